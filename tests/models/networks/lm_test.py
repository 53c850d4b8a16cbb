"""The language model: its options, its head and its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.networks import lm
from tests.support.layers import array, randomised, tiny_lm


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
        ({"mlp": "relu"}, "mlp must be one of 'swiglu', 'gelu', .*'none'; got 'relu'"),
        ({"remat": "some"}, "remat must be one of"),
        ({"embedding_dropout": 1.0}, r"embedding_dropout must be .* in \[0, 1\)"),
        (
            {"mixers": {"linear_attention": {"heads": 3}}},
            "heads must divide the 16 channels.*heads=3",
        ),
        (
            {"mixers": {"linear_attention": {"feature_map": "identity"}}},
            'needs normaliser="rms_norm"',
        ),
        (
            {"mixers": {"linear_attention": {"conv_width": -1}}},
            r"conv_width must be an integer in \[0, 256\]; got -1",
        ),
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


def test_parameters_lie_where_checkpoints_have_them():
    options = {"pattern": ("gla", "hgrn2"), "depth": 3, "mixers": {"gla": {"conv_width": 2}}}
    parameters = nnx.state(nnx.eval_shape(lambda: tiny_lm(**options)), nnx.Param)
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(parameters)}
    gla = {f"{name}/kernel" for name in ("query", "key", "value", "gate_in", "gate_out", "output")}
    gla |= {"gate_out/bias", "output_gate/kernel", "norm/scale"}
    gla |= {f"conv_{name}/weight_WD" for name in "qkv"}
    hgrn2 = {f"{name}/kernel" for name in ("query", "forget", "value", "output")} | {"norm/scale"}
    blocks = {"period/0": gla, "period/1": hgrn2, "remainder/0": gla}
    assert paths == {
        *("embedding/embedding", "norm/scale", "head_WD", "stack/shared/hgrn2/gamma_LD"),
        *(f"stack/{place}/mixer/{name}" for place, names in blocks.items() for name in names),
        *(f"stack/{place}/{name}_norm/scale" for place in blocks for name in ("mixer", "mlp")),
        *(f"stack/{place}/mlp/{m}/kernel" for place in blocks for m in ("gate", "up", "down")),
    }
