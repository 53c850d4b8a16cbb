"""Liger against a loop over tokens, and against the softmax attention whose weights it has."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import liger, transformer
from tests.support.layers import BATCH, LENGTH, build_mixer, inputs

HEADS: dict[str, Any] = {"heads": 4, "key_value_heads": 2}


def softmax_attention() -> tuple[Any, Any]:
    mixer = build_mixer(transformer, context_length=LENGTH, **HEADS)
    return mixer, nnx.state(mixer, nnx.Param)


def converted(params: Any, **options: Any) -> Any:
    mixer = build_mixer(liger, **HEADS, **options)
    nnx.update(mixer, params)
    return mixer


def test_it_has_the_parameters_of_softmax_attention_and_in_a_wide_window_alone_is_it() -> None:
    source, params = softmax_attention()
    mixer = converted(params, window=LENGTH, recurrence_share=0.0)
    assert jax.tree.structure(nnx.state(mixer, nnx.Param)) == jax.tree.structure(params)
    np.testing.assert_allclose(mixer(inputs())[0], source(inputs())[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["gla", "hgrn2", "none"])
def test_the_recurrence_is_the_loop_of_the_paper(gate: str) -> None:
    _, params = softmax_attention()
    mixer = converted(params, gate=gate, recurrence_share=1.0)
    x_BTD = inputs()
    q, k, v = (
        np.asarray(m(x_BTD), np.float64).reshape(BATCH, LENGTH, heads, -1)
        for m, heads in ((mixer.query, 4), (mixer.key, 2), (mixer.value, 2))
    )
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    sigmoid = 1 / (1 + np.exp(-k))
    softmax = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (q, k)]
    alpha = {"gla": sigmoid ** (1 / 16), "hgrn2": sigmoid, "none": np.ones_like(k)}[gate]
    phi = 1 - sigmoid if gate == "hgrn2" else softmax[1]
    S = np.zeros((BATCH, 4, k.shape[-1], v.shape[-1]))
    found = []
    for t in range(LENGTH):
        S = alpha[:, t, :, :, None] * S + phi[:, t, :, :, None] * v[:, t, :, None, :]
        found.append(np.einsum("bhk,bhkv->bhv", softmax[0][:, t], S))
    o_BTD = np.stack(found, axis=1).reshape(BATCH, LENGTH, -1)
    y_BTD, state = mixer(x_BTD)
    expected = o_BTD @ np.asarray(mixer.output.kernel[...], np.float64)
    np.testing.assert_allclose(y_BTD, expected, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(state["memory"], S, atol=1e-5)


@pytest.mark.parametrize("slots", [0, 3])
def test_slots_are_the_loop_of_the_paper(slots: int) -> None:
    _, params = softmax_attention()
    mixer = converted(params, gate="gsa", slots=slots, recurrence_share=1.0)
    x_BTD = inputs()
    q, k, v = (np.asarray(x, np.float64) for x in mixer.projected(x_BTD))
    gate = np.asarray(liger.pooled(jnp.asarray(k, jnp.float32), slots or k.shape[-1]), np.float64)
    k, v, gate = (np.repeat(x, 2, axis=2) for x in (k, v, gate))
    alpha = (1 / (1 + np.exp(-gate))) ** (1 / 16)
    keys, values = (np.zeros((*gate[:, 0].shape, x.shape[-1])) for x in (k, v))
    found = []
    for t in range(LENGTH):
        kept, written = alpha[:, t, :, :, None], 1 - alpha[:, t, :, :, None]
        keys = kept * keys + written * k[:, t, :, None]
        values = kept * values + written * v[:, t, :, None]
        p = np.exp(np.einsum("bhmk,bhk->bhm", keys, q[:, t]))
        found.append(np.einsum("bhm,bhmv->bhv", p / p.sum(-1, keepdims=True), values))
    o_BTD = np.stack(found, axis=1).reshape(BATCH, LENGTH, -1)
    y_BTD, state = jax.jit(lambda mixer, x: mixer(x))(mixer, x_BTD)
    expected = o_BTD @ np.asarray(mixer.output.kernel[...], np.float64)
    np.testing.assert_allclose(y_BTD, expected, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(state["memory"], values, atol=1e-5)


def test_pooling_takes_means_of_neighbouring_channels() -> None:
    x_BTHK = jnp.arange(12.0).reshape(1, 1, 2, 6)
    np.testing.assert_array_equal(liger.pooled(x_BTHK, 6), x_BTHK)
    np.testing.assert_allclose(liger.pooled(x_BTHK, 1)[0, 0, :, 0], [2.5, 8.5])
    # 12 channels to 8: bins of 2, of which every second begins where the one before it ends.
    expected = [0.5, 1.5, 3.5, 4.5, 6.5, 7.5, 9.5, 10.5]
    np.testing.assert_allclose(liger.pooled(x_BTHK, 4).reshape(-1), expected)
    with pytest.raises(ValueError, match="slots is for gate='gsa'; got slots=3 and gate='gla'"):
        build_mixer(liger, slots=3)


def test_a_gate_at_a_zero_key_keeps_for_sixteen_tokens_half() -> None:
    decay_log = jax.nn.log_sigmoid(jnp.zeros(())) / liger.TEMPERATURE
    assert np.exp(decay_log) == pytest.approx(0.95760, abs=1e-5)
    assert np.exp(16 * decay_log) == pytest.approx(0.5)
