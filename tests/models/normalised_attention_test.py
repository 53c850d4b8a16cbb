"""Normalised attention against a slow transcription of its paper."""

import numpy as np
import pytest

from models import normalised_attention
from tests.support.layers import (
    array,
    build_mixer,
    check_layer,
    count_parameters,
    merge,
    sigmoid,
    softplus,
    weight,
)


@pytest.mark.parametrize(
    ("normaliser", "eta"), [("exp", np.exp), ("softplus", softplus), ("sigmoid", sigmoid)]
)
def test_normalised_attention_divides_the_rows_of_its_scores(normaliser, eta):
    mixer = build_mixer(normalised_attention, heads=2, state_size=6, normaliser=normaliser)

    def transcription(x_TD):
        q, k, v, z = (
            (x_TD @ weight(m) + array(m.bias)).reshape(len(x_TD), 2, -1)
            for m in (mixer.query, mixer.key, mixer.value, mixer.scale)
        )
        scores = np.tril(np.einsum("thk,shk->hts", q, k)) / eta(z[:, :, 0]).T[:, :, None]
        return merge(np.einsum("hts,shv->thv", scores, v)) @ weight(mixer.output) + array(
            mixer.output.bias
        )

    check_layer(mixer, transcription)


def test_normalised_attention_has_the_published_projections():
    width, state = 128, 64
    want = 2 * (width + 1) * state + 2 * (width + 1) * width + (width + 1)
    assert count_parameters(normalised_attention, width, depth=2, state_size=state) == want


def test_what_normalised_attention_cannot_be_is_said():
    with pytest.raises(ValueError, match="heads must divide state_size=3; got heads=2"):
        build_mixer(normalised_attention, heads=2, state_size=3)
    with pytest.raises(ValueError, match=r"normaliser must be one of 'exp', .*; got 'relu'"):
        build_mixer(normalised_attention, normaliser="relu")
