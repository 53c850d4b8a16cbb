"""What a TPU kernel computes of the decays of a chunk: products over its intervals, and their
adjoint.

As in `ops/chunks/chunking.py`, W_ij = a_{j+1} .. a_i (i >= j) is never a quotient, an exponent is
never positive, and no sum of logs is ever the difference of two others. There are three kinds of
decay with one interface (`decay.py`, `channel_decay.py`). `products` gives what the recurrence
needs of a chunk,

    P_ij = sum_c q_ic k_jc W_ijc     for i >= j, else 0                                  (1)
    q_start = q . W_(start..i)       k_end = k . W_(j+1..end)     total = W_(start..end) (2)

and `adjoint` takes their gradients to those of q, k and log a. Both are generators (see
`ops/tpu/__init__.py`) that return their result.

Here and there, first and last are meant in the order of the walk (`HeadGrid.place`), which in
reverse is not that of rows.
"""

from collections.abc import Generator
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

# Where a segment starts the decay is zero: a log that any sum of real ones leaves at exp(.) == 0
# exactly. It is only ever added to other logs, never subtracted.
LOG_ZERO = -1e30

Result = TypeVar("Result")
Steps = Generator[None, None, Result]


class Products(NamedTuple):
    """Eqs. 1 and 2 of one head. residuals: what `adjoint` needs besides."""

    scores: jax.Array  # P [C, C], zero for later columns
    q_start: jax.Array  # [C, K]
    k_end: jax.Array  # [C, K]
    total: jax.Array | None  # [1, K or 1], None for no decay
    residuals: Any = None


class Gradients(NamedTuple):
    """Of one head's q, k and log a."""

    q: jax.Array  # [C, K]
    k: jax.Array  # [C, K]
    log: jax.Array | None  # [C, K], or [1, C] for one decay per token, None for no decay


class DecayOfChunk(Protocol):
    """What a kernel asks of the decays of one chunk, for one of its heads; q, k [C, K] are that
    head's. Generators return their result (see `ops/tpu/__init__.py`)."""

    def products(self, head: int, q: jax.Array, k: jax.Array) -> Steps[Products]: ...

    def ends(self, head: int, k: jax.Array) -> Steps[tuple[jax.Array, jax.Array | None]]:
        """k_end and total of `products`, without the rest."""
        ...

    def written(self, head: int, x: jax.Array, k: jax.Array, k_end: jax.Array) -> jax.Array:
        """x^T k_end [V, K], for x [C, V]."""
        ...

    def adjoint(
        self,
        head: int,
        products: Products,
        q: jax.Array,
        k: jax.Array,
        dscores: jax.Array,
        dq_start: jax.Array,
        dk_end: jax.Array,
        dtotal: jax.Array,
    ) -> Steps[Gradients]:
        """Gradients of q, k and log a from those of `products`; dscores does not count for later
        columns, dtotal is [1, K]."""
        ...
