"""LSSL, linear state-space layers. Gu, Johnson, Goel, Saab, Dao, Rudra, Re, "Combining Recurrent,
Convolutional, and Continuous-time Models with Linear State-Space Layers", NeurIPS 2021, arXiv
2110.13985.

    h' = A h + B x,   y = C h + D x         per channel: one input, `channels` outputs (Eq. 1, 2)
    h_t = Abar h_{t-1} + Bbar x_t,   y_t = C h_t + D x_t    as a recurrence (Section 3.1)
    y = K * x + D x,   K_l = C Abar^l Bbar                  as a convolution (Section 3.1)
    Abar = (I - Delta/2 A)^-1 (I + Delta/2 A)               bilinear (Eq. 3, alpha = 1/2)
    Bbar = (I - Delta/2 A)^-1 Delta B
    -A = P (Diag(d) + T^-1) Q,   T tridiagonal,   B = P b   the trained family (Section 4.2)
    y_t = sum_{s<=t} K_{t-s} x_s + sum_{s>t} K'_{s-t-1} x_s + D x_t     with causal=False: a second
                                                                C, in K', for the tokens that follow
    out = dropout(gelu(y)) W + w

    x               x_BTD                       input, model width D: D systems that share A and B
    Delta           step_D                      float32; one step size per channel
    T               below, diagonal, above      float32 [N-1], [N], [N-1]; N = state_size
    P, Q, d, b      left, right, middle, write  float32 [N]
    C               read_DMN                    float32; M = channels; of K' backward_read_DMN
    D               skip_DM                     float32
    h               "memory" [B, D, N]          float32

State: D N floats; none with causal=False. Cost per token: O(D (N + M) + D^2 M), and O(D N^2
sqrt(T)) per sequence for the kernel; of a recurrent step O(D N^2). One homogeneous block: use it
with mlp="none".

transition="fixed" is LSSL-f: A and B are HiPPO-LegS (models/parts/hippo.py), Delta is spread evenly
in the logarithm from dt_min to dt_max, and only C, D and W are trained. transition="learned" trains
all: A starts as HiPPO-LegS, which is the member P = Q = Diag(sqrt(2n+1)), d_n = -n / (2n+1), T with
1 on and -1 below the diagonal, b = 1; Delta log-uniform. In both, C, D ~ N(0, 1). No inverse is
dense: (I - Delta/2 A)^-1 is a tridiagonal system between diagonal and tridiagonal factors.

A call without state and segments is a convolution, also of sequences with padding at their ends, of
which a mask tells; any other is the recurrence in chunks
(`ops.dense_scan`). From the initialisation Abar is a contraction, so that its powers are harmless
in float32.

Departures: the kernel is made of about sqrt(T) powers of Abar from each side instead of all T,
whose N T numbers per channel the paper caches for LSSL-f; it is exact for every length and nothing
is cached. A and Delta share one learning rate (the authors' A learns ten times slower). The form
with causal=False is that of the authors' next paper (models/s4), whose code serves both. Dropout
draws once for all tokens of a sequence.

Authors' code: https://github.com/state-spaces/s4"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.parts.bidirectional import following, no_state, without_padding
from models.parts.dense_systems import Dense, scan_made
from models.parts.discretisation import step_range_log
from models.parts.hippo import HippoSize
from models.parts.options import Factor, Probability, Size, check_choice
from models.parts.projections import projection, tied_dropout
from ops.dense_scan.powers import krylov_kernel


def legs_factors(size: int) -> dict[str, np.ndarray]:
    """The vectors of the trained family that give HiPPO-LegS."""
    n, ones = np.arange(size), np.ones(size)
    root = np.sqrt(2 * n + 1)
    return {
        "below": -ones[1:],
        "diagonal": ones,
        "above": np.zeros(size - 1),
        "left": root,
        "right": root,
        "middle": -n / (2 * n + 1),
        "write": ones,
    }


class LSSL(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B, D, N]}, float32, and None with causal=False."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        state_size: HippoSize = 128,
        channels: Size = 1,
        transition: str = "learned",
        dt_min: Factor = 1e-3,
        dt_max: Factor = 1e-1,
        causal: bool = True,
        dropout: Probability = 0.0,
    ):
        check_choice("transition", transition, ("learned", "fixed"))
        if state_size < 2 or channels < 1:
            raise ValueError(
                "state_size must be at least 2 and channels at least 1; got"
                f" state_size={state_size}, channels={channels}"
            )
        self.width, self.state_size, self.compute_dtype = (width, state_size, compute_dtype)
        low, high = step_range_log(dt_min, dt_max)
        self.log_steps = (low, high)
        self.learned, self.causal = transition == "learned", causal
        # float32 whatever param_dtype is: they enter an inverse, and products with the float32
        # state.
        if self.learned:
            step_log_D = jax.random.uniform(rngs.params(), (width,), jnp.float32, low, high)
            self.step_log_D = nnx.Param(step_log_D, group="ssm", out_sharding=("embed",))
            for name, vector in legs_factors(state_size).items():
                parameter = nnx.Param(
                    jnp.asarray(vector, jnp.float32), group="ssm", out_sharding=(None,)
                )
                setattr(self, name, parameter)

        def read() -> nnx.Param:
            C_DMN = jax.random.normal(rngs.params(), (width, channels, state_size), jnp.float32)
            return nnx.Param(C_DMN, out_sharding=("embed", None, None))

        self.read_DMN = read()
        skip_DM = jax.random.normal(rngs.params(), (width, channels), jnp.float32)
        self.skip_DM = nnx.Param(skip_DM, group="no_decay", out_sharding=("embed", None))
        self.output = projection(
            width * channels,
            width,
            ("heads", "embed"),
            init=nnx.initializers.lecun_normal(),
            bias=True,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        self.backward_read_DMN = None if causal else read()
        self.dropout = tied_dropout(dropout, rngs)

    def factors(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Delta [D] and the vectors of A and B, float32."""
        vectors = legs_factors(self.state_size)
        if self.learned:
            return jnp.exp(self.step_log_D[...]), {
                name: getattr(self, name)[...] for name in vectors
            }
        step_D = np.exp(np.linspace(*self.log_steps, self.width))
        return jnp.asarray(step_D, jnp.float32), {
            name: jnp.asarray(vector, jnp.float32) for name, vector in vectors.items()
        }

    def system(self) -> tuple[jax.Array, jax.Array]:
        """Abar [D, N, N] and Bbar [D, N], float32."""
        return system(*self.factors())

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
        x_float_BTD, (batch, length, _) = x_BTD.astype(jnp.float32), x_BTD.shape
        x_float_BTD = without_padding(x_float_BTD, mask)
        step_D, vectors = self.factors()

        def response(
            read_DMN: jax.Array, memory_BDN: Any, reverse: bool
        ) -> tuple[jax.Array, jax.Array]:
            return scan_made(
                "lssl",
                dense_form,
                ("C", "N", "CMN"),
                x_float_BTD,
                memory_BDN,
                segment_ids,
                step_D,
                vectors,
                read_DMN,
                reverse=reverse,
            )

        memory_BDN = None if state is None else state["memory"]
        y_BTDM, memory_BDN = response(self.read_DMN[...], memory_BDN, reverse)
        if self.backward_read_DMN is not None:
            future_BTDM, _ = response(self.backward_read_DMN[...], None, not reverse)
            future_BTE = following(
                future_BTDM.reshape(batch, length, -1), segment_ids, reverse=reverse
            )
            y_BTDM = y_BTDM + future_BTE.reshape(y_BTDM.shape)
        y_BTDM = y_BTDM + self.skip_DM[...][None, None] * x_float_BTD[..., None]
        g_BTE = jax.nn.gelu(y_BTDM).astype(self.compute_dtype).reshape(batch, length, -1)
        if self.dropout is not None:
            g_BTE = self.dropout(g_BTE)
        return self.output(g_BTE), {"memory": memory_BDN} if self.causal else None

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros. ValueError with causal=False."""
        if not self.causal:
            raise no_state("lssl")
        shape = (batch, self.width, self.state_size)
        return {"memory": jnp.zeros(shape, jnp.float32)}


def system(step_D: jax.Array, v: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Abar [D, N, N] and Bbar [D, N], float32, of Delta and the vectors of A and B."""
    step_D1, size = step_D[:, None], len(v["left"])
    half_D1 = step_D1 / 2
    # I + Delta/2 P (Diag(d) + T^-1) Q = P T^-1 W Q with the tridiagonal W = T Diag(e) + Delta/2 I.
    e_DN = 1 / (v["left"] * v["right"])[None] + half_D1 * v["middle"][None]
    below_DN = jnp.pad(v["below"][None] * e_DN[:, :-1], ((0, 0), (1, 0)))
    above_DN = jnp.pad(v["above"][None] * e_DN[:, 1:], ((0, 0), (0, 1)))
    tridiagonal_NN = (
        jnp.diag(v["diagonal"]) + jnp.diag(v["below"], -1) + jnp.diag(v["above"], 1)
    ) / v["left"][None]
    inverse_DNN = (
        jax.lax.linalg.tridiagonal_solve(
            below_DN,
            v["diagonal"][None] * e_DN + half_D1,
            above_DN,
            jnp.broadcast_to(tridiagonal_NN[None], (*e_DN.shape, size)),
        )
        / v["right"][None, :, None]
    )
    # Eq. 3: (I - Delta/2 A)^-1 (I + Delta/2 A) = 2 (I - Delta/2 A)^-1 - I
    A_DNN = 2 * inverse_DNN - jnp.eye(size)[None]
    B_N = v["left"] * v["write"]
    return A_DNN, step_D1 * (inverse_DNN * B_N[None, None]).sum(-1)


def dense_form(step_D: jax.Array, vectors: Mapping[str, jax.Array], read_DMN: jax.Array) -> Dense:
    """The dense form of the channels at hand."""
    A_DNN, b_DN = system(step_D, vectors)
    return Dense(A_DNN, b_DN, read_DMN, functools.partial(krylov_kernel, A_DNN, b_DN, read_DMN))


Mixer = LSSL
