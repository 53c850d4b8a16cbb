"""Videos of a class, learned by taking noise away: items of an image data set that move about and
bounce off the edges, as in moving MNIST (Srivastava, Mansimov, Salakhutdinov, ICML 2015, arXiv
1502.04681)."""

from typing import Annotated

import numpy as np

from experiments.objectives.denoising import DenoisingGrid
from experiments.objectives.evaluation import Sums
from experiments.objectives.flow_matching import TIMES
from experiments.objectives.noise_prediction import NoisePrediction
from experiments.objectives.noise_schedules import SCHEDULES, Steps
from experiments.tasks.image_classification import EVALUATED, Side, SideOrDefault, images_of
from experiments.tasks.image_generation import Times, numbered, objective_of
from experiments.tasks.sources.image_sets import image_set
from experiments.tasks.sources.random_streams import uniforms
from experiments.training.task import Batch, Examples, Task
from models.parts.options import Probability, Range, Weight, check_choice

NUMBERS = 5  # of an item: which, where (2), how fast (2)


def make(
    dataset: str = "digits",
    size: Side = 16,
    frames: Annotated[int, Range(1, 4096)] = 8,
    items: Annotated[int, Range(1, 1024)] = 1,
    item_size: SideOrDefault = 0,
    speed: Weight = 2.0,
    objective: str = "noise",
    schedule: str = "linear",
    noise_steps: Steps = 1000,
    learned_variance: bool = True,
    flow_times: str = "uniform",
    class_dropout: Probability = 0.1,
    evaluated_times: Times = 10,
    data_dir: str = "~/tensorflow_datasets",
    download: bool = False,
) -> Task:
    """Videos [frames, size, size, C] without end, drawn as they are asked for; evaluations
    "validation" and "test", of items of those splits, the error on noise and at times that are the
    same for all models.

    dataset, data_dir, download
                as of image_classification
    size        rows and columns of a frame
    items       in a video, the brightest pixel being seen; its class is that of the first one
    item_size   rows and columns of an item; 0: those of the data set
    speed       pixels of a frame along each axis at most, drawn evenly from both directions
    the others  as of image_generation

    Items start at a place drawn evenly and stand at the nearest pixel. Pixels are in [-1, 1].
    Metrics: mse.

    Raises as image_classification does, and ValueError for items that are larger than a frame."""
    check_choice("objective", objective, ("noise", "flow"))
    check_choice("schedule", schedule, SCHEDULES)
    check_choice("flow_times", flow_times, TIMES)
    source = image_set(dataset, data_dir, download, of_any_size=item_size > 0)
    rows, columns = (item_size, item_size) if item_size else source.shape[:2]
    if max(rows, columns) > size:
        raise ValueError(
            f"size must be at least that of an item, {rows} x {columns}; got {size}: set item_size"
        )
    minimised = objective_of(
        source.classes,
        objective=objective,
        schedule=schedule,
        noise_steps=noise_steps,
        learned_variance=learned_variance,
        flow_times=flow_times,
        class_dropout=class_dropout,
    )

    def videos(split: str, stream: str) -> Examples:
        single = images_of(source, split, rows, columns)
        count = single.length
        assert count is not None

        def fetch(indices: np.ndarray) -> Batch:
            n = len(indices)
            draws_nIN = uniforms(stream, indices, items * NUMBERS).reshape(n, items, NUMBERS)
            chosen = single.fetch((draws_nIN[..., 0] * count).astype(int).reshape(-1))
            spare = np.array([size - rows, size - columns])
            places = bounced(
                draws_nIN[..., 1:3] * spare, speed * (2 * draws_nIN[..., 3:5] - 1), spare, frames
            )
            return {
                "image": drawn(chosen["image"].reshape(n, items, rows, columns, -1), places, size),
                "labels": chosen["labels"].reshape(n, items)[:, 0],
                "weights": np.ones(n, np.float32),
            }

        return Examples(fetch)

    channels = 1 if len(source.shape) == 2 else source.shape[2]
    doubled = isinstance(minimised, NoisePrediction) and learned_variance
    grid = DenoisingGrid(minimised, evaluated_times)
    return Task(
        sizes={
            "classes": source.classes,
            "channels": channels,
            "output_channels": 2 * channels if doubled else channels,
            "frames": frames,
            "height": size,
            "width": size,
        },
        train=lambda seed: videos("train", f"video_generation/train/{seed}"),
        evaluations={
            split: Sums(numbered(videos(split, f"video_generation/{split}")), grid)
            for split in EVALUATED
        },
        objective=minimised,
        provenance={"images": source.origin, "images_sha256": source.sha256},
    )


def bounced(start: np.ndarray, speed: np.ndarray, spare: np.ndarray, frames: int) -> np.ndarray:
    """Pixels int [n, items, frames, 2] of what starts at `start` [n, items, 2] in [0, spare], moves
    by `speed` a frame, and turns at both ends."""
    time = np.arange(frames)[:, None]
    place = start[:, :, None] + speed[:, :, None] * time
    around = np.maximum(2 * spare, 1e-9)  # there and back
    place = np.mod(place, around)
    place = np.minimum(place, around - place)
    return np.clip(np.rint(place), 0, spare).astype(int)


def drawn(items: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    """Videos float32 [n, frames, size, size, C] of items [n, items, Y, X, C] at these places, black
    elsewhere."""
    n, _, rows, columns, channels = items.shape
    videos = np.full((n, places.shape[2], size, size, channels), -1, np.float32)
    for video, its, where in zip(videos, items, places, strict=True):
        for item, path in zip(its, where, strict=True):
            for frame, (y, x) in zip(video, path, strict=True):
                part = frame[y : y + rows, x : x + columns]
                np.maximum(part, item, out=part)
    return videos
