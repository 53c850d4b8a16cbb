"""LSSL, linear state-space layers. Gu, Johnson, Goel, Saab, Dao, Rudra, Re, "Combining Recurrent,
Convolutional, and Continuous-time Models with Linear State-Space Layers", NeurIPS 2021, arXiv
2110.13985.

    h' = A h + B x,   y = C h + D x         per channel: one input, `channels` outputs (Eq. 1, 2)
    h_t = Abar h_{t-1} + Bbar x_t,   y_t = C h_t + D x_t    as a recurrence (Section 3.1)
    y = K * x + D x,   K_l = C Abar^l Bbar                  as a convolution (Section 3.1)
    Abar = (I - Delta/2 A)^-1 (I + Delta/2 A)               bilinear (Eq. 3, alpha = 1/2)
    Bbar = (I - Delta/2 A)^-1 Delta B
    -A = P (Diag(d) + T^-1) Q,   T tridiagonal,   B = P b   the trained family (Section 4.2)
    out = gelu(y) W + w

    x               x_BTD                       input, model width D: D systems that share A and B
    Delta           step_D                      float32; one step size per channel
    T               below, diagonal, above      float32 [N-1], [N], [N-1]; N = state_size
    P, Q, d, b      left, right, middle, write  float32 [N]
    C               read_DMN                    float32; M = channels
    D               skip_DM                     float32
    h               "memory" [B, D, N]          float32

State: D N floats. Cost per token: O(D (N + M) + D^2 M), and O(D N^2 sqrt(T)) per sequence for the
kernel; of a recurrent step O(D N^2). One homogeneous block: use it with mlp="none".

transition="fixed" is LSSL-f: A and B are HiPPO-LegS (models/parts/hippo.py), Delta is spread evenly
in the logarithm from dt_min to dt_max, and only C, D and W are trained. transition="learned" trains
all: A starts as HiPPO-LegS, which is the member P = Q = Diag(sqrt(2n+1)), d_n = -n / (2n+1), T with
1 on and -1 below the diagonal, b = 1; Delta log-uniform. In both, C, D ~ N(0, 1). No inverse is
dense: (I - Delta/2 A)^-1 is a tridiagonal system between diagonal and tridiagonal factors.

A call without state and segments is a convolution; any other is the recurrence in chunks
(`ops.dense_scan`). From the initialisation Abar is a contraction, so that its powers are harmless
in float32.

Departures: the kernel is made of about sqrt(T) powers of Abar from each side instead of all T,
whose N T numbers per channel the paper caches for LSSL-f; it is exact for every length and nothing
is cached. Causal, RMSNorm of the backbone in front of the mixer, no dropout. A and Delta share one
learning rate (the authors' A learns ten times slower).

Authors' code: https://github.com/state-spaces/s4"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.parts.discretisation import step_range_log
from models.parts.hippo import HippoSize
from models.parts.options import Factor, Size, check_choice
from models.parts.projections import projection
from ops.dense_scan.api import dense_scan
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
    """x_BTD -> y_BTD; the state is {"memory" [B, D, N]}, float32."""

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
        channels: Size = 1,
        transition: str = "learned",
        dt_min: Factor = 1e-3,
        dt_max: Factor = 1e-1,
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
        self.learned = transition == "learned"
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
        read_DMN = jax.random.normal(rngs.params(), (width, channels, state_size), jnp.float32)
        self.read_DMN = nnx.Param(read_DMN, out_sharding=("embed", None, None))
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
        step_D, v = self.factors()
        step_D1 = step_D[:, None]
        half_D1 = step_D1 / 2
        # I + Delta/2 P (Diag(d) + T^-1) Q = P T^-1 W Q with the tridiagonal W = T Diag(e) + Delta/2
        # I.
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
                jnp.broadcast_to(tridiagonal_NN[None], (*e_DN.shape, self.state_size)),
            )
            / v["right"][None, :, None]
        )
        # Eq. 3: (I - Delta/2 A)^-1 (I + Delta/2 A) = 2 (I - Delta/2 A)^-1 - I
        A_DNN = 2 * inverse_DNN - jnp.eye(self.state_size)[None]
        B_N = v["left"] * v["write"]
        return A_DNN, step_D1 * (inverse_DNN * B_N[None, None]).sum(-1)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        reverse: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        x_float_BTD, (batch, length, _) = x_BTD.astype(jnp.float32), x_BTD.shape
        A_DNN, b_DN = self.system()
        read_DMN, skip_DM = self.read_DMN[...], self.skip_DM[...]
        y_BTDM, memory_BDN = dense_scan(
            x_float_BTD,
            A_DNN,
            b_DN,
            read_DMN,
            kernel=functools.partial(krylov_kernel, A_DNN, b_DN, read_DMN),
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
            reverse=reverse,
        )
        y_BTDM = y_BTDM + skip_DM[None, None] * x_float_BTD[..., None]
        g_BTE = jax.nn.gelu(y_BTDM).astype(self.compute_dtype)
        return self.output(g_BTE.reshape(batch, length, -1)), {"memory": memory_BDN}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        shape = (batch, self.width, self.state_size)
        return {"memory": jnp.zeros(shape, jnp.float32)}


Mixer = LSSL
