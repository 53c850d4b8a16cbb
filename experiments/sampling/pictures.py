"""Pictures of a trained run, drawn in batches that are kept as they are done: what was interrupted
goes on where it was, and draws the same.

In the folder: samples.json, what they were drawn with; pictures_<first>.npy for each batch, float32
[batch, Y, X, C] with pixels in [-1, 1] where the model keeps to them; grid.png, of all. Of videos
[batch, F, Y, X, C], film.gif has all, and grid.png the frames of the first ones, each in a row."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from experiments.sampling.samplers import Drawn, Sampler, draw, guided, picture_keys
from experiments.training.progress import ProgressReport

RECORD, GRID, FILM = "samples.json", "grid.png", "film.gif"
MOST_ROWS = 16  # of the frames of videos
FRAME_MS = 125
MOST_PICTURES = 1_000_000
SMALLEST = 32  # pixels of a picture's shorter side in the grid
MOST_COLUMNS = 16


@dataclass(frozen=True)
class Drawing:
    """What pictures are drawn with.

    model       graphdef and weights (params, variables) of one replica
    objective   what the model has learned
    shape       (rows, columns, channels), of videos with the frames before them
    classes     picture n is of the class classes[n % len(classes)]
    source      facts of the model that a record has, by name
    """

    model: tuple[Any, Any]
    objective: Any
    shape: tuple[int, ...]
    sampler: Sampler
    classes: tuple[int, ...]
    seed: int
    batch_size: int
    source: Mapping[str, Any]

    def check(self) -> None:
        """Raises ValueError for what cannot be drawn."""
        self.sampler.check(self.objective)
        known = self.objective.classes
        if not self.classes or not all(0 <= one <= known for one in self.classes):
            raise ValueError(
                f"classes must be in 0..{known - 1}, or {known} for none; got"
                f" {', '.join(map(str, self.classes)) or 'nothing'}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..{2**32 - 1}; got {self.seed}")
        if not 1 <= self.batch_size <= MOST_PICTURES:
            raise ValueError(f"batch_size must be in 1..{MOST_PICTURES}; got {self.batch_size}")

    @property
    def record(self) -> dict[str, Any]:
        """What must be the same for pictures to lie in one folder; JSON types."""
        facts = {
            **self.source,
            **asdict(self.sampler),
            "classes": self.classes,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }
        return json.loads(json.dumps(facts))

    def batch(self, first: int) -> Drawn:
        """The pictures first .. first + batch_size - 1."""
        numbers = np.arange(first, first + self.batch_size)
        class_B = np.asarray(self.classes)[numbers % len(self.classes)].astype(np.int32)
        graphdef, weights = self.model
        keys = picture_keys(self.seed, numbers)
        return _batch(graphdef, weights, keys, class_B, self.objective, self.sampler, self.shape)


@functools.partial(jax.jit, static_argnames=("graphdef", "objective", "sampler", "shape"))
def _batch(
    graphdef: Any,
    weights: Any,
    keys: jax.Array,
    class_B: jax.Array,
    objective: Any,
    sampler: Sampler,
    shape: tuple[int, ...],
) -> Drawn:
    model: Any = nnx.merge(graphdef, *weights)
    model.eval()
    predict = guided(model, jnp.asarray(class_B), objective.classes, sampler.guidance)
    return draw(predict, objective, sampler, keys, shape)


def draw_pictures(
    drawing: Drawing, folder: Path, count: int, progress: ProgressReport
) -> np.ndarray:
    """The pictures 0 .. count - 1, [count, Y, X, C] or [count, F, Y, X, C], of which those that lie
    in `folder` are read and the others drawn and written; then the grid, and of videos the film.

    Raises ValueError for what cannot be drawn, and for a folder with pictures that were drawn with
    something else; FloatingPointError for a picture that is not finite, with the step."""
    drawing.check()
    if not 1 <= count <= MOST_PICTURES:
        raise ValueError(f"count must be in 1..{MOST_PICTURES}; got {count}")
    _begin(folder, drawing.record)
    found, size = [], drawing.batch_size
    for number, first in enumerate(range(0, count, size)):
        file = folder / f"pictures_{first:06d}.npy"
        if not file.exists():
            progress.doing(f"drawing {first + 1} to {min(first + size, count)} of {count}")
            _write(file, _finite(drawing, first))
        found.append(np.load(file))
        progress.advance(number + 1)
        progress.say(f"{min(first + size, count)}/{count} pictures")
    pictures = np.concatenate(found)[:count]
    columns = len(drawing.classes) if 1 < len(drawing.classes) <= MOST_COLUMNS else 0
    columns = columns or math.ceil(math.sqrt(count))
    if pictures.ndim == 5:
        write_film(pictures, columns, folder)
        shown, columns = pictures[:MOST_ROWS], pictures.shape[1]
        grid_image(shown.reshape(-1, *shown.shape[2:]), columns).save(folder / GRID)
    else:
        grid_image(pictures, columns).save(folder / GRID)
    return pictures


def write_film(videos: np.ndarray, columns: int, folder: Path) -> None:
    """FILM in the folder: the videos [n, F, Y, X, C] beside each other in rows of `columns`, all
    playing."""
    first, *others = (grid_image(videos[:, n], columns) for n in range(videos.shape[1]))
    timing: dict[str, Any] = {"duration": FRAME_MS, "loop": 0}
    first.save(folder / FILM, save_all=True, append_images=others, **timing)


def _begin(folder: Path, record: Mapping[str, Any]) -> None:
    """Makes the folder with its record, or compares the one that is there."""
    file = folder / RECORD
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        return
    then = json.loads(file.read_text("utf-8"))
    changed = [
        f"{name}: {then.get(name)} -> {record.get(name)}"
        for name in dict.fromkeys((*then, *record))
        if then.get(name) != record.get(name)
    ]
    if changed:
        raise ValueError(
            f"{folder} has pictures that were drawn with something else ({'; '.join(changed)});"
            " choose another --out, or remove it"
        )


def _finite(drawing: Drawing, first: int) -> np.ndarray:
    """The batch from picture `first` on. Raises FloatingPointError if one is not finite."""
    images, broken_B = (np.asarray(part) for part in drawing.batch(first))
    steps = drawing.sampler.steps
    if (broken_B < steps).any():
        place = int(np.argmin(broken_B))
        raise FloatingPointError(
            f"picture {first + place} is not finite after step {broken_B[place] + 1} of {steps}"
            f" ({int((broken_B < steps).sum())} of {len(broken_B)} pictures of its batch)"
        )
    return images


def _write(file: Path, pictures: np.ndarray) -> None:
    """The whole file or none."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.save(stream, pictures)
    partial.replace(file)


def grid_image(pictures: Sequence[Any] | np.ndarray, columns: int) -> Image.Image:
    """The pictures [n, Y, X, C], C 1 or 3, in rows of `columns`; what is small is enlarged, each
    pixel to a square. Raises ValueError for other channels."""
    pictures = np.asarray(pictures)
    count, rows, wide, channels = pictures.shape
    if channels not in (1, 3):
        raise ValueError(f"pictures must have 1 or 3 channels for a grid; got {channels}")
    pixels = np.clip(np.rint((pictures + 1) * 127.5), 0, 255).astype(np.uint8)
    factor = max(1, -(-SMALLEST // min(rows, wide)))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    lines, gap = -(-count // columns), 2
    high, across = (extent * factor + gap for extent in (rows, wide))
    sheet = np.full((lines * high + gap, columns * across + gap, channels), 255, np.uint8)
    for number, picture in enumerate(pixels):
        y, x = gap + number // columns * high, gap + number % columns * across
        sheet[y : y + rows * factor, x : x + wide * factor] = picture
    return Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)
