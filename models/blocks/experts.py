"""A mixture of experts in place of a block's MLP: every token passes the k that its router chooses.

    I_t, w_t = router(x_t)                                              (models/parts/router.py)
    y_t = sum_{e in I_t} w_t^e f_e(x_t) + sigmoid(x_t w_s) f_s(x_t)    (f_s(x_t) without its gate)
    f(x) = (silu(x W_gate) * (x W_up)) W_down

Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017, arXiv 1701.06538, with the SwiGLU
experts of Mixtral (arXiv 2401.04088) and, where it has one, a shared expert f_s: behind a gate as
in Qwen's models, or without as in DeepSeek's. No token is dropped: the copies of all tokens, sorted
by expert, are one grouped product per matrix, whose groups are as long as they come. Letters: E
experts, M their inner width, J copies of a token, N = B T J."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.mlp import SwiGLU
from models.parts.projections import projection
from models.parts.router import Router

# Each expert's matrix by itself, N(0, 0.02^2).
STACKED_NORMAL = nnx.initializers.normal(0.02)


class Experts(nnx.Module):
    """x_BTD -> y_BTD; the router reports its load-balancing loss over the whole batch."""

    def __init__(
        self,
        width: int,
        *,
        experts: int,
        experts_per_token: int,
        weights: str,
        scale: float,
        inner: int,
        shared: int,
        shared_gate: bool,
        balance_weight: float,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.experts, self.compute_dtype = experts, compute_dtype
        self.router = Router(
            width,
            choices=experts,
            top_k=experts_per_token,
            load_balancing="global_batch",
            micro_batch_size=1,
            balance_weight=balance_weight,
            normalised=weights.endswith("normalised"),
            scores="sigmoid" if weights.startswith("sigmoid") else "softmax",
            scale=scale,
            rngs=rngs,
            param_dtype=param_dtype,
        )

        def matrices(shape: tuple[int, ...], axes: tuple[str, str], scale: float = 1.0) -> Any:
            values = scale * STACKED_NORMAL(rngs.params(), (experts, *shape), param_dtype)
            return nnx.Param(values.astype(param_dtype), out_sharding=(None, *axes))

        self.gate_EDM = matrices((width, inner), ("embed", "mlp"))
        self.up_EDM = matrices((width, inner), ("embed", "mlp"))
        self.down_EMD = matrices((inner, width), ("mlp", "embed"), (2 * depth) ** -0.5)
        self.shared = (
            SwiGLU(width, ratio=1.0, inner=shared, depth=depth, rngs=rngs, **dtypes)
            if shared
            else None
        )
        self.shared_gate = (
            projection(width, 1, ("embed", None), rngs=rngs, **dtypes)
            if shared and shared_gate
            else None
        )

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        chosen_BTJ, weight_BTJ = self.router(x_BTD)
        copies, width = chosen_BTJ.shape[-1], x_BTD.shape[-1]
        expert_N = chosen_BTJ.reshape(-1)
        order_N = jnp.argsort(expert_N, stable=True)
        x_ND = x_BTD.reshape(-1, width)[order_N // copies].astype(self.compute_dtype)
        product = functools.partial(
            jax.lax.ragged_dot, group_sizes=jnp.bincount(expert_N, length=self.experts)
        )
        gate, up, down = (
            kernel[...].astype(self.compute_dtype)
            for kernel in (self.gate_EDM, self.up_EDM, self.down_EMD)
        )
        y_ND = product(jax.nn.silu(product(x_ND, gate)) * product(x_ND, up), down)
        # Back in the order of the tokens.
        y_BTJD = y_ND[jnp.argsort(order_N)].reshape(*chosen_BTJ.shape, width)
        y_BTD = jnp.einsum("btj,btjd->btd", weight_BTJ, y_BTJD.astype(jnp.float32))
        y_BTD = y_BTD.astype(self.compute_dtype)
        if self.shared is None:
            return y_BTD
        if self.shared_gate is None:
            return y_BTD + self.shared(x_BTD)
        return y_BTD + jax.nn.sigmoid(self.shared_gate(x_BTD)) * self.shared(x_BTD)
