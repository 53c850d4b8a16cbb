"""RetNet against a slow transcription of its paper."""

import math

import numpy as np

from models import retnet
from tests.support.layers import (
    build_mixer,
    check_layer,
    count_parameters,
    merge,
    project,
    rms,
    rotated,
    silu,
    weight,
)


def test_retnet_computes_its_recurrence_and_output():
    mixer = build_mixer(retnet, heads=2)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        o = np.zeros_like(v)
        for h, gamma in enumerate((1 - 1 / 32, 1 - 1 / 64)):
            S = np.zeros((8, 16))
            for t in range(len(x_TD)):
                angle = t * 10000.0 ** (-np.arange(4) / 4)
                S = gamma * S + np.outer(rotated(k[t, h], angle), v[t, h])
                o[t, h] = rotated(q[t, h], angle) @ S / math.sqrt(8)
        return (silu(x_TD @ weight(mixer.output_gate)) * merge(rms(o))) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_retnet_has_eight_squares_of_its_width():
    assert count_parameters(retnet, 2048, depth=24, heads=8) == 8 * 2048**2
