"""Images to be made: sizes, examples, and a run from config to metrics."""

from typing import Any

import numpy as np
import pytest

from experiments import train
from experiments.configs.dit import get_config
from experiments.configs.gla import get_config as get_gla
from experiments.objectives.flow_matching import FlowMatching
from experiments.tasks.image_classification import make as make_classification
from experiments.tasks.image_generation import make


def test_images_are_those_of_the_classification_and_have_numbers():
    task: Any = make()
    other: Any = make_classification()
    assert task.sizes == {**other.sizes, "output_channels": 2}
    assert make(learned_variance=False).sizes["output_channels"] == 1
    flow = make(objective="flow", flow_times="logit_normal")
    assert flow.sizes["output_channels"] == 1
    assert flow.objective == FlowMatching(10, "logit_normal", 0.1)
    indices = np.array([5, 2])
    for name in ("validation", "test"):
        got = task.evaluation(name).examples.fetch(indices)
        want = other.evaluation(name).examples.fetch(indices)
        np.testing.assert_array_equal(got["number"], indices)
        np.testing.assert_array_equal(got["image"], want["image"])
    seen = task.train(0).seen(indices, np.zeros(2, int))
    np.testing.assert_array_equal(seen["labels"], other.train(0).fetch(indices)["labels"])
    assert seen["image"].shape == (2, 8, 8, 1) and np.abs(seen["image"]).max() <= 1


@pytest.mark.slow
def test_a_smoke_recipe_trains_and_is_evaluated(tmp_path):
    config: Any = get_config("diffusion_digits,smoke")
    config.steps, config.optimizer.warmup_steps = 3, 0
    config.model.update({"width": 16, "depth": 1})
    config.eval.update({"every_steps": 3, "examples": 16})
    summary = train.run(config, tmp_path, quiet=True)
    assert summary["unit"] == "images" and summary["state_bytes"] is None
    # A fresh network predicts 0: what is to be predicted has the variance 1.
    assert 0.5 < summary["evaluations"]["test"]["mse"][0] < 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task.objective": "score"}, "objective must be one of 'noise', 'flow'; got 'score'"),
        ({"task.schedule": "sine"}, "schedule must be one of 'linear', 'cosine'; got 'sine'"),
        ({"task.flow_times": "sine"}, "flow_times must be one of 'uniform', "),
        ({"task.noise_steps": 3}, r"config.task.noise_steps must be an integer in \[25, 10000\]"),
        ({"task.size": 9}, "height and width of images must be multiples of patch=2; got 9 x 9"),
        ({"model.norm": "l2"}, "norm must be one of 'rms', .*'layer_plain'"),
        ({"model.name": "image_classifier"}, "has no option|makes no images"),
        ({"task.name": "mqar"}, "needs a task with the size 'classes'|has no option"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_begins(options, message, tmp_path):
    config: Any = get_config("diffusion_digits,smoke")
    config.update_from_flattened_dict(options)
    with pytest.raises(ValueError, match=message):
        train.run(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_another_mixer_takes_the_recipe_and_another_recipe_is_refused():
    config: Any = get_gla("diffusion_digits,smoke")
    assert config.model.name == "diffusion_transformer" and config.model.pattern == ("gla",)
    for task in ("digits", "mqar,smoke"):
        with pytest.raises(ValueError, match="dit makes images: use a task of image_generation"):
            get_config(task)
    with pytest.raises(ValueError, match="dit has the size 'base' for diffusion_imagenet"):
        get_config("diffusion_digits,base")
    config = get_config("diffusion_imagenet,xlarge")
    assert config.model.width == 1152
