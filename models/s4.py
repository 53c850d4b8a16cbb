"""S4. Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces", ICLR 2022, arXiv 2111.00396.

    h' = A h + B x,   y = C h + D x,   A = Lambda - p p*                    per channel; Theorem 1
    h_t = Abar h_{t-1} + Bbar x_t                                           (Eq. 3)
    Abar = (I - Delta/2 A)^-1 (I + Delta/2 A),   Bbar = (I - Delta/2 A)^-1 Delta B
    Ctil = C (I - Abar^L)                                                   cuts the kernel off at L (Section 3.2)
    Khat(z) = 2/(1+z) [k_cb - k_cp k_pb / (1 + k_pp)]                       (Algorithm 1, Lemma C.3)
    k_xy(z) = sum_n x_n y_n / (g(z) - Lambda_n),   g(z) = 2/Delta (1-z)/(1+z),   z the L roots of unity
    K = F^-1 Khat,   y = K * x + D x
    out = (g W_1 + b_1) sigmoid(g W_2 + b_2),    g = gelu(y)

    x           x_BTD                                   input, model width D: D systems of one input and one output
    Lambda      -exp(decay_log_DM) + i angle_DM         float32; M = state_size / 2 modes, conjugates implied
    p           low_rank_real_DM, _imaginary_DM         float32; the minus sign keeps A stable whatever p is
    B           write_real_DM, _imaginary_DM            float32
    Ctil        read_real_DM, _imaginary_DM             float32; the parameter in place of C, as in the paper
    Delta       exp(step_log_D)                         float32
    D           skip_D
    h           "memory" [B, D, N]                      float32; N = state_size: real parts, then imaginary parts

State: D N floats. Cost per token: O(D N + D^2) in a convolution, which has O(D N L) for the kernel besides. One
homogeneous block: use it with mlp="none".

Two forms, chosen by what a call is given, so that each is static. Without state and segments, and up to kernel_length
L tokens: the convolution. Otherwise the recurrence with dense real Abar (models/krylov.py), which recovers C from Ctil
by solving with I - Abar^L, O(N^3 log L) per channel and call: it is exact for packed documents, carried states and
decoding, not fast. Where a mesh cuts time each device runs its part in that form, and states pass between them. Both
hold h in the real coordinates (Re h, Im h), where A is Re- and Im-blocks of Lambda minus 2 q q^T, q = (Re p, Im p):
Abar is a contraction there, and I - Abar^L is well conditioned.

Initialisation: HiPPO-LegS, Lambda - p p* = V* A V with p = V* P, B = V* B_LegS (models/hippo.py); Delta log-uniform;
both parts of C ~ N(0, 1/2); D ~ N(0, 1).

Departures: causal only, RMSNorm of the backbone, no dropout. The Cauchy sums are evaluated with numerators and
denominators multiplied by 1 + z, so that z = -1 is a node like any other. Im B is not clipped (models/s4d.py says why).

Authors' code: https://github.com/state-spaces/s4
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.hippo import legs, normal_legs
from models.krylov import einsum, matrix_power, respond
from models.projections import projection


class S4(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B, D, N]}, float32."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        state_size: int = 64,
        kernel_length: int = 1024,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ):
        if kernel_length < 1:
            raise ValueError(f"kernel_length must be at least 1; got {kernel_length}")
        dense = functools.partial(
            projection,
            width,
            width,
            ("heads", "embed"),
            init=nnx.initializers.lecun_normal(),
            bias=True,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        self.width, self.state_size, self.compute_dtype = (
            width,
            state_size,
            compute_dtype,
        )
        self.kernel_length = kernel_length

        # float32 whatever param_dtype is: they enter quotients, and products with the float32 state.
        def per_channel(array_M: np.ndarray) -> nnx.Param:
            array_DM = jnp.broadcast_to(
                jnp.asarray(array_M, jnp.float32)[None, :], (width, state_size // 2)
            )
            return nnx.Param(array_DM, group="ssm", out_sharding=("embed", None))

        eigenvalue_M, V = normal_legs(state_size)
        _, B = legs(state_size)
        write_M = V.conj().T @ B
        low_rank_M = write_M / math.sqrt(2)  # P = B / sqrt(2)
        self.decay_log_DM = per_channel(np.log(-np.real(eigenvalue_M)))
        self.angle_DM = per_channel(np.imag(eigenvalue_M))
        self.low_rank_real_DM = per_channel(np.real(low_rank_M))
        self.low_rank_imaginary_DM = per_channel(np.imag(low_rank_M))
        self.write_real_DM = per_channel(np.real(write_M))
        self.write_imaginary_DM = per_channel(np.imag(write_M))
        step_log_D = jax.random.uniform(
            rngs.params(), (width,), jnp.float32, math.log(dt_min), math.log(dt_max)
        )
        self.step_log_D = nnx.Param(step_log_D, group="ssm", out_sharding=("embed",))
        skip_D = jax.random.normal(rngs.params(), (width,), jnp.float32)
        self.skip_D = nnx.Param(skip_D, group="no_decay", out_sharding=("embed",))
        self.output, self.output_gate = dense(), dense()

        # y = 2 Re(C h), as a row on (Re h, Im h).
        c_DN = math.sqrt(2) * jax.random.normal(
            rngs.params(), (width, state_size), jnp.float32
        )
        A_DNN, _ = self.system()
        c_DN -= einsum("dn,dnk->dk", c_DN, matrix_power(A_DNN, kernel_length))
        read_real_DM, read_imaginary_DM = jnp.split(c_DN / 2, 2, axis=1)
        self.read_real_DM = nnx.Param(read_real_DM, out_sharding=("embed", None))
        self.read_imaginary_DM = nnx.Param(
            -read_imaginary_DM, out_sharding=("embed", None)
        )

    def modes(self) -> tuple[jax.Array, ...]:
        """Lambda Delta / 2, p sqrt(Delta / 2) and B Delta, complex64 [D, M]: the system in units of half a step."""
        half_D1 = jnp.exp(self.step_log_D[...])[:, None] / 2
        eigenvalue_DM = jax.lax.complex(
            -jnp.exp(self.decay_log_DM[...]), self.angle_DM[...]
        )
        low_rank_DM = jax.lax.complex(
            self.low_rank_real_DM[...], self.low_rank_imaginary_DM[...]
        )
        write_DM = jax.lax.complex(
            self.write_real_DM[...], self.write_imaginary_DM[...]
        )
        return (
            half_D1 * eigenvalue_DM,
            jnp.sqrt(half_D1) * low_rank_DM,
            2 * half_D1 * write_DM,
        )

    def system(self) -> tuple[jax.Array, jax.Array]:
        """Abar [D, N, N] and Bbar [D, N] in the real coordinates (Re h, Im h), float32."""
        half_DM, p_DM, write_DM = self.modes()
        half_DM1, p_DM1 = half_DM[..., None], p_DM[..., None]

        def onto_p(x_DMR: jax.Array) -> jax.Array:  # p* x, conjugates included
            return 2 * (p_DM1.conj() * x_DMR).sum(1, keepdims=True).real

        # (I - Delta/2 A)^-1 v by Sherman and Morrison.
        inverse_DM1 = 1 / (1 - half_DM1)
        rho_D11 = 1 / (1 + onto_p(inverse_DM1 * p_DM1))

        def solve(v_DMR: jax.Array) -> jax.Array:
            x_DMR = inverse_DM1 * v_DMR
            return x_DMR - inverse_DM1 * p_DM1 * (rho_D11 * onto_p(x_DMR))

        identity_MM = jnp.eye(self.state_size // 2)
        unit_1MN = jnp.concatenate([identity_MM, 1j * identity_MM], axis=1)[None]
        A_DMN = solve((1 + half_DM1) * unit_1MN - p_DM1 * onto_p(unit_1MN))
        b_DM = solve(write_DM[..., None])[..., 0]
        return (
            jnp.concatenate([A_DMN.real, A_DMN.imag], axis=1),
            jnp.concatenate([b_DM.real, b_DM.imag], axis=1),
        )

    def kernel(self) -> jax.Array:
        """K [D, L] float32, by the Cauchy sums of Alg. 1 at the L / 2 + 1 roots of unity of the upper half circle."""
        half_DM, p_DM, write_DM = self.modes()
        read_DM = jax.lax.complex(self.read_real_DM[...], self.read_imaginary_DM[...])
        # z = exp(-2 i angle): with 1 - z = 2 i sin(angle) e^(-i angle) and 1 + z = 2 cos(angle) e^(-i angle), all that
        # remains of g(z) - Lambda Delta / 2 is i sin - cos Lambda Delta / 2.
        angle_F = np.pi * np.arange(self.kernel_length // 2 + 1) / self.kernel_length
        sine_F, cosine_F = jnp.float32(np.sin(angle_F)), jnp.float32(np.cos(angle_F))

        # Its matrix D N L is recomputed in the backward pass.
        @jax.checkpoint
        def cauchy(half_DM: jax.Array, terms_D4M: jax.Array) -> jax.Array:
            def conjugates_too(array: jax.Array) -> jax.Array:
                return jnp.concatenate([array, array.conj()], axis=-1)

            half_DN1 = conjugates_too(half_DM)[..., None]
            matrix_DNF = 1 / (1j * sine_F[None, None] - half_DN1 * cosine_F[None, None])
            return einsum("dkn,dnf->dkf", conjugates_too(terms_D4M), matrix_DNF)

        # The unit of half a step is in p and B; c and B have half of it each, hence the factor 1/2.
        terms_D4M = jnp.stack(
            [
                read_DM * write_DM / 2,
                read_DM * p_DM,
                p_DM.conj() * write_DM / 2,
                p_DM.conj() * p_DM,
            ],
            axis=1,
        )
        cb, cp, pb, pp = jnp.unstack(cauchy(half_DM, terms_D4M), axis=1)
        phase_1F = jnp.asarray(np.exp(1j * angle_F), jnp.complex64)[None]
        cosine_1F = cosine_F[None]
        spectrum_DF = phase_1F * (cb - cosine_1F * cp * pb / (1 + cosine_1F * pp))
        return jnp.fft.irfft(spectrum_DF, self.kernel_length)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        x_float_BTD, length = x_BTD.astype(jnp.float32), x_BTD.shape[1]
        A_DNN, b_DN = self.system()

        def kernel(length: int) -> jax.Array:
            return self.kernel()[:, None, :length]

        y_BTD1, memory_BDN = respond(
            A_DNN,
            b_DN,
            lambda: self.untruncated_read(A_DNN)[:, None],
            x_float_BTD,
            kernel=kernel if length <= self.kernel_length else None,
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
        )
        y_BTD = y_BTD1[..., 0] + self.skip_D[...][None, None, :] * x_float_BTD
        g_BTD = jax.nn.gelu(y_BTD).astype(self.compute_dtype)
        return self.output(g_BTD) * jax.nn.sigmoid(self.output_gate(g_BTD)), {
            "memory": memory_BDN
        }

    def untruncated_read(self, A_DNN: jax.Array) -> jax.Array:
        """C [D, N] of y = C (Re h, Im h): Ctil (I - Abar^L)^-1."""
        c_DN = 2 * jnp.concatenate(
            [self.read_real_DM[...], -self.read_imaginary_DM[...]], axis=1
        )
        remaining_DNN = jnp.eye(self.state_size)[None] - matrix_power(
            A_DNN, self.kernel_length
        )
        with jax.default_matmul_precision("highest"):
            transposed_DNN = jnp.swapaxes(remaining_DNN, 1, 2)
            return jnp.linalg.solve(transposed_DNN, c_DN[..., None])[..., 0]

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        shape = (batch, self.width, self.state_size)
        return {"memory": jnp.zeros(shape, jnp.float32)}

    @property
    def state_bytes(self) -> int:
        """Bytes of state per sequence."""
        return 4 * self.width * self.state_size


Mixer = S4
