"""Mamba-2 against a slow transcription of its paper, and against Mamba's op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mamba2
from models.networks import lm
from ops.gated_linear_attention.api import gated_linear_attention
from ops.selective_scan.api import selective_scan
from tests.support.layers import (
    array,
    build_mixer,
    check_layer,
    convolved,
    merge,
    rms,
    silu,
    softplus,
    weight,
)


@pytest.mark.parametrize(
    "options",
    [{"heads": 4, "groups": 2}, {"heads": 2, "norm": "before_gate"}, {"heads": 2, "conv_width": 0}],
)
def test_mamba2_computes_its_block(options):
    mixer = build_mixer(mamba2, state_size=3, **options)
    heads, groups = options["heads"], options.get("groups", 1)

    def transcription(u_TD):
        def part(linear, convolution):
            return silu(convolved(u_TD @ weight(linear), convolution))

        z = u_TD @ weight(mixer.gate)
        x = part(mixer.input, mixer.conv_x).reshape(len(u_TD), heads, -1)
        B = part(mixer.write, mixer.conv_B).reshape(len(u_TD), groups, 3)
        C = part(mixer.read, mixer.conv_C).reshape(len(u_TD), groups, 3)
        dt = softplus(u_TD @ weight(mixer.dt) + array(mixer.dt_bias_H))
        A = -np.exp(array(mixer.a_log_H))
        y = np.zeros_like(x)
        for head in range(heads):
            group = head // (heads // groups)
            h = np.zeros((x.shape[-1], 3))
            for t in range(len(x)):
                h = np.exp(dt[t, head] * A[head]) * h + dt[t, head] * np.outer(
                    x[t, head], B[t, group]
                )
                y[t, head] = h @ C[t, group] + array(mixer.skip_H)[head] * x[t, head]
        scale = array(mixer.norm.scale)
        if options.get("norm") == "before_gate":
            return (rms(merge(y), scale) * silu(z)) @ weight(mixer.output)
        return rms(merge(y) * silu(z), scale) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_a_scalar_transition_makes_mambas_scan_linear_attention():
    batch, length, heads, size, states = 2, 7, 2, 3, 4
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (batch, length, heads, size))
    B, C = (jax.random.normal(key, (batch, length, states)) for key in keys[1:3])
    dt = jax.nn.softplus(jax.random.normal(keys[3], (batch, length, heads)))
    A = -jnp.array([0.5, 3.0])
    per_channel = (
        jnp.repeat(dt, size, axis=2),
        jnp.broadcast_to(jnp.repeat(A, size)[:, None], (heads * size, states)),
    )

    @jax.jit
    def both():
        scalar = A[None, None, :] * dt
        definition = {"implementation": "reference"}
        q, k, v = C[:, :, None], B[:, :, None], dt[..., None] * x
        attention, _ = gated_linear_attention(q, k, v, scalar, scale=1.0, **definition)
        scan, _ = selective_scan(x.reshape(batch, length, -1), *per_channel, B, C, **definition)
        return attention, scan

    got, want = both()
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)


@pytest.mark.parametrize(
    ("mixer", "vocabulary", "parameters"),
    [("mamba", 50280, 129_135_360), ("mamba2", 50288, 128_989_632)],
)
def test_the_published_130m_models_have_as_many_parameters(mixer, vocabulary, parameters):
    config = {
        "width": 768,
        "depth": 24,
        "pattern": (mixer,),
        "mixers": {},
        "mlp": "none",
        "tie_embeddings": True,
    }
    dtypes = {"param_dtype": "float32", "compute_dtype": "float32"}
    model = nnx.eval_shape(
        lambda: lm.build(config, vocabulary=vocabulary, rngs=nnx.Rngs(0), **dtypes)
    )
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == parameters


def test_mamba2_refuses_groups_that_do_not_divide_its_heads():
    with pytest.raises(ValueError, match="groups must divide the 4 heads; got 3"):
        build_mixer(mamba2, heads=4, groups=3)
