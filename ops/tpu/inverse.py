"""(I + A)^-1 of a strictly triangular A, in what a TPU kernel can do.

Powers of A are never formed: with identical keys they overflow float32 while the inverse itself
stays within 2.

**Diagonal blocks** of 16 rows are solved by forward substitution, all of a matrix at once. They lie
side by side along lanes, D[r, 16 n + c] = A[16 n + r, 16 n + c], two registers for 128 rows, and
column s of the blocks updates the rows below it:

    X[r, 16 n + c] -= D[r, 16 n + s] X[s, 16 n + c]        s = 0, 1, .. 14                 (1)

The factors want each column spread over the lanes of its block; rotations by 8, 4, 2 and 1 lanes
make all sixteen.

**Merging** doubles the blocks until they are one. With T the inverses of blocks of b rows, and A21
what is left of A in blocks of 2b rows, the new part of the inverse is

    T21 = -T22 A21 T11                                                                     (2)

Only second halves have rows in these products.

**In reverse** A lies above the diagonal. Rows are solved, and halves counted, from the last to the
first."""

from collections.abc import Generator

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from .kernel import LANES
from .matmul import Matmul, indices

ROWS = 16  # of a diagonal block solved by substitution


def unit_triangular_inverse(
    matmul: Matmul, A: jax.Array, reverse: bool
) -> Generator[None, None, jax.Array]:
    """(I + A)^-1 [C, C] of A [C, C] in float32, zero on and above the diagonal, in reverse on and
    below it; C a power of two from 16 to 128."""
    C, _ = A.shape
    row, column = indices(C, C)
    # From b to 2b - 1 at the pairs in different halves of a block of 2b rows.
    distance = row ^ column
    inside = (distance < ROWS).astype(jnp.float32)
    D = (A * inside).reshape(C // ROWS, ROWS, C).sum(0)  # [16, C]
    X = yield from _substitution(jnp.concatenate([D] * (LANES // C), 1), reverse)  # [16, 128]
    T = jnp.concatenate([X[:, :C]] * (C // ROWS), 0) * inside  # [C, C], block-diagonal
    halves = (1, 0) if reverse else (0, 1)
    b = ROWS
    while b < C:
        blocks, half = (C // (2 * b), 2, b, C), (C // 2, C)
        pairs = ((distance >= b) & (distance < 2 * b)).astype(jnp.float32)
        first, second = (T.reshape(blocks)[:, side] for side in halves)  # [C / 2b, b, C]
        A21 = (A * pairs).reshape(blocks)[:, halves[1]].reshape(half)  # [C / 2, C]
        yield
        product = matmul.nn(A21, T).reshape(C // (2 * b), b, C)
        yield
        T22 = second.reshape(half)
        product = jnp.stack([product] * 2, 1).reshape(C, C)
        second -= matmul.nn(T22, product).reshape(second.shape)  # Eq. 2
        T = jnp.stack([second, first] if reverse else [first, second], 1).reshape(C, C)
        b *= 2
    return T


def _substitution(D: jax.Array, reverse: bool) -> Generator[None, None, jax.Array]:
    """The inverses of I + blocks [16, 128], for blocks [16, 16] side by side in D [16, 128]."""
    row, lane = indices(ROWS, LANES)
    columns = D[None]  # [1, 2, .. 16, 16, 128], of each block, in all its lanes
    for bit in (8, 4, 2, 1):
        left, right = (pltpu.roll(columns, shift, axis=2) for shift in (bit, LANES - bit))
        without = lane & bit == 0
        columns = jnp.stack(
            [jnp.where(without, columns, left), jnp.where(without, right, columns)], 1
        ).reshape(-1, ROWS, LANES)
        yield
    X = (row == lane & (ROWS - 1)).astype(jnp.float32)
    for s in range(ROWS - 1, 0, -1) if reverse else range(ROWS - 1):
        X -= columns[s] * X[s : s + 1]  # Eq. 1
        yield
    return X
