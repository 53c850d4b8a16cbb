"""Exact risks and minimisers of one-layer linear self-attention on in-context linear regression.

Zhang, Frei, Bartlett, "Trained Transformers Learn Linear Models In-Context", JMLR 2024, arXiv
2306.09927 (ZFB); Mahankali, Hashimoto, Ma, "One Step of Gradient Descent is Provably the Optimal
In-Context Learner with One Layer of Linear Self-Attention", ICLR 2024, arXiv 2307.03576.

A prompt has N examples x_i ~ N(0, Lam) in R^d with labels y_i = w^T x_i + s xi_i, xi_i ~ N(0, 1), w
~ N(0, Psi). The layer predicts x_q^T P h with h = (1/N) sum_i y_i x_i. Risks are excess risks, E
(prediction - w^T x_q)^2: the noise of the query's own label is not in them.

    Lam     covariance [d, d]             P     preconditioner [d, d]
    Psi     task_covariance [d, d]        N     examples
            None: I                       M     examples at test time
    s       noise, a standard deviation

All functions take and return float64 numpy.
"""

import numpy as np


def second_moment(
    covariance: np.ndarray,
    examples: int,
    noise: float = 0.0,
    task_covariance: np.ndarray | None = None,
) -> np.ndarray:
    """E[h h^T] = (1 + 1/N) Lam Psi Lam + (tr(Lam Psi) + s^2)/N Lam."""
    psi = _task_covariance(covariance, task_covariance)
    signal = np.trace(covariance @ psi) + noise**2
    return (1 + 1 / examples) * covariance @ psi @ covariance + signal / examples * covariance


def risk(
    preconditioner: np.ndarray,
    examples: int,
    context_covariance: np.ndarray,
    query_covariance: np.ndarray | None = None,
    noise: float = 0.0,
    task_covariance: np.ndarray | None = None,
) -> float:
    """R(P; M, Lc, Lq) = tr(Lq [P H_M(Lc) P^T - P Lc Psi - Psi Lc P^T + Psi]), of any P at any
    length and covariances.

    `query_covariance` None: that of the context.
    """
    p, context = preconditioner, context_covariance
    psi = _task_covariance(context, task_covariance)
    query = context if query_covariance is None else query_covariance
    moment = second_moment(context, examples, noise, psi)
    return float(
        np.trace(query @ (p @ moment @ p.T - p @ context @ psi - psi @ context @ p.T + psi))
    )


def optimal_preconditioner(
    covariance: np.ndarray,
    examples: int,
    noise: float = 0.0,
    task_covariance: np.ndarray | None = None,
) -> np.ndarray:
    """P* = Psi [(1 + 1/N) Lam Psi + (tr(Lam Psi) + s^2)/N I]^-1; for Psi = I it is Gamma^-1."""
    psi = _task_covariance(covariance, task_covariance)
    signal = np.trace(covariance @ psi) + noise**2
    identity = np.eye(len(covariance))
    return psi @ np.linalg.inv((1 + 1 / examples) * covariance @ psi + signal / examples * identity)


def gamma(covariance: np.ndarray, examples: int, noise: float = 0.0) -> np.ndarray:
    """Gamma = (1 + 1/N) Lam + (tr Lam + s^2)/N I (ZFB Theorem 4.1), for tasks w ~ N(0, I)."""
    identity = np.eye(len(covariance))
    return (1 + 1 / examples) * covariance + (np.trace(covariance) + noise**2) / examples * identity


def optimal_risk(covariance: np.ndarray, examples: int, noise: float = 0.0) -> float:
    """R* = tr(Lam (I - Gamma^-1 Lam)), the least risk of one layer for tasks w ~ N(0, I).

    With Lam = I it is d (d + 1 + s^2) / (N + d + 1 + s^2).
    """
    explained = covariance @ np.linalg.inv(gamma(covariance, examples, noise)) @ covariance
    return float(np.trace(covariance - explained))


def length_floor(covariance: np.ndarray, examples: int, noise: float = 0.0) -> float:
    """The risk that no test length removes, trained at N, w ~ N(0, I): sum_i lam_i (1 -
    lam_i/gamma_i)^2."""
    remainder = (
        np.eye(len(covariance)) - np.linalg.inv(gamma(covariance, examples, noise)) @ covariance
    )
    return float(np.trace(remainder.T @ covariance @ remainder))


def global_minimum(covariance: np.ndarray, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """(W_PV, W_KQ) that gradient flow finds without noise, both [d+1, d+1] (ZFB Theorem 4.1).

    W_PV = tr(Gamma^-2)^(1/4) [[0, 0], [0, 1]], W_KQ = tr(Gamma^-2)^(-1/4) [[Gamma^-1, 0], [0, 0]].
    """
    size = len(covariance)
    inverse = np.linalg.inv(gamma(covariance, examples))
    scale = np.trace(inverse @ inverse) ** 0.25
    w_pv, w_kq = np.zeros((size + 1, size + 1)), np.zeros((size + 1, size + 1))
    w_pv[-1, -1] = scale
    w_kq[:-1, :-1] = inverse / scale
    return w_pv, w_kq


def exponential_preconditioner(dimension: int, examples: int) -> float:
    """A_0 = 1 / (3 + (d + 5)/N), times I: the minimiser over prompts whose covariance is diagonal
    with Exp(1) entries.

    The general diagonal law has A_0 = E[Gamma Lam^2]^-1 E[Lam^2] (ZFB Theorem 5.1), with E lam^2 =
    2 and E lam^3 = 6 here."""
    return 1 / (3 + (dimension + 5) / examples)


def exponential_risk(dimension: int, examples: int) -> float:
    """d (1 - 2 A_0), the least risk over those prompts; it tends to d/3, not to 0, as N grows."""
    return dimension * (1 - 2 * exponential_preconditioner(dimension, examples))


def least_squares_risk(dimension: int, examples: int) -> float:
    """Minimum-norm least squares without noise, Lam = Psi = I: d - N below d examples, and 0 from
    there on."""
    return float(max(dimension - examples, 0))


def _task_covariance(covariance: np.ndarray, task_covariance: np.ndarray | None) -> np.ndarray:
    return np.eye(len(covariance)) if task_covariance is None else task_covariance
