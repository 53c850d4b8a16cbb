"""The loss of DiT against a loop over images in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from experiments.objectives.noise_prediction import NoisePrediction, log_probability_of_level
from experiments.objectives.noise_schedules import cumulative

OBJECTIVE = NoisePrediction(classes=3, steps=25)
RNG = np.random.default_rng(0)
LEVELS = RNG.integers(0, 256, (8, 2, 2, 1))
BATCH = {
    "image": (LEVELS / 127.5 - 1).astype(np.float32),
    "labels": np.arange(8) % 3,
    "weights": np.array([1, 1, 1, 1, 1, 1, 2, 0], np.float32),
}


def toy(image, time, label):
    """Some noise and some v, of all that a model is told."""
    told = (time / 1000 + label)[:, None, None, None]
    return jnp.concatenate((0.7 * image - 0.1 * told, jnp.tanh(image + told)), axis=-1)


def transcription(x, e, t, output):
    """(squared error, bits) of one image."""
    a = np.append(cumulative("linear", 25), 1.0)  # a[-1] is that before the first step
    beta = 1 - a[t] / a[t - 1]
    posterior = [
        beta_of * (1 - a[s - 1]) / (1 - a[s])
        for s in range(25)
        for beta_of in [1 - a[s] / a[s - 1]]
    ]
    posterior[0] = posterior[1]
    predicted, v = output[..., :1], output[..., 1:]
    noisy = math.sqrt(a[t]) * x + math.sqrt(1 - a[t]) * e

    def mean(image):
        return (
            math.sqrt(a[t - 1]) * beta * image + math.sqrt(1 - beta) * (1 - a[t - 1]) * noisy
        ) / (1 - a[t])

    log_variance = (v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(posterior[t])
    model_mean = mean((noisy - math.sqrt(1 - a[t]) * predicted) / math.sqrt(a[t]))
    deviation = np.exp(log_variance / 2)
    if t == 0:
        high, low = (norm((model_mean), deviation).cdf(x + sign / 255) for sign in (1, -1))
        high, low = np.where(x > 0.999, 1, high), np.where(x < -0.999, 0, low)
        nats = -np.log(high - low)
    else:
        nats = np.log(deviation / math.sqrt(posterior[t])) - 0.5
        nats = nats + (posterior[t] + (mean(x) - model_mean) ** 2) / (2 * deviation**2)
    return ((predicted - e) ** 2).mean(), nats.mean() / math.log(2)


def test_the_loss_is_the_error_of_the_noise_and_the_bound():
    key = jax.random.key(3)
    loss, sums = jax.jit(lambda key: OBJECTIVE(toy, BATCH, key))(key)
    step_B, noise, class_B = OBJECTIVE.drawn(BATCH, key)
    noisy, time_B = OBJECTIVE.noisy(BATCH["image"], noise, step_B)
    np.testing.assert_allclose(time_B, 40 * np.asarray(step_B))
    output = np.asarray(toy(noisy, time_B, class_B), np.float64)
    rows = [
        transcription(*(np.asarray(a[i], np.float64) for a in (BATCH["image"], noise)), int(t), o)
        for i, (t, o) in enumerate(zip(step_B, output, strict=True))
    ]
    square, bits = np.average(rows, axis=0, weights=BATCH["weights"])
    metrics = OBJECTIVE.metrics(sums)
    assert metrics["mse"] == pytest.approx(square, rel=1e-5)
    assert metrics["bound"] == pytest.approx(bits, rel=1e-3)
    assert float(loss) == pytest.approx(metrics["loss"], rel=1e-6)
    assert metrics["loss"] == pytest.approx(square + 25 / 1000 * bits, rel=1e-4)


def test_the_first_step_is_the_probability_of_a_level():
    probability = jax.jit(log_probability_of_level)
    mean = (LEVELS[:2].reshape(-1) / 127.5 - 1).astype(np.float32)
    everything = (np.arange(256)[:, None] / 127.5 - 1).astype(np.float32)
    of_all = np.exp(probability(everything, mean[None], np.float32(-2)))
    np.testing.assert_allclose(of_all.sum(axis=0), 1, rtol=1e-5)
    # Far in the tail the difference of two probabilities is 0, and its log not finite.
    far = np.array([[-0.9], [0.0]], np.float32)
    got = probability(np.full((2, 1), 0.9, np.float32), far, np.float32(-4))
    above = norm(0, math.exp(-4)).logsf([0.9 - far - 1 / 255, 0.9 - far + 1 / 255])
    want = above[0] + np.log1p(-np.exp(above[1] - above[0]))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_bound_moves_the_variance_and_not_the_noise():
    output = jnp.asarray(RNG.standard_normal((8, 2, 2, 2)), jnp.float32)

    def loss(output, objective):
        return objective(lambda *_: output, BATCH, jax.random.key(0))[0]

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    both = gradient(output, OBJECTIVE)
    plain = dataclasses.replace(OBJECTIVE, learned_variance=False)
    alone = gradient(output[..., :1], plain)
    np.testing.assert_allclose(both[..., :1], alone, rtol=1e-6)
    assert float(jnp.abs(both[:7, ..., 1:]).min()) > 0
    np.testing.assert_array_equal(both[7], 0)  # a row of weight 0


def test_a_perfect_prediction_has_no_error_and_least_bits_at_the_posterior():
    step_B, noise, _ = OBJECTIVE.drawn(BATCH, jax.random.key(0))
    step_B = jnp.maximum(step_B, 2)
    least = jnp.full_like(noise, -1.0)  # log variance of the posterior itself
    bound = jax.jit(OBJECTIVE.bound)(BATCH["image"], noise, step_B, noise, least)
    np.testing.assert_allclose(bound, 0, atol=1e-6)


def test_the_share_of_images_without_a_class_is_that_of_the_option():
    batch = {"image": np.zeros((4000, 1, 1, 1)), "labels": np.zeros(4000, int)}
    _, _, class_B = dataclasses.replace(OBJECTIVE, class_dropout=0.3).drawn(
        batch, jax.random.key(0)
    )
    assert set(np.unique(class_B)) == {0, 3}
    assert np.mean(class_B == 3) == pytest.approx(0.3, abs=0.03)


def test_a_batch_without_images_is_refused():
    with pytest.raises(ValueError, match="objective NoisePrediction must have 'image'; got labels"):
        OBJECTIVE.work({"labels": BATCH["labels"]})
