"""The systems of S4, one per channel: from their parameters to kernel and recurrence. Equations and
letters are those of models/s4/__init__.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.parts.dense_systems import Dense
from models.s4.cauchy import transfer, transfer_at_zero
from ops.dense_scan.powers import power_less_one

# Fields of `System` -> their axes; besides, read_real and read_imaginary [D, M]
FIELDS = {
    "step_log": "D",
    "decay_log": "DM",
    "angle": "DM",
    "low_rank_real": "DRM",
    "low_rank_imaginary": "DRM",
    "write_real": "DM",
    "write_imaginary": "DM",
}


class System(NamedTuple):
    """The parameters, float32, of the channels that are at hand: all, or those of a device."""

    step_log: jax.Array
    decay_log: jax.Array
    angle: jax.Array
    low_rank_real: jax.Array
    low_rank_imaginary: jax.Array
    write_real: jax.Array
    write_imaginary: jax.Array
    read_real: jax.Array
    read_imaginary: jax.Array

    def modes(self) -> tuple[jax.Array, ...]:
        """The system in units of half a step, complex64.

        Lambda Delta / 2 [D, M], p sqrt(Delta / 2) [D, R, M] and B Delta [D, M]."""
        half_D1 = jnp.exp(self.step_log)[:, None] / 2
        eigenvalue_DM = jax.lax.complex(-jnp.exp(self.decay_log), self.angle)
        low_rank_DRM = jax.lax.complex(self.low_rank_real, self.low_rank_imaginary)
        write_DM = jax.lax.complex(self.write_real, self.write_imaginary)
        return (
            half_D1 * eigenvalue_DM,
            jnp.sqrt(half_D1)[..., None] * low_rank_DRM,
            2 * half_D1 * write_DM,
        )

    def increment(self) -> tuple[jax.Array, jax.Array]:
        """Abar - I [D, N, N] and Bbar [D, N] in the real coordinates (Re h, Im h), float32."""
        half_DM, p_DRM, write_DM = self.modes()
        half_DM1 = half_DM[..., None]
        columns = [p_DM[..., None] for p_DM in jnp.unstack(p_DRM, axis=1)]

        def onto(p_DM1: jax.Array, x_DMX: jax.Array) -> jax.Array:
            """p* x [D, 1, X], conjugates included."""
            return 2 * (p_DM1.conj() * x_DMX).sum(1, keepdims=True).real

        # (I - Delta/2 A)^-1 v by Sherman and Morrison, one column of p after another.
        inverse_DM1 = 1 / (1 - half_DM1)
        corrections: list[tuple[jax.Array, ...]] = []

        def solve(v_DMX: jax.Array) -> jax.Array:
            x_DMX = inverse_DM1 * v_DMX
            for p_DM1, solved_DM1, rho_D11 in corrections:
                x_DMX = x_DMX - solved_DM1 * (rho_D11 * onto(p_DM1, x_DMX))
            return x_DMX

        for p_DM1 in columns:
            solved_DM1 = solve(p_DM1)
            rho_D11 = 1 / (1 + onto(p_DM1, solved_DM1))
            corrections.append((p_DM1, solved_DM1, rho_D11))

        # Eq. 3: Abar - I = (I - Delta/2 A)^-1 Delta A, Bbar = (I - Delta/2 A)^-1 Delta B
        identity_MM = jnp.eye(half_DM.shape[1])
        unit_1MN = jnp.concatenate([identity_MM, 1j * identity_MM], axis=1)[None]
        A_DMN = half_DM1 * unit_1MN
        for p_DM1 in columns:
            A_DMN = A_DMN - p_DM1 * onto(p_DM1, unit_1MN)
        E_DMN, b_DM = solve(2 * A_DMN), solve(write_DM[..., None])[..., 0]
        return (
            jnp.concatenate([E_DMN.real, E_DMN.imag], axis=1),
            jnp.concatenate([b_DM.real, b_DM.imag], axis=1),
        )

    def kernel(self, length: int) -> jax.Array:
        """K [D, L], L = `length`, float32, by the Cauchy sums of Algorithm 1.

        At the L / 2 + 1 roots of unity of the upper half circle."""
        # z = exp(-2 i angle): with 1 - z = 2 i sin(angle) e^(-i angle) and 1 + z = 2 cos(angle)
        # e^(-i angle), all that remains of g(z) - Lambda Delta / 2 is i sin - cos Lambda Delta / 2.
        angle_F = np.pi * np.arange(length // 2 + 1) / length
        sine_F, cosine_F = jnp.float32(np.sin(angle_F)), jnp.float32(np.cos(angle_F))
        read_DM = jax.lax.complex(self.read_real, self.read_imaginary)
        half_DM, p_DRM, write_DM = self.modes()
        # The unit of half a step is in p and B; c and B have half of it each, hence the factor 1/2.
        system = half_DM, p_DRM, write_DM / 2, read_DM
        spectrum_DF = jnp.concatenate(
            [transfer_at_zero(*system)[:, None], transfer(*system, sine_F[1:], cosine_F[1:])],
            axis=1,
        )
        phase_1F = jnp.asarray(np.exp(1j * angle_F), jnp.complex64)[None]
        return jnp.fft.irfft(phase_1F * spectrum_DF, length)  # K = F^-1 Khat

    def untruncated_read(self, E_DNN: jax.Array, length: int) -> jax.Array:
        """C [D, N] of y = C (Re h, Im h): Ctil (I - Abar^L)^-1."""
        c_DN = 2 * jnp.concatenate([self.read_real, -self.read_imaginary], axis=1)
        with jax.default_matmul_precision("highest"):
            transposed_DNN = jnp.swapaxes(truncation(E_DNN, length), 1, 2)
            return jnp.linalg.solve(transposed_DNN, c_DN[..., None])[..., 0]


def truncation(E_DNN: jax.Array, length: int) -> jax.Array:
    """I - Abar^L [D, N, N], given E = Abar - I; Ctil = C (I - Abar^L) (Section 3.2)."""
    return -power_less_one(E_DNN, length)


def dense_form(*parameters: jax.Array, kernel_length: int, convolved: bool) -> Dense:
    """The dense form of a `System` of these fields; with its kernel if `convolved`."""
    system = System(*parameters)
    E_DNN, b_DN = system.increment()

    def kernel(length: int) -> jax.Array:
        return system.kernel(kernel_length)[:, None, :length]

    return Dense(
        E_DNN + jnp.eye(b_DN.shape[1])[None],
        b_DN,
        system.untruncated_read(E_DNN, kernel_length)[:, None],
        kernel if convolved else None,
    )
