"""Every recipe fits its task, and a launcher can read it anywhere."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.config import flatten, validate
from experiments.configs.recipes import RECIPES, recipe
from experiments.task import find_task
from models.lm import build

REPOSITORY = Path(__file__).parent.parent
TOKEN_SUMS = (
    "loss_sum",
    "weight_sum",
    "correct_sum",
    "sequence_correct_sum",
    "sequence_sum",
    "bytes_sum",
)
SUMS = (*TOKEN_SUMS, "target_square_sum")


@pytest.mark.parametrize("variant", ["", ",smoke"])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_names_a_task_its_options_and_a_metric_of_it(
    name: str, variant: str, tmp_path: Path
) -> None:
    config: Any = recipe(name + variant)
    validate(config)
    options = config.task.to_dict()
    if name == "text":
        (tmp_path / "lines.txt").write_text("a line of text\n" * 5000)
        options |= {"path": str(tmp_path / "lines.txt"), "data_dir": str(tmp_path)}
    task = find_task(options.pop("name"), options)
    evaluation, metric = config.eval.best_metric.split("/")
    assert evaluation in task.evaluations
    sums = (
        "loss_sum",
        "weight_sum",
        "correct_sum",
        "sequence_correct_sum",
        "sequence_sum",
        "bytes_sum",
        "target_square_sum",
    )
    assert metric in task.derive(dict.fromkeys(sums, 1.0))
    make = importlib.import_module(f"experiments.tasks.{config.task.name}").make
    assert set(options) == set(inspect.signature(make).parameters), (
        "an option that is not there cannot be overridden"
    )


# Of ListOps: what the papers and their authors' code publish.
LISTOPS: dict[str, dict[str, Any]] = {
    "s4": {
        "steps": 120_000,
        "batch_size": 32,
        "model.width": 256,
        "model.depth": 6,
        "model.mixers.s4.state_size": 4,
        "model.mixers.s4.kernel_length": 2000,
        "optimizer.lr": 0.01,
        "optimizer.ssm_lr": 0.001,
        "optimizer.weight_decay": 0.05,
        "optimizer.warmup_steps": 12_000,
    },
    "s4d": {
        "steps": 120_000,
        "batch_size": 32,
        "model.width": 256,
        "model.depth": 6,
        "model.mixers.s4d.state_size": 4,
        "optimizer.lr": 0.01,
        "optimizer.ssm_lr": 0.001,
        "optimizer.weight_decay": 0.05,
        "optimizer.warmup_steps": 12_000,
    },
    "s5": {
        "steps": 76_800,  # 40 epochs
        "batch_size": 50,
        "model.width": 128,
        "model.depth": 8,
        "model.mixers.s5.state_size": 16,
        "model.mixers.s5.blocks": 8,
        "model.mixers.s5.gate": "half_glu2",
        "optimizer.lr": 0.003,
        "optimizer.ssm_lr": 0.001,
        "optimizer.weight_decay": 0.04,
        "optimizer.warmup_steps": 1_920,
    },
    "seqboat": {
        "steps": 90_000,
        "batch_size": 64,
        "model.width": 80,
        "model.depth": 6,
        "model.mixers.seqboat.expand_v": 2.0,
        "model.mixers.seqboat.key_size": 64,
        "model.mixers.seqboat.state_size": 16,
        "model.mixers.seqboat.window": 128,
        "model.mixers.seqboat.init_temperature": 0.3,
        "model.mixers.seqboat.attention": "softmax",
        "optimizer.lr": 0.004,
        "optimizer.b2": 0.98,
        "optimizer.schedule": "linear",
        "optimizer.weight_decay": 0.001,
        "optimizer.warmup_steps": 27_000,
        "optimizer.clip_norm": 1.0,
    },
    "transnormer": {
        "batch_size": 128,
        "model.width": 128,
        "model.depth": 4,
        "model.mlp_ratio": 4.0,
        "model.mixers.transnormer.heads": 8,
        "optimizer.lr": 1e-4,
    },
}


@pytest.mark.parametrize("name", LISTOPS)
def test_listops_has_the_published_settings_and_its_smoke_size_has_not(
    name: str,
) -> None:
    get_config = importlib.import_module(f"experiments.configs.{name}").get_config
    config, smoke = get_config("listops"), get_config("listops,smoke")
    validate(config)
    values = dict(flatten(config))
    assert {key: values[key] for key in LISTOPS[name]} == LISTOPS[name]
    assert (smoke.steps, smoke.model.width, smoke.model.depth) == (300, 32, 2)
    model = config.model.to_dict()
    assert model.pop("name") == "lm"
    jax.eval_shape(  # nothing is computed
        lambda: nnx.split(
            build(
                model,
                vocabulary_size=26,
                param_dtype=jnp.float32,
                compute_dtype=jnp.float32,
                rngs=nnx.Rngs(0),
            )
        )[1]
    )


def test_a_recipe_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"task of parity, .*; got 'parity,tiny'"):
        recipe("parity,tiny")


def test_recipes_need_no_jax() -> None:
    code = (
        "import sys, experiments.configs.recipes as r; list(map(r.recipe, r.RECIPES));"
        " assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
