"""MossFormer2 against a slow transcription of its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mossformer2
from models.mossformer2.attention import squared_relu_attention
from models.mossformer2.convolution import centred_convolution
from models.mossformer2.memory import Memory
from tests.support.layers import (
    FLOAT32,
    WIDTH,
    array,
    build_mixer,
    check_layer,
    sigmoid,
    silu,
    weight,
)

SMALL = {
    "group": 3,
    "qk_size": 6,
    "rotary_size": 4,
    "conv_width": 3,
    "recurrent_width": 4,
    "order": 2,
    "dropout": 0.0,
}


def convolved(x_TC, weight_WC, dilation=1):
    """Zero padding on both sides."""
    taps, y = len(weight_WC), np.zeros_like(x_TC)
    for t in range(len(x_TC)):
        for i in range(taps):
            source = t + (i - taps // 2) * dilation
            if 0 <= source < len(x_TC):
                y[t] += weight_WC[i] * x_TC[source]
    return y


def dense(x, linear):
    return x @ weight(linear) + array(linear.bias)


def layer_norm(x, norm):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * array(norm.scale) + array(norm.bias)


def scale_norm(x, norm):
    size = np.linalg.norm(x, axis=-1, keepdims=True) * x.shape[-1] ** -0.5
    return x / np.maximum(size, 1e-5) * array(norm.scale)


def ffconvm(x, part, norm):
    h = silu(dense(norm(x, part.norm), part.dense))
    return h + convolved(h, array(part.weight_WD))


def prelu(x, slope):
    return np.where(x >= 0, x, slope * x)


def attention(x_TD, part, group):
    length, width = x_TD.shape
    s = x_TD.copy()
    s[1:, : width // 2], s[0, : width // 2] = x_TD[:-1, : width // 2], 0
    v, u = np.split(ffconvm(s, part.hidden, scale_norm), 2, axis=-1)
    z = ffconvm(s, part.query_key, scale_norm)
    heads = []
    for gamma, beta in zip(array(part.gamma_JK), array(part.beta_JK), strict=True):
        q = gamma * z + beta
        for t in range(length):
            for i in range(part.rotary_size // 2):
                angle = t * 10000.0 ** (-2 * i / part.rotary_size)
                turned = (q[t, 2 * i] + 1j * q[t, 2 * i + 1]) * np.exp(1j * angle)
                q[t, 2 * i : 2 * i + 2] = turned.real, turned.imag
        heads.append(q)
    quad_q, lin_q, quad_k, lin_k = heads
    vu = np.concatenate((v, u), axis=-1)
    att = np.zeros_like(vu)
    for t in range(length):
        for r in range(length):
            if t // group == r // group:
                att[t] += max(quad_q[t] @ quad_k[r] / group, 0) ** 2 * vu[r]
            if part.global_attention:
                att[t] += lin_q[t] @ lin_k[r] / length * vu[r]
    att_v, att_u = np.split(att, 2, axis=-1)
    return ffconvm(att_u * v * sigmoid(att_v * u), part.output, scale_norm)


def memory(a, part):
    p = np.maximum(dense(a, part.hidden), 0) @ weight(part.projected)
    if part.weight_WC is not None:
        return a + p + convolved(p, array(part.weight_WC))
    outputs = [p]
    for place, layer in enumerate(part.layers):
        read = np.concatenate(outputs, axis=-1)
        y = np.zeros_like(p)
        for channel in range(p.shape[1]):
            for j in range(place + 1):
                source = channel * (place + 1) + j
                taps = array(layer.weight_WI)[:, [source]]
                y[:, channel] += convolved(read[:, [source]], taps, 2**place)[:, 0]
        y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
        y = prelu(y * array(layer.scale_C) + array(layer.shift_C), array(layer.slope_C))
        outputs.insert(0, y)
    return a + outputs[0]


def recurrent(x, part):
    h = layer_norm(prelu(dense(x, part.first), array(part.slope)), part.first_norm)
    remembered = memory(ffconvm(h, part.value, layer_norm), part.memory)
    if part.gate is not None:
        remembered = ffconvm(h, part.gate, layer_norm) * remembered
    return dense(layer_norm(remembered + h, part.last_norm), part.last)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recurrent": "plain", "gated": False, "group": 16},
        pytest.param({"recurrent": "none", "global_attention": False}, marks=pytest.mark.full),
        pytest.param({"dense_layers": 3, "gated": False}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_the_layer_computes_its_equations(options):
    mixer = build_mixer(mossformer2, **{**SMALL, **options})

    def transcription(x_TD):
        y = attention(x_TD, mixer.attention, {**SMALL, **options}["group"])
        return y if mixer.recurrent is None else y + recurrent(x_TD + y, mixer.recurrent)

    check_layer(mixer, transcription)


@pytest.mark.parametrize("group", [4, 16])  # three blocks, the last not full, and one
def test_attention_of_runs_reads_no_other_run_wherever_runs_begin(group):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 11, 3)).astype(np.float32) for _ in range(3))
    runs = np.array([[1, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4]])
    got = jax.jit(squared_relu_attention, static_argnames="group")(
        q, k, v, group=group, group_BT=jnp.asarray(runs)
    )
    weights = np.maximum(q[0] @ k[0].T / group, 0) ** 2 * (runs[0][:, None] == runs[0])
    np.testing.assert_allclose(got[0], weights @ v[0], atol=1e-5)


def test_the_dense_memory_reaches_as_far_as_its_two_layers():
    """5 tokens of the first and 2 x 5 of the second, on both sides; 57 with the paper's 20."""
    part = Memory(2, order=6, layers=2, rngs=nnx.Rngs(0), **FLOAT32)
    length, middle = 40, 20

    @jax.jit
    def reached(part, a):  # instance norm alone reads all tokens: without its statistics
        first, second = part.layers
        y = centred_convolution(a, first.weight_WI[...], None)
        c = jnp.concatenate((y, a), axis=-1)
        return centred_convolution(c, second.weight_WI[...], None, dilation=2)

    y = reached(part, jnp.zeros((1, length, 2)).at[0, middle].set(1.0))
    where = np.flatnonzero(np.abs(np.asarray(y[0])).max(axis=-1) > 1e-9)
    assert y.shape == (1, length, 4)
    assert (where[0], where[-1]) == (middle - 15, middle + 15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary_size": 3}, "even head size; got 3: change rotary_size"),
        ({"rotary_size": 8}, "rotary_size must be at most qk_size=6; got 8"),
        ({"conv_width": 4}, "conv_width must be odd"),
        ({"recurrent": "lstm"}, "recurrent must be one of 'dense', 'plain', 'none'; got 'lstm'"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mossformer2.Mixer(WIDTH, depth=1, rngs=nnx.Rngs(0), **FLOAT32, **{**SMALL, **options})
