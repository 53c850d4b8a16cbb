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


@pytest.mark.parametrize("gate", liger.GATES)
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


def test_a_gate_at_a_zero_key_keeps_for_sixteen_tokens_half() -> None:
    decay_log = jax.nn.log_sigmoid(jnp.zeros(())) / liger.TEMPERATURE
    assert np.exp(decay_log) == pytest.approx(0.95760, abs=1e-5)
    assert np.exp(16 * decay_log) == pytest.approx(0.5)
