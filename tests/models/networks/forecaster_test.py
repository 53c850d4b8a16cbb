"""Forecasters: their definition, and what they do not depend on."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.networks import forecaster
from tests.models.itransformer_test import HEADS, attended
from tests.support.layers import FLOAT32, array, parts, randomised, weight

SIZES = {"context": 6, "horizon": 3, "calendar": 2}
PAPER: dict[str, Any] = {
    "width": 16,
    "depth": 1,
    "pre_norm": False,
    "mlp": "gelu",
    "mlp_width": 12,
    "mixers": {"itransformer": {"heads": HEADS, "dropout": 0.0}},
}


def model_of(
    *names: str, variates: int = 4, calendar: int = 2, random: bool = True, **model: Any
) -> Any:
    config = {**PAPER, "pattern": names, **model}
    sizes = {**SIZES, "variates": variates, "calendar": calendar}

    def build():
        return forecaster.build(config, rngs=nnx.Rngs(0), **sizes, **FLOAT32)

    return randomised(build) if random else parts(build)


def histories(variates: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (2, SIZES["context"])
    x = 3 * rng.standard_normal((*shape, variates)) + 5
    return x.astype(np.float32), rng.uniform(-0.5, 0.5, (*shape, 2)).astype(np.float32)


def norm_of(module: Any, x: np.ndarray) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * array(module.scale) + array(module.bias)


def linear(module: Any, x: np.ndarray) -> np.ndarray:
    return x @ weight(module) + array(module.bias)


def test_a_forecast_is_that_of_the_papers_encoder():
    model = model_of("itransformer")
    history, calendar = histories()
    graphdef, state = nnx.split(model.stack.period[0])
    block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], state))
    for got, x, dates in zip(model(history, calendar), history, calendar, strict=True):
        x = x.astype(np.float64)
        mean, sigma = x.mean(0), np.sqrt(x.var(0) + 1e-5)
        E = linear(model.embedding, np.concatenate(((x - mean) / sigma, dates), axis=1).T)
        a = norm_of(block.mixer_norm, E + attended(block.mixer, E))
        h = linear(block.mlp.up, a)
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        E = norm_of(block.mlp_norm, a + linear(block.mlp.down, h))
        want = linear(model.head, norm_of(model.norm, E))[:4].T * sigma + mean
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_permuted_variates_have_permuted_forecasts_where_attention_mixes_them():
    model = model_of("itransformer")
    history, calendar = histories()
    order = np.array([2, 0, 3, 1])
    want = model(history, calendar)[:, :, order]
    np.testing.assert_allclose(model(history[:, :, order], calendar), want, atol=1e-4)


@pytest.mark.parametrize(("names", "tokens"), [(("itransformer",), "variates"), (("gla",), "time")])
def test_forecasts_shift_and_scale_with_their_histories(names, tokens):
    mixers = {**PAPER["mixers"], "gla": {"heads": 2}}
    model = model_of(*names, tokens=tokens, mixers=mixers)
    history, calendar = histories()
    factor, shift = np.array([0.5, 2, 3, 10]), np.array([100, -7, 0, 1])
    want = np.asarray(model(history, calendar)) * factor + shift
    got = model((history * factor + shift).astype(np.float32), calendar)
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def test_variates_it_has_not_seen_and_any_number_of_them_are_forecast_by_the_same_weights():
    few, many = (model_of("itransformer", variates=n, random=False)[1] for n in (4, 9))
    assert jax.tree.map(jnp.shape, few) == jax.tree.map(jnp.shape, many)
    model = model_of("itransformer")
    assert model(*histories(9)).shape == (2, 3, 9)


def test_the_calendar_reaches_forecasts_through_the_mixer_alone():
    history, calendar = histories()
    model = model_of("itransformer")
    moved = np.abs(model(history, calendar) - model(history, -calendar)).max()
    model.stack.period[0].mixer.output.kernel[...] *= 0
    unmoved = np.abs(model(history, calendar) - model(history, -calendar)).max()
    assert moved > 1e-3 and unmoved == 0


def test_along_time_the_last_row_is_read_and_all_rows_reach_it():
    model = model_of("gla", tokens="time", mixers={"gla": {"heads": 2}}, instance_norm=False)
    history, calendar = histories()
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(model(x, calendar)))))(history)
    assert (np.abs(gradient).max(axis=(0, 2)) > 1e-6).all()
    x_BLD, _ = model.hidden(jnp.concatenate((history, calendar), axis=-1))
    y = model.head(model.norm(x_BLD[:, -1])).reshape(2, 3, 4)
    np.testing.assert_allclose(model(history, calendar), y, atol=1e-4)


def test_no_gradient_goes_through_the_mean_of_a_history():
    x = jnp.asarray(histories()[0][:1, :, :1])

    def held(x):
        return jnp.sum(forecaster.standardised(x)[0][:, 0])

    mean = jnp.mean(x, axis=1, keepdims=True)

    def by_hand(x):
        return ((x - mean) / jnp.sqrt(jnp.var(x, axis=1, keepdims=True) + 1e-5))[0, 0, 0]

    np.testing.assert_allclose(jax.grad(held)(x), jax.grad(by_hand)(x), atol=1e-6)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            lambda: model_of("itransformer", tokens="rows"),
            "tokens must be one of 'variates', 'time'",
        ),
        (lambda: model_of("itransformer")(*(x[:, :5] for x in histories())), r"\[B, 6, V\]; got"),
        (lambda: model_of("itransformer")(histories()[0]), r"calendar must be \[B, 6, 2\] .* None"),
        (
            lambda: model_of("itransformer", calendar=0)(*histories()),
            r"calendar must be None; got \(2, 6, 2\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()
