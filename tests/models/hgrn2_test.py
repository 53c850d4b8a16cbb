"""HGRN2 against a slow transcription of its paper, and its lower bounds in a network."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import hgrn2
from models.blocks.block import Context
from models.blocks.stack import Stack
from models.networks import lm
from models.parts.variables import Report
from tests.support.layers import (
    array,
    build_mixer,
    check_layer,
    count_parameters,
    merge,
    project,
    randomised,
    rms,
    sigmoid,
    silu,
    weight,
)


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_hgrn2_computes_its_recurrence(layer):
    mixer = build_mixer(hgrn2, heads=2)
    given, bound = {}, np.zeros((2, 8))
    if layer is not None:
        gamma_LD, bounds = random_bounds(layers=2, width=16)
        given = {"shared": tuple(log_LD[layer] for log_LD in bounds)}
        bound = paper_bounds(gamma_LD)[layer].reshape(2, 8)

    def transcription(x_TD):
        q, z, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.forget, mixer.value))
        f = bound + (1 - bound) * sigmoid(z)
        o = np.zeros_like(v)
        for h in range(2):
            S = np.zeros((8, 8))
            for t in range(len(x_TD)):
                S = np.diag(f[t, h]) @ S + np.outer(1 - f[t, h], v[t, h])
                o[t, h] = silu(q[t, h]) @ S
        return rms(merge(o), array(mixer.norm.scale)) @ weight(mixer.output)

    check_layer(mixer, transcription, **given)


def random_bounds(layers: int, width: int, scale: float = 2.0) -> tuple[Any, Any]:
    """A random Gamma, float64, and what the module computes of it."""
    module = hgrn2.LowerBounds(width, layers=layers)
    gamma_LD = np.random.default_rng(layers).standard_normal((layers, width)) * scale
    module.gamma_LD[...] = jnp.asarray(gamma_LD, jnp.float32)
    return array(module.gamma_LD), module()


def paper_bounds(gamma_LD: np.ndarray) -> np.ndarray:
    """Softmax over layers, cumulative sum, less its first row."""
    P_LD = np.exp(gamma_LD) / np.exp(gamma_LD).sum(axis=0)
    return np.cumsum(P_LD, axis=0) - P_LD[0]


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_hgrn2s_lower_bounds_are_the_papers_and_increase_from_zero(layers):
    gamma_LD, (bound_log_LD, rest_log_LD) = random_bounds(layers, width=5)
    want = paper_bounds(gamma_LD)
    np.testing.assert_allclose(np.exp(bound_log_LD), want, rtol=2e-6, atol=0)
    np.testing.assert_allclose(np.exp(rest_log_LD), 1 - want, rtol=2e-6, atol=0)
    assert (np.diff(np.exp(bound_log_LD), axis=0) > 0).all()
    assert (bound_log_LD[0] == -jnp.inf).all() and (rest_log_LD[0] == 0).all()
    start = hgrn2.LowerBounds(5, layers=layers)()
    np.testing.assert_allclose(
        np.exp(start[0]), np.tile(np.arange(layers) / layers, (5, 1)).T, rtol=1e-6
    )


def test_hgrn2s_lower_bounds_near_one_leave_their_exact_rest():
    # 1 - lb is e^-30 and less, far below the spacing of float32 numbers near 1.
    gamma_LD = np.array([[-30.0], [0.0], [-40.0], [-50.0]])
    module = hgrn2.LowerBounds(1, layers=4)
    module.gamma_LD[...] = jnp.asarray(gamma_LD, jnp.float32)
    rest_log_LD = np.asarray(module()[1], np.float64)[:, 0]
    want = [0, *(-30 + np.log1p([math.exp(-10) + math.exp(-20), math.exp(-20), 0]))]
    np.testing.assert_allclose(rest_log_LD, want, rtol=1e-6)


def test_hgrn2s_gates_have_the_gradient_of_the_papers_bounds():
    rng = np.random.default_rng(0)
    gamma_LD, z_LTD = rng.standard_normal((4, 3)), rng.standard_normal((4, 6, 3))
    weights = rng.standard_normal((2, 4, 6, 3))  # of log f and of 1 - f
    mixer = build_mixer(hgrn2, heads=2)

    def slow(gamma_LD):
        bound = paper_bounds(gamma_LD)[:, None, :]
        f = bound + (1 - bound) * sigmoid(z_LTD)
        return np.sum(weights * np.stack((np.log(f), 1 - f)))

    @jax.grad
    def gradient(module):
        f_log_k = [
            mixer.gate(jnp.asarray(z_LTD[l : l + 1], jnp.float32), (bound, rest))
            for l, (bound, rest) in enumerate(zip(*module(), strict=True))
        ]
        return sum(
            jnp.sum(jnp.asarray(weights[i, l], jnp.float32) * f_log_k[l][i][0])
            for i in range(2)
            for l in range(4)
        )

    module = hgrn2.LowerBounds(3, layers=4)
    module.gamma_LD[...] = jnp.asarray(gamma_LD, jnp.float32)
    step = 1e-5
    want = np.zeros_like(gamma_LD)
    for place in np.ndindex(*gamma_LD.shape):
        d = np.zeros_like(gamma_LD)
        d[place] = step
        want[place] = (slow(gamma_LD + d) - slow(gamma_LD - d)) / (2 * step)
    assert np.abs(want).min() > 1e-3
    np.testing.assert_allclose(
        array(gradient(module).gamma_LD), want, atol=2e-6 * np.abs(want).max(), rtol=0
    )


def test_hgrn2_forgets_at_most_to_its_lower_bound():
    logits = jnp.broadcast_to(jnp.linspace(-1e4, 1e4, 41)[None, :, None], (1, 41, 16))
    mixer, (gamma_LD, bounds) = (
        build_mixer(hgrn2, heads=2),
        random_bounds(layers=4, width=16, scale=8.0),
    )
    for layer, want in enumerate(paper_bounds(gamma_LD)):
        given = tuple(log_LD[layer] for log_LD in bounds)
        f_log, k = (np.asarray(x, np.float64) for x in mixer.gate(logits, given))
        assert np.isfinite(f_log).all() and (f_log <= 0).all() and (k >= 0).all()
        np.testing.assert_allclose(np.exp(f_log) + k, 1, atol=1e-6)
        np.testing.assert_allclose(np.exp(f_log).min(axis=(0, 1)), want, atol=1e-6)


def test_hgrn2_has_four_squares_of_its_width_and_one_parameter_of_all_layers():
    assert count_parameters(hgrn2, 2048, depth=24, heads=16) == 4 * 2048**2 + 2048
    network = nnx.eval_shape(lambda: build_lm(("hgrn2",), 24, width=2048))
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(part, nnx.Param)))
        for part in (network.stack, network.stack.shared)
    ]
    assert sizes == [24 * (4 * 2048**2 + 2 * 2048) + 24 * 2048, 24 * 2048]
    gamma_LD = network.stack.shared["hgrn2"].gamma_LD
    assert gamma_LD.get_metadata()["group"] == "no_decay"


def build_lm(pattern: tuple[str, ...], depth: int, **model: Any) -> Any:
    attention = {"window": 2, "heads": 2}
    config = {
        "width": 8,
        "depth": depth,
        "pattern": pattern,
        "mixers": {"hgrn2": {"heads": 2}, "window_attention": attention},
        "mlp": "none",
        **model,
    }
    return lm.build(
        config, vocabulary=11, param_dtype="float32", compute_dtype="float32", rngs=nnx.Rngs(0)
    )


# And their depths: with a remainder, of which two are the last of six HGRN2 layers, and without.
PATTERNS = {
    ("hgrn2", "hgrn2", "window_attention"): 8,
    ("window_attention", "hgrn2"): 5,
    ("hgrn2",): 3,
}


def of_block(i: int, repeats: int, period: Any, remainder: Any) -> Any:
    repeat, place = divmod(i, len(period))
    if repeat < repeats:
        return jax.tree.map(lambda leaf: leaf[repeat], period[place])
    return remainder[place]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_hgrn2_layer_of_a_network_is_given_the_bounds_of_its_place(pattern):
    depth = PATTERNS[pattern]
    stack = randomised(lambda: build_lm(pattern, depth)).stack
    bounds, layer = stack.shared["hgrn2"](), 0
    # As the trainer calls it, which captures what layers report.
    (period, remainder), _ = nnx.capture(Stack.shared_by_block, Report)(stack)
    for i in range(depth):
        given = of_block(i, stack.repeats, period, remainder)
        if pattern[i % len(pattern)] != "hgrn2":
            assert given is None
            continue
        for got, want in zip(given, bounds, strict=True):
            np.testing.assert_array_equal(got, want[layer], err_msg=f"block {i}")
        layer += 1
    assert layer == len(bounds[0])


@pytest.mark.full
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_network_with_hgrn2_equals_its_blocks_called_one_by_one(pattern):
    depth = PATTERNS[pattern]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)

    def one_by_one(stack):
        P_LD = jax.nn.softmax(stack.shared["hgrn2"].gamma_LD[...], axis=0)
        y, layer = x, 0
        for i in range(depth):
            block = of_block(i, stack.repeats, stack.period, stack.remainder)
            shared = None
            if pattern[i % len(pattern)] == "hgrn2":
                bound_D = sum((P_LD[l] for l in range(1, layer + 1)), jnp.zeros(8))
                shared = (jnp.log(bound_D), jnp.log1p(-bound_D))
                layer += 1
            y, _ = block(y, None, shared, Context())
        return y

    def values_and_gradients(run, **options):
        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def evaluate(stack):
            y = run(stack)
            return jnp.sum(y**2), y

        stack = randomised(lambda: build_lm(pattern, depth, **options)).stack
        (_, y), gradient = evaluate(stack)
        return np.asarray(y), array(gradient.shared["hgrn2"].gamma_LD)

    y_want, gamma_want = values_and_gradients(one_by_one)
    assert np.abs(gamma_want).max(axis=1).min() > 0
    for options in ({}, {"scan_layers": False}, {"remat": "full"}):
        y, gamma = values_and_gradients(
            lambda stack: stack(x, None, positions=None, segment_ids=None)[0], **options
        )
        scale = np.abs(gamma_want).max()
        np.testing.assert_allclose(y, y_want, atol=2e-5, rtol=1e-5, err_msg=f"{options}")
        np.testing.assert_allclose(gamma, gamma_want, atol=1e-4 * scale, err_msg=f"{options}")
