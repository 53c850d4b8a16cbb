"""DeltaNet against a slow transcription of its paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import delta_net
from tests.support.layers import (
    WIDTH,
    array,
    build_mixer,
    check_layer,
    convolved,
    merge,
    rms,
    sigmoid,
    silu,
    unit,
    weight,
)


@pytest.mark.parametrize("conv_width", [0, 4])
@pytest.mark.parametrize(("eigenvalue_range", "beta_max"), [((0, 1), 1), ((-1, 1), 2)])
def test_delta_net_computes_its_recurrence(conv_width, eigenvalue_range, beta_max):
    mixer = build_mixer(
        delta_net, heads=2, conv_width=conv_width, eigenvalue_range=eigenvalue_range
    )

    def transcription(x_TD):
        def activated(linear, convolution):
            y_TD = x_TD @ weight(linear)
            y_TD = convolved(y_TD, convolution) if conv_width else y_TD
            return silu(y_TD).reshape(len(x_TD), 2, -1)

        q, k = activated(mixer.query, mixer.conv_q), activated(mixer.key, mixer.conv_k)
        v = activated(mixer.value, mixer.conv_v)
        q, k = unit(q), unit(k)
        beta = beta_max * sigmoid(x_TD @ weight(mixer.beta))
        o = np.zeros_like(v)
        for h in range(2):
            S = np.zeros((8, 8))
            for t in range(len(x_TD)):
                S = (np.eye(8) - beta[t, h] * np.outer(k[t, h], k[t, h])) @ S + beta[
                    t, h
                ] * np.outer(k[t, h], v[t, h])
                o[t, h] = q[t, h] @ S / math.sqrt(8)
        return merge(rms(o, array(mixer.norm.scale))) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_negative_eigenvalues_reach_below_zero_and_default_ones_do_not():
    key = jnp.zeros(WIDTH).at[0].set(1.0)
    step = jax.jit(lambda mixer, x, state: mixer(x, state))

    def eigenvalue(mixer):
        # With v = 0 a unit key direction of the state is multiplied by the moving eigenvalue 1 -
        # beta.
        mixer.value.kernel[...] = jnp.zeros_like(mixer.value.kernel[...])
        # Sigmoid saturates.
        mixer.beta.kernel[...] = jnp.full_like(mixer.beta.kernel[...], 10.0)
        mixer.key.kernel[...] = jnp.eye(WIDTH)
        start = mixer.init_state(1)
        start["memory"] = start["memory"].at[0, 0, 0, 0].set(1.0)
        _, state = step(mixer, key[None, None, :], start)
        return float(state["memory"][0, 0, 0, 0])

    options = {"heads": 1, "conv_width": 0}
    assert eigenvalue(build_mixer(delta_net, **options)) == pytest.approx(0.0, abs=1e-3)
    assert eigenvalue(build_mixer(delta_net, eigenvalue_range=(-1, 1), **options)) == pytest.approx(
        -1.0, abs=1e-3
    )
