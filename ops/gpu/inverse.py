"""(I + A)^-1 of a strictly lower-triangular A in a GPU kernel.

Powers of A are never formed: with identical keys they overflow float32 while the inverse itself
stays within 2.

**Diagonal blocks** of 16 rows are solved by forward substitution, all of a matrix at once, as [C /
16, 16, 16]: column s of the blocks times row s of their inverses is taken from the rows below, s =
0, 1, .. 14.

**Merging** doubles the blocks until they are one. With T the inverses of blocks of b rows and A21
what A has below the diagonal in blocks of 2b rows, the new part of the inverse is -T22 A21 T11. The
lowering cannot cut a block out of a tile, so this is T - T A21 T on whole tiles, A21 behind a mask.
"""

import jax
import jax.numpy as jnp
from jax import lax

from . import tiles as gpu

ROWS = 16  # of a diagonal block solved by substitution


def unit_lower_inverse(matmul: gpu.Matmul, A: jax.Array) -> jax.Array:
    """A [C, C] float32, zero on and above the diagonal; C a power of two, at least 16. Returns
    float32."""
    size = A.shape[0]
    row, column = gpu.indices(size, size)
    distance = row ^ column  # below b: in one block of b rows
    T = _diagonal_blocks(jnp.where(distance < ROWS, A, 0.0))
    T = jnp.where(distance < ROWS, T, 0.0)
    b = ROWS
    while b < size:
        below = jnp.where((distance >= b) & (distance < 2 * b), A, 0.0)
        T -= matmul.nn(T, matmul.nn(below, T))
        b *= 2
    return T


def _diagonal_blocks(A: jax.Array) -> jax.Array:
    """The inverses of I + the diagonal blocks, each in all blocks of its rows; A is zero
    elsewhere."""
    size = A.shape[0]
    shape = size // ROWS, ROWS, ROWS
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    D = A.reshape(size, size // ROWS, ROWS).sum(1).reshape(shape)

    def step(s: jax.Array, X: jax.Array) -> jax.Array:
        of_column = jnp.where(column == s, D, 0.0).sum(2)
        of_row = jnp.where(row == s, X, 0.0).sum(1)
        return X - of_column[:, :, None] * of_row[:, None, :]

    X = jnp.where(row == column, 1.0, 0.0)
    X = lax.fori_loop(0, ROWS - 1, step, X)
    wide = lax.broadcast_in_dim(X.reshape(size, ROWS), (size, size // ROWS, ROWS), (0, 2))
    return wide.reshape(size, size)
