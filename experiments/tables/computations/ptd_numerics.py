"""Numbers about HiPPO-LegS and the matrices that replace it: how well conditioned their
eigenvectors are, how far their responses are from its own, and what a tone in the input does to a
read-out trained without it.

    h' = M h + b u       M = A ("s4"), S = A + P P^T ("s4d", with b = B / 2), A + E ("ptd", and
                         "random": Gaussian E)

After Yu et al., "Robustifying State-space Models for Long Sequences via Approximate
Diagonalization", ICLR 2024, arXiv 2310.01698: the response of A is that of S times 1 + rho(i
omega), |rho| = |omega| / sqrt(omega^2 + N^2), so that S has resonances up to omega near N^2 / pi
that A has not, however large N is; the response of A + E differs from that of A by no more than the
size of E allows. Everything is numpy in float64."""

import math

import numpy as np
from scipy.linalg import expm
from scipy.ndimage import gaussian_filter1d

from models.parts.hippo import legs, normal_legs, perturbed_legs
from models.parts.options import check_choice

SYSTEMS = ("s4", "s4d", "ptd", "random")
# Of the delay task, in steps: its length, the width of the smoothed noise, and the delay.
LENGTH, SMOOTHING, DELAY = 6_000, 20, 40
STEP = 0.02
TONES = tuple(float(omega) for omega in np.round(np.geomspace(2, 140, 32), 2))


def system(
    name: str, size: int, *, gamma: float, relative: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """M [N, N] and b [N], real. `gamma` is that of "ptd", `relative` = |E|_2 / |A|_2 that of
    "random"."""
    check_choice("name", name, SYSTEMS)
    A, B = legs(size)
    if name == "s4":
        return A, B
    if name == "s4d":
        return A + np.outer(B, B) / 2, B / 2
    if name == "ptd":
        eigenvalue, V, inverse = perturbed_legs(size, gamma)
        return 2 * np.real(V * eigenvalue @ inverse), B
    E = np.random.default_rng(seed).standard_normal(A.shape)
    return A + E * relative * np.linalg.norm(A, 2) / np.linalg.norm(E, 2), B


def measure(
    name: str, size: int, gamma: float = 1.0, relative: float = 0.01, seed: int = 0
) -> dict[str, dict[str, float]]:
    """The numbers of one system.

    matrix      condition_log10 of the eigenvectors; distance_percent, |M - A|_2 / |A|_2; rightmost,
                the largest real part of an eigenvalue
    response    gap_percent, of `response_gap`"""
    M, b = system(name, size, gamma=gamma, relative=relative, seed=seed)
    A, B = legs(size)
    eigenvalue, V = np.linalg.eig(M)
    return {
        "matrix": {
            "condition_log10": math.log10(np.linalg.cond(V)),
            "distance_percent": float(100 * np.linalg.norm(M - A, 2) / np.linalg.norm(A, 2)),
            "rightmost": float(np.real(eigenvalue).max()),
        },
        "response": {"gap_percent": 100 * response_gap(M, b, A, B)},
    }


def response_gap(M: np.ndarray, b: np.ndarray, A: np.ndarray, B: np.ndarray) -> float:
    """max over omega of |(i omega - M)^-1 b - (i omega - A)^-1 B| / |B|: of the states, whatever is
    read from them."""
    size = len(A)
    poles = np.abs(np.imag(np.linalg.eigvals(M)))
    omega = np.concatenate([np.geomspace(1e-2, 10 * size**2, 800), poles])
    shift = 1j * omega[:, None, None] * np.eye(size)
    states, wanted = (
        np.linalg.solve(shift - matrix, np.broadcast_to(vector[:, None], (size, 1)))
        for matrix, vector in ((M, b), (A, B))
    )
    return float(np.linalg.norm(states - wanted, axis=(1, 2)).max() / np.linalg.norm(B))


def delay_under_tones(
    name: str, size: int, gamma: float = 1.0, relative: float = 0.01, seed: int = 0
) -> dict[str, dict[str, float]]:
    """{test: {"error_log10": number}} of a linear read-out of the states that delays a smooth
    signal: the decimal logarithm of the squared error over that of the prediction 0.

    The read-out is least squares on the states for one signal, with a ridge of 1e-6 of their
    energy. It is tested on another signal, alone ("clean") and with a tone of a tenth of its root
    mean square, at the largest eigenvalue of S ("spike") and at the frequencies TONES
    ("tone_<omega>"). "borrowed_clean" and "borrowed_spike" use the read-out that was fitted to the
    states of "s4": with one C, only the transfer functions differ. The dynamics are exact for an
    input held during each step."""
    rng = np.random.default_rng(seed)
    train, test = (
        signal / np.sqrt(np.mean(signal**2))
        for signal in gaussian_filter1d(rng.standard_normal((2, LENGTH)), SMOOTHING)
    )
    spike = float(-np.imag(normal_legs(size)[0][0]))
    labels = ("clean", "spike", *(f"tone_{omega:g}" for omega in TONES))
    omega_S1 = np.array([0.0, spike, *TONES])[:, None]
    tone_ST = 0.1 * math.sqrt(2) * np.cos(STEP * omega_S1 * np.arange(LENGTH))
    tone_ST[0] = 0

    def fit(states_TN: np.ndarray) -> np.ndarray:
        gram = states_TN.T @ states_TN
        ridge = 1e-6 * np.trace(gram) * np.eye(size)
        return np.linalg.solve(gram + ridge, states_TN.T @ train[:-DELAY])

    def states(name: str) -> np.ndarray:
        M, b = system(name, size, gamma=gamma, relative=relative, seed=seed)
        return held_states(M, b, np.concatenate([train[None], test + tone_ST]))

    def error_log10(states_TN: np.ndarray, read_N: np.ndarray) -> dict[str, float]:
        error = np.mean((states_TN @ read_N - test[:-DELAY]) ** 2)
        return {"error_log10": math.log10(error / np.mean(test[:-DELAY] ** 2))}

    states_STN = states(name)
    read_N = fit(states_STN[0])
    results = {
        label: error_log10(states_TN, read_N)
        for label, states_TN in zip(labels, states_STN[1:], strict=True)
    }
    borrowed_N = fit(states("s4")[0])
    for label, states_TN in zip(("clean", "spike"), states_STN[1:3], strict=True):
        results[f"borrowed_{label}"] = error_log10(states_TN, borrowed_N)
    return results


def held_states(M: np.ndarray, b: np.ndarray, signals_ST: np.ndarray) -> np.ndarray:
    """h DELAY or more steps after the start, from zero, for each of the signals: [S, T - DELAY,
    N]."""
    size = len(b)
    # Zero-order hold in one exponential: [[M, b], [0, 0]].
    step = expm(STEP * np.block([[M, b[:, None]], [np.zeros((1, size + 1))]]))
    h_SN, states = np.zeros((len(signals_ST), size)), []
    for u_S in signals_ST.T:
        h_SN = h_SN @ step[:size, :size].T + u_S[:, None] * step[None, :size, size]
        states.append(h_SN)
    return np.stack(states[DELAY:], axis=1)
