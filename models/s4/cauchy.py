"""The transfer function of a diagonal matrix less one of low rank, by Cauchy sums (Gu, Goel, Re,
"Efficiently Modeling Long Sequences with Structured State Spaces", ICLR 2022, arXiv 2111.00396,
Algorithm 1).

    c (s - Lambda + p p*)^-1 b = k_cb - k_cp (I + k_pp)^-1 k_pb
    k_xy = sum_n x_n y_n / (s - Lambda_n)

is Woodbury's identity. It loses its digits where an s is near a Lambda_n: all four sums are then
large and cancel. In general an s is no nearer to a mode than the step between frequencies. The
exception is s = 0, which is among the frequencies of kernels of every length and meets modes with
Lambda = 0 or nearly so. There the slowest mode stays out of the sums. Its real and imaginary part h
are unknowns beside v = p* (all modes),

    v + k_pp v - p* h = k_pb u,    p v - Lambda h = b u,    y = k_cb u + c h - k_cp v

Letters: D systems, M modes of which conjugates are implied, N = 2 M, R rank, X = R + 1, F
frequencies."""

import jax
import jax.numpy as jnp

from ops.dense_scan.powers import einsum


# The matrix of the sums, D N F numbers, is recomputed in the backward pass.
@jax.checkpoint
def transfer(
    eigenvalue_DM: jax.Array,
    p_DRM: jax.Array,
    b_DM: jax.Array,
    c_DM: jax.Array,
    sine_F: jax.Array,
    cosine_F: jax.Array,
) -> jax.Array:
    """c (i sine - cosine (Lambda - p p*))^-1 b with conjugates, complex64 [D, F].

    That is the transfer function at s = i sine / cosine, divided by the cosine: an infinite s is
    like any other. sine and cosine are float32, of angles above 0, up to pi / 2."""

    def with_conjugates(array: jax.Array) -> jax.Array:
        return jnp.concatenate([array, array.conj()], axis=-1)

    size = p_DRM.shape[1] + 1
    x_DXN = with_conjugates(jnp.concatenate([p_DRM.conj(), c_DM[:, None]], axis=1))
    y_DXN = with_conjugates(jnp.concatenate([p_DRM, b_DM[:, None]], axis=1))
    terms_DKN = (x_DXN[:, :, None] * y_DXN[:, None]).reshape(len(x_DXN), size**2, -1)
    eigenvalue_DN1 = with_conjugates(eigenvalue_DM)[..., None]
    cauchy_DNF = 1 / (1j * sine_F[None, None] - eigenvalue_DN1 * cosine_F[None, None])
    k_DKF = einsum("dkn,dnf->dkf", terms_DKN, cauchy_DNF)
    k_DXXF = k_DKF.reshape(-1, size, size, len(sine_F))
    # k_cb - k_cp (I + k_pp)^-1 k_pb is what Gauss's elimination of p leaves. It needs no pivots:
    # the Hermitian part of I + k_pp is at least I, and elimination keeps it so.
    low_rank_DRXF = jnp.eye(size)[None, :-1, :, None] + cosine_F[None, None, None] * k_DXXF[:, :-1]
    k_DXXF = jnp.concatenate([low_rank_DRXF, k_DXXF[:, -1:]], axis=1)
    for _ in range(size - 1):
        ratio_D1XF = k_DXXF[:, :1, 1:] / k_DXXF[:, :1, :1]
        k_DXXF = k_DXXF[:, 1:, 1:] - k_DXXF[:, 1:, :1] * ratio_D1XF
    return k_DXXF[:, 0, 0]


def transfer_at_zero(
    eigenvalue_DM: jax.Array, p_DRM: jax.Array, b_DM: jax.Array, c_DM: jax.Array
) -> jax.Array:
    """c (p p* - Lambda)^-1 b with conjugates, float32 [D]; the last mode is the slowest."""
    rank, slow = p_DRM.shape[1], slice(-1, None)

    def parts(array: jax.Array) -> jax.Array:
        """Of the slowest mode, as columns: [D, ..., 2]."""
        return jnp.concatenate([array[..., slow].real, array[..., slow].imag], axis=-1)

    x_DXM = jnp.concatenate([p_DRM.conj(), c_DM[:, None]], axis=1)
    y_DXM = jnp.concatenate([p_DRM, b_DM[:, None]], axis=1)
    weight_DM = -1 / eigenvalue_DM[:, :-1]
    k_DXX = 2 * einsum("dxm,dym,dm->dxy", x_DXM[..., :-1], y_DXM[..., :-1], weight_DM).real
    # x h and its conjugate: 2 (Re x Re h - Im x Im h)
    x_DX2 = 2 * parts(x_DXM.conj())
    re, im = jnp.unstack(parts(eigenvalue_DM), axis=-1)
    lambda_D22 = jnp.stack([jnp.stack([re, -im], axis=-1), jnp.stack([im, re], axis=-1)], axis=1)
    upper = jnp.concatenate([k_DXX[:, :, :-1], -x_DX2], axis=2)
    lower = jnp.concatenate([jnp.swapaxes(parts(p_DRM), 1, 2), -lambda_D22], axis=2)
    matrix = jnp.concatenate([jnp.eye(rank, rank + 2)[None] + upper[:, :-1], lower], axis=1)
    right = jnp.concatenate([k_DXX[:, :-1, -1], parts(b_DM)], axis=1)
    unknowns = jnp.linalg.solve(matrix, right[..., None])[..., 0]
    return k_DXX[:, -1, -1] - (upper[:, -1] * unknowns).sum(-1)
