"""The stack: its parameters, first values, layers under scan and remat, and its state."""

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.blocks.stack import available_mixers, shortest_period, state_bytes
from tests.support.layers import array, randomised, tiny_lm
from tests.support.mixers import SegmentMean, add_mixers


def test_every_parameter_has_one_axis_name_per_dimension():
    known = {"layers", "vocabulary", "embed", "heads", "mlp", None}
    required = {
        "window_attention": {"window": 4, "qk_norm": True},
        "transformer": {"context_length": 4},
        "latent_attention": {"context_length": 4},
        "monarch_mixer": {"context_length": 4},
        "vig": {"size_per_head": 8},
        "soft": {"size_per_head": 8},
    }
    for mixer in available_mixers():
        model = nnx.eval_shape(
            lambda m=mixer: tiny_lm(pattern=(m,), mixers={m: required.get(m, {})})
        )
        for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            names = parameter.get_metadata()["out_sharding"]
            assert len(names) == parameter.ndim and set(names) <= known, f"{mixer} {path}: {names}"
            assert (names[0] == "layers") == ("period" in path)


def test_building_needs_no_mesh():
    assert flax.config.flax_always_shard_variable is False
    assert tiny_lm().head_WD is not None


def test_first_values_have_the_published_sizes():
    model = tiny_lm(width=128, depth=2, pattern=("gla",), mixers={}, vocabulary=256)
    block = model.stack.period[0]
    for parameter, std in (
        (model.embedding.embedding, 0.02),
        (block.mlp.up.kernel, 0.02),
        (block.mlp.down.kernel, 0.02 / math.sqrt(2 * 2)),
        (block.mixer.value.kernel, 2**-2.5 * math.sqrt(2 / (128 + 128))),
    ):
        assert array(parameter).std() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("names", "period"),
    [("a", 1), ("aaaa", 1), ("abab", 2), ("ababa", 2), ("aab", 3), ("aaba", 3), ("abc", 3)],
)
def test_the_shortest_period_is_found(names, period):
    assert shortest_period(names) == period


def test_given_positions_reach_every_mixer():
    options = {
        "pattern": ("transformer",),
        "mixers": {"transformer": {"context_length": 6, "heads": 1}},
        "mlp": "none",
    }
    model = randomised(lambda: tiny_lm(**options))
    tokens, positions = jnp.arange(6)[None, :], jnp.arange(6)[None, :]
    call = jax.jit(lambda model, positions: model(tokens, positions=positions)[0])
    counted, _ = jax.jit(lambda model: model(tokens))(model)
    np.testing.assert_allclose(call(model, positions), counted, atol=1e-5)
    np.testing.assert_allclose(call(model, positions + 5), counted, atol=1e-4)
    assert np.abs(np.asarray(call(model, 2 * positions) - counted)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "scan_layers"), [("full", True), pytest.param("dots", False, marks=pytest.mark.full)]
)
def test_remat_changes_no_gradient(remat, scan_layers):
    tokens = jnp.arange(6)[None, :]

    @jax.jit
    @jax.grad
    def gradient(model):
        return jnp.sum(jnp.square(model(tokens)[0]))

    options = {"depth": 3, "pattern": ("linear_attention", "gla"), "scan_layers": scan_layers}
    want = jax.tree.leaves(gradient(randomised(lambda: tiny_lm(**options))))
    got = jax.tree.leaves(gradient(randomised(lambda: tiny_lm(remat=remat, **options))))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=1e-4)


def test_mixers_that_share_nothing_add_nothing_to_a_stack():
    network = nnx.eval_shape(lambda: tiny_lm(pattern=("gla",)))
    assert not jax.tree.leaves(nnx.state(network.stack.shared))


@pytest.mark.parametrize(
    ("mixer", "width", "options", "floats"),
    [
        ("mamba", 768, {}, 1536 * 16 + 3 * 1536),  # E N and the convolution's last 3 tokens
        ("gla", 1024, {"heads": 4}, 512 * 1024 // 4),  # d_k d_v / H
        ("delta_net", 1024, {"heads": 8}, 1024 * 128 + 3 * 3 * 1024),
        ("mamba2", 768, {"heads": 24, "state_size": 128}, 1536 * 128 + 3 * (1536 + 2 * 128)),
        ("hgrn2", 2048, {"heads": 16}, 2048 * 128),
    ],
)
def test_published_models_have_states_of_the_published_sizes(mixer, width, options, floats):
    model = nnx.eval_shape(
        lambda: tiny_lm(width=width, depth=24, pattern=(mixer,), mixers={mixer: options})
    )
    assert state_bytes(model) == 24 * 4 * floats
    assert state_bytes(model.stack.period[0].mixer) == 4 * floats


@pytest.mark.slow
def test_a_network_of_a_mixer_that_is_not_causal_learns_and_refuses_to_decode(monkeypatch):
    add_mixers(monkeypatch, segment_mean=SegmentMean)
    model = tiny_lm(pattern=("segment_mean", "gla"), depth=3)
    tokens = jnp.arange(22).reshape(2, 11) % 7
    graphdef, params, variables = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits, _ = nnx.merge(graphdef, params, variables)(tokens)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1))

    before, gradients = loss(params)
    after, _ = loss(jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients))
    assert after < before - 1e-3
    assert state_bytes(model) is None and not model.causal
    with pytest.raises(ValueError, match="a stack with segment_mean has no state to decode from"):
        model.init_state(2)
