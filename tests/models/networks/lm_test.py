"""The backbone: its parameters, first values, options, layers under scan and remat, and dropout."""

import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.networks import lm
from models.networks.mlp import inner_width
from models.networks.stack import available_mixers, shortest_period
from tests.support.layers import array, randomised


def test_every_parameter_has_one_axis_name_per_dimension():
    known = {"layers", "vocabulary", "embed", "heads", "mlp", None}
    required = {
        "window_attention": {"window": 4, "qk_norm": True},
        "transformer": {"context_length": 4},
        "monarch_mixer": {"context_length": 4},
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


@pytest.mark.parametrize(("width", "inner"), [(32, 88), (128, 344), (1024, 2816), (2048, 5632)])
def test_mlp_inner_width_is_eight_thirds_rounded_up(width, inner):
    assert inner_width(width, 4.0) == inner


@pytest.mark.parametrize(
    ("names", "period"),
    [("a", 1), ("aaaa", 1), ("abab", 2), ("ababa", 2), ("aab", 3), ("aaba", 3), ("abc", 3)],
)
def test_the_shortest_period_is_found(names, period):
    assert shortest_period(names) == period


def tiny_lm(
    *, vocabulary: int = 11, compute_dtype: str = "float32", seed: int = 0, **model: Any
) -> Any:
    config = {"width": 16, "depth": 2, "pattern": ("linear_attention",), "mixers": {}, **model}
    return lm.build(
        config,
        vocabulary=vocabulary,
        param_dtype="float32",
        compute_dtype=compute_dtype,
        rngs=nnx.Rngs(seed),
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"pattern": ("delta_nte",)},
            ("a mixer of model.pattern .* must be one of .*'delta_net'.*'gla'.*; got 'delta_nte'"),
        ),
        ({"pattern": "gla"}, r"write \('gla',\)"),
        ({"pattern": ()}, "pattern must name between 1 and depth=2"),
        ({"pattern": ("gla", "mamba", "gla")}, "pattern must name between 1 and depth=2"),
        (
            {"mixers": {"gla": {"head": 2}}},
            ("mixer gla has no option 'head'; known options in model.mixers.gla: .*heads"),
        ),
        ({"mixers": {"gal": {}}}, "a mixer of .* must be one of .*; got 'gal'"),
        ({"pattern": ("window_attention",)}, "mixer window_attention needs the option 'window'"),
        ({"widht": 3}, "model lm has no option 'widht'; known options in model: .*width"),
        ({"mlp": "relu"}, "mlp must be one of 'swiglu', 'gelu', 'none'; got 'relu'"),
        ({"remat": "some"}, "remat must be one of"),
        ({"embedding_dropout": 1.0}, r"embedding_dropout must be in \[0, 1\)"),
        (
            {"mixers": {"linear_attention": {"heads": 3}}},
            "heads must divide the 16 channels.*heads=3",
        ),
        (
            {"mixers": {"linear_attention": {"feature_map": "identity"}}},
            'needs normaliser="rms_norm"',
        ),
        ({"mixers": {"linear_attention": {"conv_width": -1}}}, "conv_width must be 0"),
        (
            {"pattern": ("mamba",), "mixers": {"mamba": {"eigenvalue_range": (0, 2)}}},
            "eigenvalue_range must be one of",
        ),
    ],
)
def test_impossible_options_raise_and_say_what_is_possible(model, message):
    with pytest.raises(ValueError, match=message):
        tiny_lm(**model)


def test_readout_positions_select_logits():
    model = randomised(tiny_lm)
    tokens = jnp.arange(12).reshape(2, 6) % 11
    at = jnp.array([[5, 0], [2, 2]])
    everywhere, selected = jax.jit(
        lambda model: (model(tokens)[0], model(tokens, readout_positions=at)[0])
    )(model)
    np.testing.assert_allclose(
        selected, jnp.take_along_axis(everywhere, at[..., None], axis=1), atol=1e-6
    )


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


def test_tied_head_is_the_embedding():
    tied, untied = (randomised(lambda t=t: tiny_lm(tie_embeddings=t)) for t in (True, False))
    count = [
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(m, nnx.Param))) for m in (tied, untied)
    ]
    assert count[1] - count[0] == 11 * 16
    gradient = jax.jit(jax.grad(lambda m: m(jnp.zeros((1, 2), jnp.int32))[0].sum()))(tied)
    assert np.abs(array(gradient.embedding.embedding)[1:]).max() > 0, (
        "rows of absent tokens learn through the head"
    )


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


def test_embedding_dropout_draws_anew_in_each_training_call_and_never_in_evaluation():
    model = tiny_lm(embedding_dropout=0.5)
    tokens = jnp.arange(11)[None, :]

    @nnx.jit
    def call(model):
        return model(tokens)[0]

    first, second = call(model), call(model)
    assert np.abs(np.asarray(first - second)).max() > 0
    evaluated = nnx.view(model, deterministic=True)
    np.testing.assert_array_equal(call(evaluated), call(evaluated))
    model.eval()
    np.testing.assert_array_equal(call(model), call(evaluated))
    model.train()
    assert np.abs(np.asarray(call(model) - first)).max() > 0


@pytest.mark.full
def test_embedding_dropout_works_for_replicas_under_vmap():
    def replica(key):
        return nnx.split(
            lm.build(
                {
                    "width": 16,
                    "depth": 2,
                    "pattern": ("linear_attention",),
                    "embedding_dropout": 0.5,
                },
                vocabulary=11,
                param_dtype="float32",
                compute_dtype="float32",
                rngs=nnx.Rngs(key),
            )
        )

    graphdef, _ = replica(jax.random.key(0))
    states = jax.vmap(lambda key: replica(key)[1])(jax.random.split(jax.random.key(1), 2))

    @jax.jit
    @jax.vmap
    def step(state):
        model = nnx.merge(graphdef, state)
        logits, _ = model(jnp.zeros((1, 4), jnp.int32))
        return logits, nnx.state(model)

    first, states = step(states)
    second, _ = step(states)
    assert np.abs(np.asarray(first[0] - first[1])).max() > 0
    assert np.abs(np.asarray(first - second)).max() > 0
