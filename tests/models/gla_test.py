"""GLA against a slow transcription of its paper."""

import math

import numpy as np

from models import gla
from tests.support.layers import (
    array,
    build_mixer,
    check_layer,
    merge,
    project,
    rms,
    sigmoid,
    silu,
    weight,
)


def test_gla_computes_its_recurrence_gate_and_output():
    mixer = build_mixer(gla, heads=2, gate_rank=3)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        logits = x_TD @ weight(mixer.gate_in) @ weight(mixer.gate_out) + array(mixer.gate_out.bias)
        alpha = (sigmoid(logits) ** (1 / 16)).reshape(len(x_TD), 2, -1)
        o = np.zeros_like(v)
        for h in range(2):
            S = np.zeros((4, 8))  # K = 16 / 2 / 2, V = 16 / 2
            for t in range(len(x_TD)):
                S = np.diag(alpha[t, h]) @ S + np.outer(k[t, h], v[t, h])
                o[t, h] = q[t, h] @ S / math.sqrt(4)
        normed = merge(rms(o, array(mixer.norm.scale)))
        return (silu(x_TD @ weight(mixer.output_gate)) * normed) @ weight(mixer.output)

    check_layer(mixer, transcription)
