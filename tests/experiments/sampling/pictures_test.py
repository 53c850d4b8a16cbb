"""Pictures of a run: in batches that are kept, on a grid, from the command."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image, ImageSequence

from experiments import sample, train
from experiments.configs import lingen
from experiments.configs.dit import get_config
from experiments.sampling.pictures import draw_pictures, grid_image, write_film
from experiments.training.progress import ProgressReport
from experiments.training.run_loading import load_run

FLAGS: dict[str, Any] = {
    "sampler": "heun",
    "steps": 3,
    "guidance": 1.5,
    "eta": 0.0,
    "clip": False,
    "classes": "1,none,4",
    "seed": 2,
    "batch_size": 4,
    "averaged": False,
    "replica": 0,
}


def test_a_film_plays_all_videos_beside_each_other(tmp_path):
    videos = np.linspace(-1, 1, 3)[None, :, None, None, None] * np.ones((2, 3, 40, 40, 1))
    videos[1] *= -1
    write_film(videos, 2, tmp_path)
    with Image.open(tmp_path / "film.gif") as film:
        frames = [np.asarray(each.convert("L")) for each in ImageSequence.Iterator(film)]
    assert [frame.shape for frame in frames] == [(44, 86)] * 3
    assert [(int(f[20, 20]), int(f[20, 60])) for f in frames] == [(0, 255), (128, 128), (255, 0)]


@pytest.mark.full
def test_videos_are_drawn_and_the_first_ones_shown_frame_by_frame(tmp_path):
    config: Any = lingen.get_config("diffusion_moving_digits,smoke")
    config.steps, config.optimizer.warmup_steps, config.batch_size = 1, 0, 2
    config.model.update({"width": 16, "depth": 1})
    config.eval.update({"every_steps": 1, "examples": 2})
    train.run(config, tmp_path / "run", quiet=True)
    run = load_run(tmp_path / "run", averaged=True, reads_data=False)
    videos = drawn(run, tmp_path / "drawn", 3, sampler="ddpm")
    assert videos.shape == (3, 8, 16, 16, 1) and np.isfinite(videos).all()
    with Image.open(tmp_path / "drawn" / "grid.png") as grid:
        assert grid.size == (8 * 34 + 2, 3 * 34 + 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config: Any = get_config("diffusion_digits,smoke")
    config.task.objective = "flow"
    config.steps, config.optimizer.warmup_steps = 1, 0
    config.model.update({"width": 8, "depth": 1})
    config.model.mixers.vit.heads = 1
    config.eval.update({"every_steps": 1, "examples": 4})
    folder = tmp_path_factory.mktemp("flow")
    train.run(config, folder, quiet=True)
    return load_run(folder, averaged=True, reads_data=False)


def drawing(run, **options):
    return sample.drawing_of(run, SimpleNamespace(**{**FLAGS, **options}))


def drawn(run, folder: Path, count: int, **options) -> np.ndarray:
    return draw_pictures(drawing(run, **options), folder, count, ProgressReport(1, quiet=True))


@pytest.mark.slow
def test_what_was_interrupted_goes_on_and_draws_the_same(run, tmp_path, monkeypatch):
    whole = drawn(run, tmp_path / "whole", 10)
    assert whole.shape == (10, 8, 8, 1) and np.isfinite(whole).all()
    drawn(run, tmp_path / "part", 3)
    first = (tmp_path / "part" / "pictures_000000.npy").read_bytes()
    (tmp_path / "part" / "pictures_000004.partial").write_bytes(b"half")
    np.testing.assert_array_equal(drawn(run, tmp_path / "part", 10), whole)
    assert (tmp_path / "part" / "pictures_000000.npy").read_bytes() == first
    record = json.loads((tmp_path / "part" / "samples.json").read_text())
    assert (record["classes"], record["step"]) == ([1, 10, 4], 1)
    assert (tmp_path / "part" / "grid.png").stat().st_size > 500
    # Nothing is drawn anew where all is there.
    monkeypatch.setattr("experiments.sampling.pictures._batch", None)
    np.testing.assert_array_equal(drawn(run, tmp_path / "part", 7), whole[:7])
    with pytest.raises(ValueError, match=r"something else \(guidance: 1.5 -> 2.0; seed: 2 -> 3\)"):
        drawn(run, tmp_path / "part", 10, guidance=2.0, seed=3)


@pytest.mark.slow
def test_a_picture_that_is_not_finite_is_told_with_its_step_and_not_kept(run, tmp_path):
    params, variables = run.replica(0)
    params = jax.tree.map(lambda leaf: leaf * np.nan, params)
    broken: Any = SimpleNamespace(
        blueprint=run.blueprint,
        task=run.task,
        config=run.config,
        seeds=run.seeds,
        step=run.step,
        replica=lambda place: (params, variables),
    )
    message = r"picture 0 is not finite after step 1 of 3 \(4 of 4 pictures of its batch\)"
    with pytest.raises(FloatingPointError, match=message):
        drawn(broken, tmp_path, 6)
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "11"}, r"classes must be in 0..9, or 10 for none; got 11"),
        ({"classes": "two"}, r"--classes must be numbers in 0..9 or none, with commas; got 'two'"),
        ({"sampler": "ddpm"}, "sampler must be one of 'euler', 'heun'; got 'ddpm'"),
        ({"seed": -1}, "seed must be in 0..4294967295; got -1"),
        ({"batch_size": 0}, "batch_size must be in 1..1000000; got 0"),
        ({"replica": 1}, "--replica must be in 0..0; got 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(
    run, tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        drawn(run, tmp_path / "out", 4, **options)
    with pytest.raises(ValueError, match=r"count must be in 1..1000000; got 0"):
        drawn(run, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


def test_a_grid_has_rows_of_pictures_whose_pixels_are_squares():
    pictures = np.stack([np.full((8, 8, 1), value) for value in (-1.0, 0.0, 1.5)])
    pictures[0, 0, 0] = 1.0
    sheet = np.asarray(grid_image(pictures, 2))
    assert sheet.shape == (2 * 34 + 2, 2 * 34 + 2)
    assert (sheet[2:6, 2:6] == 255).all() and (sheet[6:34, 2:34] == 0).all()
    assert (sheet[2:34, 36:68] == 128).all() and (sheet[36:68, 2:34] == 255).all()
    assert np.asarray(grid_image(np.zeros((1, 40, 50, 3)), 1)).shape == (44, 54, 3)
    with pytest.raises(ValueError, match="pictures must have 1 or 3 channels for a grid; got 2"):
        grid_image(np.zeros((1, 4, 4, 2)), 1)
