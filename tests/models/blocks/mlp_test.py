"""The MLPs of the blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.blocks.mlp import MLPS, inner_width
from tests.support.layers import FLOAT32


def mlp_of(name: str, **options: Any) -> Any:
    return MLPS[name](8, ratio=1.0, inner=32, depth=2, rngs=nnx.Rngs(0), **FLOAT32, **options)


@pytest.mark.parametrize(("width", "inner"), [(32, 88), (128, 344), (1024, 2816), (2048, 5632)])
def test_mlp_inner_width_is_eight_thirds_rounded_up(width, inner):
    assert inner_width(width, 4.0) == inner


def test_fan_in_starts_weights_and_biases_uniformly_within_one_over_the_root_of_the_inputs():
    mlp = mlp_of("gelu", init="fan_in")
    for linear, inputs in ((mlp.up, 8), (mlp.down, 32)):
        for values in (linear.kernel[...], linear.bias[...]):
            largest = float(jnp.abs(values).max()) * inputs**0.5
            assert 0.6 < largest <= 1
            assert float(jnp.std(values)) * inputs**0.5 == pytest.approx(3**-0.5, rel=0.35)
    assert not np.any(mlp_of("gelu").up.bias[...])


@pytest.mark.parametrize("name", MLPS)
def test_dropout_is_of_inner_activations_and_of_the_output_and_only_in_training(name):
    x = jax.random.normal(jax.random.key(0), (1, 400, 8))
    mlp, plain = mlp_of(name, dropout=0.5), mlp_of(name)
    for one in (mlp, plain):
        one.down.kernel[...] = jnp.eye(32, 8)  # eight inner activations come out as they are
    assert float(jnp.mean(mlp(x) == 0)) == pytest.approx(0.75, abs=0.04)
    mlp.eval()
    np.testing.assert_array_equal(mlp(x), plain(x))
