"""DiagAttention against a slow transcription of its paper."""

import math

import numpy as np
import pytest

from models import diag_attention
from tests.support.layers import (
    build_mixer,
    check_layer,
    count_parameters,
    merge,
    project,
    turned,
    weight,
)


@pytest.mark.parametrize("block", [3, 64])
def test_diag_attention_is_softmax_attention_inside_blocks(block):
    mixer = build_mixer(diag_attention, heads=2, block=block)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        q, k = turned(mixer, q), turned(mixer, k)
        o = np.zeros_like(v)
        for t in range(len(x_TD)):
            seen = slice(t - t % block, t + 1)
            scores = np.exp(np.einsum("hk,shk->hs", q[t], k[seen]) / math.sqrt(8))
            o[t] = np.einsum("hs,shv->hv", scores / scores.sum(-1, keepdims=True), v[seen])
        return merge(o) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_a_mixer_of_transnormer_has_four_squares_of_its_width():
    assert count_parameters(diag_attention, 768, depth=12, heads=12) == 4 * 768**2 + 32
