"""A run of DiT is given another attention, and learns from what it was."""

import json
from typing import Any

import numpy as np
import pytest

from experiments import train
from experiments.configs import lit
from experiments.configs.dit import get_config
from experiments.training import program
from experiments.training.config import to_json
from experiments.training.mesh import make_mesh
from experiments.training.run_loading import load_run, matching_params
from experiments.training.state import by_path


def small(config: Any, steps: int) -> Any:
    config.steps, config.optimizer.warmup_steps = steps, 0
    config.eval.update({"every_steps": steps, "examples": 4})
    config.checkpoint.every_steps = steps
    return config


def config_of_teacher() -> Any:
    config: Any = small(get_config("diffusion_digits,smoke"), 1)
    config.model.update({"width": 8, "depth": 1})
    return config


@pytest.mark.full
def test_all_but_attention_is_inherited_and_the_teacher_stays_as_it_is(tmp_path, capsys):
    teacher = tmp_path / "teacher"
    train.run(config_of_teacher(), teacher, quiet=True)
    source = by_path(load_run(teacher, reads_data=False).params)
    config: Any = small(lit.get_config(str(teacher)), 2)
    config.seeds = (1,)
    assert config.task.distil_output == 0.5 and config.task.distil_variance == 0.05
    made = program.make_program(config, make_mesh(config.mesh))
    began = by_path(made.start(matching_params(teacher, made)).params)
    fresh = {path for path in began if path.startswith("stack/") and "/mixer/" in path}
    assert any("weight_YXK" in path for path in fresh)
    for path in began.keys() - fresh:
        np.testing.assert_array_equal(began[path], source[path.removeprefix("teacher/")], path)
    query = "stack/period/0/mixer/query/kernel"
    assert np.abs(began[query] - source[query]).max() > 1e-3
    error = capsys.readouterr().err
    assert "not in the checkpoint, starting from the seed: stack/period/0/mixer/bias_K" in error

    summary = train.run(config, tmp_path / "lit", quiet=True)
    after = by_path(load_run(tmp_path / "lit", reads_data=False).params)
    for path, value in source.items():
        np.testing.assert_array_equal(after[f"teacher/{path}"], value, path)
    assert np.abs(after[query] - began[query]).max() > 1e-6
    assert summary["train"]["loss"][0] > 0

    # A run that had a teacher can be one: its own model is what teaches.
    made.config.init_except = ()
    taken = matching_params(tmp_path / "lit", made)
    np.testing.assert_array_equal(taken[query], after[query])
    made.config.init_except = ("attention/.*",)
    with pytest.raises(ValueError, match=r"'attention/.*' matches none of condition/first/bias"):
        matching_params(teacher, made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_except": ("(",)}, r"config.init_except must be a tuple of regular expressions"),
        ({"init_from": "", "init_except": ("a",)}, r"config.init_except must be \(\) without"),
        ({"model.teacher.width": 6}, "width must be a multiple of 4"),
        ({"model.teacher.mixers": {"vit": {"head": 2}}}, "mixer vit has no option 'head'"),
        ({"task.learned_variance": False}, "distil_variance must be 0 without objective='noise'"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_it_begins(tmp_path, options, message):
    record = {"config": to_json(config_of_teacher())}
    (tmp_path / "run.json").write_text(json.dumps(record))
    config: Any = small(lit.get_config(str(tmp_path)), 1)
    with config.unlocked():
        config.update_from_flattened_dict(options)
    with pytest.raises(ValueError, match=message):
        train.run(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_task_of_distillation_needs_a_teacher(tmp_path):
    config: Any = get_config("diffusion_digits,smoke")
    config.task.distil_output = 1.0
    with pytest.raises(ValueError, match=r"config.model.teacher must be the section of a model"):
        train.run(config, tmp_path / "run", quiet=True)


def test_a_run_without_softmax_attention_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(
        '{"config": {"model": {"name": "lm", "pattern": ["gla"]}, "task": {"name": "mqar"}}}'
    )
    with pytest.raises(ValueError, match=r"must be a run of diffusion_transformer .* lm with gla"):
        lit.get_config(str(tmp_path))
