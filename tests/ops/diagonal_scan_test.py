"""Diagonal scan: the op contract, and what ties its forms to each other and to a convolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import ops
from ops import diagonal_scan
from ops.diagonal_scan import examples, pallas_gpu, pallas_tpu
from tests.contracts.ops import BATCH, DOCUMENT, LENGTH, TOLERANCE, OpContract, assert_close

scan = jax.jit(diagonal_scan, static_argnames="implementation")
CHANNELS = examples.SHAPES["test"]["channels"]
HARD_MODULI = (0.0, 1e-30, 0.5, 1 - 1e-3, 1.0)  # total decay to none, side by side


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def factors(seed, *shape):
    """Real and imaginary parts of factors of hard moduli at random angles; the real form takes
    signs for angles."""
    rng = np.random.default_rng(seed)
    modulus, angle = rng.choice(HARD_MODULI, shape), rng.uniform(0, 2 * np.pi, shape)
    return jnp.asarray(modulus * np.cos(angle), jnp.float32), jnp.asarray(
        modulus * np.sin(angle), jnp.float32
    )


class TestDiagonalScan(OpContract):
    # The other two are tied to these below.
    variants = ("real", "complex, per token")
    implementations = ("xla",)
    examples = examples

    def inputs(self, key, variant, length, dtype):
        """With factors from total decay to none; a complex number is two inputs."""
        inputs = super().inputs(key, variant, length, dtype)
        if variant == "real":
            return {"a": jnp.asarray((*HARD_MODULI, -0.9), jnp.float32), "b": inputs["b"]}
        parts = factors(int(jax.random.bits(key)), BATCH, length, CHANNELS)
        if variant == "real, per token":
            return {"a": parts[0], "b": inputs["b"]}
        return {
            f"{name}_{part}": x
            for name, pair in (("a", parts), ("b", inputs["b"]))
            for part, x in zip(("real", "imaginary"), pair, strict=True)
        }

    def initial_state(self, key, variant):
        return jax.random.normal(
            key, (BATCH, CHANNELS if variant.startswith("real") else 2 * CHANNELS)
        )

    @classmethod
    def call(cls, inputs, state, segment_ids, implementation, **options):
        call = functools.partial(
            diagonal_scan, segment_ids=segment_ids, implementation=implementation, **options
        )
        if "a" in inputs:
            return call(**inputs, initial_state=state)
        outputs = call(
            (inputs["a_real"], inputs["a_imaginary"]),
            (inputs["b_real"], inputs["b_imaginary"]),
            initial_state=(None if state is None else tuple(jnp.split(state, 2, axis=-1))),
        )
        return tuple(jnp.concatenate(pair, axis=-1) for pair in outputs)


@pytest.mark.full
class TestKernels(TestDiagonalScan):
    """The kernels, interpreted: the whole contract. What `make test` runs of it stands below."""

    implementations = ("pallas_gpu", "pallas_tpu")

    @pytest.fixture(autouse=True)
    def short_turns(self, monkeypatch):
        # Interpreted GPU kernels take longer to compile than to run.
        monkeypatch.setattr(pallas_gpu, "TURN", 4)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_values_states_and_gradients_equal_the_reference(self, variant, implementation, dtype):
        inputs, state, ids = self.data(variant, LENGTH, dtype)
        expected = self.values_and_gradients("reference", inputs, state, ids)
        got = self.values_and_gradients(implementation, inputs, state, ids)
        # bfloat16: rounded results, of a cotangent of h that XLA need not have rounded for the
        # reference.
        tolerance = 2 * TOLERANCE[dtype] if dtype == "bfloat16" else TOLERANCE[dtype]
        for name in expected:
            assert got[name].dtype == expected[name].dtype, name
            assert_close(name, got[name], expected[name], tolerance)


@pytest.mark.parametrize(
    "variant", ["complex, per token", pytest.param("real", marks=pytest.mark.slow)]
)
def test_tpu_kernels_equal_the_reference(variant):
    contract = TestDiagonalScan()
    inputs, state, ids = contract.data(variant, 40)  # 40 tokens of a chunk of 48
    expected = contract.values_and_gradients("reference", inputs, state, ids)
    got = contract.values_and_gradients("pallas_tpu", inputs, state, ids)
    for name in expected:
        assert_close(name, got[name], expected[name])


# Of 16 tokens per chunk: two full ones, and a token, so that states are passed on.
@pytest.mark.parametrize(
    ("variant", "reverse", "length"),
    [
        pytest.param("real, per token", False, 33, marks=pytest.mark.full),
        pytest.param("real", False, 33, marks=pytest.mark.full),
        pytest.param("complex, per token", False, 33, marks=pytest.mark.full),
        pytest.param("real, per token", True, 33, marks=pytest.mark.slow),
        pytest.param("real", True, 33, marks=pytest.mark.full),
        pytest.param("complex, per token", True, 32, marks=pytest.mark.full),
    ],
)
def test_tpu_kernels_carry_states_and_gradients_over_chunks(variant, reverse, length, monkeypatch):
    tuning = pallas_tpu.Tuning(values=16 * CHANNELS)
    monkeypatch.setattr(pallas_tpu, "TUNING", tuning)
    contract = TestDiagonalScan()
    case = contract.data(variant, length)
    expected = contract.values_and_gradients("reference", *case, reverse=reverse)
    got = contract.values_and_gradients("pallas_tpu", *case, reverse=reverse)
    for name in expected:
        assert_close(name, got[name], expected[name])


# Five turns, the last ragged, of four tokens: interpreted kernels take longer to compile than to
# run.
@pytest.mark.parametrize(
    ("variant", "reverse"),
    [
        pytest.param("complex, per token", False, marks=pytest.mark.slow),
        pytest.param("complex, per token", True, marks=pytest.mark.slow),
        pytest.param("real", False, marks=pytest.mark.full),
    ],
)
def test_gpu_kernels_equal_the_reference(variant, reverse, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "TURN", 4)
    contract = TestDiagonalScan()
    inputs, state, ids = contract.data(variant, 19)
    expected = contract.values_and_gradients("reference", inputs, state, ids, reverse=reverse)
    got = contract.values_and_gradients("pallas_gpu", inputs, state, ids, reverse=reverse)
    for name in expected:
        assert_close(name, got[name], expected[name])


# Three chunks in two parts; four in three, of which the last is empty.
@pytest.mark.full
@pytest.mark.parametrize(("length", "parts"), [(130, 2), (193, 3)])
@pytest.mark.parametrize("variant", ["real", "complex, per token"])
def test_gpu_kernels_cut_time_into_parts(variant, length, parts, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "part_count", lambda length, programs: parts)
    contract = TestDiagonalScan()
    inputs, state, ids = contract.data(variant, length)
    for segment_ids, reverse in ((ids, False), (None, False), (ids, True)):
        run = functools.partial(contract.values_and_gradients, reverse=reverse)
        expected = run("reference", inputs, state, segment_ids)
        got = run("pallas_gpu", inputs, state, segment_ids)
        for name in expected:
            assert_close(name, got[name], expected[name])


def test_gpu_kernels_refuse_what_they_do_not_take():
    b = jnp.zeros((1, 4, 2), jnp.float16)
    with pytest.raises(ValueError, match="'pallas_gpu' takes float32 or bfloat16"):
        diagonal_scan(jnp.zeros((2,)), b, implementation="pallas_gpu")


@pytest.mark.full
@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu"])
@pytest.mark.parametrize("channels", [1, 192, 700])  # below, beside, beyond a block
def test_kernels_take_any_number_of_channels(channels, implementation):
    a, b = factors(8, channels), factors(9, BATCH, 40, channels)

    def scan_and_gradients(implementation):
        def function(a, b):
            return diagonal_scan(a, b, implementation=implementation)

        return jax.jit(functools.partial(values_and_gradients, function))(a, b)

    expected, got = scan_and_gradients("reference"), scan_and_gradients(implementation)
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert_close(jax.tree_util.keystr(path), value, wanted)


def test_a_program_lowered_for_a_tpu_takes_the_kernels():
    b = jax.ShapeDtypeStruct((1, 2048, 128), jnp.float32)

    def loss(a, b):
        return diagonal_scan(a, b)[0].sum()

    a = jax.ShapeDtypeStruct((128,), jnp.float32)
    traced = jax.jit(jax.value_and_grad(loss)).trace(a, b)
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("tpu_custom_call") == 2
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def values_and_gradients(function, *inputs):
    outputs, pullback = jax.vjp(function, *inputs)
    return outputs, pullback(jax.tree.map(jnp.cos, outputs))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_constant_factor_equals_it_at_every_token(implementation):
    a, b = (factors(0, CHANNELS), (normal(1, BATCH, 65, CHANNELS), normal(2, BATCH, 65, CHANNELS)))
    state = (normal(3, BATCH, CHANNELS), normal(4, BATCH, CHANNELS))

    def repeated(a, b, state):
        a = tuple(jnp.broadcast_to(part[None, None, :], b[0].shape) for part in a)
        return diagonal_scan(a, b, initial_state=state, implementation="reference")

    @jax.jit
    def both(a, b, state):
        def constant(a, b, state):
            return diagonal_scan(a, b, initial_state=state, implementation=implementation)

        return values_and_gradients(constant, a, b, state), values_and_gradients(
            repeated, a, b, state
        )

    got, want = both(a, b, state)
    for (path, value), expected in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert_close(jax.tree_util.keystr(path), value, expected)


def test_a_real_scan_is_a_complex_one_without_imaginary_parts():
    a, b = (factors(5, BATCH, DOCUMENT, CHANNELS)[0], normal(6, BATCH, DOCUMENT, CHANNELS))

    def real(a, b):
        return diagonal_scan(a, b)

    def part(a, b):
        (h, h_imaginary), (final, _) = diagonal_scan((a, jnp.zeros_like(a)), (b, jnp.zeros_like(b)))
        return h + h_imaginary, final

    got, want = jax.jit(
        lambda a, b: (values_and_gradients(real, a, b), values_and_gradients(part, a, b))
    )(a, b)
    for value, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close("real", value, expected)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_constant_factor_makes_a_convolution_with_its_powers(implementation):
    a, b = (
        factors(7, CHANNELS),
        (normal(8, BATCH, DOCUMENT, CHANNELS), normal(9, BATCH, DOCUMENT, CHANNELS)),
    )
    (real, imaginary), final = scan(a, b, implementation=implementation)
    a_N, b_BTN = (np.asarray(z[0], np.float64) + 1j * np.asarray(z[1], np.float64) for z in (a, b))
    want = np.stack(
        [sum(a_N**lag * b_BTN[:, t - lag] for lag in range(t + 1)) for t in range(DOCUMENT)], axis=1
    )
    assert_close("real part", real, np.real(want))
    assert_close("imaginary part", imaginary, np.imag(want))
    np.testing.assert_array_equal(final, (real[:, -1], imaginary[:, -1]))


@pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        pytest.param("pallas_gpu", marks=pytest.mark.full),
        pytest.param("pallas_tpu", marks=pytest.mark.slow),
    ],
)
def test_a_growing_state_overflows_only_where_the_definition_does(implementation):
    length = 130  # of chunks with padded tokens, whose states would be 2^128 and more
    a, b, state = (jnp.full((1,), 2.0), jnp.zeros((1, length, 1)), jnp.full((1, 1), 2.0**-3))

    def loss(a, b, state):
        final = diagonal_scan(a, b, initial_state=state, implementation=implementation)[1]
        return final.sum() * 2.0**-20

    da, db, dstate = jax.jit(jax.grad(loss, (0, 1, 2)))(a, b, state)
    np.testing.assert_array_equal(da, [length * 2.0**106])
    np.testing.assert_array_equal(db[0, :, 0], 2.0 ** (np.arange(length)[::-1] - 20))
    np.testing.assert_array_equal(dstate, [[2.0**110]])


def test_the_backward_pass_keeps_the_states_and_not_what_entered_them():
    a, b = normal(0, CHANNELS), normal(1, BATCH, LENGTH, CHANNELS)
    (h, _), pullback = jax.vjp(diagonal_scan, a, b)
    (kept,) = [x for x in jax.tree.leaves(pullback) if x.shape == b.shape]
    np.testing.assert_array_equal(kept, h)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {"a": ones(BATCH, 4, CHANNELS), "b": ones(BATCH, 4, CHANNELS)}
PAIR = {
    "a": (ones(CHANNELS), ones(CHANNELS)),
    "b": (ones(BATCH, 4, CHANNELS), ones(BATCH, 4, CHANNELS)),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("b", {"b": ones(BATCH, 4)}),
        ("b", {"b": ones(BATCH, 0, CHANNELS)}),
        ("b", {"b": ones(BATCH, 4, CHANNELS, dtype=np.complex64)}),
        ("b", {"b": (ones(BATCH, 4, CHANNELS),) * 3}),
        ("b", {"b": ()}),
        ("b", PAIR | {"b": (ones(BATCH, 4, CHANNELS), ones(BATCH, 4, 1))}),
        ("a", {"a": ones(CHANNELS + 1)}),
        ("a", {"a": ones(BATCH, CHANNELS)}),
        ("a", {"a": ones(BATCH, 5, CHANNELS)}),
        ("a", {"a": np.full(CHANNELS, np.inf)}),
        ("a", {"a": PAIR["a"]}),
        ("a", PAIR | {"a": ones(CHANNELS)}),
        ("initial_state", {"initial_state": ones(BATCH, CHANNELS + 1)}),
        ("initial_state", PAIR | {"initial_state": ones(BATCH, CHANNELS)}),
        ("segment_ids", {"segment_ids": ones(BATCH, 4)}),
        ("implementation", {"implementation": "fast"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        diagonal_scan(**GOOD | change)


def test_values_are_checked_under_jit_by_ops_checks():
    checked = ops.checks(lambda a: diagonal_scan(a, GOOD["b"])[0])
    checked(GOOD["a"])
    with pytest.raises(checkify.JaxRuntimeError, match="a must be finite"):
        checked(GOOD["a"] * np.nan)
