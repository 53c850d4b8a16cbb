"""qLSTM and its reversed form against a slow transcription of their paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from models import qlstm
from tests.support.layers import (
    array,
    build_mixer,
    check_layer,
    convolved,
    count_parameters,
    sigmoid,
    softplus,
    weight,
)


@pytest.mark.parametrize(("forget", "alpha"), [("sigmoid", None), ("reversed", 0.7)])
def test_qlstm_computes_its_recurrence(forget, alpha):
    mixer = build_mixer(qlstm, forget=forget)
    if alpha is not None:
        mixer.alpha_1[...] = jnp.array([alpha])

    def transcription(x_TD):
        gate = x_TD @ weight(mixer.gate)
        u = convolved(x_TD @ weight(mixer.input), mixer.conv)
        f, i, o = (
            u @ weight(m) + array(m.bias)
            for m in (mixer.forget_gate, mixer.input_gate, mixer.output_gate)
        )
        decay = sigmoid(f) if alpha is None else sigmoid(-f) ** alpha
        h = np.zeros_like(u)
        for t in range(len(u)):
            h[t] = (decay[t] * h[t - 1] if t else 0) + sigmoid(i[t]) * u[t]
        gelu = gate * (1 + erf(gate / np.sqrt(2))) / 2
        return (gelu * sigmoid(o) * h) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_the_reversed_gate_is_the_decay_of_s6_and_forgets_nothing_at_alpha_zero():
    mixer = build_mixer(qlstm, forget="reversed")
    f = np.linspace(-9, 9, 13)
    call = jax.jit(lambda mixer, f: mixer.decay(f[None, None, :])[0, 0])
    for alpha in (1.0, 2.5):
        mixer.alpha_1[...] = jnp.array([alpha])
        want = np.exp(-alpha * softplus(f))
        np.testing.assert_allclose(want, sigmoid(-f) ** alpha, rtol=1e-12)
        np.testing.assert_allclose(call(mixer, jnp.asarray(f, jnp.float32)), want, rtol=2e-5)
    np.testing.assert_allclose(sigmoid(-f), 1 - sigmoid(f), atol=1e-12)
    for alpha in (0.0, -1.0):
        mixer.alpha_1[...] = jnp.array([alpha])
        assert (np.asarray(call(mixer, jnp.asarray(f, jnp.float32))) == 1).all()


def test_qlstm_has_the_published_projections():
    d, inner = 64, 128
    want = d * 2 * inner + 5 * inner + 3 * (inner + 1) * inner + inner * d
    assert count_parameters(qlstm, d, depth=2) == want
    assert count_parameters(qlstm, d, depth=2, forget="reversed") == want + 1


def test_an_unknown_forget_gate_is_refused():
    with pytest.raises(ValueError, match="forget must be one of 'sigmoid', 'reversed'; got 'tanh'"):
        build_mixer(qlstm, forget="tanh")
