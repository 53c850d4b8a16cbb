"""Hedgehog's feature map, and its layer against a slow transcription of its paper."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.objectives.objective import Report
from models import hedgehog, transformer
from tests.support.layers import (
    BATCH,
    LENGTH,
    array,
    build_mixer,
    check_layer,
    count_parameters,
    inputs,
    merge,
    normalised,
    project,
    rotated,
    weight,
)


@pytest.mark.parametrize("options", [{}, {"feature_map": "exp", "temperature": 0.5, "rope": False}])
def test_hedgehog_computes_its_attention(options):
    mixer = build_mixer(hedgehog, heads=2, **options)

    def phi(x, feature_map):
        y = options.get("temperature", 1.0) * (
            np.einsum("thk,hkj->thj", x, array(feature_map.weight_HKK)) + array(feature_map.bias_HK)
        )
        e = np.exp(np.concatenate((y, -y), axis=-1))
        return e if options.get("feature_map") == "exp" else e / e.sum(-1, keepdims=True)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        if options.get("rope", True):
            angle = np.arange(len(x_TD))[:, None, None] * 10000.0 ** (-np.arange(4) / 4)
            q, k = rotated(q, angle), rotated(k, angle)
        return merge(normalised(phi(q, mixer.query_map), phi(k, mixer.key_map), v)) @ weight(
            mixer.output
        )

    check_layer(mixer, transcription)


def test_hedgehog_map_starts_as_a_sum_of_hyperbolic_cosines_and_is_symmetric():
    q, k = (
        jnp.asarray(x, jnp.float32)
        for x in np.random.default_rng(0).standard_normal((2, 1, 3, 2, 4))
    )
    exp = hedgehog.SoftmaxMimicry(2, 4, kind="exp", temperature=1.0, param_dtype=jnp.float32)
    scores = jnp.sum(exp(q) * exp(k), axis=-1)
    np.testing.assert_allclose(
        scores, 2 * np.cosh(np.asarray(q + k, np.float64)).sum(-1), rtol=1e-5
    )
    softmax = hedgehog.SoftmaxMimicry(
        2, 4, kind="softmax", temperature=1.0, param_dtype=jnp.float32
    )
    np.testing.assert_allclose(softmax(q).sum(-1), 1, rtol=1e-6)
    assert (np.asarray(softmax(1e4 * q)) >= 0).all() and np.isfinite(
        np.asarray(softmax(1e4 * q))
    ).all()
    np.testing.assert_allclose(softmax(-q), jnp.roll(softmax(q), 4, axis=-1), rtol=1e-6)
    flat = hedgehog.SoftmaxMimicry(2, 4, kind="softmax", temperature=0.0, param_dtype=jnp.float32)
    np.testing.assert_allclose(flat(q), 1 / 8, rtol=1e-6)


def test_hedgehog_maps_add_half_a_percent_to_a_seven_billion_parameter_model():
    added = count_parameters(hedgehog, 4096, depth=32, heads=32) - 4 * 4096**2
    assert added == 2 * 32 * (128**2 + 128)
    assert 32 * added / 6.74e9 == pytest.approx(0.005, abs=2e-4)


@pytest.mark.parametrize("feature_map", hedgehog.MAPS)
def test_maps_learn_the_weights_of_softmax_alone(feature_map: str) -> None:
    """The loss of a plain loop over rows; a map's weights reach it, and nothing else does."""
    options: dict[str, Any] = {"heads": 4, "key_value_heads": 2, "rope": False}
    source = build_mixer(transformer, context_length=LENGTH, **options)
    mixer = build_mixer(hedgehog, stage="transfer", feature_map=feature_map, **options)
    for name in ("query", "key", "value", "output"):
        getattr(mixer, name).kernel[...] = getattr(source, name).kernel[...]
    graphdef, params = nnx.split(mixer, nnx.Param)
    ids = jnp.arange(LENGTH)[None].repeat(BATCH, axis=0) // 5

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, params)
            y_BTD, reports = nnx.capture(lambda model: model(inputs(), segment_ids=ids)[0], Report)(
                model
            )
            values = {path[-1]: value[...] for path, value in nnx.to_flat_state(reports)}
            return values["auxiliary_loss"], (y_BTD, values)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, (y_BTD, values)), gradient = run(params)
    expected, _ = source(inputs(), segment_ids=ids)
    np.testing.assert_allclose(y_BTD, expected, atol=1e-5)
    q, k = (np.asarray(x, np.float64) for x in source.projected(inputs())[:2])
    k = np.repeat(k, 2, axis=2)
    a = [np.asarray(m(jnp.asarray(x))) for m, x in ((mixer.query_map, q), (mixer.key_map, k))]
    losses, entropies = [], []
    for b, h, t in np.ndindex(BATCH, 4, LENGTH):
        own = [s for s in range(t + 1) if ids[b, s] == ids[b, t]]
        p = np.exp(k[b, own, h] @ q[b, t, h] / np.sqrt(q.shape[-1]))
        w = a[1][b, own, h] @ a[0][b, t, h] + 1e-10
        losses.append(-(p / p.sum() * np.log(w / w.sum())).sum())
        entropies.append(-(p / p.sum() * np.log(p / p.sum())).sum())
    assert value == pytest.approx(np.mean(losses), rel=1e-4)
    assert values["transfer_error"] == pytest.approx(np.mean(losses) - np.mean(entropies), rel=1e-3)
    assert values["transfer_error"] >= 0 and 0 <= values["monotonicity"] <= 1
    for path, leaf in nnx.to_flat_state(gradient):
        size = float(jnp.abs(leaf[...]).max())
        assert np.isfinite(size) and (size > 0) == (path[0] in ("query_map", "key_map")), path
