"""The linear baseline and its decomposition."""

from typing import Any

import numpy as np
import pytest
from flax import nnx

from models.networks import linear_forecaster
from tests.support.layers import FLOAT32, array, randomised, weight

SIZES = {"context": 6, "horizon": 3, "calendar": 0}


def model_of(**model: Any) -> Any:
    return randomised(lambda: linear_forecaster.build(model, rngs=nnx.Rngs(0), **SIZES, **FLOAT32))


def history() -> np.ndarray:
    return 3 * np.random.default_rng(1).standard_normal((2, 6, 4)).astype(np.float32) + 5


def test_each_variate_is_mapped_by_the_same_weights():
    model, x = model_of(), history()
    got = model(x)
    for b in range(2):
        for v in range(4):
            one = x[b, :, v].astype(np.float64)
            mean, sigma = one.mean(), np.sqrt(one.var() + 1e-5)
            y = (one - mean) / sigma @ weight(model.output) + array(model.output.bias)
            np.testing.assert_allclose(got[b, :, v], y * sigma + mean, atol=1e-4)


def test_with_decomposition_the_trend_has_a_map_of_its_own():
    model, x = model_of(decomposition=True, instance_norm=False, kernel=3), history()
    rows = x[0, :, 0].astype(np.float64)
    padded = np.concatenate((rows[:1], rows, rows[-1:]))
    trend = np.array([padded[i : i + 3].mean() for i in range(6)])
    y = trend @ weight(model.trend) + array(model.trend.bias)
    y = y + (rows - trend) @ weight(model.output) + array(model.output.bias)
    np.testing.assert_allclose(model(x)[0, :, 0], y, atol=1e-4)


def test_the_mean_of_a_trend_has_a_middle():
    with pytest.raises(ValueError, match="kernel must be odd, as many rows on both sides; got 4"):
        model_of(kernel=4)
