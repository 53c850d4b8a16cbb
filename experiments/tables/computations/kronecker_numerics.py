"""How far Kronecker attention by a polynomial is from that by the exponential, in float64.

After Alman and Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
Attention to Kronecker Computation", ICLR 2024, arXiv 2310.04064: entries of q and of both keys up
to a bound B have scores up to B^3, on which the Taylor polynomial of degree g is off by about B^(3
(g + 1)) / (g + 1)!."""

import math

import numpy as np

TOKENS, KEY, VALUE = 64, 3, 8


def measure(bound: float, degree: int, seed: int) -> dict[str, dict[str, float]]:
    """{"polynomial": {"error_log10", "negative"}} for entries uniform on [-bound, bound], and
    values on [-1, 1].

    error_log10     the decimal logarithm of the largest difference of an output
    negative        of a hundred queries, those whose denominator is not positive
    """
    rng = np.random.default_rng(seed)
    q, k1, k2 = rng.uniform(-bound, bound, (3, TOKENS, KEY))
    v1, v2 = rng.uniform(-1, 1, (2, TOKENS, VALUE))
    A = np.einsum("il,jl,kl->ijk", q, k1, k2) / KEY

    def outputs(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total = weights.sum((1, 2))
        return np.einsum("ijk,jv,kv->iv", weights, v1, v2) / total[:, None], total

    exact, _ = outputs(np.exp(A))
    polynomial = np.ones_like(A)
    for power in range(1, degree + 1):
        polynomial += A**power / math.factorial(power)
    near, total = outputs(polynomial)
    return {
        "polynomial": {
            "error_log10": math.log10(np.abs(near - exact).max()),
            "negative": float(100 * np.mean(total <= 0)),
        }
    }
