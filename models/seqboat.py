"""SeqBoat, sparse modular activation. Ren, Liu, Wang, Xu, Zhu, Zhai, "Sparse Modular Activation for
Efficient Sequence Modeling", NeurIPS 2023, arXiv 2306.11197.

    h_t = a h_{t-1} + p b x_t,   a = 1 - sigmoid(delta) sigmoid(alpha),   p = sigmoid(delta)
    M_t = silu(sum_n gamma_n h_tn / sqrt(N) + omega x_t)        damped EMA of N states, features
    [r_t, H_t] = M_t W_h + b_h,   pi_t = softmax(r_t / tau)     router
    g_t = pi_t[1] where pi_t[1] > pi_t[0], else 0
    M^c = the rows of M with g_t > 0, in order                  compress
    [z, rho, v] = silu(M^c W + b),   q = z gamma_0 + beta_0,   k = z gamma_1 + beta_1
    Y^c = (attention(q, k, v) * rho) W_o                        over a token and the w activated
                                                                ones before it
    y_t = silu(H_t + g_t Y_t + x_t)                             extract: Y_t is the row of t in Y^c
                                                                where t is activated
    attention   "softmax": softmax(q k / sqrt(Z)) v,   "squared_relu": max(q k / w, 0)^2 v

With causal=False M adds a second moving average, with parameters of its own, from the last token to
the first; both read x_t. Attention is over the w activated tokens on either side, and
"squared_relu" divides by 2 w.

    a, p b, gamma   factor_DN, write_DN, read_DN    a in [0, 1] for every delta, alpha; per channel
    q, k, v         [B, T, 1, Z], [B, T, 1, V]      of the compressed sequence, V = expand_v D;
                                                    positions are those before it was compressed
    h               "memory" [B, D N]               float32
    tau             exp(temperature_log)            starts at init_temperature sqrt(D)

State: D N floats, and keys and values of the last w activated tokens: w (Z + V). The window reaches
as far back as activations are sparse. The compressed sequence has the static length T, activated
tokens first: the computation is exact whatever the router does, and costs what activating every
token costs, O(T w (Z + V)). With causal=False there is no state. Gradients reach the router through
g alone; it has no balancing loss. Reports `activation_density`, the share of activated tokens.

Departures: the backbone's residual and RMSNorm stand around the layer, so that x is the normalised
input, where the paper's X inside the last silu is the residual stream and there is no other; rotary
positions with either attention, where the authors' recipes with squared ReLU have a learned
relative bias.

Authors' code: https://github.com/renll/SeqBoat
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.bidirectional import no_state, reversed_tokens
from models.parts.options import Factor, Probability, Reach, Size, check_choice
from models.parts.positions import next_position, token_positions
from models.parts.projections import projection, tied_dropout
from models.parts.rotary import RopeBase, check_pairs, rotate
from models.parts.variables import report
from ops.diagonal_scan.api import diagonal_scan
from ops.framework import segments
from ops.neighbourhood_attention.api import neighbourhood_attention
from ops.window_attention.api import ACTIVATIONS, WindowState, init_window_state, window_attention


class DampedEMA(nnx.Module):
    """y_t = sum_n gamma_n h_tn / sqrt(N) + omega x_t per channel, Mega's damped moving average;
    omega is 0 without `skip`.

    Ma et al., "Mega: Moving Average Equipped Gated Attention", ICLR 2023, arXiv 2209.10655.
    """

    def __init__(self, width: int, state_size: int, *, skip: bool = True, rngs: nnx.Rngs):
        def truncated(scale: float, *shape: int) -> jax.Array:
            return scale * jax.random.truncated_normal(rngs.params(), -2, 2, shape)

        def parameter(value: jax.Array) -> nnx.Param:
            axes = ("embed", None)[: value.ndim]
            return nnx.Param(value, group="no_decay", out_sharding=axes)

        # float32 whatever param_dtype is: powers of the factor reach over the whole sequence.
        size = (width, state_size)
        sign_N = 1.0 - 2.0 * (jnp.arange(state_size) % 2)
        self.damping_DN = parameter(truncated(0.2, *size))
        self.decay_DN = parameter(truncated(0.2, *size))
        self.write_DN = parameter(sign_N[None] + truncated(0.02, *size))
        self.read_DN = parameter(truncated(1.0, *size))
        self.skip_D = parameter(truncated(1.0, width)) if skip else None

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """a and p b, [D, N]."""
        p_DN = jax.nn.sigmoid(self.damping_DN[...])
        return 1 - p_DN * jax.nn.sigmoid(self.decay_DN[...]), p_DN * self.write_DN[...]

    def __call__(
        self,
        x_BTD: jax.Array,
        state: jax.Array | None,
        segment_ids: jax.Array | None,
        *,
        reverse: bool = False,
    ) -> tuple[jax.Array, Any]:
        factor_DN, write_DN = self.factors()
        x_BTD = x_BTD.astype(jnp.float32)
        b_BTDN = x_BTD[..., None] * write_DN[None, None]
        h_BTM, state = diagonal_scan(
            factor_DN.reshape(-1),
            b_BTDN.reshape(*b_BTDN.shape[:2], -1),
            initial_state=state,
            segment_ids=segment_ids,
            reverse=reverse,
        )
        read_DN = self.read_DN[...] / math.sqrt(write_DN.shape[1])
        y_BTD = jnp.einsum("btdn,dn->btd", h_BTM.reshape(b_BTDN.shape), read_DN)
        if self.skip_D is not None:
            y_BTD = y_BTD + self.skip_D[...][None, None] * x_BTD
        return y_BTD, state


class Compressed(NamedTuple):
    """Activated tokens first, in order; then the others, which nothing reads.

    token [B, T]    which token stands in each row
    row [B, T]      the row of each token; only activated tokens have one
    activated [B]   how many are
    document [B, T] number of each row's document, from 0
    last [B]        number of the last document
    """

    token: jax.Array
    row: jax.Array
    activated: jax.Array
    document: jax.Array
    last: jax.Array


def compress(active_BT: jax.Array, segment_ids: jax.Array | None) -> Compressed:
    """The order that puts activated tokens first, and the documents in it."""
    token_BT = jnp.argsort(~active_BT, axis=1, stable=True)
    row_BT = jnp.maximum(jnp.cumsum(active_BT, axis=1) - 1, 0)
    document_BT = jnp.zeros(active_BT.shape, jnp.int32)
    if segment_ids is not None:
        starts_BT = segments.starts(segment_ids)
        document_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
    return Compressed(
        token_BT,
        row_BT,
        jnp.sum(active_BT, axis=1),
        jnp.take_along_axis(document_BT, token_BT, axis=1),
        document_BT[:, -1],
    )


def following_window(
    window: WindowState, k: jax.Array, v: jax.Array, plan: Compressed
) -> WindowState:
    """Keys and values of the last w activated tokens, remembered or of this call.

    Only those of the last document are valid."""
    remembered = window.valid.shape[1]
    row_BW = plan.activated[:, None] + jnp.arange(remembered)[None]

    def last(past: jax.Array, rows: jax.Array) -> jax.Array:
        both = jnp.concatenate([past, rows.astype(past.dtype)], axis=1)
        return jax.vmap(lambda x, i: x[i])(both, row_BW)

    of_past = jnp.where(window.valid, 0, -1)
    valid = last(of_past, plan.document) == plan.last[:, None]
    k, v = (
        jnp.where(valid[:, :, None, None], last(past, rows), 0)
        for past, rows in ((window.k, k), (window.v, v))
    )
    return WindowState(k, v, valid)


class SeqBoat(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B, D N], "window", "position" [B] int32}.

    "window" holds keys and values of the last w activated tokens. With causal=False it is None."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        window: Reach = 128,
        key_size: Size = 64,
        expand_v: Factor = 2.0,
        state_size: Size = 16,
        attention: str = "softmax",
        init_temperature: Factor = 0.3,
        rope_base: RopeBase = 10000.0,
        causal: bool = True,
        dropout: Probability = 0.0,
    ):
        check_choice("attention", attention, ACTIVATIONS)
        if window < 1 or init_temperature <= 0:
            raise ValueError(
                "window must be at least 1 and init_temperature greater than 0; got"
                f" {window} and {init_temperature}"
            )
        dense = functools.partial(
            projection,
            init=nnx.initializers.truncated_normal(0.02),
            bias=True,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        self.window, self.key_size = window, check_pairs(key_size, "key_size")
        self.attention, self.causal = attention, causal
        self.value_size = round(expand_v * width)
        self.width, self.state_size = width, state_size
        self.rope_base, self.compute_dtype = rope_base, jnp.dtype(compute_dtype)

        inner = functools.partial(dense, compute_dtype=compute_dtype)
        self.ema = DampedEMA(width, state_size, rngs=rngs)
        # The choice is discontinuous: rounding must not make it.
        self.router = dense(width, 2, ("embed", None), compute_dtype=jnp.float32)
        self.linear = inner(width, width, ("embed", "heads"))
        self.shared = inner(width, key_size, ("embed", "heads"))
        self.gate = inner(width, self.value_size, ("embed", "heads"))
        self.value = inner(width, self.value_size, ("embed", "heads"))
        self.output = inner(self.value_size, width, ("heads", "embed"), bias=False)
        temperature_log = jnp.full((1,), math.log(init_temperature * width**0.5))
        self.temperature_log = nnx.Param(temperature_log, group="no_decay", out_sharding=(None,))
        scale_2Z = 0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, (2, key_size))
        affine: dict[str, Any] = {"group": "no_decay", "out_sharding": (None, "heads")}
        self.scale_2Z = nnx.Param(scale_2Z, **affine)
        self.shift_2Z = nnx.Param(jnp.zeros((2, key_size)), **affine)
        self.backward_ema = None if causal else DampedEMA(width, state_size, skip=False, rngs=rngs)
        self.dropout = tied_dropout(dropout, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        batch, length, _ = x_BTD.shape
        state = state or self._first_state(batch)
        positions = token_positions(positions, state["position"], length, segment_ids)
        m_BTD, memory = self.ema(x_BTD, state["memory"], segment_ids)
        if self.backward_ema is not None:
            m_BTD = m_BTD + self.backward_ema(x_BTD, None, segment_ids, reverse=True)[0]
        m_BTD = jax.nn.silu(m_BTD)
        if self.dropout is not None:
            m_BTD = self.dropout(m_BTD)
        g_BT = self.route(m_BTD)
        report(self, activation_density=jnp.mean(g_BT > 0, dtype=jnp.float32))
        m_BTD = m_BTD.astype(self.compute_dtype)
        y_BTD, window = self.attend(m_BTD, g_BT, positions, state["window"], segment_ids)
        h_BTD = self.linear(m_BTD) + y_BTD + x_BTD
        after = {"memory": memory, "window": window, "position": next_position(positions)}
        return jax.nn.silu(h_BTD), after if self.causal else None

    def route(self, m_BTD: jax.Array) -> jax.Array:
        """g [B, T], float32: the probability of activation where it is above 1/2, else 0."""
        logits_BT2 = self.router(m_BTD) / jnp.exp(self.temperature_log[...])[None, None]
        p_BT2 = jax.nn.softmax(logits_BT2, axis=-1)
        return jnp.where(p_BT2[..., 1] > p_BT2[..., 0], p_BT2[..., 1], 0.0)

    def attend(
        self,
        m_BTD: jax.Array,
        g_BT: jax.Array,
        positions: jax.Array,
        window: WindowState,
        segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, WindowState]:
        """g_t Y_t for every token, 0 where it is not activated, and the window that follows."""
        plan = compress(g_BT > 0, segment_ids)
        m_BTD = jnp.take_along_axis(m_BTD, plan.token[..., None], axis=1)
        positions = jnp.take_along_axis(positions, plan.token, axis=1)
        z_BTZ, rho_BTV, v_BTV = (
            jax.nn.silu(part(m_BTD)) for part in (self.shared, self.gate, self.value)
        )
        scale_2Z, shift_2Z = (
            x[...].astype(self.compute_dtype)[:, None, None] for x in (self.scale_2Z, self.shift_2Z)
        )
        q, k = (
            rotate((z_BTZ * scale + shift)[:, :, None], positions, base=self.rope_base)
            for scale, shift in zip(scale_2Z, shift_2Z, strict=True)
        )
        v = v_BTV[:, :, None]
        if self.causal:
            # The op takes what is remembered for the first row's document; it is document 0's.
            of_first = window.valid & (plan.document[:, :1] == 0)
            o_BT1V, _ = window_attention(
                q,
                k,
                v,
                window=self.window + 1,
                scale=1 / self.window if self.attention == "squared_relu" else None,
                activation=self.attention,
                initial_state=window._replace(valid=of_first),
                segment_ids=plan.document,
            )
        else:
            o_BT1V = self.attend_both_ways(q, k, v, plan)
        y_BTD = self.output(o_BT1V[:, :, 0] * rho_BTV)
        y_BTD = jnp.take_along_axis(y_BTD, plan.row[..., None], axis=1)
        y_BTD = jnp.where(g_BT[..., None] > 0, g_BT[..., None] * y_BTD, 0.0)
        return y_BTD.astype(self.compute_dtype), following_window(window, k, v, plan)

    def attend_both_ways(
        self, q: jax.Array, k: jax.Array, v: jax.Array, plan: Compressed
    ) -> jax.Array:
        """Attention [B, T, 1, V] of the rows to the activated ones at most w before or behind."""
        there_BT = jnp.arange(q.shape[1])[None] < plan.activated[:, None]
        if self.attention == "softmax":
            return neighbourhood_attention(
                q,
                k,
                v,
                grid=q.shape[1:2],
                radius=self.window + 1,
                key_mask=there_BT,
                segment_ids=plan.document,
            )
        # Squares have no sum to be divided by: the two sides add up, less the token itself, which
        # is in both.
        v = jnp.where(there_BT[..., None, None], v, 0)
        scale = 1 / (2 * self.window)

        def side(*arrays: jax.Array) -> jax.Array:
            *qkv, document_BT = arrays
            return window_attention(
                *qkv,
                window=self.window + 1,
                scale=scale,
                activation=self.attention,
                segment_ids=document_BT,
            )[0]

        arrays = (q, k, v, plan.document)
        behind = reversed_tokens(side(*map(reversed_tokens, arrays)))
        score = scale * jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), -1, keepdims=True)
        itself = (jnp.square(jax.nn.relu(score)) * v).astype(v.dtype)
        return side(*arrays) + behind - itself

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros, and an empty window. ValueError with
        causal=False."""
        if not self.causal:
            raise no_state("seqboat")
        return self._first_state(batch)

    def _first_state(self, batch: int) -> dict[str, Any]:
        window = init_window_state(
            batch, self.window + 1, 1, self.key_size, self.value_size, self.compute_dtype
        )
        return {
            "memory": jnp.zeros((batch, self.width * self.state_size), jnp.float32),
            "window": window,
            "position": jnp.zeros((batch,), jnp.int32),
        }


Mixer = SeqBoat
