"""Mamba against a slow transcription of its paper, and its first values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mamba
from tests.support.layers import (
    FLOAT32,
    array,
    build_mixer,
    check_layer,
    convolved,
    inputs,
    silu,
    softplus,
    weight,
)


@pytest.mark.parametrize(
    ("eigenvalue_range", "conv_width"), [((0, 1), 4), ((-1, 1), 4), ((0, 1), 0)]
)
def test_mamba_computes_its_block(eigenvalue_range, conv_width):
    mixer = build_mixer(
        mamba, state_size=3, dt_rank=2, eigenvalue_range=eigenvalue_range, conv_width=conv_width
    )

    def transcription(u_TD):
        z = u_TD @ weight(mixer.gate)
        x = silu(convolved(u_TD @ weight(mixer.input), mixer.conv))
        dt = softplus(x @ weight(mixer.dt_in) @ weight(mixer.dt_out) + array(mixer.dt_bias_E))
        B, C = x @ weight(mixer.write), x @ weight(mixer.read)
        A = -np.exp(array(mixer.a_log_EN))
        h, y = np.zeros_like(A), np.zeros_like(x)
        for t in range(len(x)):
            factor = np.exp(dt[t][:, None] * A)
            if eigenvalue_range == (-1, 1):
                factor = 2 * factor - 1
            h = factor * h + dt[t][:, None] * B[t][None, :] * x[t][:, None]
            y[t] = h @ C[t] + array(mixer.skip_E) * x[t]
        return (y * silu(z)) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_negative_eigenvalues_reach_below_zero_and_default_ones_do_not():
    step = jax.jit(lambda mixer, x, state: mixer(x, state))

    def smallest_factor(mixer):
        # Nothing is written, the state only decays.
        mixer.write.kernel[...] = jnp.zeros_like(mixer.write.kernel[...])
        # Delta large: exp(Delta A) -> 0.
        mixer.dt_bias_E[...] = jnp.full_like(mixer.dt_bias_E[...], 20.0)
        start = mixer.init_state(1)
        start["memory"] = jnp.ones_like(start["memory"])
        return float(step(mixer, inputs()[:1, :1], start)[1]["memory"].min())

    assert smallest_factor(build_mixer(mamba)) == pytest.approx(0.0, abs=1e-3)
    assert smallest_factor(build_mixer(mamba, eigenvalue_range=(-1, 1))) == pytest.approx(
        -1.0, abs=1e-3
    )


def test_mamba_starts_as_published():
    mixer: Any = mamba.Mixer(64, depth=8, rngs=nnx.Rngs(0), **FLOAT32)
    dt = softplus(array(mixer.dt_bias_E))
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 1e-1 * 1.001
    assert dt.min() < 2e-3 and dt.max() > 5e-2, "log-uniform over the whole range"
    np.testing.assert_allclose(
        -np.exp(array(mixer.a_log_EN)), np.tile(-np.arange(1.0, 17.0), (128, 1)), rtol=1e-6
    )
    np.testing.assert_array_equal(array(mixer.skip_E), 1)
    assert mixer.dt_out.kernel.shape == (4, 128)  # R = ceil(64 / 16)
    for parameter, bound in (
        (mixer.input.kernel, 64**-0.5),
        (mixer.dt_out.kernel, 4**-0.5),
        (mixer.conv.weight_WD, 4**-0.5),
        (mixer.output.kernel, (128 * 8) ** -0.5),
    ):
        assert 0.95 * bound < np.abs(array(parameter)).max() <= bound * (1 + 1e-6)
    groups = {
        path[-1]: p.get_metadata().get("group")
        for path, p in nnx.to_flat_state(nnx.state(mixer, nnx.Param))
    }
    assert groups["a_log_EN"] == groups["dt_bias_E"] == "ssm" and groups["skip_E"] == "no_decay"
    assert groups["kernel"] is None
