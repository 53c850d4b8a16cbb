"""Kronecker attention against a slow transcription of its paper."""

import math

import numpy as np
import pytest

from models import kronecker_attention
from tests.support.layers import build_mixer, check_layer, merge, project, weight


@pytest.mark.parametrize(
    ("form", "causal"), [("polynomial", True), ("polynomial", False), ("exact", False)]
)
def test_kronecker_attention_weighs_pairs_of_tokens(form, causal):
    mixer = build_mixer(
        kronecker_attention, heads=2, key_size=3, bound=1.5, form=form, causal=causal
    )

    def transcription(x_TD):
        q, k1, k2 = (
            1.5 * np.tanh(project(x_TD, m, 2)) for m in (mixer.query, mixer.key_1, mixer.key_2)
        )
        v1, v2 = (project(x_TD, m, 2) for m in (mixer.value_1, mixer.value_2))
        A = np.einsum("ihl,jhl,khl->hijk", q, k1, k2) / 3
        p = np.exp(A) if form == "exact" else 1 + A + A**2 / 2
        if causal:
            seen = np.tril(np.ones((len(x_TD), len(x_TD))))
            p = p * seen[None, :, :, None] * seen[None, :, None, :]
        p = p / p.sum((2, 3), keepdims=True)
        return merge(np.einsum("hijk,jhv,khv->ihv", p, v1, v2)) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_the_state_has_the_size_of_its_features():
    mixer = build_mixer(kronecker_attention, heads=2, key_size=4, degree=4)
    assert mixer.init_state(3)["memory"].shape == (3, 2, 2, math.comb(8, 4), 9)


def test_what_kronecker_attention_cannot_be_is_said():
    with pytest.raises(ValueError, match='form="exact" needs causal=False'):
        build_mixer(kronecker_attention, form="exact")
    with pytest.raises(ValueError, match="form must be one of 'polynomial', 'exact'"):
        build_mixer(kronecker_attention, form="cubic")
    with pytest.raises(ValueError, match="has no state"):
        build_mixer(kronecker_attention, causal=False).init_state(2)
