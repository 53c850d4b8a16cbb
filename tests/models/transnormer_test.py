"""NormAttention against a slow transcription of its paper."""

import numpy as np
import pytest

from models import transnormer
from tests.support.layers import (
    build_mixer,
    call,
    check_layer,
    count_parameters,
    inputs,
    merge,
    project,
    rms,
    turned,
    weight,
)


@pytest.mark.parametrize(("causal", "feature_map"), [(True, "elu_plus_one"), (False, "elu")])
def test_norm_attention_computes_its_layer_and_ignores_the_size_of_values(causal, feature_map):
    mixer = build_mixer(transnormer, heads=2, causal=causal, feature_map=feature_map)
    shift = 1 if feature_map == "elu_plus_one" else 0

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        q, k = (turned(mixer, np.where(x > 0, x, np.exp(x) - 1) + shift) for x in (q, k))
        scores = np.einsum("thk,shk->hts", q, k)
        o = np.einsum("hts,shv->thv", np.tril(scores) if causal else scores, v)
        return rms(merge(o), eps=1e-6) @ weight(mixer.output)

    check_layer(mixer, transcription)
    want = call(mixer, inputs())
    mixer.value.kernel[...] = 3 * mixer.value.kernel[...]
    np.testing.assert_allclose(call(mixer, inputs()), want, atol=1e-4)


def test_a_mixer_of_transnormer_has_four_squares_of_its_width():
    assert count_parameters(transnormer, 768, depth=12, heads=12) == 4 * 768**2 + 32
