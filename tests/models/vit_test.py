"""Softmax attention of images against its equations."""

import numpy as np
import pytest

from models import vit
from tests.support.layers import array, build_mixer, check_layer, merge, weight


def test_softmax_attention_computes_its_equations():
    mixer = build_mixer(vit, heads=4)

    def transcription(x_TD):
        def dense(linear):
            return (x_TD @ weight(linear) + array(linear.bias)).reshape(len(x_TD), 4, 4)

        q, k, v = dense(mixer.query), dense(mixer.key), dense(mixer.value)
        p = np.exp(np.einsum("thk,shk->hts", q, k) / 2)
        o = np.einsum("hts,shk->thk", p / p.sum(-1, keepdims=True), v)
        return merge(o) @ weight(mixer.output) + array(mixer.output.bias)

    check_layer(mixer, transcription)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="heads must divide the 16 channels"):
        build_mixer(vit, heads=3)
