"""Products of matrices on a TPU's matrix unit, which multiplies bfloat16 and adds in float32.

Float32 inputs take products of six passes (HIGHEST), bfloat16 inputs products of one. Every
rounding is a cast in the source, so that interpreted kernels round as compiled ones do."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Matmul:
    """Products of matrices in `dtype` with sums in float32: nn = A B, nt = A B^T, tn = A^T B.

    fine: a float32 factor of a bfloat16 product enters as two terms, 16 bits together: two or three
    passes."""

    dtype: Any
    fine: bool = False

    @property
    def finer(self) -> "Matmul":
        return Matmul(self.dtype, fine=True)

    def nn(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """A B of A [n, m] and B [m, p]."""
        return self._dot(a, b, 1, 0)

    def nt(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """A B^T of A [n, m] and B [p, m]."""
        return self._dot(a, b, 1, 1)

    def tn(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """A^T B of A [m, n] and B [m, p]."""
        return self._dot(a, b, 0, 0)

    def terms(self, x: jax.Array, count: int) -> list[jax.Array]:
        """x as `count` float32 terms, of 8 bits each but the last, which is the rest; [x] for
        float32 products.

        Against a matrix of zeros and ones, which bfloat16 holds exactly, two terms carry 16 bits of
        x through products of one pass."""
        x, terms = x.astype(jnp.float32), []
        for _ in range(0 if self.dtype == jnp.float32 else count - 1):
            # NOTE: terms are cut off, not rounded: a cast to bfloat16 and back stops libtpu's cycle
            # analysis on v5e.
            bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 16))
            terms.append(lax.bitcast_convert_type(bits, jnp.float32))
            x = x - terms[-1]
        return [*terms, x]

    def stacked_terms(self, x: jax.Array, count: int) -> jax.Array:
        """[count * n, m]: the `terms` of x [n, m] below each other, cast for a product."""
        terms = [term.astype(self.dtype) for term in self.terms(x, count)]
        return terms[0] if len(terms) == 1 else jnp.concatenate(terms, 0)

    def _dot(self, a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
        exact = self.dtype == jnp.float32

        def one_pass(a: jax.Array, b: jax.Array) -> jax.Array:
            return lax.dot_general(
                a.astype(self.dtype),
                b.astype(self.dtype),
                (((a_axis,), (b_axis,)), ((), ())),
                precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
                preferred_element_type=jnp.float32,
            )

        if not self.fine:
            return one_pass(a, b)
        (a, *a_rest), (b, *b_rest) = (
            [x] if x.dtype == self.dtype else self.terms(x, 2) for x in (a, b)
        )
        product = one_pass(a, b)
        for x in a_rest:
            product += one_pass(x, b)
        for x in b_rest:
            product += one_pass(a, x)
        return product


def matmul_dtype(*arrays: jax.Array) -> Any:
    """bfloat16 where all inputs are bfloat16; otherwise float32."""
    return jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32


def indices(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """The row numbers and the column numbers of a matrix, [rows, columns] each."""
    shape = (rows, columns)
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return row, column
