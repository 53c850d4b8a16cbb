"""S4 against a slow dense transcription in float64, its kernel and the identities behind it, and
its three forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import s4
from models.parts.hippo import HIPPO, diagonal_plus_low_rank, legs, normal_legs
from ops.dense_scan.powers import krylov_kernel
from tests.support.layers import (
    FLOAT32,
    array,
    build_mixer,
    check_layer,
    count_parameters,
    inputs,
    sigmoid,
    weight,
)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def both_halves(mixer, name):
    """A complex parameter and its conjugates: [D, N], or [D, R, N]."""
    letters = "DRM" if name == "low_rank" else "DM"
    real, imaginary = (
        array(getattr(mixer, f"{name}_{part}_{letters}")) for part in ("real", "imaginary")
    )
    half = real + 1j * imaginary
    return np.concatenate([half, half.conj()], axis=-1)


def dense_systems(mixer):
    """Abar, Bbar and C of every channel, complex and dense, from the equations as the paper has
    them."""
    eigenvalue = -np.exp(array(mixer.decay_log_DM)) + 1j * array(mixer.angle_DM)
    eigenvalue = np.concatenate([eigenvalue, eigenvalue.conj()], axis=1)
    low_rank, write, read = (both_halves(mixer, name) for name in ("low_rank", "write", "read"))
    for d, step in enumerate(np.exp(array(mixer.step_log_D))):
        A = np.diag(eigenvalue[d]) - low_rank[d].T @ low_rank[d].conj()
        identity = np.eye(len(A))
        inverse = np.linalg.inv(identity - step / 2 * A)
        Abar, Bbar = inverse @ (identity + step / 2 * A), inverse @ (step * write[d])
        remaining = identity - np.linalg.matrix_power(Abar, mixer.kernel_length)
        yield Abar, Bbar, read[d] @ np.linalg.inv(remaining)


def block(mixer, y_TD, x_TD):
    g = gelu(y_TD + array(mixer.skip_D) * x_TD)
    value, gate = (g @ weight(m) + array(m.bias) for m in (mixer.output, mixer.output_gate))
    return value * sigmoid(gate)


@pytest.mark.parametrize(
    ("init", "kernel_length"), [("legs", 16), ("legs", 7), ("legs", 4), ("legt", 16), ("legt", 4)]
)
def test_s4_computes_the_recurrence_and_block_of_its_paper(init, kernel_length):
    """Up to kernel_length the layer is a convolution; beyond, the recurrence. "legt" has a
    correction of rank 2."""
    mixer = build_mixer(s4, state_size=6, init=init, kernel_length=kernel_length)
    assert mixer.low_rank_real_DRM.shape[1] == (2 if init == "legt" else 1)

    def transcription(x_TD):
        y_TD = np.zeros_like(x_TD)
        for d, (Abar, Bbar, C) in enumerate(dense_systems(mixer)):
            h = np.zeros(6, complex)
            for t, x in enumerate(x_TD[:, d]):
                h = Abar @ h + Bbar * x
                y_TD[t, d] = np.real(C @ h)
        return block(mixer, y_TD, x_TD)

    check_layer(mixer, transcription)


@pytest.mark.parametrize(
    ("size", "length"), [(16, 64), pytest.param(64, 1024, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("init", s4.INITS)
def test_the_cauchy_kernel_of_a_fresh_layer_is_the_krylov_kernel_of_hippo(init, size, length):
    mixer = fresh(size, length, init=init)
    # Ctil (I - Abar^L)^-1 A^l B, in the basis in which the paper states A and B.
    kernel, want = np.asarray(jax.jit(lambda m: m.system().kernel(m.kernel_length))(mixer)), []
    read, matrices = both_halves(mixer, "read"), s4.INITS[init]
    for d, step in enumerate(np.exp(array(mixer.step_log_D))):
        name = matrices[d % len(matrices)]
        A, B = HIPPO[name](size)
        V = diagonal_plus_low_rank(name, size).V
        V = np.concatenate([V, V.conj()], axis=1)
        if name != "legs":  # a parameter that is a logarithm cannot start at 0
            A = A - 1e-4 * np.eye(size)
        inverse = np.linalg.inv(np.eye(size) - step / 2 * A)
        Abar, Bbar = inverse @ (np.eye(size) + step / 2 * A), inverse @ (step * B)
        remaining = np.eye(size) - np.linalg.matrix_power(Abar, length)
        row, terms = np.real(read[d] @ V.conj().T) @ np.linalg.inv(remaining), []
        for _ in range(length):
            terms.append(row @ Bbar)
            row = row @ Abar
        want.append(terms)
    for got, row in zip(kernel, np.array(want), strict=True):
        np.testing.assert_allclose(got, row, atol=2e-5 * np.abs(row).max(), rtol=0)


def fresh(size, length, width=4, **others):
    @nnx.jit
    def build():
        options = {"state_size": size, "kernel_length": length, **others}
        return s4.Mixer(width, depth=1, rngs=nnx.Rngs(0), **FLOAT32, **options)

    return build()


@pytest.mark.slow
def test_a_fresh_layer_truncates_a_kernel_whose_read_vector_has_unit_variance():
    mixer = fresh(16, 32, width=64)
    E, b = jax.jit(lambda m: m.system().increment())(mixer)
    c = jax.jit(lambda m, E: m.system().untruncated_read(E, m.kernel_length))(mixer, E)
    # 2 Re C and -2 Im C, both parts of variance 1/2.
    assert float(jnp.var(c)) == pytest.approx(2, rel=0.1)
    A = E + jnp.eye(16)[None]
    want = jax.jit(krylov_kernel, static_argnums=3)(A, b, c[:, None], 32)[:, 0]
    kernel = jax.jit(lambda m: m.system().kernel(m.kernel_length))(mixer)
    np.testing.assert_allclose(kernel, want, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("size", [4, 16])
def test_the_low_rank_term_has_a_closed_form(size):
    eigenvalue, V = normal_legs(size)
    p = V.conj().T @ (legs(size)[1] / math.sqrt(2))
    for s in (0.7j, 0.5 + 2j):
        k_pp = np.sum(np.abs(p) ** 2 / (s - eigenvalue))
        k_pp += np.sum(np.abs(p) ** 2 / (s - eigenvalue.conj()))
        rho = np.prod(s - np.arange(size)) / np.prod(s + np.arange(1, size + 1))
        np.testing.assert_allclose(k_pp, (1 - rho) / (1 + rho), rtol=1e-9)


def test_the_state_matrix_has_the_spectral_radius_of_hippo_and_is_a_contraction():
    mixer = fresh(16, 64)
    A = np.asarray(jax.jit(lambda m: m.system().increment())(mixer)[0]) + np.eye(16)
    step = np.exp(array(mixer.step_log_D))[:, None] / 2 * np.arange(1, 17)
    want = np.abs((1 - step) / (1 + step)).max(axis=1)
    # As the eigenvalues of a float32 matrix whose eigenvectors are nearly dependent.
    radius = np.abs(np.linalg.eigvals(A)).max(axis=1)
    np.testing.assert_allclose(radius, want, atol=2e-2)
    assert np.linalg.norm(A, 2, axis=(1, 2)).max() <= 1 + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "init", ["legs_fout", *(pytest.param(x, marks=pytest.mark.full) for x in ("legt", "lagt"))]
)
def test_convolution_recurrence_carried_state_and_packed_documents_agree(init):
    """As trained: from the initialisation, over more tokens than a chunk of the recurrence has."""
    mixer = fresh(16, 64, init=init)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 41, 4)), jnp.float32)
    call = jax.jit(lambda m, x, state=None, ids=None: m(x, state, segment_ids=ids))
    y, state = call(mixer, x)
    z, other = call(mixer, x, mixer.init_state(2))
    first, carried = call(mixer, x[:, :9])
    second, last = call(mixer, x[:, 9:], carried)
    ids = jnp.broadcast_to(jnp.where(jnp.arange(41) < 9, 5, 3)[None], (2, 41))
    packed, packed_state = call(mixer, x, None, ids)
    alone, alone_state = call(mixer, x[:, 9:])
    for name, got, want in (
        ("recurrence", z, y),
        ("its state", other["memory"], state["memory"]),
        ("two pieces", jnp.concatenate([first, second], axis=1), y),
        ("their state", last["memory"], state["memory"]),
        ("packed", packed, jnp.concatenate([first, alone], axis=1)),
        ("state after packed", packed_state["memory"], alone_state["memory"]),
    ):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, atol=2e-5 * scale, rtol=0, err_msg=name)


@pytest.mark.slow
def test_a_mode_that_hardly_decays_leaves_the_recurrence_finite():
    """Of "fout", the sine of frequency 0: nothing drives it, and at this step float32 has no digit
    of its decay."""
    mixer = fresh(16, 64, init="fout", dt_min=1e-5, dt_max=2e-5)
    E, _ = jax.jit(lambda m: m.system().increment())(mixer)
    assert ((E + jnp.eye(16)[None])[:, 15, 15] == 1).all()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, 4)), jnp.float32)
    call = jax.jit(lambda m, x, state=None: m(x, state)[0])
    y, z = call(mixer, x), call(mixer, x, mixer.init_state(2))
    np.testing.assert_allclose(z, y, atol=2e-5 * float(jnp.abs(y).max()), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["legs", pytest.param("legt", marks=pytest.mark.full)])
def test_gradients_of_both_forms_agree(init):
    mixer = build_mixer(s4, state_size=4, kernel_length=8, init=init)
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
        scale = max(1.0, float(jnp.abs(want[...]).max()))
        np.testing.assert_allclose(
            got[...], want[...], atol=1e-4 * scale, rtol=0, err_msg=str(path)
        )


@pytest.mark.full
@pytest.mark.parametrize("init", s4.INITS)
@pytest.mark.parametrize("form", ["convolution", "recurrence"])
def test_gradients_of_a_fresh_layer_are_finite(init, form):
    mixer = fresh(64, 1024, init=init)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1024, 4)), jnp.float32)
    graphdef, params = nnx.split(mixer)

    @jax.jit
    def gradient(params, state):
        return jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x, state)[0]))(params)

    state = mixer.init_state(1) if form == "recurrence" else None
    for path, leaf in nnx.to_flat_state(gradient(params, state)):
        assert np.isfinite(leaf[...]).all(), f"gradient of {path}"


@pytest.mark.parametrize(("init", "rank"), [("legs", 1), ("legt", 2)])
def test_s4_has_the_parameters_of_its_paper(init, rank):
    """Lambda, p, B and C of 64 modes, Delta and D per channel, and the output map with its gate."""
    width, size = 128, 64
    assert count_parameters(s4, width, depth=4, state_size=size, init=init) == width * (
        (3 + rank) * size + 2
    ) + 2 * (width * width + width)


def test_two_matrices_share_the_channels_in_turns():
    mixed, legs_alone, fout_alone = (
        fresh(8, 16, init=init) for init in ("legs_fout", "legs", "fout")
    )
    for name in ("decay_log_DM", "angle_DM", "low_rank_real_DRM", "write_real_DM"):
        got, even, odd = (array(getattr(m, name)) for m in (mixed, legs_alone, fout_alone))
        np.testing.assert_array_equal(got[::2], even[::2])
        np.testing.assert_array_equal(got[1::2], odd[1::2])


def test_s4_refuses_what_it_cannot_build():
    with pytest.raises(ValueError, match="kernel_length must be at least 1; got 0"):
        build_mixer(s4, kernel_length=0)
    with pytest.raises(ValueError, match="must be even and positive"):
        build_mixer(s4, state_size=5)
    known = "'legs', 'legt', 'lagt', 'fout', 'legs_fout'"
    with pytest.raises(ValueError, match=f"init must be one of {known}; got 'lin'"):
        build_mixer(s4, init="lin")
