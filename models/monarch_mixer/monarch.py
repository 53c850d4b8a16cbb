"""Monarch matrices of order two. Dao et al., "Monarch: Expressive Structured Matrices for Efficient
and Accurate Training", ICML 2022, arXiv 2204.00595; Fu et al., "Monarch Mixer", NeurIPS 2023, arXiv
2310.12109.

    M = P L P R P,    L, R block-diagonal with b blocks of b x b,    P: index i b + j -> j b + i,
    n = b^2

n^1.5 numbers in each factor, 2 n^1.5 products per vector, as two batched matrix products. The
Fourier transform is one."""

import functools
import math

import jax
import jax.numpy as jnp

from ops.long_convolution.documents import convolve_documents


def monarch_multiply(x: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """M x for x [..., n] and the blocks of L and R [b, b, b] (block, row, column); n = b^2. The
    permutations are in the indices."""
    b = left.shape[0]
    if left.shape != (b, b, b) or right.shape != left.shape or x.shape[-1] != b * b:
        raise ValueError(
            "left and right must be [b, b, b] and x [..., b^2]; got"
            f" {left.shape}, {right.shape} and {x.shape}"
        )
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    X = x.reshape(*x.shape[:-1], b, b)
    Y = product("jki,...ij->...kj", right, X)
    Z = product("kmj,...kj->...mk", left, Y)
    return Z.reshape(x.shape)


def fourier_factors(b: int) -> tuple[jax.Array, jax.Array]:
    """Blocks of L and R, complex64, with which M is the discrete Fourier transform of length n =
    b^2.

    With j = j1 b + j0 and k = k1 b + k0: exp(-2 pi i j k / n) = F[k0, j1] exp(-2 pi i k0 j0 / n)
    F[k1, j0]. The inverse is the conjugate over n."""
    number = jnp.arange(b)
    # Integers, reduced before they become angles: exact for every n.
    product = number[:, None] * number[None, :]
    dft = _root(product % b, b)
    left = jnp.broadcast_to(dft[None], (b, b, b))
    right = dft[None] * _root(product, b * b)[:, :, None]
    return left, right


def _root(power: jax.Array, order: int) -> jax.Array:
    angle = (-2 * math.pi / order) * power.astype(jnp.float32)
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


def monarch_convolution(
    u: jax.Array, kernel: jax.Array, *, segment_ids: jax.Array | None = None
) -> jax.Array:
    """y_t = sum_{l <= t} kernel_l u_{t-l} of each channel, float32: `ops.long_convolution` of u
    [B, T, D], kernel [D, T] and segment_ids [B, T] in matrix products.

    Two Monarch products and an inverse one, of length b^2 >= 2 T: nothing wraps around.
    """
    if segment_ids is not None:
        return convolve_documents(u, kernel, segment_ids, monarch_convolution)
    length = u.shape[1]
    b = math.isqrt(2 * length - 1) + 1
    left, right = fourier_factors(b)

    def transform(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        pad = [(0, 0)] * (x.ndim - 1) + [(0, b * b - length)]
        return monarch_multiply(jnp.pad(x, pad).astype(left.dtype), left, right)

    spectrum = transform(jnp.swapaxes(u, 1, 2)) * transform(kernel)[None]
    inverse = monarch_multiply(spectrum, jnp.conj(left), jnp.conj(right))
    return jnp.swapaxes(inverse.real[..., :length] / (b * b), 1, 2)
