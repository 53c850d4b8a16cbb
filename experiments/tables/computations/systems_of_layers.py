"""Layers of this project as linear time-varying systems, and as their papers' equations.

The table of Sieber et al., "Understanding the Differences in Foundation Models", NeurIPS 2024,
arXiv 2405.15731, for our layers and their parameters:

                            Lam_i                       B_i                             C_i
    softmax attention       eta_{i-1} / eta_i           phi(k_i) x W_V / eta_i          phi(q_i)
    linear attention        as above, eta_i = sum_j phi(q_i) phi(k_j)
    normalised attention    as above, eta_i = exp(w x_i), phi = 1
    S6 (Mamba)              exp(Delta_i a)              Delta_i x W_B u_i               W_C u_i
    SSD (Mamba-2)           the same, a per head
    qLSTM                   sigmoid(f_i)                sigmoid(i_i)                    sigmoid(o_i)
    qLSTM, reversed         sigmoid(-f_i)^alpha         as above                        as above

Softmax attention's features, phi(q) phi(k) = exp(q k), are infinitely many; over T given keys they
have a form in T dimensions, phi(k_j) = e_j and phi(q)_j = exp(q k_j), whose state is the key-value
cache. `taylor_system` cuts them at a degree instead.

Everything takes the layer's parameters as dictionaries and one sequence x [T, D], in the dtype that
they have.

Letters: T time (also i and j), H heads, K key and F feature size, V value size, N states, C inputs
of the system, E its outputs."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.linear_attention import LinearAttention
from models.mamba import Mamba
from models.mamba2 import Mamba2
from models.normalised_attention import NormalisedAttention
from models.qlstm import QuasiLSTM
from models.transformer import SoftmaxAttention

Params = Any


class System(NamedTuple):
    """h_i = decay_i h_{i-1} + write_i u_i, y_i = read_i h_i + u_i skip, over T tokens."""

    input_TC: jax.Array
    decay_TN: jax.Array
    write_TNC: jax.Array
    read_TEN: jax.Array
    skip_CE: jax.Array


@dataclass(frozen=True)
class Layer:
    """A mixer of models/ with `options`, and what its output is made of.

    system, equations   of the same y [T, E]: as a linear system, and as the paper writes it
    finish              the layer's output [T, D] of x and y
    """

    mixer: type
    system: Callable[[Params, jax.Array], System]
    equations: Callable[[Params, jax.Array], jax.Array]
    finish: Callable[[Params, jax.Array, jax.Array], jax.Array]
    options: Mapping[str, Any] = field(default_factory=dict)


def linear(params: Params, x_TD: jax.Array) -> jax.Array:
    """x W + b of an nnx.Linear."""
    y = x_TD @ params["kernel"]
    return y + params["bias"][None] if "bias" in params else y


def out(params: Params, x_TD: jax.Array, y_TE: jax.Array) -> jax.Array:
    del x_TD
    return linear(params["output"], y_TE)


def convolved(params: Params, x_TE: jax.Array) -> jax.Array:
    """Causal depthwise convolution, the last tap on the current token."""
    w_WE = params["weight_WD"]
    padded = jnp.pad(x_TE, ((len(w_WE) - 1, 0), (0, 0)))
    y_TE = jnp.broadcast_to(params["bias_D"][None], x_TE.shape)
    for i, w_E in enumerate(w_WE):
        y_TE = y_TE + w_E[None] * padded[i : i + len(x_TE)]
    return y_TE


def no_skip(input_TC: jax.Array, outputs: int) -> jax.Array:
    return jnp.zeros((input_TC.shape[1], outputs), input_TC.dtype)


# --- Attention: (phi(q), phi(k), eta) of two heads


HEADS = 2


def heads_of(params: Params, x_TD: jax.Array) -> jax.Array:
    y_TE = linear(params, x_TD)
    return y_TE.reshape(len(y_TE), HEADS, -1)


def attention_system(
    params: Params, x_TD: jax.Array, q_THF: jax.Array, k_THF: jax.Array, eta_TH: jax.Array
) -> System:
    """States [H, F, V], one behind the other. Inputs are x and a one, which W_V's bias takes."""
    w_v = params["value"]
    ones_T1 = jnp.ones_like(x_TD[:, :1])
    bias_1E = w_v["bias"][None] if "bias" in w_v else jnp.zeros_like(w_v["kernel"][:1])
    w_CHV = jnp.concatenate([w_v["kernel"], bias_1E]).reshape(x_TD.shape[1] + 1, HEADS, -1)
    length, _, features = q_THF.shape
    values = w_CHV.shape[2]
    write = jnp.einsum("thf,chv->thfvc", k_THF / eta_TH[:, :, None], w_CHV)
    eye_HH, eye_VV = (jnp.eye(size, dtype=x_TD.dtype) for size in (HEADS, values))
    read = jnp.einsum("thf,hg,vw->tgwhfv", q_THF, eye_HH, eye_VV)
    # Before the first token there is nothing, whose factor is taken to be one.
    ratio_TH = jnp.concatenate([eta_TH[:1], eta_TH[:-1]]) / eta_TH
    decay = jnp.broadcast_to(ratio_TH[:, :, None, None], (length, HEADS, features, values))
    input_TC = jnp.concatenate([x_TD, ones_T1], axis=1)
    return System(
        input_TC,
        decay.reshape(length, -1),
        write.reshape(length, -1, input_TC.shape[1]),
        read.reshape(length, HEADS * values, -1),
        no_skip(input_TC, HEADS * values),
    )


def attention_equations(params: Params, x_TD: jax.Array, weights_HTT: jax.Array) -> jax.Array:
    o_THV = jnp.einsum("hij,jhv->ihv", weights_HTT, heads_of(params["value"], x_TD))
    return o_THV.reshape(len(x_TD), -1)


def scores(q_THF: jax.Array, k_THF: jax.Array) -> jax.Array:
    return jnp.tril(jnp.einsum("ihf,jhf->hij", q_THF, k_THF))


def softmax_queries_keys(params: Params, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    q_THK, k_THK = (heads_of(params[name], x_TD) for name in ("query", "key"))
    return q_THK / math.sqrt(q_THK.shape[-1]), k_THK


def softmax_system(params: Params, x_TD: jax.Array) -> System:
    q_THK, k_THK = softmax_queries_keys(params, x_TD)
    q_THF = jnp.exp(jnp.einsum("ihk,jhk->ihj", q_THK, k_THK))
    eye_TT = jnp.eye(len(x_TD), dtype=x_TD.dtype)
    k_THF = jnp.broadcast_to(eye_TT[:, None, :], q_THF.shape)
    eta_TH = jnp.sum(jnp.tril(jnp.swapaxes(q_THF, 0, 1)), axis=-1).T
    return attention_system(params, x_TD, q_THF, k_THF, eta_TH)


def softmax_equations(params: Params, x_TD: jax.Array) -> jax.Array:
    logits_HTT = scores(*softmax_queries_keys(params, x_TD))
    seen_TT = jnp.tril(jnp.ones(logits_HTT.shape[1:], bool))
    weights_HTT = jax.nn.softmax(logits_HTT, axis=-1, where=seen_TT[None])
    return attention_equations(params, x_TD, weights_HTT)


def taylor_features(x_THK: jax.Array, degree: int) -> jax.Array:
    """The F = C(K + P, P) monomials of degree P or less, so weighted that phi(q) phi(k) = sum_p (q
    k)^p / p!."""
    size = x_THK.shape[-1]
    features = []
    for power in range(degree + 1):
        for places in itertools.combinations_with_replacement(range(size), power):
            factorials = math.prod(math.factorial(places.count(i)) for i in range(size))
            product_TH = jnp.prod(x_THK[..., list(places)], axis=-1)  # one, of none
            features.append(product_TH / math.sqrt(factorials))
    return jnp.stack(features, axis=-1)


def taylor_system(params: Params, x_TD: jax.Array, degree: int) -> System:
    """Softmax attention whose exponential is its Taylor polynomial."""
    q_THF, k_THF = (taylor_features(x, degree) for x in softmax_queries_keys(params, x_TD))
    return attention_system(params, x_TD, q_THF, k_THF, jnp.sum(scores(q_THF, k_THF), axis=-1).T)


def elu_queries_keys(params: Params, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    q_THF, k_THF = (jax.nn.elu(heads_of(params[name], x_TD)) + 1 for name in ("query", "key"))
    return q_THF, k_THF


def elu_system(params: Params, x_TD: jax.Array) -> System:
    q_THF, k_THF = elu_queries_keys(params, x_TD)
    return attention_system(params, x_TD, q_THF, k_THF, jnp.sum(scores(q_THF, k_THF), axis=-1).T)


def elu_equations(params: Params, x_TD: jax.Array) -> jax.Array:
    scores_HTT = scores(*elu_queries_keys(params, x_TD))
    weights_HTT = scores_HTT / jnp.sum(scores_HTT, axis=-1, keepdims=True)
    return attention_equations(params, x_TD, weights_HTT)


def normalised_system(params: Params, x_TD: jax.Array) -> System:
    q_THF, k_THF = (heads_of(params[name], x_TD) for name in ("query", "key"))
    eta_TH = jnp.exp(linear(params["scale"], x_TD))
    return attention_system(params, x_TD, q_THF, k_THF, eta_TH)


def normalised_equations(params: Params, x_TD: jax.Array) -> jax.Array:
    q_THF, k_THF = (heads_of(params[name], x_TD) for name in ("query", "key"))
    eta_TH = jnp.exp(linear(params["scale"], x_TD))
    return attention_equations(params, x_TD, scores(q_THF, k_THF) / eta_TH.T[:, :, None])


# --- Selective state-space models: u = silu(conv(x W_in))


class Selection(NamedTuple):
    """u and Delta a, Delta, both [T, E, N] and [T, E]; B and C [T, E, N]: what S6 selects."""

    u_TE: jax.Array
    decay_log_TEN: jax.Array
    step_TE: jax.Array
    write_TEN: jax.Array
    read_TEN: jax.Array


def selective_system(selection: Selection, skip_E: jax.Array) -> System:
    """States [E, N], one behind the other."""
    u_TE, decay_log_TEN, step_TE, write_TEN, read_TEN = selection
    length, channels = u_TE.shape
    eye_EE = jnp.eye(channels, dtype=u_TE.dtype)
    write = jnp.einsum("te,ten,ec->tenc", step_TE, write_TEN, eye_EE)
    read = jnp.einsum("ten,ec->tcen", read_TEN, eye_EE)
    decay_TN = jnp.exp(decay_log_TEN).reshape(length, -1)
    return System(
        u_TE,
        decay_TN,
        write.reshape(length, -1, channels),
        read.reshape(length, channels, -1),
        jnp.diag(skip_E),
    )


def s6_selection(params: Params, x_TD: jax.Array) -> Selection:
    u_TE = jax.nn.silu(convolved(params["conv"], linear(params["input"], x_TD)))
    step = linear(params["dt_out"], linear(params["dt_in"], u_TE)) + params["dt_bias_E"][None]
    step_TE = jax.nn.softplus(step)
    decay_log_TEN = -step_TE[:, :, None] * jnp.exp(params["a_log_EN"])[None]
    B, C = (
        jnp.broadcast_to(linear(params[name], u_TE)[:, None], decay_log_TEN.shape)
        for name in ("write", "read")
    )
    return Selection(u_TE, decay_log_TEN, step_TE, B, C)


def s6_system(params: Params, x_TD: jax.Array) -> System:
    return selective_system(s6_selection(params, x_TD), params["skip_E"])


def s6_equations(params: Params, x_TD: jax.Array) -> jax.Array:
    u_TE, decay_log_TEN, step_TE, B_TEN, C_TEN = s6_selection(params, x_TD)
    h_EN, y = jnp.zeros_like(B_TEN[0]), []
    for t in range(len(u_TE)):
        h_EN = jnp.exp(decay_log_TEN[t]) * h_EN + (step_TE[t] * u_TE[t])[:, None] * B_TEN[t]
        y.append(jnp.sum(C_TEN[t] * h_EN, axis=1) + params["skip_E"] * u_TE[t])
    return jnp.stack(y)


def s6_finish(params: Params, x_TD: jax.Array, y_TE: jax.Array) -> jax.Array:
    return linear(params["output"], y_TE * jax.nn.silu(linear(params["gate"], x_TD)))


def ssd_parts(params: Params, x_TD: jax.Array) -> tuple[jax.Array, ...]:
    """x [T, H, P], Delta and Delta a [T, H], B and C [T, N]."""
    x, B, C = (
        jax.nn.silu(convolved(params[f"conv_{conv}"], linear(params[name], x_TD)))
        for conv, name in (("x", "input"), ("B", "write"), ("C", "read"))
    )
    step_TH = jax.nn.softplus(linear(params["dt"], x_TD) + params["dt_bias_H"][None])
    decay_log_TH = -jnp.exp(params["a_log_H"])[None] * step_TH
    return x.reshape(len(x), HEADS, -1), step_TH, decay_log_TH, B, C


def ssd_system(params: Params, x_TD: jax.Array) -> System:
    x_THP, step_TH, decay_log_TH, B_TN, C_TN = ssd_parts(params, x_TD)
    length, _, size = x_THP.shape
    step_TE, decay_log_TE = (jnp.repeat(a, size, axis=1) for a in (step_TH, decay_log_TH))
    shape = (length, HEADS * size, B_TN.shape[1])
    selection = Selection(
        x_THP.reshape(length, -1),
        jnp.broadcast_to(decay_log_TE[:, :, None], shape),
        step_TE,
        jnp.broadcast_to(B_TN[:, None], shape),
        jnp.broadcast_to(C_TN[:, None], shape),
    )
    return selective_system(selection, jnp.repeat(params["skip_H"], size))


def ssd_equations(params: Params, x_TD: jax.Array) -> jax.Array:
    """The dual form: scores C B under a mask of products of decays."""
    x_THP, step_TH, decay_log_TH, B_TN, C_TN = ssd_parts(params, x_TD)
    total_TH = jnp.cumsum(decay_log_TH, axis=0)
    seen_TT1 = jnp.tril(jnp.ones((len(x_TD), len(x_TD)), bool))[:, :, None]
    between_TTH = jnp.where(seen_TT1, total_TH[:, None] - total_TH[None], -jnp.inf)
    scores_TTH = (C_TN @ B_TN.T)[:, :, None] * jnp.exp(between_TTH)
    y_THP = jnp.einsum("ijh,jh,jhp->ihp", scores_TTH, step_TH, x_THP)
    return (y_THP + params["skip_H"][None, :, None] * x_THP).reshape(len(x_TD), -1)


def ssd_finish(params: Params, x_TD: jax.Array, y_TE: jax.Array) -> jax.Array:
    y_TE = y_TE * jax.nn.silu(linear(params["gate"], x_TD))
    y_TE = y_TE / jnp.sqrt(jnp.mean(y_TE**2, axis=-1, keepdims=True) + 1e-5)
    return linear(params["output"], y_TE * params["norm"]["scale"][None])


# --- qLSTM


def qlstm_parts(params: Params, x_TD: jax.Array) -> tuple[jax.Array, ...]:
    """u, the decay, and the input and output gates, [T, E] each."""
    u_TE = convolved(params["conv"], linear(params["input"], x_TD))
    f, i, o = (linear(params[f"{name}_gate"], u_TE) for name in ("forget", "input", "output"))
    if "alpha_1" in params:
        decay = jax.nn.sigmoid(-f) ** jax.nn.relu(params["alpha_1"])[None]
    else:
        decay = jax.nn.sigmoid(f)
    return u_TE, decay, jax.nn.sigmoid(i), jax.nn.sigmoid(o)


def qlstm_system(params: Params, x_TD: jax.Array) -> System:
    u_TE, decay_TE, i_TE, o_TE = qlstm_parts(params, x_TD)
    eye_1EE = jnp.eye(u_TE.shape[1], dtype=u_TE.dtype)[None]
    write, read = (gate_TE[:, :, None] * eye_1EE for gate_TE in (i_TE, o_TE))
    return System(u_TE, decay_TE, write, read, no_skip(u_TE, u_TE.shape[1]))


def qlstm_equations(params: Params, x_TD: jax.Array) -> jax.Array:
    u_TE, decay_TE, i_TE, o_TE = qlstm_parts(params, x_TD)
    h_E, y = jnp.zeros_like(u_TE[0]), []
    for t in range(len(u_TE)):
        h_E = decay_TE[t] * h_E + i_TE[t] * u_TE[t]
        y.append(o_TE[t] * h_E)
    return jnp.stack(y)


def qlstm_finish(params: Params, x_TD: jax.Array, y_TE: jax.Array) -> jax.Array:
    gate_TE = jax.nn.gelu(linear(params["gate"], x_TD), approximate=False)
    return linear(params["output"], gate_TE * y_TE)


LAYERS = {
    "softmax": Layer(
        SoftmaxAttention,
        softmax_system,
        softmax_equations,
        out,
        {"heads": HEADS, "rope": False, "context_length": 64},
    ),
    "linear": Layer(LinearAttention, elu_system, elu_equations, out, {"heads": HEADS}),
    "normalised": Layer(
        NormalisedAttention,
        normalised_system,
        normalised_equations,
        out,
        {"heads": HEADS, "state_size": 6},
    ),
    "s6": Layer(Mamba, s6_system, s6_equations, s6_finish, {"state_size": 3}),
    "ssd": Layer(Mamba2, ssd_system, ssd_equations, ssd_finish, {"state_size": 3, "heads": HEADS}),
    "qlstm": Layer(QuasiLSTM, qlstm_system, qlstm_equations, qlstm_finish),
    "qlstm_reversed": Layer(
        QuasiLSTM, qlstm_system, qlstm_equations, qlstm_finish, {"forget": "reversed"}
    ),
}
