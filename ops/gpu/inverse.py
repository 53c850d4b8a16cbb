"""(I + A)^-1 of a strictly lower-triangular A in a GPU kernel.

Powers of A are never formed: with identical keys they overflow float32, while the inverse itself
stays within 2.

**Diagonal blocks** of 16 rows are solved by forward substitution, all blocks of a matrix at once,
as [C / 16, 16, 16]. With X the inverses, at first the identity, and D the blocks, for s = 0 .. 14

    X -= (column s of D) (row s of X)                                                 (1)

**Merging** doubles the blocks until there is one. Let T hold the inverses of the blocks of b rows,
and A21 those elements of A that are in blocks of 2b rows but not of b rows. Then

    T -= T A21 T                                                                      (2)

The product on whole tiles is -T22 A21 T11 in the lower left of each block of 2b rows and zero
elsewhere. NOTE: the lowering cannot cut a block out of a tile."""

import jax
import jax.numpy as jnp
from jax import lax

from . import tiles as gpu

ROWS = 16  # of a diagonal block solved by substitution


def unit_lower_inverse(matmul: gpu.Matmul, A: jax.Array) -> jax.Array:
    """(I + A)^-1 [C, C] float32.

    A: [C, C] float32, zero on and above the diagonal; C a power of two, at least 16."""
    C = A.shape[0]
    row, column = gpu.indices(C, C)
    distance = row ^ column  # below b: in one block of b rows
    T = _diagonal_inverses(jnp.where(distance < ROWS, A, 0.0))  # [C, C]
    T = jnp.where(distance < ROWS, T, 0.0)
    b = ROWS
    while b < C:
        A21 = jnp.where((distance >= b) & (distance < 2 * b), A, 0.0)  # [C, C]
        T -= matmul.nn(T, matmul.nn(A21, T))  # Eq. 2
        b *= 2
    return T


def _diagonal_inverses(A: jax.Array) -> jax.Array:
    """[C, C]: the inverse of each diagonal block of I + A, repeated in all blocks of its rows.

    A: [C, C], zero outside the diagonal blocks."""
    C = A.shape[0]
    shape = C // ROWS, ROWS, ROWS
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    D = A.reshape(C, C // ROWS, ROWS).sum(1).reshape(shape)  # [C / 16, 16, 16]

    def step(s: jax.Array, X: jax.Array) -> jax.Array:
        D_column = jnp.where(column == s, D, 0.0).sum(2)  # [C / 16, 16]
        X_row = jnp.where(row == s, X, 0.0).sum(1)  # [C / 16, 16]
        return X - D_column[:, :, None] * X_row[:, None, :]  # Eq. 1

    X = jnp.where(row == column, 1.0, 0.0)  # [C / 16, 16, 16]
    X = lax.fori_loop(0, ROWS - 1, step, X)
    wide = lax.broadcast_in_dim(X.reshape(C, ROWS), (C, C // ROWS, ROWS), (0, 2))
    return wide.reshape(C, C)
