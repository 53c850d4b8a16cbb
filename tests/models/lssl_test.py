"""LSSL against a slow dense transcription in float64, its structured transitions, and its forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import lssl
from models.parts.hippo import legs
from ops.dense_scan.powers import krylov_kernel
from tests.support.layers import (
    FLOAT32,
    array,
    build_mixer,
    check_layer,
    count_parameters,
    inputs,
    weight,
)

VECTORS = ("below", "diagonal", "above", "left", "right", "middle", "write")


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def tridiagonal(v):
    return np.diag(v["diagonal"]) + np.diag(v["below"], -1) + np.diag(v["above"], 1)


def structured(v):
    """A and B of the trained family."""
    inner = np.diag(v["middle"]) + np.linalg.inv(tridiagonal(v))
    return -v["left"][:, None] * inner * v["right"][None], v["left"] * v["write"]


def bilinear(A, B, step):
    inverse = np.linalg.inv(np.eye(len(A)) - step / 2 * A)
    return inverse @ (np.eye(len(A)) + step / 2 * A), inverse @ (step * B)


def near_legs(size):
    """Vectors of order one near those of LegS: random tridiagonal systems need not be stable."""
    rng = np.random.default_rng(0)
    return {
        name: vector + 0.05 * rng.standard_normal(vector.shape)
        for name, vector in lssl.legs_factors(size).items()
    }


@pytest.mark.parametrize("transition", ["learned", "fixed"])
def test_lssl_computes_the_recurrence_and_block_of_its_paper(transition):
    size, channels = 5, 2
    mixer = build_mixer(lssl, state_size=size, channels=channels, transition=transition)
    if transition == "learned":
        for name, vector in near_legs(size).items():
            getattr(mixer, name)[...] = jnp.asarray(vector, jnp.float32)
        A, B = structured({name: array(getattr(mixer, name)) for name in VECTORS})
        steps = np.exp(array(mixer.step_log_D))
    else:
        A, B = legs(size)
        steps = np.geomspace(1e-3, 1e-1, mixer.width)

    def transcription(x_TD):
        y_TDM = np.zeros((*x_TD.shape, channels))
        for d, step in enumerate(steps):
            Abar, Bbar = bilinear(A, B, step)
            h = np.zeros(size)
            for t, x in enumerate(x_TD[:, d]):
                h = Abar @ h + Bbar * x
                y_TDM[t, d] = array(mixer.read_DMN)[d] @ h + array(mixer.skip_DM)[d] * x
        g = gelu(y_TDM).reshape(len(x_TD), -1)
        return g @ weight(mixer.output) + array(mixer.output.bias)

    check_layer(mixer, transcription)


@pytest.mark.parametrize("size", [2, 16, 64])
def test_the_trained_family_starts_as_hippo(size):
    for got, want in zip(structured(lssl.legs_factors(size)), legs(size), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12 * size**2)


def test_the_tridiagonal_system_is_the_dense_inverse():
    size = 6
    mixer = build_mixer(lssl, state_size=size)
    vectors = near_legs(size)
    for name, vector in vectors.items():
        getattr(mixer, name)[...] = jnp.asarray(vector, jnp.float32)
    A, B = structured(vectors)
    for step, got_A, got_B in zip(
        np.exp(array(mixer.step_log_D)), *jax.jit(lambda m: m.system())(mixer), strict=True
    ):
        want_A, want_B = bilinear(A, B, step)
        np.testing.assert_allclose(got_A, want_A, atol=2e-5)
        np.testing.assert_allclose(got_B, want_B, atol=2e-5)


def fresh(size, **options):
    build = nnx.jit(
        lambda: lssl.Mixer(4, depth=1, rngs=nnx.Rngs(0), **FLOAT32, state_size=size, **options)
    )
    return build()


def test_the_transition_of_hippo_is_a_contraction_with_eigenvalues_inside_the_circle():
    size = 64
    A, _ = jax.jit(lambda m: m.system())(fresh(size, transition="fixed"))
    A = np.asarray(A, np.float64)
    assert np.linalg.norm(A, 2, axis=(1, 2)).max() <= 1 + 1e-5
    half = np.geomspace(1e-3, 1e-1, 4)[:, None] / 2 * np.arange(1, size + 1)
    diagonal = np.diagonal(A, axis1=1, axis2=2)  # A is triangular
    np.testing.assert_allclose(diagonal, (1 - half) / (1 + half), atol=1e-5)


@pytest.mark.slow
def test_a_slower_sampling_rate_is_a_longer_step():
    """The continuous kernel stays: r steps of Delta are one of r Delta, r times as strong."""
    mixer, r = fresh(8), 3
    kernels = []
    for factor, length in ((1.0, 64 * r), (float(r), 64)):
        mixer.step_log_D[...] = jnp.full((4,), math.log(2e-3 * factor))
        A, b = jax.jit(lambda m: m.system())(mixer)
        kernels.append(jax.jit(krylov_kernel, static_argnums=3)(A, b, mixer.read_DMN[...], length))
    fine, coarse = np.asarray(kernels[0][..., r // 2 :: r]), np.asarray(kernels[1])
    assert np.abs(coarse - r * fine).max() < 0.02 * np.abs(coarse).max()


@pytest.mark.slow
def test_convolution_recurrence_and_carried_state_agree():
    """As trained: from the initialisation, over more tokens than a chunk of the recurrence has."""
    mixer = fresh(16, channels=2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 41, 4)), jnp.float32)
    call = jax.jit(lambda m, x, state=None: m(x, state))
    y, state = call(mixer, x)
    z, other = call(mixer, x, mixer.init_state(2))
    first, carried = call(mixer, x[:, :9])
    second, last = call(mixer, x[:, 9:], carried)
    pieces = jnp.concatenate([first, second], axis=1)
    for name, got, want in (
        ("recurrence", z, y),
        ("its state", other["memory"], state["memory"]),
        ("two pieces", pieces, y),
        ("their state", last["memory"], state["memory"]),
    ):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, atol=2e-5 * scale, rtol=0, err_msg=name)


@pytest.mark.full
def test_gradients_of_both_forms_agree():
    mixer = build_mixer(lssl, state_size=4)
    for name, vector in near_legs(4).items():
        getattr(mixer, name)[...] = jnp.asarray(vector, jnp.float32)
    x = jnp.asarray(inputs())
    graphdef, params = nnx.split(mixer)

    @jax.jit
    def gradient(params, state):
        def loss(params):
            y, final = nnx.merge(graphdef, params)(x, state)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(final["memory"]))

        return jax.grad(loss)(params)

    convolution, recurrence = (
        gradient(params, state) for state in (None, mixer.init_state(len(x)))
    )
    for (path, got), (_, want) in zip(
        nnx.to_flat_state(convolution), nnx.to_flat_state(recurrence), strict=True
    ):
        scale = float(jnp.abs(want[...]).max())
        assert scale > 0, f"gradient of {path}"
        np.testing.assert_allclose(
            got[...], want[...], atol=1e-4 * scale, rtol=0, err_msg=str(path)
        )


def test_the_published_sizes_have_about_200_000_and_two_million_parameters():
    small = 6 * count_parameters(lssl, 128, depth=6, state_size=128, channels=1)
    large = 4 * count_parameters(lssl, 256, depth=4, state_size=256, channels=4)
    assert small == pytest.approx(200_000, rel=0.05)
    assert large == pytest.approx(2_000_000, rel=0.06)


def test_only_reads_and_output_of_a_fixed_transition_are_trained():
    mixer = fresh(4, transition="fixed")
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(mixer, nnx.Param))}
    assert names == {"read_DMN", "skip_DM", "output"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transition": "frozen"}, "transition must be one of 'learned', 'fixed'; got 'frozen'"),
        ({"state_size": 1}, "state_size must be at least 2 .* got state_size=1"),
        ({"channels": 0}, "channels at least 1; got state_size=128, channels=0"),
    ],
)
def test_lssl_refuses_what_it_cannot_build(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(lssl, **options)
