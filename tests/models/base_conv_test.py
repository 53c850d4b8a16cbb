"""BaseConv against the paper's equation, written out."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.base_conv import BaseConv


def test_base_conv_is_gate_times_shifted_inputs_plus_the_input():
    layer = BaseConv(
        6, depth=1, rngs=nnx.Rngs(0), param_dtype=jnp.float32, compute_dtype=jnp.float32
    )
    x_BTD = jax.random.normal(jax.random.key(1), (2, 7, 6))
    y_BTD, state = layer(x_BTD)
    x = np.asarray(x_BTD, np.float64)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    taps, bias = (np.asarray(params["conv"][name]) for name in ("weight_WD", "bias_D"))
    W, b = (np.asarray(params["gate"][name]) for name in ("kernel", "bias"))
    assert taps.shape == (3, 6) and np.abs(taps).max() <= 3**-0.5
    expected = np.zeros_like(x)
    for t in range(7):
        shifted = sum(taps[2 - lag] * x[:, t - lag] for lag in range(min(3, t + 1)))
        expected[:, t] = (x[:, t] @ W + b) * (shifted + bias) + x[:, t]
    np.testing.assert_allclose(y_BTD, expected, atol=1e-5)
    np.testing.assert_array_equal(state["conv"], x_BTD[:, -2:])
