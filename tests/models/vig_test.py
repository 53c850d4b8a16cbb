"""ViG against its equations, one token at a time, and the identities of its paper."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.configs.vig import get_config
from models import vig
from models.networks import image_classifier
from ops import gated_linear_attention
from tests.support.layers import (
    FLOAT32,
    array,
    build_mixer,
    check_layer,
    inputs,
    merge,
    project,
    rms,
    sigmoid,
    silu,
    weight,
)

GRID = (1, 7)
BUILD = functools.partial(build_mixer, vig, size_per_head=8, gate_rank=3)
HEADS = 2


def convolved(x_TD, mixer, grid):
    """The depthwise convolution, tap by tap."""
    w, rows, columns = array(mixer.weight_YXD), *grid
    half = len(w) // 2
    x = x_TD.reshape(rows, columns, -1)
    y = np.zeros_like(x)
    for r in range(rows):
        for c in range(columns):
            for i in range(len(w)):
                for j in range(len(w)):
                    above, left = r + i - half, c + j - half
                    if 0 <= above < rows and 0 <= left < columns:
                        y[r, c] += w[i, j] * x[above, left]
    return y.reshape(len(x_TD), -1)


def walk(q, k, v, alpha):
    """S_i = diag(alpha_i) S_{i-1} + k_i^T v_i and o_i = q_i S_i / sqrt(K), from the first token."""
    o = np.zeros_like(v)
    for h in range(q.shape[1]):
        S = np.zeros((q.shape[2], v.shape[2]))
        for i in range(len(q)):
            S = np.diag(alpha[i, h]) @ S + np.outer(k[i, h], v[i, h])
            o[i, h] = q[i, h] @ S / np.sqrt(q.shape[2])
    return o


def transcription(mixer, x_TD, grid=GRID, activations=("none", "none")):
    act = {"none": lambda x: x, "silu": silu}
    L = x_TD if mixer.weight_YXD is None else act[activations[0]](convolved(x_TD, mixer, grid))
    q, k, v = (project(L, m, HEADS) for m in (mixer.query, mixer.key, mixer.value))
    if mixer.gate_in is None:
        both = [np.ones_like(q)] * 2
    else:
        u = L @ weight(mixer.gate_in) @ weight(mixer.gate_out) + array(mixer.gate_out.bias)
        alpha = sigmoid(u) ** (1 / 16)
        size = HEADS * q.shape[2]
        both = [alpha[:, :size].reshape(q.shape), alpha[:, -size:].reshape(q.shape)]
    o = walk(q, k, v, both[0])
    if mixer.directions == "both":
        o = (o + walk(q[::-1], k[::-1], v[::-1], both[1][::-1])[::-1]) / 2
    y = rms(o, array(mixer.norm.scale), 1e-6)
    if mixer.blend is not None:
        g = sigmoid(L @ weight(mixer.blend) + array(mixer.blend.bias)).reshape(v.shape)
        local = rms(L.reshape(v.shape), array(mixer.local_norm.scale), 1e-6)
        y = g * y + (1 - g) * local
    return act[activations[1]](merge(y)) @ weight(mixer.output)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convolution_activation": "silu", "output_activation": "silu"},
        {"gates": "shared", "blend": False},
        {"directions": "forward", "kernel_size": 0, "blend": False},
        {"gates": "none", "kernel_size": 5},
    ],
)
def test_vig_computes_its_equations(options):
    mixer = BUILD(**options)
    names = ("convolution_activation", "output_activation")
    activations = tuple(options.get(name, "none") for name in names)
    check_layer(mixer, lambda x: transcription(mixer, x, activations=activations))


def test_the_convolution_reads_the_grid():
    mixer: Any = BUILD()
    x = np.random.default_rng(3).standard_normal((1, 12, 16)).astype(np.float32)
    want = transcription(mixer, x[0].astype(np.float64), (3, 4))
    got = np.asarray(mixer(x, grid=(3, 4))[0][0])
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def core(mixer, x):
    q, k, v = (m(x).reshape(*x.shape[:2], HEADS, -1) for m in (mixer.query, mixer.key, mixer.value))
    return q, k, v, mixer.decays(x)


def test_without_decay_it_is_full_linear_attention_with_half_of_the_own_token():
    mixer: Any = BUILD(gates="none", kernel_size=0)
    q, k, v, decays = core(mixer, jnp.asarray(inputs()))
    got = np.asarray(mixer.walks(q, k, v, decays, None))
    scores = np.einsum("bthk,bshk->bhts", *(np.asarray(a, np.float64) for a in (q, k)))
    scores = (scores + scores * np.eye(7)) / 2 / np.sqrt(4)
    want = np.einsum("bhts,bshv->bthv", scores, np.asarray(v, np.float64))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_flipped_tokens_with_swapped_gates_flip_the_output_and_one_merged_call_is_the_same():
    mixer: Any = BUILD(kernel_size=0)
    q, k, v, (forward, backward) = core(mixer, jnp.asarray(inputs()))
    want = np.asarray(mixer.walks(q, k, v, (forward, backward), None))
    flip = functools.partial(jnp.flip, axis=1)
    swapped = (flip(backward), flip(forward))
    got = flip(mixer.walks(flip(q), flip(k), flip(v), swapped, None))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    stacked = [jnp.concatenate((a, flip(a))) for a in (q, k, v)]
    both, _ = gated_linear_attention(*stacked, jnp.concatenate((forward, flip(backward))))
    merged = (both[:2] + flip(both[2:])) / 2
    np.testing.assert_allclose(merged, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize(("bias", "seen"), [(-1e9, 9), (1e9, 35)])
def test_a_closed_gate_sees_nine_tokens_and_an_open_one_all(bias, seen):
    mixer: Any = BUILD()
    mixer.blend.bias[...] = jnp.full(16, bias)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 35, 16)), jnp.float32)

    def middle(x):
        return jnp.sum(mixer(x, grid=(5, 7))[0][0, 17])

    gradient = np.abs(np.asarray(jax.grad(middle)(x))[0]).max(axis=-1)
    assert (gradient > 0).sum() == seen


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("tiny", 5_834_536),
        ("small", 22_615_144),
        ("base", 89_022_184),
        ("hierarchical_tiny", 28_600_680),  # published: 29 M, 50 M and 89 M
        ("hierarchical_small", 50_051_688),
        ("hierarchical_base", 88_904_360),
    ],
)
def test_the_published_models_have_their_numbers_of_parameters(size, parameters):
    config: Any = get_config(f"imagenet,{size}")
    model = config.model.to_dict()
    assert model.pop("name") == "image_classifier"
    sizes = {"classes": 1000, "channels": 3, "height": 224, "width": 224}
    built = nnx.eval_shape(
        lambda: image_classifier.build(model, rngs=nnx.Rngs(0, dropout=1), **sizes, **FLOAT32)
    )
    found = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(built, nnx.Param)))
    assert found == parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_per_head": 3}, "size_per_head must divide the width 16; got 3"),
        ({"kernel_size": 2}, "kernel_size must be odd, or 0 for none; got 2"),
        ({"gates": "own"}, "gates must be one of 'direction_wise', 'shared', 'none'"),
    ],
)
def test_impossible_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(vig, **{"size_per_head": 8, **options})


def test_tokens_that_are_not_on_the_grid_are_refused():
    with pytest.raises(ValueError, match="whose product is the length of q, 7; got"):
        BUILD()(jnp.asarray(inputs()), grid=(2, 4))
