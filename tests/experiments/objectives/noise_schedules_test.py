"""Schedules against a loop over steps, and the step before against Bayes' rule."""

import numpy as np
import pytest

from experiments.objectives.noise_schedules import chain, cumulative


def test_signals_are_products_over_the_steps_and_end_in_noise():
    for schedule in ("linear", "cosine"):
        a = cumulative(schedule, 1000)
        assert (np.diff(a) < 0).all() and a[0] > 0.999 and a[-1] < 1e-4
    product = 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
    assert cumulative("linear", 1000)[-1] == pytest.approx(product, rel=1e-12)
    half = np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert cumulative("cosine", 1000)[499] == pytest.approx(half, rel=1e-9)


@pytest.mark.parametrize("kept", [None, 7])
def test_the_step_before_is_what_the_image_and_the_noisy_one_say(kept):
    """x_s ~ N(signal_s x, noise_s^2) before it is known that x_t = c x_s + N(0, beta)."""
    found = chain("linear", 50, kept)
    for t in range(1, len(found.time)):
        signal, noise = np.float64(found.signal[t - 1]), np.float64(found.noise[t - 1])
        c = np.float64(found.signal[t]) / signal
        beta = np.exp(np.float64(found.log_beta[t]))
        assert c**2 + beta == pytest.approx(1, rel=1e-5)
        variance = 1 / (1 / noise**2 + c**2 / beta)
        assert np.exp(found.log_posterior[t]) == pytest.approx(variance, rel=1e-4)
        assert found.of_image[t] == pytest.approx(variance * signal / noise**2, rel=1e-4)
        assert found.of_noisy[t] == pytest.approx(variance * c / beta, rel=1e-4)


def test_kept_steps_are_steps_of_the_whole():
    whole, part = chain("cosine", 100), chain("cosine", 100, 5)
    np.testing.assert_array_equal(part.time, [0, 250, 500, 740, 990])
    places = np.searchsorted(whole.time, part.time)
    np.testing.assert_array_equal(part.signal, whole.signal[places])
    assert chain("cosine", 100, 1).time == [990]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="schedule must be one of 'linear', 'cosine'; got 'sine'"):
        cumulative("sine", 100)
    with pytest.raises(ValueError, match=r"steps must be in 1..100, those of training; got 101"):
        chain("linear", 100, 101)
