"""S5. Smith, Warrington, Linderman, "Simplified State Space Layers for Sequence Modeling", ICLR
2023, arXiv 2208.04933.

    h_t = Lbar h_{t-1} + Bbar x_t,    y_t = 2 Re(C h_t) + D x_t                     (Section 3)
    zoh         Lbar = exp(z),                      Bbar = ((Lbar - 1) / Lambda) B
    bilinear    Lbar = (1 + z / 2) / (1 - z / 2),   Bbar = Delta / (1 - z / 2) B,   z = Lambda Delta
    y_t = 2 Re(C h_t + C' h'_t) + D x_t     with causal=False: h' is the same recurrence from the
                                            last token to the first; both read x_t
    out = v sigmoid(g W + b),    g = dropout(gelu(y))   v = g of gate="half_glu1", the authors'
                                                        default; v = y of "half_glu2"

    x           x_BTD                           model width D: one system, D inputs and D outputs
    Lambda      eigenvalue_real_N, _imaginary_N float32; N = state_size / 2 stored modes
    Delta       exp(step_log_N)                 float32; one step size per mode
    B           write_real, write_imaginary     [D,N]
    C           read_real, read_imaginary       [N,D]; C' backward_read_real, _imaginary
    D           skip_D
    h           "memory", a pair of [B,N]       float32: real and imaginary part; the conjugate of
                                                each mode is implied

State: state_size floats; none with causal=False. Cost per token: O(D state_size + D^2). One
homogeneous block: use it with mlp="none". Dropout draws once for all tokens of a sequence.

Initialisation: `blocks` copies of the normal part of HiPPO-LegS of size R = state_size / blocks,
Lambda their eigenvalues; B = V* B' with a real B' ~ N(0, 1 / state_size); Delta log-uniform; D ~
N(0, 1). C, and C' likewise, is by `read_init`, as the authors' code calls it, whose draws are
truncated,

    "trunc_standard_normal"     G V, both parts of G ~ N(0, 1 / state_size)
    "lecun_normal"              G V, both parts of G ~ N(0, 1 / (D state_size))
    "complex_normal"            both parts ~ N(0, 1/2)

init="ptd" is S5-PTD (Yu et al., ICLR 2024, arXiv 2310.01698): Lambda and V of HiPPO-LegS after a
small perturbation (models/parts/hippo.py), whose V^-1 takes the place of V*; nothing else changes.

clip_eigenvalues keeps Re Lambda <= -1e-4, so that |Lbar| < 1. Otherwise Lambda is free, as in the
paper.

B decays and learns at the full rate with write_rate="full" (the authors' "BfastandCdecay"), or at
the rate of Lambda, which is that of the group "ssm", with "ssm_decay" ("BandCdecay"), and does not
decay with "ssm" ("standard"). step_rate="full" has Delta learn at the full rate and decay
("dt_global").

Departures: D does not decay, and norms learn at the full rate.

Authors' code: https://github.com/lindermanlab/S5"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.parts.bidirectional import no_state
from models.parts.discretisation import DISCRETISATIONS, step_range_log
from models.parts.hippo import HippoSize, normal_legs, perturbed_legs
from models.parts.options import Factor, Probability, Size, check_choice
from models.parts.projections import projection, tied_dropout
from ops.diagonal_scan.api import diagonal_scan


def initial_modes(
    init: str, state_size: int, blocks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lambda [N], V [P, N] and the rows [N, P] of V^-1 that belong to it, complex.

    They are those of `blocks` systems of size P / blocks side by side, P = state_size.

    Raises ValueError for an unknown `init` and for a size that does not divide into blocks."""
    check_choice("init", init, ("legs", "ptd"))
    if blocks < 1 or state_size % (2 * blocks):
        raise ValueError(
            f"state_size must be a multiple of 2 * blocks = {2 * blocks}; got {state_size}"
        )
    if init == "legs":
        eigenvalue_R, V = normal_legs(state_size // blocks)
        inverse = V.conj().T
    else:
        eigenvalue_R, V, inverse = perturbed_legs(state_size // blocks)
    identity = np.eye(blocks)
    return np.tile(eigenvalue_R, blocks), np.kron(identity, V), np.kron(identity, inverse)


def initial_write(
    width: int, inverse_NP: np.ndarray, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    """The real and imaginary parts of B = V^-1 B' [D, N], B' ~ N(0, 1 / P)."""
    size = inverse_NP.shape[1]
    B_DP = jax.random.normal(rngs.params(), (width, size), jnp.float32) / math.sqrt(size)
    parts = (np.real(inverse_NP.T), np.imag(inverse_NP.T))
    real_DN, imaginary_DN = (B_DP @ jnp.asarray(part, jnp.float32) for part in parts)
    return real_DN, imaginary_DN


def initial_read(
    read_init: str, width: int, V_PN: np.ndarray, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    """The real and imaginary parts of C [N, D]. Raises ValueError for an unknown `read_init`."""
    size, modes = V_PN.shape
    precisions = {"trunc_standard_normal": size, "lecun_normal": width * size, "complex_normal": 2}
    check_choice("read_init", read_init, tuple(precisions))
    rows = modes if read_init == "complex_normal" else size
    real_DP, imaginary_DP = (
        jax.random.normal(rngs.params(), (width, rows), jnp.float32)
        / math.sqrt(precisions[read_init])
        for _ in range(2)
    )
    if read_init == "complex_normal":
        return real_DP.T, imaginary_DP.T
    V_real, V_imaginary = (jnp.asarray(part(V_PN), jnp.float32) for part in (np.real, np.imag))
    real_DN = real_DP @ V_real - imaginary_DP @ V_imaginary
    return real_DN.T, (real_DP @ V_imaginary + imaginary_DP @ V_real).T


class S5(nnx.Module):
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
        state_size: HippoSize = 128,
        blocks: Size = 1,
        init: str = "legs",
        dt_min: Factor = 1e-3,
        dt_max: Factor = 1e-1,
        discretisation: str = "zoh",
        gate: str = "half_glu1",
        clip_eigenvalues: bool = False,
        read_init: str = "trunc_standard_normal",
        write_rate: str = "full",
        step_rate: str = "ssm",
        causal: bool = True,
        dropout: Probability = 0.0,
    ):
        check_choice("discretisation", discretisation, tuple(DISCRETISATIONS))
        check_choice("gate", gate, ("half_glu1", "half_glu2"))
        check_choice("write_rate", write_rate, ("full", "ssm_decay", "ssm"))
        check_choice("step_rate", step_rate, ("full", "ssm"))
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.modes, self.compute_dtype = state_size // 2, compute_dtype
        self.discretisation, self.clip_eigenvalues = discretisation, clip_eigenvalues
        self.gate, self.causal = gate, causal

        eigenvalue_N, V_PN, inverse_NP = initial_modes(init, state_size, blocks)
        # float32 whatever param_dtype is: they enter exponentials.
        per_mode: dict[str, Any] = {"out_sharding": ("heads",)}
        ssm = {"group": "ssm", **per_mode}
        self.eigenvalue_real_N = nnx.Param(jnp.asarray(np.real(eigenvalue_N), jnp.float32), **ssm)
        self.eigenvalue_imaginary_N = nnx.Param(
            jnp.asarray(np.imag(eigenvalue_N), jnp.float32), **ssm
        )
        low, high = step_range_log(dt_min, dt_max)
        self.step_log_N = nnx.Param(
            jax.random.uniform(rngs.params(), (self.modes,), jnp.float32, low, high),
            **(ssm if step_rate == "ssm" else {"group": "decay", **per_mode}),
        )

        def given(array: jax.Array) -> jax.nn.initializers.Initializer:
            return lambda key, shape, dtype=jnp.float32, out_sharding=None: array.astype(dtype)

        write = functools.partial(
            dense,
            width,
            self.modes,
            ("embed", "heads"),
            group=None if write_rate == "full" else write_rate,
        )
        read = functools.partial(dense, self.modes, width, ("heads", "embed"))
        write_DN = initial_write(width, inverse_NP, rngs)
        read_ND = initial_read(read_init, width, V_PN, rngs)
        self.write_real, self.write_imaginary = (write(init=given(part)) for part in write_DN)
        self.read_real, self.read_imaginary = (read(init=given(part)) for part in read_ND)
        skip_D = jax.random.normal(rngs.params(), (width,), jnp.float32)
        self.skip_D = nnx.Param(skip_D, group="no_decay", out_sharding=("embed",))
        self.output_gate = dense(
            width, width, ("heads", "embed"), init=nnx.initializers.lecun_normal(), bias=True
        )
        backward = (None, None) if causal else initial_read(read_init, width, V_PN, rngs)
        self.backward_read_real, self.backward_read_imaginary = (
            None if part is None else read(init=given(part)) for part in backward
        )
        self.dropout = tied_dropout(dropout, rngs)

    def system(self) -> tuple[jax.Array, jax.Array]:
        """Lbar and Bbar / B, complex64 [N]."""
        real_N = self.eigenvalue_real_N[...]
        if self.clip_eigenvalues:
            real_N = jnp.minimum(real_N, -1e-4)
        eigenvalue_N = jax.lax.complex(real_N, self.eigenvalue_imaginary_N[...])
        return DISCRETISATIONS[self.discretisation](eigenvalue_N, jnp.exp(self.step_log_N[...]))

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        reverse: bool = False,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        factor_N, input_N = self.system()
        real_11N, imaginary_11N = (input_N.real[None, None, :], input_N.imag[None, None, :])
        u_real_BTN = self.write_real(x_BTD).astype(jnp.float32)
        u_imaginary_BTN = self.write_imaginary(x_BTD).astype(jnp.float32)
        u_BTN = (
            real_11N * u_real_BTN - imaginary_11N * u_imaginary_BTN,
            real_11N * u_imaginary_BTN + imaginary_11N * u_real_BTN,
        )

        def walk(memory: Any, reverse: bool) -> tuple[Any, Any]:
            h_BTN, after = diagonal_scan(
                (factor_N.real, factor_N.imag),
                u_BTN,
                initial_state=memory,
                segment_ids=segment_ids,
                reverse=reverse,
            )
            return [part.astype(self.compute_dtype) for part in h_BTN], after

        (real_BTN, imaginary_BTN), memory = walk((state or {}).get("memory"), reverse)
        y_BTD = self.read_real(real_BTN) - self.read_imaginary(imaginary_BTN)  # Re(C h)
        if self.backward_read_real is not None and self.backward_read_imaginary is not None:
            (real_BTN, imaginary_BTN), _ = walk(None, not reverse)
            y_BTD = y_BTD + self.backward_read_real(real_BTN)
            y_BTD = y_BTD - self.backward_read_imaginary(imaginary_BTN)
        y_BTD = 2 * y_BTD + self.skip_D[...].astype(self.compute_dtype)[None, None, :] * x_BTD
        g_BTD = jax.nn.gelu(y_BTD)
        if self.dropout is not None:
            g_BTD = self.dropout(g_BTD)
        value_BTD = g_BTD if self.gate == "half_glu1" else y_BTD
        return value_BTD * jax.nn.sigmoid(self.output_gate(g_BTD)), (
            {"memory": memory} if self.causal else None
        )

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros. ValueError with causal=False."""
        if not self.causal:
            raise no_state("s5")
        zeros_BN = jnp.zeros((batch, self.modes), jnp.float32)
        return {"memory": (zeros_BN, zeros_BN)}


Mixer = S5
