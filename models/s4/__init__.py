"""S4. Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces", ICLR 2022,
arXiv 2111.00396.

    h' = A h + B x,   y = C h + D x,   A = Lambda - p p*        per channel, p of rank R (Theorem 1)
    h_t = Abar h_{t-1} + Bbar x_t                               (Eq. 3)
    Abar = (I - Delta/2 A)^-1 (I + Delta/2 A),   Bbar = (I - Delta/2 A)^-1 Delta B
    Ctil = C (I - Abar^L)                                       the kernel ends at L (Section 3.2)
    Khat(z) = 2/(1+z) Ctil (g(z) - A)^-1 B,   g(z) = 2/Delta (1-z)/(1+z)
                                                                at the L roots of unity z (Algorithm
                                                                1, Lemma C.3; models/s4/cauchy.py)
    K = F^-1 Khat,   y = K * x + D x
    y_t = sum_{s<=t} K_{t-s} x_s + sum_{s>t} K'_{s-t-1} x_s + D x_t     with causal=False: a second
                                                                C, in K', for the tokens that follow
    out = (g W_1 + b_1) sigmoid(g W_2 + b_2),    g = dropout(gelu(y))

    x           x_BTD                           model width D: D systems, one input and output each
    Lambda      -exp(decay_log_DM) + i angle_DM float32; M = state_size / 2 modes; the conjugate of
                                                each is implied
    p           low_rank_real_DRM, _imaginary_DRM   float32; A is stable whatever p is
    B           write_real_DM, _imaginary_DM    float32
    Ctil        read_real_DM, _imaginary_DM     float32; the parameter instead of C, as in the
                                                paper; of K' backward_read_real_DM, _imaginary_DM
    Delta       exp(step_log_D)                 float32
    D           skip_D
    h           "memory" [B, D, N]              float32; N = state_size: the real parts, then the
                                                imaginary parts

State: D N floats; none with causal=False. Cost per token: O(D N + D^2) in a convolution, which has
O(D N L) for the kernel besides. One homogeneous block: use it with mlp="none". Dropout draws once
for all tokens of a sequence, as in the authors' code.

Two forms; what a call is given chooses between them, so that each is static. Without state and
segments, and up to kernel_length = L tokens, it is the convolution, also of sequences with padding
at their ends, of which a mask tells. Otherwise it is the recurrence
with dense real Abar (`ops.dense_scan`), for which C is recovered from Ctil by solving with
I - Abar^L, O(N^3 log L) per channel and call: exact for packed documents, carried states and
decoding, but not fast. Both forms hold h in the real coordinates (Re h, Im h), where A consists of
the Re- and Im-blocks of Lambda minus 2 q q^T with q = (Re p, Im p); Abar is a contraction there.
I - Abar^L is made of powers of Abar - I, so that a mode which hardly decays keeps its digits.

Initialisation: a HiPPO matrix in its diagonal form, Lambda - p p* = V* A V with p = V* P, B = V*
B_HiPPO (models/parts/hippo.py), by `init`: "legs"; "legt", of rank 2; "lagt"; "fout"; "legs_fout",
which alternates from channel to channel (the last two: Gu, Johnson, Timalsina, Rudra, Re, ICLR
2023, arXiv 2206.12037). Re Lambda is 0 for all but "legs"; it then starts at -1e-4, as in the
authors' code. Delta log-uniform; both parts of C ~ N(0, 1/2); D ~ N(0, 1).

Departure: Im B is not clipped (models/s4d.py says why).

Authors' code: https://github.com/state-spaces/s4"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.parts.bidirectional import following, no_state, without_padding
from models.parts.dense_systems import scan_made
from models.parts.discretisation import step_range_log
from models.parts.hippo import HippoSize, diagonal_plus_low_rank
from models.parts.options import Factor, Probability, Reach, check_choice
from models.parts.projections import projection, tied_dropout
from models.s4.system import FIELDS, System, dense_form, truncation
from ops.dense_scan.powers import einsum

# init -> the HiPPO matrices that channels have in turns
INITS = {
    "legs": ("legs",),
    "legt": ("legt",),
    "lagt": ("lagt",),
    "fout": ("fout",),
    "legs_fout": ("legs", "fout"),
}
SLOWEST = 1e-4  # the least initial -Re Lambda, whose logarithm is the parameter


class S4(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B, D, N]}, float32, and None with causal=False."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        state_size: HippoSize = 64,
        init: str = "legs",
        kernel_length: Reach = 1024,
        dt_min: Factor = 1e-3,
        dt_max: Factor = 1e-1,
        causal: bool = True,
        dropout: Probability = 0.0,
    ):
        check_choice("init", init, tuple(INITS))
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
        self.width, self.state_size, self.compute_dtype = (width, state_size, compute_dtype)
        self.kernel_length, self.causal = kernel_length, causal

        # float32 whatever param_dtype is: they enter quotients, and products with the float32
        # state.
        def ssm(array: jax.Array) -> nnx.Param:
            axes = ("embed", *(None,) * (array.ndim - 1))
            return nnx.Param(array, group="ssm", out_sharding=axes)

        forms = [diagonal_plus_low_rank(name, state_size) for name in INITS[init]]

        def in_turns(arrays: list[np.ndarray]) -> nnx.Param:
            array = jnp.asarray(np.stack(arrays), jnp.float32)
            return ssm(array[np.arange(width) % len(forms)])

        self.decay_log_DM = in_turns(
            [np.log(np.maximum(-np.real(form.eigenvalue), SLOWEST)) for form in forms]
        )
        self.angle_DM = in_turns([np.imag(form.eigenvalue) for form in forms])
        self.low_rank_real_DRM = in_turns([np.real(form.low_rank) for form in forms])
        self.low_rank_imaginary_DRM = in_turns([np.imag(form.low_rank) for form in forms])
        self.write_real_DM = in_turns([np.real(form.write) for form in forms])
        self.write_imaginary_DM = in_turns([np.imag(form.write) for form in forms])
        step_log_D = jax.random.uniform(
            rngs.params(), (width,), jnp.float32, *step_range_log(dt_min, dt_max)
        )
        self.step_log_D = ssm(step_log_D)
        skip_D = jax.random.normal(rngs.params(), (width,), jnp.float32)
        self.skip_D = nnx.Param(skip_D, group="no_decay", out_sharding=("embed",))
        self.output, self.output_gate = dense(), dense()

        def read() -> tuple[nnx.Param, nnx.Param]:
            # y = 2 Re(C h), as a row on (Re h, Im h).
            c_DN = math.sqrt(2) * jax.random.normal(rngs.params(), (width, state_size), jnp.float32)
            E_DNN, _ = self.system(jnp.split(c_DN, 2, axis=1)).increment()
            c_DN = einsum("dn,dnk->dk", c_DN, truncation(E_DNN, kernel_length))
            real_DM, imaginary_DM = jnp.split(c_DN / 2, 2, axis=1)
            axes = ("embed", None)
            return (
                nnx.Param(real_DM, out_sharding=axes),
                nnx.Param(-imaginary_DM, out_sharding=axes),
            )

        self.read_real_DM, self.read_imaginary_DM = read()
        none = (None, None)
        self.backward_read_real_DM, self.backward_read_imaginary_DM = none if causal else read()
        self.dropout = tied_dropout(dropout, rngs)

    def reads(self) -> list[tuple[jax.Array, jax.Array]]:
        """The parts of Ctil [D, M], with causal=False those of the future, too."""
        pairs = (
            (self.read_real_DM, self.read_imaginary_DM),
            (self.backward_read_real_DM, self.backward_read_imaginary_DM),
        )
        return [(r[...], i[...]) for r, i in pairs if r is not None and i is not None]

    def system(self, read: Sequence[jax.Array] | None = None) -> System:
        """The system that has these parts of Ctil; None: those of the past."""
        parameters = (getattr(self, f"{name}_{axes}")[...] for name, axes in FIELDS.items())
        return System(*parameters, *(read or self.reads()[0]))

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

        def response(
            read: tuple[jax.Array, jax.Array], memory_BDN: Any, reverse: bool
        ) -> tuple[jax.Array, jax.Array]:
            system = self.system(read)
            y_BTD1, memory_BDN = scan_made(
                "s4",
                functools.partial(
                    dense_form,
                    kernel_length=self.kernel_length,
                    convolved=x_BTD.shape[1] <= self.kernel_length,
                ),
                tuple("CRM"[: array.ndim] for array in system),
                x_float_BTD,
                memory_BDN,
                segment_ids,
                *system,
                reverse=reverse,
            )
            return y_BTD1[..., 0], memory_BDN

        reads = self.reads()
        y_BTD, memory_BDN = response(reads[0], None if state is None else state["memory"], reverse)
        if not self.causal:
            future_BTD, _ = response(reads[1], None, not reverse)
            y_BTD = y_BTD + following(future_BTD, segment_ids, reverse=reverse)
        y_BTD = y_BTD + self.skip_D[...][None, None, :] * x_float_BTD
        g_BTD = jax.nn.gelu(y_BTD).astype(self.compute_dtype)
        if self.dropout is not None:
            g_BTD = self.dropout(g_BTD)
        return self.output(g_BTD) * jax.nn.sigmoid(self.output_gate(g_BTD)), (
            {"memory": memory_BDN} if self.causal else None
        )

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros. ValueError with causal=False."""
        if not self.causal:
            raise no_state("s4")
        shape = (batch, self.width, self.state_size)
        return {"memory": jnp.zeros(shape, jnp.float32)}


Mixer = S4
