"""LRU, the linear recurrent unit. Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De,
"Resurrecting Recurrent Neural Networks for Long Sequences", ICML 2023, arXiv 2303.06349.

    h_t = lambda h_{t-1} + exp(gamma) (B x_t),    lambda = exp(-exp(nu) + i exp(theta))
    y_t = Re(C h_t) + D x_t                     per state, complex; |lambda| < 1 for every nu
    out = (g W_1 + b_1) sigmoid(g W_2 + b_2),    g = dropout(gelu(y))   (the GLU of the paper's
                                                                        block)

    x                   x_BTD                   input, model width D
    nu, theta, gamma    decay_log_N, angle_log_N, scale_log_N, float32
    lambda              factor()                a pair of arrays [N], computed anew in every call
    B                   write_real, write_imaginary, [D, N]
    C                   read_real, read_imaginary, [N, D]
    C'                  backward_read_real, backward_read_imaginary, [N, D], with causal=False
    D                   skip_D
    h                   "memory"                float32, real and imaginary part, each [B, N]; no
                                                conjugates are implied

With causal=False, y_t = Re(C h_t + C' h'_t) + D x_t, where h' is the same recurrence from the last
token to the first, with the same lambda, gamma and B: as in S5. Both directions read x_t.

State: 2 N floats; none with causal=False. Cost per token: O(D N + D^2). One homogeneous block: use
it with mlp="none". Dropout draws once for all tokens of a sequence.

Initialisation: |lambda|^2 uniform on [r_min^2, r_max^2], the angle uniform on [0, max_phase]; gamma
= log sqrt(1 - |lambda|^2), so that white noise gives states of variance one; both parts of B ~ N(0,
1 / 2D), of C ~ N(0, 1 / N); D ~ N(0, 1).

The authors give their implementation in the paper's appendix.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.bidirectional import no_state
from models.parts.options import Factor, Probability, Size, Weight
from models.parts.projections import projection, tied_dropout
from ops.diagonal_scan.api import diagonal_scan

LECUN_NORMAL = nnx.initializers.lecun_normal()


class LinearRecurrentUnit(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory": (real [B,N], imaginary [B,N])}, float32, and None
    with causal=False."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        state_size: Size = 128,
        r_min: Weight = 0.0,
        r_max: Weight = 1.0,
        max_phase: Factor = 2 * math.pi,
        causal: bool = True,
        dropout: Probability = 0.0,
    ):
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(
                f"r_min and r_max must satisfy 0 <= r_min < r_max <= 1; got {r_min} and {r_max}"
            )
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase must be in (0, 2 pi]; got {max_phase}")
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.state_size, self.compute_dtype, self.causal = state_size, compute_dtype, causal

        # float32 whatever param_dtype is: they enter exponentials. Uniform on (0, 1): neither end
        # has a logarithm.
        positive = functools.partial(jax.random.uniform, shape=(state_size,), minval=1e-30)
        # 1 - |lambda|^2, summed from non-negative terms: where r_max is 1, |lambda|^2 itself would
        # round to 1.
        gap_N = (1 - r_max**2) + (r_max**2 - r_min**2) * positive(rngs.params())
        ssm: dict[str, Any] = {"group": "ssm", "out_sharding": ("heads",)}
        self.decay_log_N = nnx.Param(jnp.log(-0.5 * jnp.log1p(-gap_N)), **ssm)
        self.angle_log_N = nnx.Param(jnp.log(max_phase * positive(rngs.params())), **ssm)
        self.scale_log_N = nnx.Param(0.5 * jnp.log(gap_N), **ssm)
        write = functools.partial(dense, width, state_size, ("embed", "heads"))
        read = functools.partial(dense, state_size, width, ("heads", "embed"))
        self.write_real, self.write_imaginary = (
            write(init=nnx.initializers.normal(1 / math.sqrt(2 * width))) for _ in range(2)
        )
        read = functools.partial(read, init=nnx.initializers.normal(1 / math.sqrt(state_size)))
        self.read_real, self.read_imaginary = read(), read()
        skip_D = jax.random.normal(rngs.params(), (width,), jnp.float32)
        self.skip_D = nnx.Param(skip_D, group="no_decay", out_sharding=("embed",))
        self.output = dense(width, width, ("heads", "embed"), init=LECUN_NORMAL, bias=True)
        self.output_gate = dense(width, width, ("heads", "embed"), init=LECUN_NORMAL, bias=True)
        self.backward_read_real = None if causal else read()
        self.backward_read_imaginary = None if causal else read()
        self.dropout = tied_dropout(dropout, rngs)

    def factor(self) -> tuple[jax.Array, jax.Array]:
        """Real and imaginary part of lambda [N]."""
        modulus_N = jnp.exp(-jnp.exp(self.decay_log_N[...]))
        angle_N = jnp.exp(self.angle_log_N[...])
        return modulus_N * jnp.cos(angle_N), modulus_N * jnp.sin(angle_N)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        reverse: bool = False,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        scale_11N = jnp.exp(self.scale_log_N[...])[None, None, :]
        u_BTN = (
            scale_11N * self.write_real(x_BTD).astype(jnp.float32),
            scale_11N * self.write_imaginary(x_BTD).astype(jnp.float32),
        )

        def walk(memory: Any, reverse: bool) -> tuple[Any, Any]:
            h_BTN, after = diagonal_scan(
                self.factor(), u_BTN, initial_state=memory, segment_ids=segment_ids, reverse=reverse
            )
            return [part.astype(self.compute_dtype) for part in h_BTN], after

        (real_BTN, imaginary_BTN), memory = walk((state or {}).get("memory"), reverse)
        y_BTD = self.read_real(real_BTN) - self.read_imaginary(imaginary_BTN)  # Re(C h)
        if self.backward_read_real is not None and self.backward_read_imaginary is not None:
            (real_BTN, imaginary_BTN), _ = walk(None, not reverse)
            y_BTD = y_BTD + self.backward_read_real(real_BTN)
            y_BTD = y_BTD - self.backward_read_imaginary(imaginary_BTN)
        y_BTD = y_BTD + self.skip_D[...].astype(self.compute_dtype)[None, None, :] * x_BTD
        g_BTD = jax.nn.gelu(y_BTD)
        if self.dropout is not None:
            g_BTD = self.dropout(g_BTD)
        return self.output(g_BTD) * jax.nn.sigmoid(self.output_gate(g_BTD)), (
            {"memory": memory} if self.causal else None
        )

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros. ValueError with causal=False."""
        if not self.causal:
            raise no_state("lru")
        zeros_BN = jnp.zeros((batch, self.state_size), jnp.float32)
        return {"memory": (zeros_BN, zeros_BN)}


Mixer = LinearRecurrentUnit
