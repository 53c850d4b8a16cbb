"""S4D against a slow complex transcription of its paper, and its initialisations."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.linalg import expm
from scipy.ndimage import gaussian_filter1d

from models import s4d
from models.blocks.stack import state_bytes
from models.parts.hippo import diagonal_plus_low_rank, legs, normal_legs
from tests.support.layers import FLOAT32, array, build_mixer, check_layer, sigmoid, weight


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def complex_pair(mixer, name):
    real = array(getattr(mixer, f"{name}_real_DM"))
    imaginary = getattr(mixer, f"{name}_imaginary_DM")
    return real if imaginary is None else real + 1j * array(imaginary)


@pytest.mark.parametrize(
    ("discretisation", "parallel", "init"),
    [
        ("zoh", "convolution", "lin"),
        ("bilinear", "recurrence", "lin"),
        ("zoh", "recurrence", "real"),
        pytest.param("bilinear", "convolution", "real", marks=pytest.mark.slow),
        pytest.param("zoh", "recurrence", "lin", marks=pytest.mark.slow),
    ],
)
def test_s4d_computes_the_kernel_and_block_of_its_paper(discretisation, parallel, init):
    mixer = build_mixer(
        s4d, state_size=6, discretisation=discretisation, parallel=parallel, init=init
    )

    def transcription(x_TD):
        L = -np.exp(array(mixer.decay_log_DM))
        if init != "real":
            L = L + 1j * array(mixer.angle_DM)
        step = np.exp(array(mixer.step_log_D))[:, None]
        B, C = complex_pair(mixer, "write"), complex_pair(mixer, "read")
        if discretisation == "zoh":
            Lbar, Bbar = np.exp(L * step), B * (np.exp(L * step) - 1) / L
        else:
            Lbar, Bbar = ((1 + L * step / 2) / (1 - L * step / 2), B * step / (1 - L * step / 2))
        length = len(x_TD)
        conjugates = 1 if init == "real" else 2
        kernel = np.stack(
            [conjugates * np.real((C * Bbar * Lbar**lag).sum(1)) for lag in range(length)]
        )
        y = np.stack(
            [sum(kernel[lag] * x_TD[t - lag] for lag in range(t + 1)) for t in range(length)]
        )
        g = gelu(y + array(mixer.skip_D) * x_TD)
        value, gate = (g @ weight(m) + array(m.bias) for m in (mixer.output, mixer.output_gate))
        return value * sigmoid(gate)

    check_layer(mixer, transcription)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["legs", pytest.param("real", marks=pytest.mark.full)])
def test_convolution_and_recurrence_agree_in_outputs_states_and_gradients(init):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, 4)), jnp.float32)
    results = []
    for parallel in ("convolution", "recurrence"):
        graphdef, params = nnx.split(fresh(init, 16, width=4, parallel=parallel))

        def loss(params, graphdef=graphdef):
            y, state = nnx.merge(graphdef, params)(x)
            memory = sum(jnp.sum(jnp.cos(part)) for part in jax.tree.leaves(state))
            return jnp.sum(jnp.sin(y)) + memory, (y, state)

        results.append(jax.jit(jax.grad(loss, has_aux=True))(params))
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(results[0]), jax.tree.leaves(results[1]), strict=True
    ):
        scale = float(jnp.abs(want).max())
        name = jax.tree_util.keystr(path)
        # Of frequencies up to N^2 / pi: 20 products of float32 rounding each.
        np.testing.assert_allclose(got, want, atol=2e-4 * scale, rtol=0, err_msg=name)


@pytest.mark.full
@pytest.mark.parametrize("init", ["legs", "inv", "lin", "ptd", "real"])
def test_gradients_are_finite_over_16384_tokens(init):
    graphdef, params = nnx.split(fresh(init, 64, dt_min=1e-4))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 16384, 3)))

    @jax.jit
    def gradient(params, x):
        def loss(params):
            y, state = nnx.merge(graphdef, params)(x)
            return jnp.sum(y) + sum(map(jnp.sum, jax.tree.leaves(state)))

        return jax.grad(loss)(params)

    for path, leaf in nnx.to_flat_state(gradient(params, x.astype(jnp.float32))):
        assert np.isfinite(leaf[...]).all(), f"gradient of {path}"


@pytest.mark.full
@pytest.mark.parametrize("discretisation", s4d.DISCRETISATIONS)
def test_the_sum_of_the_kernel_is_the_response_to_a_constant(discretisation):
    mixer = fresh("lin", 8, dt_min=0.1, dt_max=1.0, discretisation=discretisation)
    ones = jnp.ones((1, 400, 3))
    y, _ = jax.jit(lambda m, x: m.convolution(x))(mixer, ones)
    eigenvalue, write = s4d.initial_system("lin", 8)
    want = 2 * np.real((complex_pair(mixer, "read") * write / -eigenvalue).sum(1))
    np.testing.assert_allclose(y[0, -1], want, rtol=1e-3, atol=1e-4)


def test_inverse_law_frequencies_are_near_those_of_legs_and_linear_ones_alternate():
    exact, _ = s4d.initial_system("legs", 64)
    inverse, _ = s4d.initial_system("inv", 64)
    np.testing.assert_allclose(-np.imag(exact[:3]), [1303, 433, 258], atol=0.5)
    np.testing.assert_allclose(np.imag(inverse[:3]), [1283, 414, 240], atol=0.5)
    linear, write = s4d.initial_system("lin", 8)
    np.testing.assert_allclose(np.exp(linear), math.exp(-0.5) * (-1.0) ** np.arange(4), atol=1e-12)
    np.testing.assert_array_equal(write, 1)
    fourier = diagonal_plus_low_rank("fout", 8).eigenvalue
    np.testing.assert_allclose(np.imag(linear), -np.imag(fourier)[::-1], atol=1e-12)
    quadratic, _ = s4d.initial_system("quad", 6)
    np.testing.assert_allclose(quadratic, -0.5 + 1j * np.array([1, 9, 25]) / math.pi)


@pytest.mark.parametrize("size", [4, 16])
def test_legs_answers_a_slow_input_as_hippos_system_with_half_the_input_vector_does(size):
    A, B = legs(size)
    P = B / math.sqrt(2)
    S, C = A + np.outer(P, P), np.random.default_rng(0).standard_normal(size)
    for s in (1j * 0.3, 0.5 + 1j):
        rho = np.prod(s - np.arange(size)) / np.prod(s + np.arange(1, size + 1))
        hippo = C @ np.linalg.solve(s * np.eye(size) - A, B)
        normal = C @ np.linalg.solve(s * np.eye(size) - S, B / 2)
        np.testing.assert_allclose(hippo, (1 + rho) * normal, rtol=1e-9)


@pytest.mark.full
def test_for_a_smooth_input_legs_approaches_hippo_as_it_grows_though_its_kernel_never_does():
    """The states of the first Legendre polynomials, read from the layer's modes with half the input
    vector. HiPPO's are a system of their own, whatever the size: its matrix is triangular."""
    states, step, length = 4, 0.005, 1200
    A, B = legs(states)
    # Zero-order hold in one exponential: [[A, B], [0, 0]].
    held = expm(step * np.block([[A, B[:, None]], [np.zeros((1, states + 1))]]))
    noise = np.random.default_rng(0).standard_normal(length)
    u = gaussian_filter1d(noise, 20) * np.minimum(1, np.arange(length) / 200)
    h, want = np.zeros(states), []
    for x in u:
        h = held[:states, :states] @ h + held[:states, states] * x
        want.append(h)
    want = np.array(want)
    time = np.arange(1, 3000) / 1000
    errors, gaps = [], []
    for size in (8, 32, 128):
        mixer, (eigenvalue, V) = fresh("legs", size, width=states), normal_legs(size)
        for name, part in (("real", np.real), ("imaginary", np.imag)):
            getattr(mixer, f"read_{name}_DM")[...] = jnp.float32(part(V[:states]) / 2)
        mixer.step_log_D[...] = jnp.full(states, math.log(step), jnp.float32)
        x = jnp.asarray(np.tile(u[None, :, None], (1, 1, states)), jnp.float32)
        y, _ = jax.jit(lambda m, x: m.convolution(x))(mixer, x)
        difference = np.square(np.asarray(y[0]) - want).mean(0)
        errors.append(np.sqrt(difference / np.square(want).mean(0)))
        write = V.conj().T @ legs(size)[1] / 2
        kernel = 2 * np.real(np.exp(np.outer(time, eigenvalue)) @ (V[0] * write))
        gaps.append(np.abs(kernel - np.exp(-time)).mean())
    # At least as 1 / N.
    for coarse, fine in itertools.pairwise(errors):
        assert (fine < 0.4 * coarse).all(), errors
    assert errors[-1].max() < 0.005
    np.testing.assert_allclose(gaps, 0.22, atol=0.01)


def fresh(init, size, width=3, **options):
    build = nnx.jit(
        lambda: s4d.Mixer(
            width, depth=1, rngs=nnx.Rngs(0), **FLOAT32, state_size=size, init=init, **options
        )
    )
    return build()


@pytest.mark.parametrize(
    "init",
    [
        "ptd",
        *(
            pytest.param(init, marks=pytest.mark.full)
            for init in ("legs", "inv", "lin", "quad", "real")
        ),
    ],
)
def test_a_fresh_layer_has_the_system_that_it_was_given(init):
    mixer = fresh(init, 8)
    eigenvalue, write = s4d.initial_system(init, 8)
    step = np.exp(array(mixer.step_log_D))[:, None]
    assert (step >= 1e-3 * 0.999).all() and (step <= 0.1 * 1.001).all()
    factor, gain = jax.jit(lambda m: m.system())(mixer)
    np.testing.assert_allclose(factor, np.exp(eigenvalue * step), atol=1e-6)
    np.testing.assert_allclose(
        gain, write * (np.exp(eigenvalue * step) - 1) / eigenvalue, rtol=1e-4, atol=1e-7
    )


@pytest.mark.full
def test_random_initialisations_are_random_in_the_part_that_they_name():
    angle, decay = (
        array(getattr(fresh(f"random_{part}", 8, width=64), name)).ravel()
        for part, name in (("imaginary", "angle_DM"), ("real", "decay_log_DM"))
    )
    # exp(N(0, 1)) has median 1, U(0, 1) mean 1/2.
    assert np.median(angle) == pytest.approx(1, rel=0.2) and angle.min() > 0
    assert np.exp(decay).mean() == pytest.approx(0.5, rel=0.1)
    assert np.exp(decay).max() <= 1


@pytest.mark.full
def test_the_real_initialisation_has_as_many_floats_of_state_and_hippos_spectrum():
    mixer = fresh("real", 8)
    assert state_bytes(mixer) == state_bytes(fresh("lin", 8))
    assert {leaf.shape for leaf in jax.tree.leaves(mixer.init_state(2))} == {(2, 24)}
    want = np.sort(np.linalg.eigvals(legs(8)[0]))[::-1]
    np.testing.assert_allclose(-np.exp(array(mixer.decay_log_DM))[0], want, rtol=1e-5)


def test_half_the_modes_and_their_conjugates_are_the_real_system():
    size = 8
    eigenvalue, write = s4d.initial_system("legs", size)
    A, B = legs(size)
    P = B / math.sqrt(2)
    S = A + np.outer(P, P)
    for power in range(4):  # the moments B^T S^n B of the two
        want = B @ np.linalg.matrix_power(S, power) @ B
        assert 2 * np.real(np.conj(write) @ (eigenvalue**power * write)) == pytest.approx(
            want, rel=1e-9
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"init": "random"},
            "init must be one of 'legs', 'inv', 'lin', 'quad', 'ptd', 'real', .*; got 'random'",
        ),
        ({"state_size": 5}, "must be even and positive, so that its modes pair; got 5"),
        (
            {"discretisation": "euler"},
            "discretisation must be one of 'zoh', 'bilinear'; got 'euler'",
        ),
        ({"parallel": "fft"}, "parallel must be one of 'convolution', 'recurrence'; got 'fft'"),
    ],
)
def test_s4d_refuses_what_it_cannot_build(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(s4d, **options)


def test_no_eigenvalue_can_become_unstable():
    mixer = build_mixer(s4d, state_size=6)
    mixer.decay_log_DM[...] = jnp.linspace(-50.0, 5.0, mixer.decay_log_DM[...].size).reshape(-1, 3)
    factor, _ = mixer.system()
    assert (jnp.abs(factor) <= 1 + 2e-7).all()
