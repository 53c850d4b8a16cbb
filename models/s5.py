"""S5. Smith, Warrington, Linderman, "Simplified State Space Layers for Sequence Modeling", ICLR
2023, arXiv 2208.04933.

    h_t = Lbar h_{t-1} + Bbar x_t,    y_t = 2 Re(C h_t) + D x_t                     (Section 3)
    zoh         Lbar = exp(z),                      Bbar = ((Lbar - 1) / Lambda) B
    bilinear    Lbar = (1 + z / 2) / (1 - z / 2),   Bbar = Delta / (1 - z / 2) B,   z = Lambda Delta
    out = v sigmoid(g W + b),    g = gelu(y)        v = g of gate="half_glu1", the authors' default;
                                                    v = y of "half_glu2"

    x           x_BTD                           model width D: one system, D inputs and D outputs
    Lambda      eigenvalue_real_N, _imaginary_N float32; N = state_size / 2 stored modes
    Delta       exp(step_log_N)                 float32; one step size per mode
    B           write_real, write_imaginary     [D,N]
    C           read_real, read_imaginary       [N,D]
    D           skip_D
    h           "memory", a pair of [B,N]       float32: real and imaginary part; the conjugate of
                                                each mode is implied

State: state_size floats. Cost per token: O(D state_size + D^2). One homogeneous block: use it with
mlp="none".

Initialisation: `blocks` copies of the normal part of HiPPO-LegS of size R = state_size / blocks,
Lambda their eigenvalues; B = V* B' with a real B' ~ N(0, 1 / state_size), C = C' V with both parts
of C' ~ N(0, 1 / state_size) ("trunc_standard_normal" of the authors' code, without truncation);
Delta log-uniform; D ~ N(0, 1). init="ptd" is S5-PTD (Yu et al., ICLR 2024, arXiv 2310.01698):
Lambda and V of HiPPO-LegS after a small perturbation (models/parts/hippo.py), whose V^-1 takes the
place of V*; nothing else changes.

clip_eigenvalues keeps Re Lambda <= -1e-4, so that |Lbar| < 1. Otherwise Lambda is free, as in the
paper.

Departures: causal only, where the paper's models of the Long Range Arena are bidirectional; RMSNorm
of the backbone instead of batch normalisation, no dropout. B learns at the full rate and decays
(the authors' option "BfastandCdecay").

Authors' code: https://github.com/lindermanlab/S5"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.parts.discretisation import DISCRETISATIONS, step_range_log
from models.parts.hippo import HippoSize, normal_legs, perturbed_legs
from models.parts.options import Factor, Size, check_choice
from models.parts.projections import projection
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


def initial_maps(
    width: int, V_PN: np.ndarray, inverse_NP: np.ndarray, rngs: nnx.Rngs
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The real and imaginary parts of B = V^-1 B' [D, N] and of C = C' V [N, D].

    B' and both parts of C' ~ N(0, 1 / P)."""
    size = len(V_PN)
    B_DP, C_real_DP, C_imaginary_DP = (
        jax.random.normal(rngs.params(), (width, size), jnp.float32) / math.sqrt(size)
        for _ in range(3)
    )
    V_real, V_imaginary, inverse_real, inverse_imaginary = (
        jnp.asarray(part, jnp.float32)
        for part in (np.real(V_PN), np.imag(V_PN), np.real(inverse_NP.T), np.imag(inverse_NP.T))
    )
    C_DN = (
        C_real_DP @ V_real - C_imaginary_DP @ V_imaginary,
        C_real_DP @ V_imaginary + C_imaginary_DP @ V_real,
    )
    return (B_DP @ inverse_real, B_DP @ inverse_imaginary), (C_DN[0].T, C_DN[1].T)


class S5(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory": (real [B,N], imaginary [B,N])}, float32."""

    causal = True

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
    ):
        check_choice("discretisation", discretisation, tuple(DISCRETISATIONS))
        check_choice("gate", gate, ("half_glu1", "half_glu2"))
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.modes, self.compute_dtype = state_size // 2, compute_dtype
        self.discretisation, self.clip_eigenvalues = discretisation, clip_eigenvalues
        self.gate = gate

        eigenvalue_N, V_PN, inverse_NP = initial_modes(init, state_size, blocks)
        # float32 whatever param_dtype is: they enter exponentials.
        ssm: dict[str, Any] = {"group": "ssm", "out_sharding": ("heads",)}
        self.eigenvalue_real_N = nnx.Param(jnp.asarray(np.real(eigenvalue_N), jnp.float32), **ssm)
        self.eigenvalue_imaginary_N = nnx.Param(
            jnp.asarray(np.imag(eigenvalue_N), jnp.float32), **ssm
        )
        low, high = step_range_log(dt_min, dt_max)
        self.step_log_N = nnx.Param(
            jax.random.uniform(rngs.params(), (self.modes,), jnp.float32, low, high), **ssm
        )

        def given(array: jax.Array) -> jax.nn.initializers.Initializer:
            return lambda key, shape, dtype=jnp.float32, out_sharding=None: array.astype(dtype)

        write_DN, read_ND = initial_maps(width, V_PN, inverse_NP, rngs)
        write = functools.partial(dense, width, self.modes, ("embed", "heads"))
        read = functools.partial(dense, self.modes, width, ("heads", "embed"))
        self.write_real, self.write_imaginary = (write(init=given(part)) for part in write_DN)
        self.read_real, self.read_imaginary = (read(init=given(part)) for part in read_ND)
        skip_D = jax.random.normal(rngs.params(), (width,), jnp.float32)
        self.skip_D = nnx.Param(skip_D, group="no_decay", out_sharding=("embed",))
        self.output_gate = dense(
            width, width, ("heads", "embed"), init=nnx.initializers.lecun_normal(), bias=True
        )

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
    ) -> tuple[jax.Array, dict[str, Any]]:
        factor_N, input_N = self.system()
        real_11N, imaginary_11N = (input_N.real[None, None, :], input_N.imag[None, None, :])
        u_real_BTN = self.write_real(x_BTD).astype(jnp.float32)
        u_imaginary_BTN = self.write_imaginary(x_BTD).astype(jnp.float32)
        h_BTN, memory = diagonal_scan(
            (factor_N.real, factor_N.imag),
            (
                real_11N * u_real_BTN - imaginary_11N * u_imaginary_BTN,
                real_11N * u_imaginary_BTN + imaginary_11N * u_real_BTN,
            ),
            initial_state=(state or {}).get("memory"),
            segment_ids=segment_ids,
            reverse=reverse,
        )
        real_BTN, imaginary_BTN = (part.astype(self.compute_dtype) for part in h_BTN)
        # 2 Re(C h).
        y_BTD = 2 * (self.read_real(real_BTN) - self.read_imaginary(imaginary_BTN))
        y_BTD = y_BTD + self.skip_D[...].astype(self.compute_dtype)[None, None, :] * x_BTD
        g_BTD = jax.nn.gelu(y_BTD)
        value_BTD = g_BTD if self.gate == "half_glu1" else y_BTD
        return value_BTD * jax.nn.sigmoid(self.output_gate(g_BTD)), {"memory": memory}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        zeros_BN = jnp.zeros((batch, self.modes), jnp.float32)
        return {"memory": (zeros_BN, zeros_BN)}


Mixer = S5
