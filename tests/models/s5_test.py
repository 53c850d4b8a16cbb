"""S5 against a slow complex transcription of its paper; HiPPO's normal part and the discretisations
on their own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import s5
from models.parts.discretisation import DISCRETISATIONS, zero_order_hold
from models.parts.hippo import _condition_and_size, legs, normal_legs, perturbed_legs
from tests.support.layers import FLOAT32, array, build_mixer, check_layer, sigmoid, weight


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exponential(matrix):
    """exp of a square matrix: Taylor's series of the matrix halved twenty times, squared twenty
    times."""
    term = result = np.eye(len(matrix), dtype=matrix.dtype)
    for n in range(1, 12):
        term = term @ matrix / (n * 2.0**20)
        result = result + term
    for _ in range(20):
        result = result @ result
    return result


@pytest.mark.parametrize(
    ("discretisation", "gate"), [("zoh", "half_glu1"), ("bilinear", "half_glu2")]
)
def test_s5_computes_its_recurrence_and_block(discretisation, gate):
    mixer = build_mixer(
        s5, state_size=8, discretisation=discretisation, gate=gate, clip_eigenvalues=True
    )

    def transcription(x_TD):
        L = np.minimum(array(mixer.eigenvalue_real_N), -1e-4) + 1j * array(
            mixer.eigenvalue_imaginary_N
        )
        step = np.exp(array(mixer.step_log_N))
        B = (weight(mixer.write_real) + 1j * weight(mixer.write_imaginary)).T
        C = (weight(mixer.read_real) + 1j * weight(mixer.read_imaginary)).T
        if discretisation == "zoh":
            Lbar = np.exp(L * step)
            Bbar = ((Lbar - 1) / L)[:, None] * B
        else:
            Lbar = (1 + L * step / 2) / (1 - L * step / 2)
            Bbar = (step / (1 - L * step / 2))[:, None] * B
        h, y = np.zeros(4, complex), np.zeros_like(x_TD)
        for t, x in enumerate(x_TD):
            h = Lbar * h + Bbar @ x
            y[t] = 2 * (C @ h).real + array(mixer.skip_D) * x
        g = gelu(y)
        return (g if gate == "half_glu1" else y) * sigmoid(
            g @ weight(mixer.output_gate) + array(mixer.output_gate.bias)
        )

    check_layer(mixer, transcription)


@pytest.mark.parametrize("init", ["legs", "ptd"])
def test_s5_starts_as_the_dense_real_system_of_its_blocks(init):
    width, size, blocks, length = 3, 16, 2, 20
    mixer = s5.Mixer(
        width, depth=1, rngs=nnx.Rngs(0), **FLOAT32, state_size=size, blocks=blocks, init=init
    )
    mixer.step_log_N[...] = jnp.full((size // 2,), math.log(0.03))
    # Undo the change of basis: 2 Re(V B) is the real B that was drawn, and C V = read.
    if init == "legs":
        A, _ = legs(size // blocks)
        P = np.sqrt(np.arange(size // blocks) + 0.5)
        matrix, (_, V) = A + np.outer(P, P), normal_legs(size // blocks)
        inverse = V.conj().T
    else:
        eigenvalue, V, inverse = perturbed_legs(size // blocks)
        matrix = 2 * np.real(V * eigenvalue @ inverse)
    V, inverse, S = (np.kron(np.eye(blocks), block) for block in (V, inverse, matrix))
    B = 2 * (V @ (weight(mixer.write_real) + 1j * weight(mixer.write_imaginary)).T).real
    C = 2 * ((weight(mixer.read_real) + 1j * weight(mixer.read_imaginary)).T @ inverse).real
    # Zero-order hold in one matrix exponential: [S B; 0 0].
    step = exponential(0.03 * np.block([[S, B], [np.zeros((width, size + width))]]))
    x, h = np.random.default_rng(0).standard_normal((length, width)), np.zeros(size)
    want = []
    for token in x:
        h = step[:size, :size] @ h + step[:size, size:] @ token
        want.append(C @ h)

    factor, gain = mixer.system()
    h, got = np.zeros(size // 2, complex), []
    for token in x:
        h = np.asarray(factor) * h + np.asarray(gain) * (
            token @ (weight(mixer.write_real) + 1j * weight(mixer.write_imaginary))
        )
        got.append(2 * (h @ (weight(mixer.read_real) + 1j * weight(mixer.read_imaginary))).real)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert B.std() == pytest.approx(1 / math.sqrt(size), rel=0.3)


def test_legs_is_a_normal_matrix_less_one_of_rank_one():
    size = 64
    A, B = legs(size)
    P = B / math.sqrt(2)
    S = A + np.outer(P, P)
    np.testing.assert_allclose(S + S.T, -np.eye(size), atol=1e-12)
    eigenvalues, V = normal_legs(size)
    np.testing.assert_allclose(V.conj().T @ V, np.eye(size // 2), atol=1e-12)
    np.testing.assert_allclose(2 * np.real(V @ np.diag(eigenvalues) @ V.conj().T), S, atol=1e-9)
    omega = np.imag(eigenvalues)
    assert -omega[0] == pytest.approx(1303.27, abs=0.01)
    assert (omega < 0).all() and (np.diff(omega) > 0).all()


@pytest.mark.parametrize(
    ("size", "gamma", "condition", "norm"),
    [(16, 1.0, 7.42, 5.78), (16, 10.0, 20.4, 1.68), (16, 100.0, 58.0, 0.49)],
)
def test_a_perturbation_trades_its_size_for_well_conditioned_eigenvectors(
    size, gamma, condition, norm
):
    A, B = legs(size)
    eigenvalue, V, inverse = perturbed_legs(size, gamma)
    perturbed = 2 * np.real(V * eigenvalue @ inverse)
    all_of_V = np.concatenate([V, V.conj()], axis=1)
    np.testing.assert_allclose(
        np.concatenate([inverse, inverse.conj()]) @ all_of_V, np.eye(size), atol=1e-12
    )
    assert np.linalg.norm(perturbed - A, 2) == pytest.approx(norm, rel=0.05)
    assert np.linalg.cond(all_of_V) == pytest.approx(condition, rel=0.05)
    assert (np.real(eigenvalue) < 0).all()
    assert (np.diff(np.imag(eigenvalue)) > 0).all()
    # f(A + E) B from half of the modes.
    np.testing.assert_allclose(
        2 * np.real(V @ (eigenvalue**3 * (inverse @ B))),
        np.linalg.matrix_power(perturbed, 3) @ B,
        rtol=1e-9,
    )


def test_the_gradient_of_the_condition_is_that_of_finite_differences():
    A, flat = legs(6)[0], np.random.default_rng(1).normal(0, 0.5, 36)
    _, gradient = _condition_and_size(flat, A, 2.0)
    differences = [
        (_condition_and_size(flat + step, A, 2.0)[0] - _condition_and_size(flat - step, A, 2.0)[0])
        / 2e-6
        for step in 1e-6 * np.eye(36)
    ]
    np.testing.assert_allclose(gradient, differences, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "gamma", "message"),
    [
        (5, 1.0, "must be even and positive"),
        (16, 0.0, "gamma must be greater than 0; got 0.0"),
        (2, 1.0, "no perturbation of HiPPO-LegS .* for size 2"),
    ],
)
def test_perturbations_that_cannot_be_found_are_refused(size, gamma, message):
    with pytest.raises(ValueError, match=message):
        perturbed_legs(size, gamma)


@pytest.mark.parametrize("name", DISCRETISATIONS)
def test_a_constant_input_reaches_the_steady_state_of_the_continuous_system(name):
    eigenvalue, step = (jnp.array([-0.5 + 3j, -0.1, -20 - 100j]), jnp.array([0.1, 0.1, 0.5]))
    factor, gain = jax.jit(DISCRETISATIONS[name])(eigenvalue, step)
    # 1 - Lbar has two digits less than Lbar.
    np.testing.assert_allclose(gain / (1 - factor), -1 / eigenvalue, rtol=1e-4)


def test_the_discretisations_differ_by_a_third_order_of_the_step():
    eigenvalue = jnp.array([-0.5 + 3j])
    differences = []
    for step in (0.2, 0.1):
        factors = [
            discretise(eigenvalue, jnp.array([step]))[0] for discretise in DISCRETISATIONS.values()
        ]
        differences.append(abs(complex((factors[0] - factors[1])[0])))
    assert differences[0] / differences[1] == pytest.approx(8, rel=0.1)
    assert differences[1] == pytest.approx(abs(-0.05 + 0.3j) ** 3 / 12, rel=0.1)


def test_two_steps_of_a_held_input_are_one_of_twice_the_length():
    eigenvalue, step = jnp.array([-0.5 + 30j, -0.01 - 2j]), jnp.array([0.05, 0.3])
    (one, gain), (two, gain_two) = (
        zero_order_hold(eigenvalue, step),
        zero_order_hold(eigenvalue, 2 * step),
    )
    np.testing.assert_allclose(one**2, two, rtol=1e-6)
    np.testing.assert_allclose((one + 1) * gain, gain_two, rtol=1e-5)


def test_zero_order_hold_keeps_its_digits_where_the_step_is_tiny_or_the_eigenvalue_zero():
    eigenvalue, step = (
        jnp.array([-0.5 + 3j, 0.0, -1e-20, -0.24, -0.26]),
        jnp.array([1e-6, 0.1, 0.1, 1.0, 1.0]),
    )
    z = np.asarray(eigenvalue, complex) * np.asarray(step, np.float64)
    # (exp(z) - 1) / z.
    powers = np.stack([z**n / math.factorial(n + 1) for n in range(12)])
    slopes = np.stack([n * z ** (n - 1) / math.factorial(n + 1) for n in range(1, 12)])
    _, gain = zero_order_hold(eigenvalue, step)
    np.testing.assert_allclose(gain, np.asarray(step) * powers.sum(0), rtol=1e-6)

    def loss(real):
        return jnp.sum(zero_order_hold(jax.lax.complex(real, eigenvalue.imag), step)[1].real)

    want = np.asarray(step, np.float64) ** 2 * slopes.sum(0).real
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(eigenvalue.real), want, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"state_size": 12, "blocks": 4},
            r"state_size must be a multiple of 2 \* blocks = 8; got 12",
        ),
        ({"init": "lin"}, "init must be one of 'legs', 'ptd'; got 'lin'"),
        ({"gate": "glu"}, "gate must be one of 'half_glu1', 'half_glu2'; got 'glu'"),
        (
            {"discretisation": "euler"},
            "discretisation must be one of 'zoh', 'bilinear'; got 'euler'",
        ),
    ],
)
def test_s5_refuses_what_it_cannot_build(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(s5, **options)
