"""S-Mamba: two Mambas that read the tokens in both orders."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import s_mamba
from tests.support.layers import build_mixer, call, count_parameters, inputs

OPTIONS = {"state_size": 3}


def assert_close(got: jax.Array, want: jax.Array) -> None:
    """Relative to the largest number, 240: the two walks sum in different orders."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * float(jnp.abs(want).max()))


def test_it_is_a_mamba_forwards_and_another_on_the_flipped_tokens():
    mixer = build_mixer(s_mamba, **OPTIONS)
    x = inputs()
    forward = call(mixer.mamba.forward, x)
    backward = call(mixer.mamba.backward, jnp.flip(x, 1))
    assert_close(call(mixer, x), forward + jnp.flip(backward, 1))


def test_flipped_tokens_and_swapped_mambas_flip_the_output():
    mixer = build_mixer(s_mamba, **OPTIONS)
    x = inputs()
    want = jnp.flip(call(mixer, x), 1)
    mixer.mamba.forward, mixer.mamba.backward = mixer.mamba.backward, mixer.mamba.forward
    assert_close(call(mixer, jnp.flip(x, 1)), want)


def test_in_one_direction_a_token_reads_no_later_one():
    mixer = build_mixer(s_mamba, bidirectional=False, **OPTIONS)
    x = inputs()
    y, changed = call(mixer, x), call(mixer, x + (np.arange(x.shape[1]) == 4)[None, :, None])
    np.testing.assert_array_equal(y[:, :4], changed[:, :4])
    assert np.abs(y[:, 4:] - changed[:, 4:]).max() > 1e-3


def test_parameters_are_those_of_mambas_with_inner_width_d():
    D, N, R = 32, 3, 2
    each = 2 * D * D + 3 * D + D * (R + 2 * N) + R * D + D + D * N + D + D * D
    assert count_parameters(s_mamba, D, depth=2, **OPTIONS) == 2 * each


def test_the_output_map_starts_the_same_at_any_depth():
    first, second = (
        s_mamba.Mixer(
            16, depth=depth, rngs=nnx.Rngs(0), param_dtype=jnp.float32, compute_dtype=jnp.float32
        ).mamba.forward.output.kernel[...]
        for depth in (1, 4)
    )
    np.testing.assert_array_equal(first, second)
