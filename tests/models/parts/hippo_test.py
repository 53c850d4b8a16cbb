"""The HiPPO matrices against loops over their definitions and against the functions that they stand
for."""

import math

import numpy as np
import pytest
from scipy.linalg import expm
from scipy.special import eval_laguerre, eval_legendre

from models.parts.hippo import HIPPO, correction, diagonal_plus_low_rank

RANK = {"legs": 1, "legt": 2, "lagt": 1, "fout": 1}
every_matrix = pytest.mark.parametrize("name", HIPPO)


def transcription(name, size):
    """A and B, element by element."""
    A, B = np.zeros((size, size)), np.zeros(size)
    for n in range(size):
        if name == "fout":
            B[n] = 0 if n % 2 else 1 if n == 0 else math.sqrt(2)
        else:
            r = math.sqrt(2 * n + 1)
            B[n] = {"legs": r, "legt": r / 2, "lagt": 1}[name]
        for k in range(size):
            product = math.sqrt(2 * n + 1) * math.sqrt(2 * k + 1)
            if name == "legs":
                A[n, k] = -product if n > k else -(n + 1) if n == k else 0
            elif name == "legt":
                A[n, k] = -product / 2 if n >= k else -product / 2 * (-1) ** (n - k)
            elif name == "lagt":
                A[n, k] = -1 if n > k else -0.5 if n == k else 0
            else:
                both = 0.0 if n % 2 or k % 2 else 2 / math.sqrt(2) ** ((n < 1) + (k < 1))
                A[n, k] = -both
                if n // 2 == k // 2 and n != k:
                    A[n, k] += math.pi * (n // 2) * (1 if n > k else -1)
    return A, B


@every_matrix
def test_a_matrix_is_what_its_definition_says(name):
    for got, want in zip(HIPPO[name](10), transcription(name, 10), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-13)


@every_matrix
@pytest.mark.parametrize("size", [2, 16, 64])
def test_what_is_left_after_the_correction_is_normal(name, size):
    (A, _), P = HIPPO[name](size), correction(name, size)
    assert P.shape == (size, RANK[name])
    S, real = A + P @ P.T, -0.5 if name == "legs" else 0.0
    np.testing.assert_allclose(S + S.T, 2 * real * np.eye(size), atol=1e-13 * size)


@every_matrix
@pytest.mark.parametrize("size", [2, 16, 64])
def test_a_matrix_is_diagonal_plus_low_rank(name, size):
    A, B = HIPPO[name](size)
    form = diagonal_plus_low_rank(name, size)
    eigenvalue, low_rank, V, write = (
        np.concatenate([half, half.conj()], axis=-1)
        for half in (form.eigenvalue, form.low_rank, form.V, form.write)
    )
    assert low_rank.shape == (RANK[name], size)
    np.testing.assert_allclose(V.conj().T @ V, np.eye(size), atol=1e-12)
    inner = np.diag(eigenvalue) - low_rank.T @ low_rank.conj()
    # Relative to the largest eigenvalue, about N^2.
    atol = 1e-14 * max(np.abs(eigenvalue).max(), size)
    np.testing.assert_allclose(V @ inner @ V.conj().T, A, atol=10 * atol)
    np.testing.assert_allclose(V @ write, B, atol=1e-12)
    assert (np.imag(form.eigenvalue) <= 0).all()
    assert set(np.real(form.eigenvalue)) == {-0.5 if name == "legs" else 0.0}


def test_the_fourier_matrix_turns_at_multiples_of_pi_and_has_a_pair_of_zeros():
    eigenvalue = diagonal_plus_low_rank("fout", 16).eigenvalue
    np.testing.assert_allclose(-np.imag(eigenvalue), np.pi * np.arange(8)[::-1], atol=1e-12)
    assert eigenvalue[-1] == 0


def responses(name, size, states, length=3.0, points=1501):
    """Times, and (e^(tA) B)_n of the first states."""
    A, B = HIPPO[name](size)
    time = np.linspace(0, length, points)
    step, h, rows = expm(A * time[1]), B, []
    for _ in time:
        rows.append(h[:states])
        h = step @ h
    return time, np.stack(rows, axis=1)


@pytest.mark.parametrize("name", ["legs", "lagt"])
def test_states_of_the_whole_past_have_closed_forms_at_every_size(name):
    time, got = responses(name, 12, 12)
    for n, row in enumerate(got):
        if name == "legs":
            want = np.exp(-time) * eval_legendre(n, 2 * np.exp(-time) - 1)
            want = math.sqrt(2 * n + 1) * want
        else:
            want = np.exp(-time / 2) * eval_laguerre(n, time)
        np.testing.assert_allclose(row, want, atol=1e-9, err_msg=f"state {n}")


@pytest.mark.parametrize("name", ["legt", "fout"])
def test_states_of_a_window_approach_its_polynomials_and_waves(name):
    errors = []
    for size in (16, 64):
        time, got = responses(name, size, 6)
        want = []
        for n in range(6):
            if name == "legt":
                function = math.sqrt(2 * n + 1) / 2 * eval_legendre(n, 1 - time)
            else:
                wave = (np.cos, np.sin)[n % 2](np.pi * (n // 2) * time)
                function = wave * (1 if n < 2 else math.sqrt(2)) / 2
            want.append(np.where(time < 2, function, 0))
        errors.append(np.sqrt(np.mean((got - want) ** 2, axis=1)))
    # The function jumps at both ends of the window, so that its series converges in the mean, as
    # N^(-1/2).
    coarse, fine = errors
    reached = coarse > 0  # nothing reaches the sine of frequency 0
    assert reached.sum() == (6 if name == "legt" else 5)
    assert (fine[reached] < 0.6 * coarse[reached]).all() and fine.max() < 0.1


@every_matrix
@pytest.mark.parametrize("size", [0, 5])
def test_modes_that_do_not_pair_are_refused(name, size):
    with pytest.raises(ValueError, match=f"must be even and positive.* got {size}"):
        diagonal_plus_low_rank(name, size)
