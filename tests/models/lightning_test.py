"""Lightning Attention against a slow transcription of its paper."""

import math

import numpy as np
import pytest

from models import lightning
from tests.support.layers import (
    array,
    build_mixer,
    check_layer,
    count_parameters,
    merge,
    project,
    rms,
    rotated,
    sigmoid,
    silu,
    weight,
)


@pytest.mark.parametrize(
    ("layer", "options"), [(0, {}), (1, {"decay": "alibi", "gate_rank": 3}), (1, {"lrpe": "all"})]
)
def test_lightning_attention_computes_its_layer(layer, options):
    mixer = build_mixer(lightning, heads=2, layer=layer, **options)
    theta = (
        array(mixer.rotation.theta_K) if layer == 0 or options.get("lrpe") == "all" else np.zeros(4)
    )

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        if options.get("decay") == "alibi":
            decays = [
                math.exp(-slope * (1 - 1 / 1 + 1e-5)) for slope in (2**-4, 2**-8)
            ]  # l = L - 1 = 1
        else:
            decays = [math.exp(-(8 * h / 2) * (1 - layer / 2)) for h in range(2)]
        o = np.zeros_like(v)
        for h in range(2):
            for i in range(len(x_TD)):  # the quadratic form: ((Q K^T) . M) V
                for j in range(i + 1):
                    score = rotated(silu(q[i, h]), i * theta) @ rotated(silu(k[j, h]), j * theta)
                    o[i, h] += decays[h] ** (i - j) * score * v[j, h]
        if options.get("gate_rank"):
            u = sigmoid(x_TD @ weight(mixer.gate_in) @ weight(mixer.gate))
        else:
            u = x_TD @ weight(mixer.gate)
        return (rms(merge(o), eps=1e-6) * u) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_decays_of_lightning_attention_are_the_published_ones():
    table = {
        kind: np.array([lightning.decay_log(kind, 8, layer, 4) for layer in range(4)], np.float64)
        for kind in lightning.DECAYS
    }
    np.testing.assert_allclose(
        table["paper"], [[-h * (1 - l / 4) for h in range(8)] for l in range(4)], atol=1e-6
    )
    slopes = 0.5 ** np.arange(1, 9)
    for l in range(4):
        np.testing.assert_allclose(
            table["alibi"][l], -slopes * (1 - l / 3 + 1e-5), rtol=1e-3, atol=1e-9
        )
    lengths = np.geomspace(2, 256, 8)
    np.testing.assert_allclose(table["receptive"][0], -1.00001 / lengths, rtol=1e-6)
    for kind, decays in table.items():
        # The paper's first head forgets least, ALiBi's first head most.
        order = 1 if kind == "paper" else -1
        assert (order * np.diff(decays, axis=1) <= 0).all() and (np.diff(decays, axis=0) >= 0).all()
    assert lightning.alibi_slopes(6) == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert (np.array(lightning.decay_log("alibi", 4, 0, 1)) < 0).all(), (
        "a network of one layer forgets"
    )


def test_lightning_attention_has_the_parameters_of_the_published_gate_ablation():
    # 385M parameters with the gate, 379M without: rank 128 at width 1024, in 24 layers.
    sizes = {"depth": 24, "layer": 0, "heads": 8}
    gate = count_parameters(lightning, 1024, gate_rank=128, **sizes) - (4 * 1024**2 + 64)
    assert 24 * gate / 1e6 == pytest.approx(385 - 379, abs=0.5)
    assert count_parameters(lightning, 1024, lrpe="none", **sizes) == 5 * 1024**2
