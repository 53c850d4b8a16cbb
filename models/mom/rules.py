"""The rules by which a memory of MoM changes: gates made by a matrix per memory, and a recurrence.

A rule has a method `gates(x_BTD)`, which returns arrays [B, T, E, X] by name; one of them is
"decay_log". `conv_width` is that of the published layer, and `activated` says whether its q, k and
v pass a SiLU without a convolution, too. The rule is called with sorted entries: q, k [R, N, H, K],
v [R, N, H, V], the gates [R, N, X] and `writes` [R, N]. An entry with writes=False must have
decay_log = 0; it then leaves the memory as it is. All other arguments are those of the op. Letters:
E memories, R streams of N entries."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.discretisation import dt_bias
from models.parts.norms import l2_normalise
from models.parts.projections import split_heads
from ops.delta_rule.api import delta_rule
from ops.gated_linear_attention.api import gated_linear_attention

# Each memory's matrix by itself: the fans of a stack are those of its matrices.
STACKED_XAVIER_SMALL = nnx.initializers.variance_scaling(
    (2**-2.5) ** 2, "fan_avg", "uniform", batch_axis=(0,)
)


class MemoryProjection(nnx.Module):
    """[B, T, E, X] by a matrix per memory, of [B, T, D] for all alike or [B, T, E, D]."""

    def __init__(
        self,
        memories: int,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None] = ("embed", "heads"),
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        shape, self.compute_dtype = (memories, inputs, outputs), compute_dtype
        kernel_EDX = STACKED_XAVIER_SMALL(rngs.params(), shape, param_dtype)
        self.kernel_EDX = nnx.Param(kernel_EDX, out_sharding=(None, *axes))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_EDX = self.kernel_EDX[...].astype(self.compute_dtype)
        layout = "btd" if x.ndim == 3 else "bted"
        return jnp.einsum(f"{layout},edx->btex", x, kernel_EDX)


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

    def gates(self, x_BTD: jax.Array) -> dict[str, jax.Array]:
        """The log decay and beta of each token, memory and head [B, T, E, H], float32."""
        dt_BTEH = jax.nn.softplus(
            self.dt(x_BTD).astype(jnp.float32) + self.dt_bias_H[...][None, None, None]
        )
        return {
            "decay_log": -jnp.exp(self.a_log_H[...])[None, None, None] * dt_BTEH,
            "beta": jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32)),
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

    def gates(self, x_BTD: jax.Array) -> dict[str, jax.Array]:
        """The log decay of each token, memory and key channel [B, T, E, H K], float32."""
        logit_BTEX = self.gate_out(self.gate_in(x_BTD)).astype(jnp.float32)
        logit_BTEX += self.bias_EX[...].astype(jnp.float32)[None, None]
        return {"decay_log": jax.nn.log_sigmoid(logit_BTEX) / self.temperature}

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
