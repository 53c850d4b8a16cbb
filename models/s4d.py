"""S4D. Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space
Models", NeurIPS 2022, arXiv 2206.11893.

    h_t = Lbar h_{t-1} + f B x_t,   y_t = 2 Re(C h_t) + D x_t      per channel, N/2 complex modes
    y = K * x + D x,   K_l = 2 Re(C Lbar^l f B)                    the same, a convolution (Eq. 5)
    zoh         Lbar = exp(z),                      f = (Lbar - 1) / Lambda,    z = Lambda Delta
    bilinear    Lbar = (1 + z / 2) / (1 - z / 2),   f = Delta / (1 - z / 2)
    y_t = sum_{s<=t} K_{t-s} x_s + sum_{s>t} K'_{s-t-1} x_s + D x_t     with causal=False: a second
                                                                C, in K', for the tokens that follow
    out = (g W_1 + b_1) sigmoid(g W_2 + b_2),    g = dropout(gelu(y))

    x           x_BTD                           model width D: D systems, one input and output each
    Lambda      -exp(decay_log_DM) + i angle_DM float32; M = state_size / 2 modes; always stable
    Delta       exp(step_log_D)                 float32; one step size per channel
    B           write_real_DM, _imaginary_DM    float32
    C           read_real_DM, _imaginary_DM     float32; of K' backward_read_real_DM, _imaginary_DM
    D           skip_D
    h           "memory", a pair of [B, D M]    float32: real and imaginary part; the conjugate of
                                                each mode is implied

State: D state_size floats; none with causal=False. Cost per token: O(D state_size + D^2). One
homogeneous block: use it with mlp="none". Dropout draws once for all tokens of a sequence, as in
the authors' code.

Initialisation of Lambda and B, by `init` (Section 4). "legs" is the normal part of HiPPO-LegS with
its input V* B. All others but "real" and "ptd" have B = 1 and Lambda_n = -1/2 + i times, for
n = 0 .. N/2 - 1,

    "inv"               N / pi (N / (2n + 1) - 1)
    "lin"               pi n
    "quad"              (2n + 1)^2 / pi
    "random_imaginary"  e^g, g ~ N(0, 1)                            an ablation
    "random_real"       pi n, and the real part is ~ -U(0, 1)       an ablation

"real" is S4D-Real, Lambda_n = -(n + 1) for n = 0 .. N - 1: everything is real, M = state_size,
y_t = C h_t + D x_t, and "memory" is one array. "ptd" is S4-PTD (Yu et al., ICLR 2024, arXiv
2310.01698): the modes of HiPPO-LegS after a small perturbation, with its input V^-1 B
(models/parts/hippo.py); nothing else changes. Delta is log-uniform; both parts of C ~ N(0, 1/2), a
real C ~ N(0, 1); D ~ N(0, 1).

A call without state and segments is the convolution, also of sequences with padding at their ends,
of which a mask tells. Any other call is the recurrence, which holds T D state_size floats of states
per sequence for the output map; parallel="recurrence" always takes it.

Departures: V* B is not clipped: the authors' code
clips its imaginary part to +-2, but that depends on the phases of the eigenvectors, which are
arbitrary. Only the product of B and C matters; both are trained, as in the authors' code. Powers of
Lbar are products, not exponentials of multiples.

Authors' code: https://github.com/state-spaces/s4"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.parts.bidirectional import following, no_state, without_padding
from models.parts.discretisation import DISCRETISATIONS, step_range_log
from models.parts.hippo import HippoSize, legs, normal_legs, perturbed_legs
from models.parts.options import Factor, Probability, check_choice
from models.parts.projections import projection, tied_dropout
from ops.diagonal_convolution.api import diagonal_convolution
from ops.diagonal_scan.api import diagonal_scan

INITS = ("legs", "inv", "lin", "quad", "ptd", "real", "random_real", "random_imaginary")


def initial_system(init: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Lambda and B in float64: complex [N/2], or for "real" real [N].

    What an `init` draws at random is as in "lin" here.

    Raises ValueError for an unknown `init`, and for an odd or non-positive size.
    """
    check_choice("init", init, INITS)
    # Also where only the check of the size is wanted.
    eigenvalue_M, V = normal_legs(size)
    if init == "legs":
        return eigenvalue_M, V.conj().T @ legs(size)[1]
    if init == "ptd":
        eigenvalue_M, _, inverse = perturbed_legs(size)
        return eigenvalue_M, inverse @ legs(size)[1]
    if init == "real":
        return -np.arange(1.0, size + 1), np.ones(size)
    n = np.arange(size // 2)
    angle_M = {
        "inv": size / np.pi * (size / (2 * n + 1) - 1),
        "quad": (2 * n + 1) ** 2 / np.pi,
    }.get(init, np.pi * n)
    return -0.5 + 1j * angle_M, np.ones(size // 2, complex)


class S4D(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory": (real [B, D M], imaginary [B, D M])}, float32.

    Of "real" it is one array [B, D M]; with causal=False there is none."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        state_size: HippoSize = 64,
        init: str = "lin",
        dt_min: Factor = 1e-3,
        dt_max: Factor = 1e-1,
        discretisation: str = "zoh",
        parallel: str = "convolution",
        causal: bool = True,
        dropout: Probability = 0.0,
    ):
        check_choice("discretisation", discretisation, tuple(DISCRETISATIONS))
        check_choice("parallel", parallel, ("convolution", "recurrence"))
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
        eigenvalue_M, write_M = initial_system(init, state_size)
        self.width, self.modes, self.compute_dtype = (width, len(eigenvalue_M), compute_dtype)
        self.discretisation, self.parallel, self.causal = discretisation, parallel, causal
        self.is_complex = init != "real"

        # float32 whatever param_dtype is: they enter exponentials, and products with the float32
        # state.
        def ssm(array_DM: jax.Array) -> nnx.Param:
            return nnx.Param(array_DM, group="ssm", out_sharding=("embed", None))

        def per_channel(array_M: np.ndarray) -> jax.Array:
            return jnp.tile(jnp.asarray(array_M, jnp.float32)[None], (width, 1))

        def normal(*shape: int) -> jax.Array:
            return jax.random.normal(rngs.params(), shape, jnp.float32)

        def read() -> nnx.Param:
            scale = math.sqrt(0.5) if self.is_complex else 1.0
            return nnx.Param(scale * normal(width, self.modes), out_sharding=("embed", None))

        decay_log_DM = per_channel(np.log(-np.real(eigenvalue_M)))
        angle_DM = per_channel(np.imag(eigenvalue_M))
        if init == "random_real":
            decay_log_DM = jnp.log(jax.random.uniform(rngs.params(), angle_DM.shape, minval=1e-3))
        if init == "random_imaginary":
            angle_DM = jnp.exp(normal(width, self.modes))
        self.decay_log_DM = ssm(decay_log_DM)
        self.angle_DM = ssm(angle_DM) if self.is_complex else None
        self.write_real_DM = ssm(per_channel(np.real(write_M)))
        self.write_imaginary_DM = ssm(per_channel(np.imag(write_M))) if self.is_complex else None
        step_log_D = jax.random.uniform(
            rngs.params(), (width,), jnp.float32, *step_range_log(dt_min, dt_max)
        )
        self.step_log_D = nnx.Param(step_log_D, group="ssm", out_sharding=("embed",))
        self.read_real_DM = read()
        self.read_imaginary_DM = read() if self.is_complex else None
        self.skip_D = nnx.Param(normal(width), group="no_decay", out_sharding=("embed",))
        self.output, self.output_gate = dense(), dense()
        self.backward_read_real_DM = None if causal else read()
        self.backward_read_imaginary_DM = None if causal or not self.is_complex else read()
        self.dropout = tied_dropout(dropout, rngs)

    def system(self) -> tuple[jax.Array, jax.Array]:
        """Lbar and f B [D, M], complex64; float32 of "real"."""
        eigenvalue_DM = _number(-jnp.exp(self.decay_log_DM[...]), self.angle_DM)
        step_D1 = jnp.exp(self.step_log_D[...])[:, None]
        factor_DM, input_DM = DISCRETISATIONS[self.discretisation](eigenvalue_DM, step_D1)
        return factor_DM, input_DM * _number(self.write_real_DM[...], self.write_imaginary_DM)

    def reads(self) -> list[Any]:
        """The parts of 2 C [D, M]; of "real", of C. With causal=False those of the future, too."""
        pairs = (
            (self.read_real_DM, self.read_imaginary_DM),
            (self.backward_read_real_DM, self.backward_read_imaginary_DM),
        )
        scale = 2.0 if self.is_complex else 1.0
        parts = (tuple(scale * part[...] for part in pair if part is not None) for pair in pairs)
        return [pair for pair in parts if pair]

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        reverse: bool = False,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        x_float_BTD = without_padding(x_BTD.astype(jnp.float32), mask)

        def response(read: Any, state: Any, reverse: bool) -> tuple[jax.Array, Any]:
            if state is None and segment_ids is None and self.parallel == "convolution":
                return self.convolution(x_float_BTD, read, reverse)
            return self.recurrence(x_float_BTD, read, state, segment_ids, reverse)

        reads = self.reads()
        y_BTD, memory = response(reads[0], state, reverse)
        if not self.causal:
            future_BTD, _ = response(reads[1], None, not reverse)
            y_BTD = y_BTD + following(future_BTD, segment_ids, reverse=reverse)
        y_BTD = y_BTD + self.skip_D[...][None, None, :] * x_float_BTD
        g_BTD = jax.nn.gelu(y_BTD).astype(self.compute_dtype)
        if self.dropout is not None:
            g_BTD = self.dropout(g_BTD)
        return self.output(g_BTD) * jax.nn.sigmoid(self.output_gate(g_BTD)), (
            {"memory": memory} if self.causal else None
        )

    def convolution(self, x_BTD: jax.Array, read: Any, reverse: bool) -> tuple[jax.Array, Any]:
        """K * x [B, T, D], and the memory after it."""
        factor_DM, write_DM = self.system()
        y_BTD, memory = diagonal_convolution(  # Eq. 5
            x_BTD,
            _parts(factor_DM),
            _parts(write_DM),
            read if self.is_complex else read[0],
            reverse=reverse,
        )
        return y_BTD, jax.tree.map(lambda part_BDM: part_BDM.reshape(len(x_BTD), -1), memory)

    def recurrence(
        self,
        x_BTD: jax.Array,
        read: Any,
        state: dict[str, Any] | None,
        segment_ids: jax.Array | None,
        reverse: bool,
    ) -> tuple[jax.Array, Any]:
        """2 Re(C h) [B, T, D], and the memory after the last token."""
        factor_DM, write_DM = self.system()

        def written(part_DM: jax.Array) -> jax.Array:
            return (x_BTD[..., None] * part_DM[None, None]).reshape(*x_BTD.shape[:2], -1)

        h, memory = diagonal_scan(
            jax.tree.map(jnp.ravel, _parts(factor_DM)),
            jax.tree.map(written, _parts(write_DM)),
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
            reverse=reverse,
        )
        terms_BTDM = sum(  # Re(C h) = Re C Re h - Im C Im h
            sign * c_DM[None, None] * part.reshape(*x_BTD.shape, -1)
            for sign, c_DM, part in zip((1, -1), read, jax.tree.leaves(h), strict=False)
        )
        return jnp.sum(terms_BTDM, axis=-1), memory

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros. ValueError with causal=False."""
        if not self.causal:
            raise no_state("s4d")
        zeros = jnp.zeros((batch, self.width * self.modes), jnp.float32)
        return {"memory": (zeros, zeros) if self.is_complex else zeros}


def _number(real_DM: jax.Array, imaginary_DM: nnx.Param | None) -> jax.Array:
    """The complex number of two parts, or the real one."""
    if imaginary_DM is None:
        return real_DM
    return jax.lax.complex(real_DM, imaginary_DM[...])


def _parts(number: jax.Array) -> Any:
    """A pair of real arrays, or one, as ops take numbers."""
    return (number.real, number.imag) if jnp.iscomplexobj(number) else number


Mixer = S4D
