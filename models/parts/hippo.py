"""HiPPO, the matrices behind the initial states of S4, S4D and S5 (Gu, Dao, Ermon, Rudra, Re,
"HiPPO", NeurIPS 2020, arXiv 2008.07669), and matrices near them that have eigenvectors.

    h' = A h + B u        basis_n(t) = (e^(tA) B)_n: what h_n(t) holds of an impulse t ago

    legs    A_nk = -sqrt(2n+1) sqrt(2k+1) (n > k), -(n+1) (n = k), 0 (n < k);   B_n = sqrt(2n+1)
            basis_n = sqrt(2n+1) e^-t P_n(2 e^-t - 1): Legendre polynomials, all of the past
    legt    A_nk = -sqrt(2n+1) sqrt(2k+1) / 2, times (-1)^(n-k) (n < k);   B_n = sqrt(2n+1) / 2
            basis_n -> sqrt(2n+1) P_n(1 - t) / 2 for t < 2, 0 beyond, as N grows: Legendre
            polynomials, a window
    lagt    A_nk = -1 (n > k), -1/2 (n = k), 0 (n < k);   B_n = 1
            basis_n = e^(-t/2) L_n(t): Laguerre functions
    fout    A = F - B B^T, F_{2m+1,2m} = -F_{2m,2m+1} = pi m;   B = (1, 0, sqrt(2), 0, sqrt(2), 0,
            ...) basis_2m, basis_2m+1 -> cos(pi m t), sin(pi m t), times B_2m / 2, for t < 2: a
            Fourier series of a window (Gu, Johnson, Timalsina, Rudra, Re, "How to Train Your
            HiPPO", ICLR 2023, arXiv 2206.12037)

legt and fout are half of what the papers print, as in the authors' code: a window of length 2 where
theirs has 1, and steps of a size that suits legs. A alone has no eigenvectors that float64 could
hold. Two matrices near it have:

- S = A + P P^T with P [N, R] (`correction`) is normal, S + S^T = 2 Re(Lambda) I: S = V Lambda V*
  with a unitary V and Lambda = -1/2 + i omega for legs, i omega for the others, omega in pairs +-
  (S4: Gu, Goel, Re, ICLR 2022, arXiv 2111.00396, Theorem 1). P P^T is not small. R is 2 for legt,
  else 1.
- A + E with a small real E that is found by minimising cond(V) + gamma |E|_F over E, V the
  eigenvectors of A + E with unit columns: perturb then diagonalise (PTD: Yu, Nigmetov, Morozov,
  Mahoney, Erichson, ICLR 2024, arXiv 2310.01698), for legs. For unit input and output vectors and
  |E|_2 < 1/2 no response changes by more than 4 |E| / (1 - 2 |E|).

Everything here is numpy in float64, computed once when a model is built.
"""

import functools
import math
from typing import Annotated, NamedTuple

import numpy as np
from scipy.optimize import minimize

from models.parts.options import Range

# A matrix N x N per channel, or the eigenvectors of one, found before anything is traced.
HippoSize = Annotated[int, Range(2, 2048)]


def legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A [N, N] and B [N]."""
    root = np.sqrt(2 * np.arange(size) + 1)
    return -np.tril(np.outer(root, root), -1) - np.diag(np.arange(size) + 1.0), root


def legt(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A [N, N] and B [N]."""
    n, (_, root) = np.arange(size), legs(size)
    sign = np.where(n[:, None] < n[None], (-1.0) ** (n[:, None] - n[None]), 1.0)
    return -sign * np.outer(root, root) / 2, root / 2


def lagt(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A [N, N] and B [N]."""
    return np.eye(size) / 2 - np.tril(np.ones((size, size))), np.ones(size)


def fout(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A [N, N] and B [N], N even. Nothing reaches state 1, the sine of frequency 0."""
    rotations = np.zeros(size - 1)  # of 2m into 2m + 1, none of 2m + 1 into 2m + 2
    rotations[::2] = np.pi * np.arange(size // 2)
    B = np.zeros(size)
    B[::2] = math.sqrt(2)
    B[0] = 1
    return np.diag(rotations, -1) - np.diag(rotations, 1) - np.outer(B, B), B


HIPPO = {"legs": legs, "legt": legt, "lagt": lagt, "fout": fout}


def correction(name: str, size: int) -> np.ndarray:
    """P [N, R] with a normal A + P P^T."""
    _, B = HIPPO[name](size)
    if name == "legt":
        even = np.arange(size) % 2 == 0
        return math.sqrt(2) * np.stack([B * even, B * ~even], axis=1)
    return B[:, None] if name == "fout" else B[:, None] / math.sqrt(2)


class DiagonalPlusLowRank(NamedTuple):
    """One of each conjugate pair of modes: with V', Lambda', p', b' that have the other too,
    A = V' (Lambda' - p' p'*) V'* and B = V' b'.

    eigenvalue [N/2]    Lambda; omega <= 0, the fastest first
    V [N, N/2]          orthonormal columns
    low_rank [R, N/2]   p^T = (V* P)^T
    write [N/2]         b = V* B
    """

    eigenvalue: np.ndarray
    V: np.ndarray
    low_rank: np.ndarray
    write: np.ndarray


def diagonal_plus_low_rank(name: str, size: int) -> DiagonalPlusLowRank:
    """The form of a matrix of `HIPPO` in which S4 has it.

    2 Re(V diag(f(Lambda)) V* B) = f(S) B for a real B. Raises ValueError for an odd or non-positive
    size."""
    if size < 2 or size % 2:
        raise ValueError(
            "the size of a HiPPO matrix must be even and positive, so that its modes"
            f" pair; got {size}"
        )
    (A, B), P = HIPPO[name](size), correction(name, size)
    skew = A + P @ P.T
    skew = (skew - skew.T) / 2
    # Hermitian, unlike S: orthonormal eigenvectors, real omega in rising order.
    omega, V = np.linalg.eigh(-1j * skew)
    half = size // 2
    omega, V = omega[:half], V[:, :half]
    if name == "fout":
        # Of a pair of zeros eigh may return any vectors: states 0 and 1 as real and imaginary part.
        omega[-1], V[:, -1] = 0, 0
        V[:2, -1] = np.array([1, 1j]) / math.sqrt(2)
    real = -0.5 if name == "legs" else 0.0
    adjoint = V.conj().T
    return DiagonalPlusLowRank(real + 1j * omega, V, (adjoint @ P).T, adjoint @ B)


def normal_legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Lambda [N/2] and V [N, N/2] of HiPPO-LegS; `diagonal_plus_low_rank` says what they are."""
    form = diagonal_plus_low_rank("legs", size)
    return form.eigenvalue, form.V


@functools.cache
def perturbed_legs(size: int, gamma: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lambda [N/2], V [N, N/2] and the rows [N/2, N] of the inverse of all of V: the modes of A + E
    with omega < 0.

    2 Re(V diag(f(Lambda)) V^-1 B) = f(A + E) B for a real B. A larger gamma gives a smaller E and a
    worse condition of V; 1 gives relative sizes |E|_2 / |A|_2 of 3.5 % at N = 16 and 0.8 % at N =
    64 with conditions 7 and 25. Half a second for N = 64, grows with N^3. Raises ValueError for an
    odd or non-positive size and where no E without real eigenvalues is found."""
    A, _ = legs(size)
    normal_legs(size)  # checks the size
    if gamma <= 0:
        raise ValueError(f"gamma must be greater than 0; got {gamma}")
    # The minimum that a start leads to has no real eigenvalue, or two, which could not be halved.
    for seed in range(32):
        start = np.random.default_rng(seed).normal(0, 0.05, size * size)
        found = minimize(_condition_and_size, start, (A, gamma), jac=True, method="L-BFGS-B")
        eigenvalue, V = np.linalg.eig(A + found.x.reshape(size, size))
        real, omega = np.real(eigenvalue), np.imag(eigenvalue)
        if np.all(omega != 0) and np.all(real < 0):
            inverse = np.linalg.inv(V)
            kept = np.argsort(omega)[: size // 2]  # omega < 0, the fastest first
            return eigenvalue[kept], V[:, kept], inverse[kept]
    raise ValueError(
        "found no perturbation of HiPPO-LegS whose eigenvalues come in conjugate pairs"
        f" for size {size} and gamma {gamma}; use another size"
    )


def _condition_and_size(flat: np.ndarray, A: np.ndarray, gamma: float) -> tuple[float, np.ndarray]:
    """cond(V) + gamma |E|_F and its gradient by E (flat).

    With A + E = V Lambda V^-1, X = F . (V^-1 dE V) and F_ij = 1 / (lambda_j - lambda_i), F_ii = 0,
    unit columns move by dV = V X - V Diag(Re v_j* (V X)_j), and d cond = Re tr(W* dV) with W = (u_1
    w_1* - cond u_N w_N*) / s_N of the singular vectors of V."""
    E = flat.reshape(A.shape)
    eigenvalue, V = np.linalg.eig(A + E)
    U, singular, W = np.linalg.svd(V)
    condition = singular[0] / singular[-1]
    by_V = np.outer(U[:, 0], W[0]) - condition * np.outer(U[:, -1], W[-1])
    G = V.conj().T @ by_V / singular[-1]
    G = G - V.conj().T @ V * np.real(np.diag(G))[None]
    gap = eigenvalue[None] - eigenvalue[:, None]
    np.fill_diagonal(gap, np.inf)
    gradient = np.real(np.linalg.inv(V).conj().T @ (G / gap.conj()) @ V.conj().T)
    norm = np.linalg.norm(E)
    return condition + gamma * norm, (gradient + gamma * E / norm).ravel()
