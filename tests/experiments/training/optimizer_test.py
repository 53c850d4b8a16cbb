"""Schedules, parameter groups, clipping and the guard against steps that are not finite."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.configs.recipes.base import recipe
from experiments.training import config as configs
from experiments.training.config import OPTIMIZERS
from experiments.training.hyperparameters import Hyperparameters, hyperparameters
from experiments.training.mesh import optimizer_specs
from experiments.training.optimizer import make_optimizer, make_schedule, parameter_groups
from experiments.training.refined_schedule import refine, smooth

OPTIONS = {
    "name": "adamw",
    "lr": 0.1,
    "schedule": "constant",
    "warmup_steps": 0,
    "end_lr": 0.0,
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "ssm_lr": 0.0,
}
GROUPS = {"matrix": "matrix", "conv": "decay", "norm": "no_decay", "a_log": "ssm"}


def params() -> dict[str, jax.Array]:
    shapes = {"matrix": (5, 2, 3), "conv": (2, 2), "norm": (3,), "a_log": (4,)}
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def numbers_of(options: Any, steps: int = 10) -> Hyperparameters:
    return hyperparameters(options, make_schedule(options, steps), steps)


def first_update(gradient: float, **options: Any) -> Any:
    """params after one step minus params, all gradients being `gradient`."""
    options = OPTIONS | options
    tx = make_optimizer(options, numbers_of(options), GROUPS)
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, gradient), params())
    return tx.update(grads, tx.init(params()), params())[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.775, 0.55, 0.325, 0.1]),
        ("wsd", [0, 0.5, 1, 1, 1, 1, 0.1]),
        ("halving:2", [0, 0.5, 1, 1, 1, 1, 0.5]),
        ("halving:1", [0, 0.5, 1, 1, 0.5, 0.25, 0.125]),
        (
            "cosine",
            [0, 0.5, 1, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5), 0.1],
        ),
    ],
)
def test_schedules_warm_up_and_go_down(name, expected):
    schedule: Any = make_schedule(
        OPTIONS | {"schedule": name, "lr": 1.0, "end_lr": 0.1, "warmup_steps": 2}, 6
    )
    np.testing.assert_allclose([float(schedule(step)) for step in range(7)], expected, atol=1e-6)


def test_without_warmup_the_first_step_has_the_full_rate():
    schedule: Any = make_schedule(OPTIONS | {"schedule": "linear"}, 6)
    assert float(schedule(0)) == pytest.approx(0.1)


def test_wsd_decays_over_the_last_fifth_of_the_run():
    options = OPTIONS | {"schedule": "wsd", "lr": 1.0, "warmup_steps": 10}
    schedule: Any = make_schedule(options, 100)
    rates = [float(schedule(step)) for step in (5, 10, 80, 90, 99, 100)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 0.5, 0.05, 0], atol=1e-6)


def test_vectors_and_marked_parameters_do_not_decay():
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.matrix = nnx.Param(jnp.ones((2, 3)), out_sharding=("embed", "mlp"))
            self.stacked_vector = nnx.Param(jnp.ones((5, 3)), out_sharding=("layers", "embed"))
            self.stacked_matrix = nnx.Param(
                jnp.ones((5, 2, 3)), out_sharding=("layers", "embed", "mlp")
            )
            self.vector = nnx.Param(jnp.ones((3,)))
            self.kernel = nnx.Param(jnp.ones((2, 3)), out_sharding=(None, "heads"))
            self.embedding = nnx.Param(jnp.ones((2, 3)), out_sharding=("vocabulary", "embed"))
            self.gate = nnx.Param(jnp.ones((2, 3)), group="no_decay")
            self.a_log = nnx.Param(jnp.ones((2, 3)), group="ssm")

    with nnx.use_eager_sharding(False):
        groups = parameter_groups(nnx.state(Model(), nnx.Param))
    assert groups == {
        "matrix": "matrix",
        "stacked_vector": "no_decay",
        "stacked_matrix": "matrix",
        "vector": "no_decay",
        "kernel": "decay",
        "embedding": "decay",
        "gate": "no_decay",
        "a_log": "ssm",
    }


def test_an_unknown_group_is_refused_by_the_parameters_name():
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.gate = nnx.Param(jnp.ones((2, 3)), group="fast")

    with pytest.raises(ValueError, match=r"parameter gate: group must be one of .* got 'fast'"):
        parameter_groups(nnx.state(Model(), nnx.Param))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_the_decay_group_decays(name):
    update = first_update(0.0, name=name, weight_decay=0.5)
    assert float(jnp.max(update["matrix"])) < -1e-3
    assert float(jnp.max(update["conv"])) < -1e-3
    assert not np.any(update["norm"]) and not np.any(update["a_log"])


def test_ssm_parameters_have_a_rate_of_their_own():
    update = first_update(1.0, ssm_lr=0.02)
    np.testing.assert_allclose(update["norm"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(update["a_log"], -0.02, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    # Beyond the clip, adam's first moment is that of the clipped gradient: clip_norm / sqrt(number
    # of parameters).
    options = OPTIONS | {"clip_norm": 1.0}
    tx = make_optimizer(options, numbers_of(options), GROUPS)
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0), params())
    _, state = tx.update(grads, tx.init(params()), params())
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(moment["norm"], 0.1 / np.sqrt(41), rtol=1e-5)


def test_non_finite_gradients_are_never_accepted_however_many():
    tx = make_optimizer(OPTIONS, numbers_of(OPTIONS), GROUPS)
    state: Any = tx.init(params())
    start = state
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan), params())
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(grads, state, params())
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert int(state.notfinite_count) == 3
    same = jax.tree.map(np.array_equal, state.inner_state, start.inner_state)
    assert all(jax.tree.leaves(same))


def test_muon_orthogonalises_the_matrix_of_every_layer_by_itself():
    options = OPTIONS | {"name": "muon"}
    tx = make_optimizer(options, numbers_of(options), GROUPS)
    # Layers of very different scale: as one matrix, the first would leave nothing to the others.
    scales = jnp.logspace(0, -4, 5)[:, None, None]
    matrix = scales * jax.random.normal(jax.random.key(0), (5, 2, 3))
    grads = params() | {"matrix": matrix}
    update: Any = tx.update(grads, tx.init(params()), params())[0]
    for layer in np.asarray(update["matrix"]):
        singular = np.linalg.svd(layer, compute_uv=False)
        # lr 0.2 sqrt(max(2, 3)) times singular values that Newton-Schulz brings to 1, give or take
        # a third.
        np.testing.assert_allclose(singular, 0.1 * 0.2 * 3**0.5, rtol=0.35)
    adamw = first_update(1.0)
    for name in ("conv", "norm", "a_log"):
        np.testing.assert_allclose(update[name], adamw[name], rtol=1e-6)


def test_kar3_adds_the_signs_of_gradient_and_moments_before_the_step():
    options: Any = OPTIONS | {"name": "kar3"}
    tx = make_optimizer(options, numbers_of(options), GROUPS)
    state: Any = tx.init(params())
    fast, slow = 0.0, 0.0
    for grad in (0.3, -0.1, -2.0, -1.0):
        grads = jax.tree.map(lambda leaf, grad=grad: jnp.full(leaf.shape, grad), params())
        updates: Any
        updates, state = tx.update(grads, state, params())
        # In the first step no entry moves by more or less than the rate.
        expected = -options["lr"] * (np.sign(grad) + np.sign(fast) + np.sign(slow))
        np.testing.assert_allclose(updates["conv"], expected, rtol=1e-6)
        fast = options["b1"] * fast + (1 - options["b1"]) * grad
        slow = options["b2"] * slow + (1 - options["b2"]) * grad


def test_muons_moments_lie_like_their_parameters():
    options = OPTIONS | {"name": "muon"}
    tx = make_optimizer(options, numbers_of(options), GROUPS)
    specs = {name: jax.P(name) for name in GROUPS}
    laid = optimizer_specs(tx, jax.eval_shape(tx.init, params()), specs)
    found = jax.tree.leaves(laid, is_leaf=lambda leaf: isinstance(leaf, jax.P))
    assert found.count(jax.P("matrix")) == 1
    assert [found.count(specs[name]) for name in ("conv", "norm", "a_log")] == [2, 2, 2]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_in_bfloat16_follow_those_in_float32(name):
    options = OPTIONS | {"name": name, "lr": 1e-4, "b2": 0.999, "weight_decay": 0.01}
    numbers = numbers_of(options, 1000)
    exact = make_optimizer(options, numbers, GROUPS)
    rounded = make_optimizer(options, numbers, GROUPS, "bfloat16")
    coarse = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        pairs = []
        for tx, values, state in zip((exact, rounded), *carry, strict=True):
            # The same gradients for both, in bfloat16, from large ones to small ones.
            grads = jax.tree.map(
                lambda leaf: 0.01 * jax.random.normal(key, leaf.shape, jnp.bfloat16) + 0.003, values
            )
            grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
            updates, state = tx.update(grads, state, values)
            pairs.append((optax.apply_updates(values, updates), state))
        return tuple(zip(*pairs, strict=True)), None

    start = (params(), coarse), (exact.init(params()), rounded.init(coarse))
    keys = jax.random.split(jax.random.key(0), 300)
    ((wide, narrow), _), _ = jax.jit(lambda: jax.lax.scan(step, start, keys))()
    for leaf, reference in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert leaf.dtype == jnp.bfloat16 and np.all(np.asarray(reference) != 1.0)
        # Half a unit in the last place of numbers below 1, and what float32 loses on the way.
        np.testing.assert_allclose(leaf.astype(jnp.float32), reference, rtol=0, atol=2**-9 + 1e-5)


def test_the_second_moment_of_parameters_in_bfloat16_falls_again():
    options = OPTIONS | {"b2": 0.999}
    tx = make_optimizer(options, numbers_of(options), GROUPS, "bfloat16")
    coarse = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())

    def run(state: Any, gradient: float, steps: int) -> Any:
        grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, gradient), coarse)

        def update(_: Any, state: Any) -> Any:
            return tx.update(grads, state, coarse)[1]

        return jax.jit(lambda state: jax.lax.fori_loop(0, steps, update, state))(state)

    state = run(run(tx.init(coarse), 1.0, 200), 0.01, 5000)
    for moment in jax.tree.leaves(optax.tree.get(state, "nu")):
        assert moment.dtype == jnp.float32
        np.testing.assert_allclose(
            moment, 0.181 * 0.999**5000 + 1e-4 * (1 - 0.999**5000), rtol=0.01
        )


def last_iterate_bound(steps_T: np.ndarray, norms_T: np.ndarray) -> float:
    """The bound on f(x_T) - f* for any positive step sizes (arXiv 2310.07831), at D = 1 and the
    best scale of them."""
    squares = (steps_T * norms_T) ** 2
    tail, tail_squares = (np.cumsum(x[::-1])[::-1] for x in (steps_T, squares))
    noise = tail_squares[0] / tail[0] + np.sum(
        steps_T[:-1] / tail[1:] * tail_squares[:-1] / tail[:-1]
    )
    return float(np.sqrt(noise / tail[0]))


@pytest.mark.parametrize("exponent", [1, 2])
def test_constant_gradient_norms_refine_to_linear_decay(exponent):
    linear = 1 - np.arange(1, 101) / 100
    for norm in (1.0, 30.0):
        refined = refine(np.full(100, norm), exponent)
        np.testing.assert_allclose(refined, linear / linear[0], atol=1e-12)


def test_falling_norms_refine_to_a_warmup_with_a_lower_bound():
    norms = np.linspace(3, 1, 100)
    refined, linear = refine(norms, exponent=2), 1 - np.arange(100) / 100
    assert np.argmax(refined) == 74 and refined[-1] == 0 and np.max(refined) == 1
    assert np.all(np.diff(refined[:75]) > 0) and np.all(np.diff(refined[74:]) < 0)
    np.testing.assert_allclose(refine(7 * norms, exponent=2), refined, rtol=1e-12)
    assert last_iterate_bound(linear, norms) == pytest.approx(0.420, abs=5e-4)
    assert last_iterate_bound(refined[:-1], norms[:-1]) == pytest.approx(0.358, abs=5e-4)


def test_spikes_of_the_gradient_norm_are_smoothed_away_and_steps_are_not():
    norms = np.where(np.arange(200) < 90, 3.0, 1.0)
    spiky = norms.copy()
    spiky[[7, 8, 150, 199]] = 100.0
    np.testing.assert_array_equal(smooth(spiky), norms)


def write_run(workdir: Path, norms: Any, steps: int = 200) -> None:
    """What refinement reads of a finished run that logged `norms` at equal distances."""
    config: Any = recipe("mqar,smoke")
    config.steps = steps
    workdir.mkdir()
    record = {"config": configs.to_json(config), "continued": []}
    (workdir / "run.json").write_text(json.dumps(record))
    window = steps // 20
    rows = [
        {"step": window * place, "train/gradient_norm": norm}
        for place, norm in enumerate(norms, start=1)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(lines)


def test_a_schedule_is_refined_from_the_log_of_a_run(tmp_path):
    # Two seeds, and a window in which one of them rejected every step.
    write_run(tmp_path / "run", [[1.0, 3.0]] * 10 + [[None, 2.0]] + [[2.0, 2.0]] * 9)
    options = OPTIONS | {"schedule": f"refined:{tmp_path / 'run'}", "lr": 1.0}
    linear: Any = make_schedule(OPTIONS | {"schedule": "linear", "lr": 1.0}, 1000)
    for end_lr, steps in ((0.0, 1000), (0.25, 1000), (0.0, 50)):
        schedule: Any = make_schedule(options | {"end_lr": end_lr}, steps)
        for fraction in (0.0, 0.3, 0.9, 1.0):
            expected = end_lr + (1 - end_lr) * float(linear(1000 * fraction))
            rate = float(schedule(steps * fraction))
            assert rate == pytest.approx(expected, abs=2 / steps)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ([], r"finished run; it ends at step 0 of 200"),
        ([[1.0]] * 19, r"finished run; it ends at step 190 of 200"),
        ([[None]] * 11 + [[1.0]] * 9, r"at least 10 windows .* got 9"),
    ],
)
def test_a_log_that_is_too_short_to_refine_from_is_refused(tmp_path, norms, message):
    write_run(tmp_path / "run", norms)
    with pytest.raises(ValueError, match=message):
        make_schedule(OPTIONS | {"schedule": f"refined:{tmp_path / 'run'}"}, 100)
