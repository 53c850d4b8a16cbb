"""LoLCATs against an explicit double loop, and what its first stage trains."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.objectives.objective import Report
from models import lolcats, transformer
from tests.support.layers import BATCH, LENGTH, build_mixer, inputs

OPTIONS: dict[str, Any] = {"heads": 4, "key_value_heads": 2, "context_length": LENGTH}
NEW = ("query_map_HKF", "key_map_HKF", "mix_H", "query_bias_H", "key_bias_H")


def made(**options: Any) -> Any:
    """A mixer with weights at which every part counts."""
    mixer = build_mixer(lolcats, **OPTIONS, feature_size=3, **options)
    keys = iter(jax.random.split(jax.random.key(7), 20))
    params = jax.tree.map(
        lambda leaf: 0.5 * jax.random.normal(next(keys), leaf.shape), nnx.state(mixer, nnx.Param)
    )
    nnx.update(mixer, params)
    return mixer


def heads(mixer: Any, x_BTD: jax.Array) -> list[np.ndarray]:
    """q, k and v of all heads, float64."""
    positions = jnp.broadcast_to(jnp.arange(x_BTD.shape[1])[None], x_BTD.shape[:2])
    q, k, v = mixer.projected(x_BTD)
    q, k = mixer.rotated(q, positions), mixer.rotated(k, positions)
    return [np.asarray(x, np.float64) for x in (q, *(np.repeat(x, 2, axis=2) for x in (k, v)))]


def features(x_HK: np.ndarray, kernel_HKF: Any, bias_H: Any = None) -> np.ndarray:
    u = np.einsum("hk,hkf->hf", x_HK, np.asarray(kernel_HKF[...], np.float64))
    if bias_H is not None:
        return np.maximum(u + np.asarray(bias_H[...])[:, None], 1e-12)
    e = [np.exp(s * u) / np.exp(s * u).sum(-1, keepdims=True) for s in (1, -1)]
    return np.concatenate(e, axis=-1)


def double_loop(mixer: Any, x_BTD: jax.Array) -> np.ndarray:
    q, k, v = heads(mixer, x_BTD)
    g_H = 1 / (1 + np.exp(-np.asarray(mixer.mix_H[...], np.float64))) if mixer.window else None
    o = np.zeros_like(q)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            first = t - mixer.window + 1
            if mixer.terraced:
                first = (t // mixer.window - 1) * mixer.window
            near = range(max(0, first), t + 1)
            scores = {s: (q[b, t] * k[b, s]).sum(-1) / math.sqrt(q.shape[-1]) for s in near}
            largest = np.max(list(scores.values()), axis=0, initial=-np.inf)
            phi_q = features(q[b, t], mixer.query_map_HKF, mixer.query_bias_H)
            num, den = np.zeros_like(q[b, t]), np.zeros(q.shape[2])
            for s in range(t + 1):
                w_H = (
                    g_H * np.exp(scores[s] - largest)
                    if s in near
                    else (phi_q * features(k[b, s], mixer.key_map_HKF, mixer.key_bias_H)).sum(-1)
                )
                num, den = num + w_H[:, None] * v[b, s], den + w_H
            o[b, t] = num / den[:, None]
    return o


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 3},
        {"window": LENGTH},
        {"window": 3, "terraced": True},
        {"window": 2, "feature_map": "relu"},
        {"window": 0},
    ],
    ids=str,
)
def test_output_is_that_of_a_double_loop(options: dict[str, Any]) -> None:
    mixer = made(**options)
    o_BTD = double_loop(mixer, inputs()).reshape(BATCH, LENGTH, -1)
    expected = o_BTD @ np.asarray(mixer.output.kernel[...], np.float64)
    run = jax.jit(lambda mixer, x: mixer(x)[0])
    np.testing.assert_allclose(run(mixer, inputs()), expected, atol=1e-4, rtol=1e-4)


def test_in_a_wide_window_it_is_softmax_attention_whatever_the_mix() -> None:
    mixer = made(window=LENGTH)
    source = build_mixer(transformer, **OPTIONS)
    params = nnx.state(mixer, nnx.Param)
    nnx.update(source, nnx.State({name: params[name] for name in params if name not in NEW}))
    np.testing.assert_allclose(mixer(inputs())[0], source(inputs())[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_transfer_gives_the_teacher_on_and_its_loss_reaches_the_maps_alone() -> None:
    mixer = made(window=3, stage="transfer")
    student, source = made(window=3), build_mixer(transformer, **OPTIONS)
    params = nnx.state(mixer, nnx.Param)
    nnx.update(source, nnx.State({name: params[name] for name in params if name not in NEW}))
    graphdef, params = nnx.split(mixer, nnx.Param)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params)
        y_BTD, reports = nnx.capture(lambda model: model(inputs())[0], Report)(model)
        values = {path[-1]: value[...] for path, value in nnx.to_flat_state(reports)}
        return values["auxiliary_loss"], y_BTD

    (value, y_BTD), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(y_BTD, source(inputs())[0], atol=1e-5)
    q, k, v = heads(student, inputs())
    scores = np.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((LENGTH, LENGTH), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    teacher = np.einsum("bhts,bshv->bthv", p / p.sum(-1, keepdims=True), v)
    expected = 1000 * np.mean((double_loop(student, inputs()) - teacher) ** 2)
    assert value == pytest.approx(expected, rel=1e-4)
    for path, leaf in nnx.to_flat_state(gradient):
        size = float(jnp.abs(leaf[...]).max())
        assert (size > 0) == (path[0] in NEW), path
