"""Softmax attention becomes linear by the commands of the configs: weights go on, and only what is
new is trained."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import train
from experiments.configs import liger, lolcats, mm_mamba, of_run, transformer
from experiments.conversion.reading import read_checkpoint
from experiments.conversion.writing import write_checkpoint
from experiments.training.run_loading import load_run
from experiments.training.state import by_path
from tests.experiments.convert_test import DATA, numbers


def brief(config: Any, lr: float = 1e-2) -> Any:
    config.steps, config.batch_size, config.log_every_steps = 2, 4, 1
    config.task.update({"train": ((16, 2, 8),), "test": ((16, 2),), "vocabulary_size": 16})
    config.model.update({"width": 16, "depth": 2})
    config.eval.update({"every_steps": 2, "examples": 4, "best_metric": ""})
    config.checkpoint.every_steps = 2
    config.optimizer.update({"lr": lr, "warmup_steps": 0})
    return config


def run(config: Any, workdir: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Parameters by path at the end, and the summary."""
    summary = train.run(config, workdir, quiet=True)
    params = load_run(workdir, reads_data=False).params
    return {path: np.asarray(leaf) for path, leaf in by_path(params).items()}, summary


@pytest.mark.full
def test_a_run_becomes_linear_by_either_paper(tmp_path: Path) -> None:
    config: Any = brief(transformer.get_config("mqar,smoke"))
    config.model.mixers.transformer.update({"context_length": 16, "heads": 2})
    teacher, _ = run(config, tmp_path / "teacher")

    config = brief(liger.get_config(str(tmp_path / "teacher")))
    config.model.mixers.liger.window = 4
    params, _ = run(config, tmp_path / "liger")
    changed = {path for path in params if not np.array_equal(params[path], teacher.get(path))}
    assert changed == params.keys() - teacher.keys()
    assert all(path.endswith(("/lora_a", "/lora_b")) for path in changed) and len(changed) == 6

    config = brief(lolcats.get_config(str(tmp_path / "teacher")))
    config.model.mixers.lolcats.update({"window": 4, "feature_size": 4})
    first, summary = run(config, tmp_path / "transfer")
    new = first.keys() - teacher.keys()
    assert {path.rsplit("/", 1)[1] for path in new} == {"query_map_HKF", "key_map_HKF", "mix_H"}
    assert all(np.array_equal(first[path], teacher[path]) for path in teacher)
    errors = [summary["train"][f"transfer_error{end}"] for end in ("_0", "_1", "")]
    assert np.mean(errors[:2]) == pytest.approx(np.mean(errors[2]), rel=1e-5)

    config = brief(lolcats.get_config(str(tmp_path / "transfer")))
    assert config.model.mixers.lolcats.stage == "student"
    second, _ = run(config, tmp_path / "lolcats")
    assert all(np.array_equal(second[path], first[path]) for path in first)
    assert len(second) == len(first) + 8


@pytest.mark.full
def test_a_run_becomes_mamba_2_in_three_stages(tmp_path: Path) -> None:
    config: Any = brief(transformer.get_config("mqar,smoke"))
    config.model.mixers.transformer.update({"context_length": 16, "heads": 2, "qk_norm": True})
    teacher, _ = run(config, tmp_path / "teacher")
    found = teacher
    for stage, source in (("new", "teacher"), ("all", "new"), ("student", "all")):
        config = brief(mm_mamba.get_config(str(tmp_path / source)))
        assert config.model.mixers.mm_mamba.stage == stage
        before = found
        found, summary = run(config, tmp_path / stage)
        inherited = {path for path in found if re.search("/mixer/(query|key|value)/kernel$", path)}
        own = {path for path in inherited if not path.startswith("teacher/")}
        own = {path for path in own if "/teacher/" not in path}
        moved = {path for path in before if not np.array_equal(found.get(path), before[path])}
        assert bool(own & moved) == (stage != "new")
        for path in teacher.keys() - own:  # what both have stays as it was
            np.testing.assert_array_equal(found[path], teacher[path], err_msg=path)
        if stage == "all":
            where = "stack/period/0/mixer/{}query/kernel"
            copy = found[where.format("teacher/")]
            np.testing.assert_array_equal(copy, teacher[where.format("")])
        assert ("transfer_error" in summary["train"]) == (stage != "student")
    for path, array in teacher.items():
        np.testing.assert_array_equal(found[f"teacher/{path}"], array, err_msg=path)
    assert summary["train"]["divergence"][0] > 0


def test_what_lora_adds_goes_out_in_the_kernels(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(DATA / "qwen2")
    checkpoint.config.model.update({"lora_rank": 2, "lora_alpha": 3.0, "lora_targets": ("query",)})
    where = "stack/period/0/mixer/query"
    layers, inputs, outputs = checkpoint.params[f"{where}/kernel"].shape
    random = np.random.default_rng(0)
    lora = [random.normal(size=(layers, *s)) for s in ((inputs, 2), (2, outputs))]
    added = dict(zip((f"{where}/lora_a", f"{where}/lora_b"), lora, strict=True))
    write_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.params | added)
    before, after = numbers(DATA / "qwen2"), numbers(tmp_path / "out")
    for name, array in before.items():
        if name.endswith("q_proj.weight"):
            layer = int(name.split(".")[2])
            expected = array + 1.5 * (lora[0][layer] @ lora[1][layer]).T
            np.testing.assert_allclose(after[name], expected, atol=1e-5)
        else:
            np.testing.assert_array_equal(after[name], array)


def test_a_run_without_softmax_attention_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        '{"config": {"model": {"pattern": ["gla"], "mixers": {"gla": {}}}}}'
    )
    assert of_run.get_config(str(tmp_path))
    with pytest.raises(ValueError, match=r"must be a run with softmax attention .*; it has gla"):
        liger.get_config(str(tmp_path))
