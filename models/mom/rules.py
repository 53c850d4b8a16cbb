"""The rules by which a memory of MoM changes: gates made by a matrix per memory, and a recurrence.

A rule has a method `gates(projected, x_BTD)`, which returns arrays [B, T, E, X] by name, or
[B, T, J, X] of the copies of tokens alone, as `projected` makes them (models/mom/projections.py);
one of them is "decay_log". `conv_width` is that of the published layer, and `activated` says
whether its q, k and v pass a SiLU without a convolution, too. The rule is called with sorted
entries: q, k [R, N, H, K], v [R, N, H, V], the gates [R, N, X] and `writes` [R, N]. An entry with
writes=False must have decay_log = 0; it then leaves the memory as it is. All other arguments are
those of the op. Letters: E memories, J copies of a token, R streams of N entries."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.mom.projections import Memories, MemoryProjection
from models.parts.discretisation import dt_bias
from models.parts.norms import l2_normalise
from models.parts.projections import split_heads
from ops.delta_rule.api import delta_rule
from ops.gated_linear_attention.api import gated_linear_attention


class GatedDeltaRule(nnx.Module):
    """S <- alpha (I - beta k^T k) S + beta k^T v, as in models/gated_delta_net.py.

    Every memory has its own matrices for beta and for the step that makes alpha; the rest of
    alpha's parameters is shared by the memories."""

    conv_width, activated = 4, True

    def __init__(
        self,
        width: int,
        memories: int,
        heads: int,
        key_size: int,
        *,
        options: Mapping[str, Any],
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        del key_size
        gate = functools.partial(MemoryProjection, memories, width, heads, rngs=rngs, **dtypes)
        self.beta, self.dt = gate(), gate()
        # float32 whatever param_dtype is: they enter exponentials. 1 - u is in (0, 1]: no logarithm
        # of 0.
        a_log_H = jnp.log(16 * (1 - jax.random.uniform(rngs.params(), (heads,))))
        self.a_log_H = nnx.Param(a_log_H, group="no_decay", out_sharding=("heads",))
        dt_bias_H = dt_bias(rngs.params(), heads, options["dt_min"], options["dt_max"])
        self.dt_bias_H = nnx.Param(dt_bias_H, group="no_decay", out_sharding=("heads",))

    def gates(self, projected: Memories, x_BTD: jax.Array) -> dict[str, jax.Array]:
        """The log decay and beta of each token, memory and head [B, T, E or J, H], float32."""
        dt, beta = (y.astype(jnp.float32) for y in projected(x_BTD, self.dt, self.beta))
        dt = jax.nn.softplus(dt + self.dt_bias_H[...][None, None, None])
        return {
            "decay_log": -jnp.exp(self.a_log_H[...])[None, None, None] * dt,
            "beta": jax.nn.sigmoid(beta),
        }

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: Mapping[str, jax.Array],
        writes_RN: jax.Array,
        **state: Any,
    ) -> tuple[jax.Array, jax.Array]:
        q, k = (l2_normalise(x).astype(v.dtype) for x in (q, k))
        beta_RNH = jnp.where(writes_RN[..., None], gates["beta"], 0.0)
        return delta_rule(q, k, v, beta_RNH, gates["decay_log"], **state)


class GatedSum(nnx.Module):
    """S <- Diag(alpha) S + k^T v, alpha = sigmoid((x W_1^m) W_2^m + b^m)^(1/tau).

    As in models/gla.py, with matrices and a bias of each memory's own."""

    conv_width, activated = 0, False

    def __init__(
        self,
        width: int,
        memories: int,
        heads: int,
        key_size: int,
        *,
        options: Mapping[str, Any],
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        rank, self.temperature = options["gate_rank"], options["gate_temperature"]
        matrices = functools.partial(MemoryProjection, memories, rngs=rngs, **dtypes)
        self.gate_in = matrices(width, rank, ("embed", None))
        self.gate_out = matrices(rank, heads * key_size, (None, "heads"))
        bias_EX = jnp.zeros((memories, heads * key_size), dtypes["param_dtype"])
        self.bias_EX = nnx.Param(bias_EX, group="no_decay", out_sharding=(None, "heads"))

    def gates(self, projected: Memories, x_BTD: jax.Array) -> dict[str, jax.Array]:
        """The log decay of each token, memory and key channel [B, T, E or J, H K], float32."""
        (low,) = projected(x_BTD, self.gate_in)
        (logit,) = projected(low, self.gate_out)
        bias = projected.of_each(self.bias_EX[...].astype(jnp.float32), logit)
        logit = logit.astype(jnp.float32) + bias
        return {"decay_log": jax.nn.log_sigmoid(logit) / self.temperature}

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: Mapping[str, jax.Array],
        writes_RN: jax.Array,
        **state: Any,
    ) -> tuple[jax.Array, jax.Array]:
        k = jnp.where(writes_RN[..., None, None], k, 0)
        decay_log = split_heads(gates["decay_log"], k.shape[2])
        return gated_linear_attention(q, k, v, decay_log, **state)


RULES = {"gated_delta_net": GatedDeltaRule, "gla": GatedSum}
