"""An encoder's mixer made of a causal one, against the causal mixer called by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import delta_net, gla, mamba
from models.parts.bidirectional import Bidirectional
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
