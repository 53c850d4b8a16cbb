"""Numbers of a run are arguments of its programs: they reach the step, and never its code."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs.linear_self_attention import get_config
from experiments.training.hyperparameters import Decay, hyperparameters, rate_table
from experiments.training.mesh import make_mesh, traced_on
from experiments.training.optimizer import make_optimizer, make_schedule
from experiments.training.program import make_program

# Of a recipe without these; whether they are 0 is part of a program.
NUMBERS = {"ema_decay": 0.9, "optimizer.ssm_lr": 1e-3, "optimizer.clip_norm": 1.0}
OTHER_NUMBERS = {
    "steps": 777,
    "seeds": (5,),
    "ema_decay": 0.7,
    "optimizer.lr": 3e-4,
    "optimizer.ssm_lr": 1e-4,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 33,
    "optimizer.b1": 0.8,
    "optimizer.b2": 0.95,
    "optimizer.eps": 1e-7,
    "optimizer.weight_decay": 0.3,
    "optimizer.clip_norm": 0.1,
}
OPTIONS = {"name": "adamw", "lr": 0.01, "b1": 0.9, "b2": 0.999, "eps": 1e-3}
OPTIONS |= {"schedule": "constant", "warmup_steps": 0, "end_lr": 0.0}
OPTIONS |= {"weight_decay": 0.1, "clip_norm": 1.0, "ssm_lr": 0.02}
GROUPS = {"matrix": "matrix", "a_log": "ssm"}


def program_text(**overrides: Any) -> str:
    config: Any = get_config("icl_regression,smoke")
    config.update_from_flattened_dict(NUMBERS | overrides)
    mesh = make_mesh(config.mesh)
    made: Any = make_program(config, mesh)
    with traced_on(mesh, config):
        step = made.step.lower(made.state, made.batch, np.int32(1), made.hyperparameters)
        return step.as_text() + made.initial.lower(made.hyperparameters.seeds).as_text()


def test_runs_that_differ_in_numbers_share_their_programs():
    assert program_text() == program_text(**OTHER_NUMBERS)
    assert program_text() != program_text(**{"optimizer.clip_norm": 0.0})


def after_three_steps(tx: optax.GradientTransformation) -> Any:
    params = {"matrix": jnp.linspace(-1, 1, 6).reshape(2, 3), "a_log": jnp.ones(4)}
    state = tx.init(params)
    for number in range(1, 4):
        grads = jax.tree.map(lambda leaf, n=number: jnp.cos(7 * n * leaf), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def trained(**options: Any) -> Any:
    options = OPTIONS | options
    numbers = hyperparameters(options, make_schedule(options, 10), 10)
    return jax.jit(lambda numbers: after_three_steps(make_optimizer(options, numbers, GROUPS)))(
        numbers
    )


def test_arguments_give_to_the_bit_what_constants_give():
    def with_constants() -> Any:
        mask = {"matrix": True, "a_log": False}
        core = optax.adamw(0.01, b1=0.9, b2=0.999, eps=1e-3, weight_decay=0.1, mask=mask)
        ssm = optax.masked(optax.scale(2.0), {"matrix": False, "a_log": True})
        return after_three_steps(optax.chain(optax.clip_by_global_norm(1.0), core, ssm))

    jax.tree.map(np.testing.assert_array_equal, trained(), jax.jit(with_constants)())


@pytest.mark.parametrize(
    ("name", "value", "parameter"),
    [
        ("lr", 0.02, "matrix"),
        ("b1", 0.5, "matrix"),
        ("b2", 0.5, "matrix"),
        ("eps", 1e-2, "matrix"),
        ("weight_decay", 0.5, "matrix"),
        ("clip_norm", 1e-2, "matrix"),
        ("ssm_lr", 0.03, "a_log"),
    ],
)
def test_every_number_changes_what_is_trained(name, value, parameter):
    changed = trained(**{name: value})[parameter] - trained()[parameter]
    assert float(jnp.max(jnp.abs(changed))) > 1e-5


def test_a_table_of_rates_is_its_schedule_to_the_bit():
    options = OPTIONS | {"schedule": "cosine", "warmup_steps": 7, "end_lr": 1e-3}
    schedule: Any = make_schedule(options, 1500)
    table = rate_table(schedule, 1500)
    assert table.shape == (2048,) and table.dtype == np.float32
    # With few optimisations the cosine of a vector is another than that of a number.
    ulp = 1 if jax.config.read("jax_disable_most_optimizations") else 0
    for count in (0, 1, 6, 7, 8, 400, 1499):
        rate = np.float32(jax.jit(schedule)(np.int32(count)))
        np.testing.assert_array_max_ulp(table[count], rate, maxulp=ulp)


def test_a_decay_knows_its_complement_exactly_and_no_other_difference():
    assert 1 - Decay.of(0.999) == np.float32(0.001) != 1 - np.float32(0.999)
    with pytest.raises(ValueError, match=r"only 1 - decay is known; got 2 - decay"):
        2 - Decay.of(0.999)  # pyright: ignore[reportUnusedExpression] the operator is what raises
