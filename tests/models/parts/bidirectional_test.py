"""An encoder's mixer made of a causal one, against the causal mixer called by hand."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import delta_net, gla, mamba
from models.networks.stack import available_mixers, find_mixer
from models.parts.bidirectional import Bidirectional
from tests.contracts.ops import assert_close
from tests.support.layers import FLOAT32, WIDTH, array, inputs, randomised

SEGMENT_IDS = jnp.array([[0, 0, 0, 1, 1, 0, 0], [2, 2, 2, 2, 2, 2, 2]])


def encoder(module: Any, combine: str = "sum", **options: Any) -> Any:
    def make() -> Bidirectional:
        given: dict[str, Any] = {"depth": 2, "rngs": nnx.Rngs(0), **FLOAT32}
        mixer = functools.partial(module.Mixer, WIDTH, **given, **options)
        return Bidirectional(mixer, WIDTH, combine=combine, **given)

    return randomised(make)


@pytest.mark.parametrize(
    ("module", "options"),
    [(gla, {"heads": 2, "conv_width": 3}), (mamba, {"state_size": 3}), (delta_net, {"heads": 2})],
)
@pytest.mark.parametrize("combine", ["sum", "concatenation"])
def test_an_encoder_reads_its_segments_in_both_directions(module, options, combine):
    mixer, x = encoder(module, combine, **options), jnp.asarray(inputs())

    @jax.jit
    def both(mixer, x):
        turned = mixer.backward(x[:, ::-1], segment_ids=SEGMENT_IDS[:, ::-1])[0]
        return mixer.forward(x, segment_ids=SEGMENT_IDS)[0], turned[:, ::-1]

    forward, backward = both(mixer, x)
    want = np.asarray(forward + backward)
    if combine == "concatenation":
        want = np.concatenate((forward, backward), axis=-1) @ array(mixer.output.kernel)
    got, state = jax.jit(lambda mixer, x: mixer(x, segment_ids=SEGMENT_IDS))(mixer, x)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    assert state is None and np.abs(np.asarray(forward - backward)).max() > 0.1


def test_another_combination_is_refused():
    with pytest.raises(ValueError, match="combine must be one of 'sum', 'concatenation'"):
        encoder(gla, "product")


# Of the mixers that walk backwards themselves.
OPTIONS: dict[str, dict[str, Any]] = {
    "linear_attention": {"heads": 2, "conv_width": 3},
    "transnormer": {"heads": 2},
    "hedgehog": {"heads": 2},
    "based": {"heads": 2, "feature_size": 4},
    "retnet": {"heads": 2},
    "lightning": {"heads": 2, "layer": 1},
    "gla": {"heads": 2, "conv_width": 3},
    "hgrn2": {"heads": 2},
    "lightnet": {"heads": 2, "gate_rank": 4},
    "flowformer": {"heads": 2, "clip": 5.0},
    "delta_net": {"heads": 2},
    "gated_delta_net": {"heads": 2},
    "kda": {"heads": 2},
    "mamba": {"state_size": 3},
    "mamba2": {"state_size": 4, "heads": 2, "groups": 1},
    "lssl": {"state_size": 4, "channels": 2, "transition": "fixed"},
    "s4": {"state_size": 4, "kernel_length": 16},
    "s4d": {"state_size": 4},
    "s5": {"state_size": 8, "blocks": 2, "clip_eigenvalues": True},
    "lru": {"state_size": 4},
    "base_conv": {},
}
FLIPPED = {"diag_attention", "mom", "monarch_mixer", "seqboat", "transformer", "window_attention"}
IN_MAKE_TEST = ("hedgehog", "lightnet", "s4d", "base_conv")


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        pytest.param(name, packed, marks=() if name in IN_MAKE_TEST else pytest.mark.full)
        for name in OPTIONS
        # Those of s4 are convolutions where there are no segments and no state.
        for packed in ((True, False) if name in ("lssl", "s4", "s4d") else (True,))
    ],
)
def test_a_mixer_in_reverse_is_itself_along_reversed_tokens(name, packed):
    given: dict[str, Any] = {"depth": 2, **FLOAT32, **OPTIONS[name]}
    mixer = randomised(lambda: find_mixer(name)(WIDTH, rngs=nnx.Rngs(0), **given))

    @jax.jit
    def both(mixer, x):
        state, ids, reversed_ids = None, None, None
        if packed:
            ids, reversed_ids = SEGMENT_IDS, SEGMENT_IDS[:, ::-1]
            _, state = mixer(x + 1)
        y, after = mixer(x[:, ::-1], state, segment_ids=reversed_ids)
        return mixer(x, state, segment_ids=ids, reverse=True), (y[:, ::-1], after)

    got, wanted = (
        jax.tree_util.tree_leaves_with_path(x) for x in both(mixer, jnp.asarray(inputs()))
    )
    for (path, value), (_, expected) in zip(got, wanted, strict=True):
        assert_close(jax.tree_util.keystr(path), value, expected, 2e-5)


def test_every_mixer_but_a_few_walks_backwards_itself():
    walking = {
        name
        for name in available_mixers()
        if "reverse" in inspect.signature(find_mixer(name).__call__).parameters
    }
    assert walking == set(OPTIONS) and walking | FLIPPED == set(available_mixers())
