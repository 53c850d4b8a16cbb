"""What stands around the recurrence of a selective scan: the step sizes that are made of a
projection, the gate, and the states that are kept between forward and backward.

    Delta = softplus(delta + bias)          out = y silu(z)

**Gate.** The implementations multiply by the gate where they have y at hand, which then never
exists in memory, forward or backward.

**Kept states.** Besides the inputs the states before every `CHUNK` tokens are kept for the backward
pass, which recomputes the others between them: at N = 16 one byte per token and channel. Without
them the states would have to be walked through once more, from the first to the last, before the
walk back can begin.

**Step sizes** are not kept. The TPU kernels compute them where they use them; the other
implementations leave them to XLA, inside their rules. A GPU kernel would compute them in each of
the four threads that share a channel of N = 16, in each of its passes: eight exponentials and
logarithms for a token and channel take half a clock of a multiprocessor, in which memory has ten
bytes. Leaving them to XLA costs eight, of float32 steps from a bfloat16 `delta`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 64  # tokens between the states that are kept for the backward pass
MAX_KEPT_STATES = 32  # of a channel; more would take more memory than the inputs do


def keeps_chunk_states(x: jax.Array, A: jax.Array) -> bool:
    """Whether forward rules keep the states at the starts of chunks [B, T / CHUNK, N, D] for the
    backward rules, which otherwise recompute them. All implementations keep the same, because a
    program has the same residuals on all platforms."""
    return x.shape[1] > CHUNK and A.shape[1] <= MAX_KEPT_STATES


def step_sizes(delta: jax.Array, bias: jax.Array | None, softplus: bool) -> jax.Array:
    """Step sizes [B, T, D], float32, or `delta` as it is without bias and softplus."""
    if bias is not None:
        delta = delta.astype(jnp.float32) + bias.astype(jnp.float32)[None, None, :]
    return jax.nn.softplus(delta.astype(jnp.float32)) if softplus else delta


def step_sizes_vjp(
    delta: jax.Array, bias: jax.Array | None, softplus: bool
) -> tuple[jax.Array, Callable[..., Any]]:
    """`step_sizes` [B, T, D], and the function that makes of their gradient those of `delta` and
    `bias` (None without)."""
    if bias is None and not softplus:
        return delta, lambda dsteps: (dsteps, None)
    return jax.vjp(
        lambda delta, bias: step_sizes(delta, bias, softplus),
        delta.astype(jnp.float32),
        None if bias is None else bias.astype(jnp.float32),
    )


def gate(y: jax.Array, z: jax.Array) -> jax.Array:
    """y silu(z), both float32."""
    return y * (z * jax.nn.sigmoid(z))


def gate_gradients(z: jax.Array, dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dy, and dz / y: the gradient of z is y times it."""
    s = jax.nn.sigmoid(z)
    return dout * (z * s), dout * (s + z * s * (1 - s))
