"""Latent attention against a slow transcription, in which every head has keys and values of its
own."""

import numpy as np
import pytest

from models import latent_attention
from tests.support.layers import (
    array,
    build_mixer,
    check_layer,
    merge,
    project,
    rms,
    rotated,
    weight,
)

SIZES = {"heads": 2, "latent_size": 6, "key_size": 4, "shared_key_size": 2, "value_size": 3}


@pytest.mark.parametrize(
    ("options", "reach"),
    [({"query_latent_size": 5}, 100), ({"rope": False, "context_length": 3}, 3)],
)
def test_attention_is_softmax_over_keys_made_of_latents(options, reach):
    mixer = build_mixer(latent_attention, **({"context_length": reach} | SIZES | options))

    def transcription(x_TD):
        time = np.arange(len(x_TD))
        h_TD = x_TD
        if "query_latent_size" in options:
            h_TD = rms(x_TD @ weight(mixer.query_in), array(mixer.query_norm.scale), 1e-6)
        q = project(h_TD, mixer.query, 2)
        c = rms(x_TD @ weight(mixer.latent), array(mixer.latent_norm.scale), 1e-6)
        shared = np.repeat(project(x_TD, mixer.shared_key, 1), 2, axis=1)
        if options.get("rope", True):
            q[..., 4:] = rotated(q[..., 4:], time[:, None, None])  # one pair, base^0
            shared = rotated(shared, time[:, None, None])
        k = np.concatenate((np.einsum("sl,lhk->shk", c, array(mixer.key_up_LHK)), shared), -1)
        v = np.einsum("sl,lhv->shv", c, array(mixer.value_up_LHV))
        scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(6)
        ago = time[:, None] - time[None, :]
        scores = np.where((ago >= 0) & (ago < reach), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        o = np.einsum("hts,shv->thv", p / p.sum(-1, keepdims=True), v)
        return merge(o) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_a_pair_needs_an_even_number_of_channels():
    with pytest.raises(ValueError, match="shared_key_size must be even with rope=True; got 3"):
        build_mixer(latent_attention, context_length=4, shared_key_size=3)
