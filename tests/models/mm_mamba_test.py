"""mmMamba against a loop over tokens, and what its stages train and are taught."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.objectives.objective import Report
from models import mm_mamba, transformer
from tests.support.layers import (
    LENGTH,
    array,
    build_mixer,
    check_layer,
    convolved,
    inputs,
    rms,
    silu,
    softplus,
    weight,
)

HEADS: dict[str, Any] = {"heads": 4, "key_value_heads": 2, "context_length": LENGTH}


@pytest.mark.parametrize("input_scale", [True, False])
def test_the_layer_is_the_loop_of_the_paper(input_scale: bool) -> None:
    mixer = build_mixer(mm_mamba, **HEADS, input_scale=input_scale)

    def transcription(x_TD: np.ndarray) -> np.ndarray:
        q, k, v = (
            silu(convolved(x_TD @ weight(m), c)).reshape(len(x_TD), heads, -1)
            for m, c, heads in (
                (mixer.query, mixer.conv_q, 4),
                (mixer.key, mixer.conv_k, 2),
                (mixer.value, mixer.conv_v, 2),
            )
        )
        k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
        dt = softplus(x_TD @ weight(mixer.dt) + array(mixer.dt_bias_H))
        gamma = np.exp(-dt * np.exp(array(mixer.a_log_H)))
        S, o = np.zeros((4, q.shape[-1], v.shape[-1])), np.zeros_like(q)
        for t in range(len(x_TD)):
            written = np.einsum("hk,hv->hkv", k[t], v[t]) * (
                dt[t][:, None, None] if input_scale else 1
            )
            S = gamma[t][:, None, None] * S + written
            o[t] = np.einsum("hk,hkv->hv", q[t], S)
        gate = silu(x_TD @ weight(mixer.gate)).reshape(o.shape)
        o = rms(o, array(mixer.norm.scale)) * gate
        return o.reshape(len(x_TD), -1) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_it_starts_with_an_identity_and_forgets_little() -> None:
    mixer = mm_mamba.Mixer(
        16, depth=1, rngs=nnx.Rngs(0), param_dtype=jnp.float32, compute_dtype=jnp.float32, **HEADS
    )
    x = jax.random.normal(jax.random.key(0), (1, 4, 16))
    np.testing.assert_array_equal(mixer.conv_q(x, None, None)[0], x)
    gamma = np.exp(-softplus(array(mixer.dt_bias_H)) * np.exp(array(mixer.a_log_H)))
    assert gamma.min() > 0.76 and gamma.max() < 0.998
    np.testing.assert_array_equal(mixer.dt(x), 0)


@pytest.mark.parametrize("stage", ["new", "all"])
def test_a_mimic_gives_the_teacher_on_and_learns_from_its_heads(stage: str) -> None:
    source, mixer = build_mixer(transformer, **HEADS), build_mixer(mm_mamba, stage=stage, **HEADS)
    for name in (*mm_mamba.PROJECTIONS, "output"):
        getattr(mixer, name).kernel[...] = getattr(source, name).kernel[...]
    if stage == "all":  # the copies, beside projections that have moved
        nnx.update(mixer.teacher, nnx.state(source, nnx.Param))
        mixer.query.kernel[...] = 0.5 * mixer.query.kernel[...]
    graphdef, params = nnx.split(mixer, nnx.Param)

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, params)
            y_BTD, reports = nnx.capture(lambda model: model(inputs())[0], Report)(model)
            values = {path[-1]: value[...] for path, value in nnx.to_flat_state(reports)}
            return values["auxiliary_loss"], y_BTD

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, y_BTD), gradient = run(params)
    np.testing.assert_allclose(y_BTD, source(inputs())[0], atol=1e-5)
    assert np.isfinite(value) and value > 0
    inherited = ("query", "key", "value")
    for path, leaf in nnx.to_flat_state(gradient):
        learns = path[0] not in ("output", "teacher", *(inherited if stage == "new" else ()))
        assert (float(jnp.abs(leaf[...]).max()) > 0) == learns, path
