"""Linear attention against a slow transcription of its paper."""

import math

import numpy as np

from models import linear_attention
from tests.support.layers import array, build_mixer, check_layer, merge, project, rms, weight


def test_linear_attention_computes_equations_18_to_20():
    mixer = build_mixer(linear_attention, heads=2)

    def phi(x):
        return np.where(x > 0, x + 1, np.exp(x))  # elu(x) + 1

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        o = np.zeros_like(v)
        for h in range(2):
            S, z = np.zeros((8, 8)), np.zeros(8)
            for t in range(len(x_TD)):
                S += np.outer(phi(k[t, h]), v[t, h])
                z += phi(k[t, h])
                o[t, h] = phi(q[t, h]) @ S / (phi(q[t, h]) @ z)
        return merge(o) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_linear_attention_without_denominator_normalises_each_head():
    mixer = build_mixer(
        linear_attention, heads=2, feature_map="identity", normaliser="rms_norm", expand_k=0.5
    )

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        scores = np.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[-1])
        o = np.einsum("hts,shv->thv", np.tril(scores), v)
        return merge(rms(o, array(mixer.norm.scale))) @ weight(mixer.output)

    check_layer(mixer, transcription)
