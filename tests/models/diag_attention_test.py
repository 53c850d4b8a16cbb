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
    rms,
    turned,
    weight,
)


@pytest.mark.parametrize(
    ("block", "causal", "attention"),
    [
        (3, True, "softmax"),
        (64, True, "softmax"),
        (3, False, "softmax"),
        (3, False, "relu"),
        (64, False, "relu"),
    ],
)
def test_diag_attention_is_attention_inside_blocks(block, causal, attention):
    mixer = build_mixer(diag_attention, heads=2, block=block, causal=causal, attention=attention)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        q, k = turned(mixer, q), turned(mixer, k)
        o = np.zeros_like(v)
        for t in range(len(x_TD)):
            begin = t - t % block
            seen = slice(begin, t + 1 if causal else begin + block)
            scores = np.einsum("hk,shk->hs", q[t], k[seen]) / math.sqrt(8)
            p = np.maximum(scores, 0)
            if attention == "softmax":
                p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            o[t] = np.einsum("hs,shv->hv", p, v[seen])
        o = merge(o) if attention == "softmax" else rms(merge(o), eps=1e-6)
        return o @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_a_mixer_of_transnormer_has_four_squares_of_its_width():
    assert count_parameters(diag_attention, 768, depth=12, heads=12) == 4 * 768**2 + 32


def test_the_attention_of_bidirectional_models_is_refused_in_a_causal_one():
    with pytest.raises(ValueError, match=r"attention='relu' .* needs causal=False"):
        build_mixer(diag_attention, attention="relu")
