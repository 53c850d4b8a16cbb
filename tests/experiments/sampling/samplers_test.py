"""Samplers on a Gaussian, whose best model, and whose samples, are known in closed form."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.objectives.flow_matching import FlowMatching
from experiments.objectives.noise_prediction import NoisePrediction
from experiments.objectives.noise_schedules import chain
from experiments.sampling.samplers import Sampler, draw, guided, picture_keys

# Images of two correlated pixels.
MEAN = np.array([0.5, -0.3])
COVARIANCE = np.array([[0.30, 0.12], [0.12, 0.10]])
VALUES, VECTORS = np.linalg.eigh(COVARIANCE)
SHAPE = (1, 2, 1)
FLOW = FlowMatching(classes=2)
NOISE = NoisePrediction(classes=2, steps=200, learned_variance=False)


def conditional(x, signal, noise):
    """E[image | x_t], E[noise | x_t] of x_t = signal image + noise e."""
    values, vectors = jnp.asarray(VALUES[None], jnp.float32), jnp.asarray(VECTORS, jnp.float32)
    mean, total = jnp.asarray(MEAN[None], jnp.float32), signal**2 * values + noise**2
    apart = (x - signal * mean) @ vectors
    return mean + (apart * signal * values / total) @ vectors.T, (apart * noise / total) @ vectors.T


def velocity(x, time_B):
    t = time_B[0] / 1000
    image, noise = conditional(x.reshape(-1, 2), 1 - t, t)
    return (noise - image).reshape(x.shape)


def of_steps(objective):
    """The best model of noise, told any of the steps of its chain."""
    numbers = chain(objective.schedule, objective.steps)

    def predict(x, time_B):
        step = jnp.round(time_B[0] * objective.steps / 1000).astype(jnp.int32)
        signal, noise = (jnp.asarray(a)[step] for a in (numbers.signal, numbers.noise))
        return conditional(x.reshape(-1, 2), signal, noise)[1].reshape(x.shape)

    return predict


def drawn(predict, objective, sampler, count=4):
    keys = picture_keys(5, np.arange(count))
    return jax.jit(lambda keys: draw(predict, objective, sampler, keys, SHAPE))(keys)


def first_noise(count):
    keys = picture_keys(5, np.arange(count))
    own = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), SHAPE))(keys)
    return np.asarray(own, np.float64).reshape(-1, 2)


def moments_fit(images, mean=MEAN, covariance=COVARIANCE):
    """Within four standard errors."""
    x = np.asarray(images, np.float64).reshape(-1, 2)
    error = np.sqrt(np.diag(covariance) / len(x))
    assert (np.abs(x.mean(axis=0) - mean) < 4 * error).all()
    variances = np.diag(covariance)
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / len(x))
    assert (np.abs(np.cov(x.T) - covariance) < 4 * error).all()


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_on_straight_lines_falls_with_the_order_of_the_method(name, order):
    z = first_noise(4)
    exact = MEAN + (z @ VECTORS) * np.sqrt(VALUES) @ VECTORS.T
    errors = []
    for steps in (20, 40):
        found = drawn(velocity, FLOW, Sampler(name, steps)).images
        errors.append(np.abs(np.asarray(found).reshape(-1, 2) - exact).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_heun_is_of_order_two_on_a_chain_and_euler_of_order_one():
    """To the last step before the image, whose size does not shrink with the others: to where a
    finer chain ends, too."""
    objective = dataclasses.replace(NOISE, steps=1000)
    numbers = chain("linear", 1000)
    z = first_noise(4) @ VECTORS
    places = {"signal": numbers.signal[-1], "noise": numbers.noise[-1]}
    a, b = (np.float64(places[name]) for name in ("signal", "noise"))
    begin = (z - a * (MEAN @ VECTORS)) / np.sqrt(a**2 * VALUES + b**2)
    exact = MEAN + (begin * np.sqrt(VALUES)) @ VECTORS.T
    found = {
        (name, steps): np.abs(
            np.asarray(drawn(of_steps(objective), objective, Sampler(name, steps)).images).reshape(
                -1, 2
            )
            - exact
        ).max()
        for name in ("euler", "heun")
        for steps in (125, 250)
    }
    assert math.log2(found["euler", 125] / found["euler", 250]) == pytest.approx(1, abs=0.3)
    assert found["heun", 250] < found["euler", 250] / 20


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_a_chain_ends_in_the_gaussian(name, eta):
    sampler = Sampler(name, 200, eta=eta)
    x = drawn(of_steps(NOISE), NOISE, sampler, count=20_000).images
    mean, covariance = moments_of_the_chain(sampler)
    moments_fit(x, mean, covariance)
    # The variance of the posterior is that of one image: what a chain of few steps lacks is known,
    # and small here.
    assert np.abs(covariance - COVARIANCE).max() < 0.02


def moments_of_the_chain(sampler):
    """Mean and covariance that a chain with the best model ends in, step by step in float64, along
    the eigenvectors, in which each number is on its own."""
    kept = chain("linear", 200)
    m, mean, variance = MEAN @ VECTORS, np.zeros(2), np.ones(2)
    for t in range(199, -1, -1):
        signal, noise = np.float64(kept.signal[t]), np.float64(kept.noise[t])
        total = signal**2 * VALUES + noise**2
        gain, of_noise = signal * VALUES / total, noise / total
        posterior = np.exp(np.float64(kept.log_posterior[t]))
        if sampler.name == "ddpm":
            of_image, rest = np.float64(kept.of_image[t]), np.float64(kept.of_noisy[t])
            factor = of_image * gain + rest
            offset = of_image * (m - gain * signal * m)
            fresh = posterior
        else:
            s, n = (
                (np.float64(kept.signal[t - 1]), np.float64(kept.noise[t - 1])) if t else (1.0, 0.0)
            )
            fresh = sampler.eta**2 * posterior if t else 0.0
            along = np.sqrt(max(n**2 - fresh, 0))
            factor = s * gain + along * of_noise
            offset = s * (m - gain * signal * m) - along * of_noise * signal * m
        mean = factor * mean + offset
        variance = factor**2 * variance + (fresh if t else 0.0)
    return VECTORS @ mean, (VECTORS * variance) @ VECTORS.T


def test_ddpm_with_the_true_variance_of_each_step_is_exact():
    """One number, whose variance of the step before is between that of the posterior and beta: what
    a learned variance can say."""
    objective = dataclasses.replace(NOISE, learned_variance=True, steps=25)
    numbers, mean, deviation = chain("linear", 25), 0.4, 0.8

    def predict(x, time_B):
        step = jnp.round(time_B[0] * 25 / 1000).astype(jnp.int32)
        at = type(numbers)(*(jnp.asarray(a)[step] for a in numbers))
        total = at.signal**2 * deviation**2 + at.noise**2
        noise = at.noise * (x - at.signal * mean) / total
        # Of the image, given x_t, then of the step before.
        of_image = deviation**2 * at.noise**2 / total
        posterior = jnp.where(step == 0, 0.0, jnp.exp(at.log_posterior))
        variance = posterior + at.of_image**2 * of_image
        share = (jnp.log(variance) - at.log_posterior) / (at.log_beta - at.log_posterior)
        return jnp.concatenate((noise, jnp.broadcast_to(2 * share - 1, x.shape)), axis=-1)

    x = drawn(predict, objective, Sampler("ddpm", 25), count=20_000).images
    # The last step draws nothing: what is left is the variance of E[image | x_0].
    of_signal = np.float64(numbers.signal[0]) ** 2 * deviation**2
    variance = deviation**2 * of_signal / (of_signal + np.float64(numbers.noise[0]) ** 2)
    assert np.mean(x) == pytest.approx(mean, abs=4 * deviation / 200)
    assert np.var(x) == pytest.approx(variance, rel=4 * math.sqrt(2) / 200)


def test_euler_on_noise_is_ddim_without_fresh_noise():
    one, other = (
        drawn(of_steps(NOISE), NOISE, Sampler(name, 20)).images for name in ("euler", "ddim")
    )
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_picture_depends_on_its_number_and_the_seed_alone():
    sampler = Sampler("ddpm", 10)
    drawn_by = jax.jit(lambda keys: draw(of_steps(NOISE), NOISE, sampler, keys, SHAPE).images)

    def of(seed, numbers):
        return np.asarray(drawn_by(picture_keys(seed, numbers)))

    whole = of(1, np.arange(6))
    np.testing.assert_array_equal(of(1, np.array([4, 2, 4, 0, 1, 5]))[[1, 2, 5]], whole[[2, 4, 5]])
    assert np.abs(of(2, np.arange(6)) - whole).min() > 0


def test_the_guess_of_an_image_can_be_kept_where_pixels_are():
    def far(x, time_B):
        return of_steps(NOISE)(x, time_B) - 2.0

    clipped, free = (drawn(far, NOISE, Sampler("ddim", 5, clip=clip)) for clip in (True, False))
    assert np.abs(clipped.images).max() <= 1 < np.abs(free.images).max()


def test_guidance_moves_away_from_what_is_said_without_a_class():
    def model(image, time_B, class_B):
        said = image + 10.0 * class_B[:, None, None, None]
        return jnp.concatenate((said, said), axis=-1)

    class_B, image = jnp.array([0, 1]), jnp.ones((2, *SHAPE))
    time_B = jnp.zeros(2)
    plain = model(image, time_B, class_B)
    np.testing.assert_array_equal(guided(model, class_B, 2, 1.0)(image, time_B), plain)
    strong = guided(model, class_B, 2, 3.0)(image, time_B)
    want = 21.0 + 3 * (plain[..., :1] - 21.0)
    np.testing.assert_allclose(strong[..., :1], want)
    np.testing.assert_array_equal(strong[..., 1:], plain[..., 1:])
    none = guided(model, class_B, 2, 0.0)(image, time_B)
    np.testing.assert_allclose(none[..., :1], 21.0)


def test_a_picture_that_breaks_says_when_and_spares_the_others():
    def predict(x, time_B):
        bad = (time_B < 500)[:, None, None, None] & (jnp.arange(len(x)) == 1)[:, None, None, None]
        return jnp.where(bad, jnp.nan, of_steps(NOISE)(x, time_B))

    for name in ("ddpm", "euler", "heun"):
        found = drawn(predict, NOISE, Sampler(name, 10))
        assert np.isfinite(np.asarray(found.images)[[0, 2, 3]]).all()
        # Step k is told 995, 885, ...: step 5 is the first below 500; heun's fourth looks ahead.
        assert found.broken.tolist() == [10, 4 if name == "heun" else 5, 10, 10]


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (FLOW, {"name": "ddpm"}, "sampler must be one of 'euler', 'heun'; got 'ddpm'"),
        (NOISE, {"name": "dpm"}, "sampler must be one of 'ddpm', 'ddim', 'euler', 'heun'"),
        (NOISE, {"steps": 201}, r"steps must be in 1..200; got 201"),
        (FLOW, {"name": "heun", "steps": 0}, r"steps must be in 1..100000; got 0"),
        (NOISE, {"guidance": -1.0}, "guidance must be a finite number >= 0; got -1.0"),
        (NOISE, {"guidance": math.nan}, "guidance must be a finite number >= 0; got nan"),
        (NOISE, {"name": "ddim", "eta": 1.5}, r"eta must be in \[0, 1\]; got 1.5"),
        (NOISE, {"eta": 0.5}, "eta must be 0 for the sampler 'ddpm'; got 0.5"),
        (FLOW, {"name": "euler", "clip": True}, "clip must be False for the sampler 'euler'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(objective, options, message):
    given: Any = {"name": "ddpm", "steps": 10, **options}
    with pytest.raises(ValueError, match=message):
        Sampler(**given).check(objective)
