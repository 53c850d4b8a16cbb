"""Selective scan: the op contract, and identities of Mamba (arXiv 2312.00752) and Grazzi et al.
(arXiv 2411.12537)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import ops
from ops import selective_scan
from ops.selective_scan import examples, gating, pallas_gpu, pallas_tpu, xla
from ops.selective_scan.pallas_gpu import gradients, program, walks
from tests.contracts.ops import BATCH, DOCUMENT, LENGTH, TOLERANCE, OpContract, assert_close

scan = jax.jit(
    selective_scan,
    static_argnames=("delta_softplus", "eigenvalue_range", "reverse", "implementation"),
)
WIDTH, STATE = examples.SHAPES["test"]["width"], examples.SHAPES["test"]["state"]
# Per channel and state: steps of order one times these are decays from none to total, side by side.
HARD_A = jnp.asarray(np.resize([0.0, -1e-3, -1.0, -20.0, -1e4], (WIDTH, STATE)), jnp.float32)


def hardened(inputs, key):
    """Some steps of zero, and at the sizes of the contract from no decay to all of it."""
    there = jax.random.uniform(key, inputs["delta"].shape) > 0.1
    zero = -1e4 if "delta_bias" in inputs else 0.0
    inputs["delta"] = jnp.where(there, inputs["delta"], zero).astype(inputs["delta"].dtype)
    if inputs["A"].shape == HARD_A.shape:
        inputs["A"] = HARD_A
    return inputs


def scan_inputs(seed, length, **sizes):
    shape = {**examples.SHAPES["test"], "batch": BATCH, "length": length, **sizes}
    key = jax.random.key(seed)
    skip = jax.random.normal(jax.random.fold_in(key, 1), (shape["width"],))
    return hardened(examples.inputs(shape, "", "float32", key), key) | {"D": skip}


class TestSelectiveScan(OpContract):
    # "gated" is all that Mamba has; the recurrence alone takes the wider range of eigenvalues.
    variants = ("gated", pytest.param("", id="alone"))
    implementations = ("xla",)
    examples = examples

    def inputs(self, key, variant, length, dtype):
        return hardened(super().inputs(key, variant, length, dtype), key)

    def initial_state(self, key, variant):
        return jax.random.normal(key, (BATCH, WIDTH, STATE))

    @classmethod
    def call(cls, inputs, state, segment_ids, implementation, **options):
        return scan(
            **inputs,
            delta_softplus="delta_bias" in inputs,
            eigenvalue_range=(0, 1) if "delta_bias" in inputs else (-1, 1),
            initial_state=state,
            segment_ids=segment_ids,
            implementation=implementation,
            **options,
        )

    @pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
    def test_values_states_and_gradients_equal_the_reference(self, variant, implementation, dtype):
        inputs, state, ids = self.data(variant, LENGTH, dtype)
        expected = self.values_and_gradients("reference", inputs, state, ids)
        got = self.values_and_gradients(implementation, inputs, state, ids)
        # bfloat16: rounded results, of a cotangent of y that XLA need not have rounded for the
        # reference.
        tolerance = 2 * TOLERANCE[dtype] if dtype == "bfloat16" else TOLERANCE[dtype]
        for name in expected:
            assert got[name].dtype == expected[name].dtype, name
            assert_close(name, got[name], expected[name], tolerance)

    @pytest.mark.full
    def test_a_ragged_last_chunk_equals_the_reference(self, variant, implementation):
        inputs, state, ids = self.data(variant, 65, seed=9)
        expected = self.values_and_gradients("reference", inputs, state, ids)
        got = self.values_and_gradients(implementation, inputs, state, ids)
        for name in expected:
            assert_close(name, got[name], expected[name])


@pytest.mark.full
class TestKernels(TestSelectiveScan):
    """The kernels, interpreted: the whole contract. What `make test` runs of it stands below."""

    implementations = ("pallas_gpu", "pallas_tpu")

    @pytest.fixture(autouse=True)
    def short_turns(self, monkeypatch):
        # Interpreted GPU kernels take longer to compile than to run.
        monkeypatch.setattr(walks, "TURN", 2)
        monkeypatch.setattr(gradients, "TURN", 2)


@pytest.mark.parametrize("variant", ["gated", pytest.param("", marks=pytest.mark.slow)])
def test_tpu_kernels_equal_the_reference(variant):
    contract = TestSelectiveScan()
    inputs, state, ids = contract.data(variant, 40)  # 40 tokens of a chunk of 48
    expected = contract.values_and_gradients("reference", inputs, state, ids)
    got = contract.values_and_gradients("pallas_tpu", inputs, state, ids)
    for name in expected:
        assert_close(name, got[name], expected[name])


@pytest.mark.full
@pytest.mark.parametrize("made_by", ["bias", "softplus"])
def test_tpu_kernels_make_step_sizes_of_a_bias_or_a_softplus_alone(made_by):
    contract = TestSelectiveScan()
    inputs, state, ids = contract.data("gated", 17)  # of a chunk of 32
    bias = inputs.pop("delta_bias")
    if made_by == "bias":
        steps = jax.nn.softplus(inputs["delta"])
        inputs |= {"delta": steps, "delta_bias": jax.nn.softplus(bias)}

    def values_and_gradients(implementation):
        def call(inputs, state):
            return scan(
                **inputs,
                delta_softplus=made_by == "softplus",
                initial_state=state,
                segment_ids=ids,
                implementation=implementation,
            )

        outputs, pullback = jax.vjp(call, inputs, state)
        key = jax.random.key(1)
        cotangents = [jax.random.normal(key, x.shape, x.dtype) for x in outputs]
        return outputs, pullback(tuple(cotangents))

    expected, got = map(values_and_gradients, ("reference", "pallas_tpu"))
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert_close(jax.tree_util.keystr(path), value, wanted)


# Chunks of 32 tokens forward and 16 backward: full ones, and a token, so that states are passed on
# and kept.
@pytest.mark.slow
def test_tpu_kernels_walk_backwards_over_chunks(monkeypatch):
    monkeypatch.setattr(gating, "CHUNK", 16)
    monkeypatch.setattr(pallas_tpu, "TUNING", pallas_tpu.Tuning(chunk=32))
    contract = TestSelectiveScan()
    case = contract.data("gated", 33)
    expected = contract.values_and_gradients("reference", *case, reverse=True)
    got = contract.values_and_gradients("pallas_tpu", *case, reverse=True)
    for name in expected:
        assert_close(name, got[name], expected[name])


@pytest.mark.slow
def test_a_tpu_kernel_carries_its_state_over_chunks_without_segments():
    contract = TestSelectiveScan()
    inputs, state, _ = contract.data("gated", LENGTH)
    for name, got, wanted in zip(
        ("y", "final state"),
        contract.forward("pallas_tpu", inputs, state),
        contract.forward("reference", inputs, state),
        strict=True,
    ):
        assert_close(name, got, wanted)


# Two chunks, the last ragged. Turns of two tokens: interpreted kernels take longer to compile than
# to run.
@pytest.mark.parametrize(
    ("variant", "reverse"),
    [
        pytest.param("gated", False, marks=pytest.mark.full),
        pytest.param("gated", True, marks=pytest.mark.slow),
        pytest.param("", False, marks=pytest.mark.full),
    ],
)
def test_gpu_kernels_equal_the_reference(variant, reverse, monkeypatch):
    monkeypatch.setattr(walks, "TURN", 2)
    monkeypatch.setattr(gradients, "TURN", 2)
    contract = TestSelectiveScan()
    inputs, state, ids = contract.data(variant, 71)
    expected = contract.values_and_gradients("reference", inputs, state, ids, reverse=reverse)
    got = contract.values_and_gradients("pallas_gpu", inputs, state, ids, reverse=reverse)
    for name in expected:
        assert_close(name, got[name], expected[name])


# Three chunks in two parts; four in three, of which the last is empty.
@pytest.mark.full
@pytest.mark.parametrize(("length", "parts"), [(130, 2), (193, 3)])
@pytest.mark.parametrize("variant", ["gated", ""])
def test_gpu_kernels_cut_time_into_parts(variant, length, parts, monkeypatch):
    monkeypatch.setattr(program, "part_count", lambda length, programs: parts)
    contract = TestSelectiveScan()
    inputs, state, ids = contract.data(variant, length)
    for segment_ids, reverse in ((ids, False), (None, False), (ids, True)):
        run = functools.partial(contract.values_and_gradients, reverse=reverse)
        expected = run("reference", inputs, state, segment_ids)
        got = run("pallas_gpu", inputs, state, segment_ids)
        for name in expected:
            assert_close(name, got[name], expected[name])


def test_gpu_kernels_refuse_what_they_do_not_take():
    inputs = scan_inputs(11, 4, width=2, state=65)
    with pytest.raises(ValueError, match=r"'pallas_gpu' takes .*N up to 64"):
        selective_scan(**inputs, implementation="pallas_gpu")


IMPLEMENTATIONS = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


# Three chunks, the last ragged; of the TPU kernel, which takes two at a time, one and a half, or a
# part of one.
@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("xla", 150),
        pytest.param("pallas_gpu", 150, marks=pytest.mark.slow),
        pytest.param("pallas_tpu", 150, marks=pytest.mark.slow),
        pytest.param("pallas_tpu", 70, marks=pytest.mark.slow),
    ],
)
def test_forward_rules_keep_the_states_before_every_64_tokens(name, length, monkeypatch):
    monkeypatch.setattr(walks, "TURN", 2)
    inputs, state, ids = TestSelectiveScan().data("gated", length)

    @jax.jit
    def keep(inputs):
        *_, starts = IMPLEMENTATIONS[name].forward(
            **{"bias" if name == "delta_bias" else name: x for name, x in inputs.items()},
            initial_state=state,
            segment_ids=ids,
            delta_softplus=True,
            eigenvalue_range=(0, 1),
            with_chunk_states=True,
            **({} if name == "xla" else {"interpret": True}),
        )
        return starts

    def state_before(t):
        prefix = {key: x[:, :t] if x.ndim == 3 else x for key, x in inputs.items()}
        return TestSelectiveScan.call(prefix, state, ids[:, :t], "reference")[1]

    expected = [state, *(state_before(t) for t in range(64, length, 64))]
    assert_close("starts", keep(inputs), jnp.stack(expected, 1).swapaxes(2, 3))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_all_forward_rules_agree_on_what_they_keep(name):
    def kept(length, states, with_chunk_states=True):
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        tokens, columns = shape((3, length, 8)), shape((3, length, states))
        state = shape((3, 8, states))
        parameters = shape((8, states)), columns, columns, None, None, None
        rule = functools.partial(
            IMPLEMENTATIONS[name].forward,
            delta_softplus=False,
            eigenvalue_range=(0, 1),
            with_chunk_states=with_chunk_states,
        )
        return jax.eval_shape(rule, tokens, tokens, *parameters, state, None)[2]

    assert kept(65, 32).shape == (3, 2, 32, 8)
    assert kept(300, 5).shape == (3, 5, 5, 8)
    assert kept(64, 32) is None
    assert kept(300, 33) is None
    assert kept(300, 5, with_chunk_states=False) is None


# D, N: two blocks of channels with part of a tile, registers of states, chunks of 32 tokens.
SIZES = [(700, 3), (130, 20), (256, 64)]


@pytest.mark.parametrize(
    ("implementation", "width", "state"),
    [
        ("xla", 3, 33),  # more states than are kept
        *(
            pytest.param(name, *sizes, marks=pytest.mark.full)
            for name in ("pallas_gpu", "pallas_tpu")
            for sizes in SIZES
        ),
    ],
)
def test_any_width_and_number_of_states_will_do(implementation, width, state):
    inputs = scan_inputs(7, 70, width=width, state=state)
    dy = jnp.asarray(np.random.default_rng(8).standard_normal(inputs["x"].shape))

    def gradients(implementation):
        def loss(inputs):
            y, final = selective_scan(**inputs, implementation=implementation)
            return jnp.sum(y * dy) + jnp.sum(jnp.sin(final))

        return jax.jit(jax.grad(loss))(inputs)

    expected, got = gradients("reference"), gradients(implementation)
    for name in expected:  # sums of up to 2 * 70 * 700 products
        assert_close(f"gradient of {name}", got[name], expected[name], 2e-5)


def test_a_program_lowered_for_a_tpu_takes_the_kernels():
    inputs = scan_inputs(9, 256)

    def loss(inputs):
        return selective_scan(**inputs)[0].sum()

    traced = jax.jit(jax.value_and_grad(loss)).trace(inputs)
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("tpu_custom_call") == 2  # what forward keeps, backward takes
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


# The identities are put to the definition; the contract holds the other implementations to it.


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_scalar_state_of_sign_changes_tracks_parity_exactly(implementation):
    length = 1000
    bits = np.random.default_rng(0).random((2, length, 1)) < 0.5
    one_BTN = jnp.ones((2, length, 1))
    y, state = scan(
        jnp.zeros((2, length, 1)),
        jnp.where(bits, 1e4, 0.0),  # 2 exp(-1e4) - 1 = -1 on a one, 2 exp(0) - 1 = 1 on a zero
        -jnp.ones((1, 1)),
        one_BTN,
        one_BTN,
        eigenvalue_range=(-1, 1),
        initial_state=-jnp.ones((2, 1, 1)),
        implementation=implementation,
    )
    parity = np.cumsum(np.asarray(bits, int), axis=1) % 2
    np.testing.assert_array_equal(y, 2.0 * parity - 1)
    np.testing.assert_array_equal(state[:, 0], y[:, -1])


def test_eigenvalues_from_zero_to_one_never_change_the_sign_of_the_state():
    inputs = scan_inputs(1, DOCUMENT) | {"x": jnp.zeros((BATCH, DOCUMENT, WIDTH))}
    ones_BDN = jnp.ones((BATCH, WIDTH, STATE))
    _, state = scan(**inputs, initial_state=ones_BDN, implementation="reference")
    assert (state >= 0).all()
    _, state = scan(
        **inputs, initial_state=ones_BDN, eigenvalue_range=(-1, 1), implementation="reference"
    )
    assert (state < 0).any()


@pytest.mark.parametrize("eigenvalue_range", [(0, 1), (-1, 1)])
def test_frozen_delta_B_and_C_make_a_convolution(eigenvalue_range):
    inputs = scan_inputs(2, DOCUMENT)
    delta_D, B_N, C_N = (inputs["delta"][0, 1] + 0.1, inputs["B"][0, 0], inputs["C"][0, 0])
    frozen = inputs | {
        name: jnp.broadcast_to(value[None, None, :], (BATCH, DOCUMENT, value.size))
        for name, value in (("delta", delta_D), ("B", B_N), ("C", C_N))
    }
    y, _ = scan(**frozen, eigenvalue_range=eigenvalue_range, implementation="reference")

    x, delta, A, B, C, D = (
        np.asarray(z, np.float64)
        for z in (inputs["x"], delta_D, inputs["A"], B_N, C_N, inputs["D"])
    )
    factor_DN = np.exp(delta[:, None] * A)
    if eigenvalue_range == (-1, 1):
        factor_DN = 2 * factor_DN - 1
    kernel_LD = np.stack([(factor_DN**lag * B * C).sum(1) * delta for lag in range(DOCUMENT)])
    expected = np.stack(
        [
            sum(kernel_LD[lag] * x[:, t - lag] for lag in range(t + 1)) + D * x[:, t]
            for t in range(DOCUMENT)
        ],
        axis=1,
    )
    assert_close("y", y, expected)


def test_a_step_of_zero_leaves_the_state_alone():
    inputs = scan_inputs(3, DOCUMENT)
    inputs["delta"] = jnp.zeros_like(inputs["delta"])
    state = jnp.asarray(
        np.random.default_rng(4).standard_normal((BATCH, WIDTH, STATE)), jnp.float32
    )
    y, final = scan(**inputs, initial_state=state, implementation="reference")
    np.testing.assert_array_equal(final, state)
    assert_close(
        "y",
        y,
        jnp.einsum("bdn,btn->btd", state, inputs["C"]) + inputs["D"][None, None] * inputs["x"],
    )


def test_gradients_under_total_decay_are_finite_and_forget_the_past():
    inputs = scan_inputs(5, DOCUMENT) | {"A": jnp.full((WIDTH, STATE), -1e30)}
    inputs["delta"] = jnp.ones_like(inputs["delta"])

    @jax.jit
    @jax.grad
    def gradient_of_last_output(x):
        return selective_scan(**inputs | {"x": x})[0][:, -1].sum()

    gradient = gradient_of_last_output(inputs["x"])
    assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, :-1], 0.0)
    assert (gradient[:, -1] != 0).all()


@pytest.mark.slow
def test_the_backward_pass_keeps_a_state_per_chunk_not_per_token():
    width, state = 8, 256
    state_bytes = 4 * BATCH * width * state

    def temporary_bytes(implementation, length):
        inputs = scan_inputs(6, length, width=width, state=state)

        def loss(inputs):
            y, final = selective_scan(**inputs, implementation=implementation)
            return y.sum() + final.sum()

        return jax.jit(jax.grad(loss)).lower(inputs).compile().memory_analysis().temp_size_in_bytes

    def bytes_per_token(implementation):
        return (temporary_bytes(implementation, 1024) - temporary_bytes(implementation, 256)) / (
            1024 - 256
        )

    # Copies of x, delta, B, C and of their gradients, cut into chunks.
    tokens = 4 * BATCH * 8 * (width + state)
    assert bytes_per_token("xla") < tokens + state_bytes / 32  # 1/64 expected
    assert bytes_per_token("reference") > state_bytes


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {
    "x": ones(BATCH, 4, WIDTH),
    "delta": ones(BATCH, 4, WIDTH),
    "A": -ones(WIDTH, STATE),
    "B": ones(BATCH, 4, STATE),
    "C": ones(BATCH, 4, STATE),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": ones(BATCH, 4)}),
        ("x", {"x": ones(BATCH, 4, WIDTH, dtype=np.int32)}),
        ("delta", {"delta": ones(BATCH, 4, WIDTH + 1)}),
        ("delta", {"delta": -ones(BATCH, 4, WIDTH)}),
        ("A", {"A": -ones(WIDTH + 1, STATE)}),
        ("A", {"A": ones(WIDTH, STATE)}),
        ("B", {"B": ones(BATCH, 4, STATE + 1)}),
        ("C", {"C": ones(BATCH, 5, STATE)}),
        ("D", {"D": ones(WIDTH, 1)}),
        ("z", {"z": ones(BATCH, 4, WIDTH + 1)}),
        ("z", {"z": ones(BATCH, 4, WIDTH, dtype=np.int32)}),
        ("delta_bias", {"delta_bias": ones(WIDTH + 1)}),
        ("delta_softplus", {"delta_softplus": 1}),
        ("delta", {"delta": np.full((BATCH, 4, WIDTH), np.inf), "delta_softplus": True}),
        (r"delta \+ delta_bias", {"delta_bias": -2 * ones(WIDTH)}),
        ("eigenvalue_range", {"eigenvalue_range": (-1, 0)}),
        ("initial_state", {"initial_state": ones(BATCH, STATE, WIDTH)}),
        ("segment_ids", {"segment_ids": ones(BATCH, 4)}),
        ("implementation", {"implementation": "fast"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        selective_scan(**GOOD | change)


def test_values_are_checked_under_jit_by_ops_checks():
    checked = ops.checks(lambda delta: selective_scan(**GOOD | {"delta": delta})[0])
    checked(GOOD["delta"])
    with pytest.raises(checkify.JaxRuntimeError, match="delta must be finite and >= 0"):
        checked(-GOOD["delta"])
