"""What every implementation of a recurrent op must satisfy, written once.

A test file subclasses `OpContract`, names the op and its examples, and lists `variants` and
`implementations`; a new kernel joins by adding its name to `implementations`. All
tests of one variant share few compiled programs: the data vary, the shapes do not."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Three documents of 43 tokens: boundaries fall inside chunks, the last chunk is ragged.
LENGTH = 129
DOCUMENT = 43
BATCH = 2
# Inputs with a time axis that may be any number.
ACTIVATIONS = {"q", "k", "v", "x", "B", "C", "b", "b_real", "u"}

# Largest error over the largest value of a tensor. float32: sums of up to LENGTH products of order
# one, in another order (about sqrt(LENGTH) * 6e-8, doubled by the state), with room for the delta
# rule's triangular inverse. bfloat16 inputs are exact in float32; only the output is rounded to 8
# bits.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2.0**-8}


def assert_close(
    name: str, got: jax.Array, expected: jax.Array, tolerance: float = TOLERANCE["float32"]
) -> None:
    """Largest absolute error relative to the largest expected value; NaN and infinity fail."""
    values, wanted = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert values.shape == wanted.shape, f"{name}: shape {values.shape}, expected {wanted.shape}"
    assert np.isfinite(values).all(), (
        f"{name}: {np.sum(~np.isfinite(values))} values are not finite"
    )
    scale = np.abs(wanted).max(initial=0.0)
    error = np.abs(values - wanted).max(initial=0.0) / (scale if scale > 0 else 1.0)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def assert_derivatives_equal(
    function: Callable[..., Any], reference: Callable[..., Any], *given: Any
) -> None:
    """First and second derivatives, forwards and backwards, of functions of trees of arrays."""
    expected = jax.jit(functools.partial(derivatives, reference))(*given)
    got = jax.jit(functools.partial(derivatives, function))(*given)
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        # Of second order: sums of as many products again, of sines that nearly cancel.
        assert_close(jax.tree_util.keystr(path), value, wanted, 4 * TOLERANCE["float32"])


def derivatives(function: Callable[..., Any], *given: Any) -> dict[str, Any]:
    """Tangents of the function's results, and derivatives of the sum of their sines."""
    leaves, tree = jax.tree.flatten(given)
    keys = jax.random.split(jax.random.key(11), len(leaves))
    directions = tree.unflatten(
        [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    )

    def loss(*given):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(function(*given)))

    def slope(*given):
        gradients = jax.grad(loss, tuple(range(len(given))))(*given)
        products = jax.tree.map(jnp.vdot, gradients, directions)
        return sum(jax.tree.leaves(products))

    def in_a_plane(x):
        return loss(*jax.tree.map(lambda a, d: a + x[0] * d + x[1] * jnp.cos(d), given, directions))

    return {
        "jvp": jax.jvp(function, given, directions)[1],
        "gradient of a gradient": jax.grad(slope, tuple(range(len(given))))(*given),
        "hessian": jax.hessian(in_a_plane)(jnp.zeros(2)),
    }


def hard_decay_log(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Log decays that break differences of cumulative sums: -20 beside -1e-3, -1e4 beside 0, and
    ordinary ones; of heads alone, [H], without the latter."""
    if len(shape) == 1:
        return jnp.resize(jnp.array([-1e4, -0.05, 0.0, -1e-3]), shape)
    kind, ordinary = jax.random.split(key)
    kind = jax.random.choice(kind, 6, shape, p=jnp.array([0.1, 0.2, 0.03, 0.2, 0.07, 0.4]))
    values = -jnp.exp(2 * jax.random.normal(ordinary, shape) - 2)
    for index, value in enumerate((-20.0, -1e-3, -1e4, 0.0, -3.0)):
        values = jnp.where(kind == index, value, values)
    return values


class OpContract:
    """Subclasses set these and define `initial_state`.

    examples: of the op, whose shape "test" the contract takes."""

    examples: ClassVar[ModuleType]
    variants: ClassVar[tuple[Any, ...]]
    implementations: ClassVar[tuple[str, ...]]
    op: ClassVar[Callable[..., Any]]
    # Where what is not finite ends: "segment", "chunk" (of 64 tokens, with the segments that have
    # tokens there) or "" for no such promise.
    isolates: ClassVar[str] = "segment"

    def inputs(self, key: jax.Array, variant: str, length: int, dtype: str) -> dict[str, jax.Array]:
        """Arguments by name, of batch BATCH, in `dtype` where the op takes activations: the
        examples of the op, but with hard decays."""
        inputs = self.examples.inputs(self.shape(variant, length), variant, dtype, key)
        if "decay_log" in inputs:
            decays = inputs["decay_log"].shape
            inputs["decay_log"] = hard_decay_log(jax.random.fold_in(key, 1), decays)
        return inputs

    def shape(self, variant: str, length: int) -> dict[str, int]:
        return {**self.examples.SHAPES["test"], "batch": BATCH, "length": length}

    def initial_state(self, key: jax.Array, variant: str) -> jax.Array:
        raise NotImplementedError

    @classmethod
    def call(cls, inputs, state, segment_ids, implementation, **options):
        return cls.op(
            **inputs,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=implementation,
            **options,
        )

    # --- shared programs --------------------------------------------------------------------------

    def data(self, variant: str, length: int, dtype: str = "float32", seed: int = 0):
        known = {getattr(one, "values", (one,))[0] for one in self.variants}
        assert variant in known | {*self.examples.VARIANTS}, f"{variant!r} is none of {known}"
        keys = jax.random.split(jax.random.key(seed), 3)
        inputs = self.inputs(keys[0], variant, length, dtype)
        starts = jax.random.uniform(keys[2], (BATCH, length)) < 0.04
        starts = starts.at[0, length // 2].set(True)  # few tokens may have none
        ids = jnp.cumsum(starts, axis=1) % 3  # ids come back: only a change counts
        return inputs, self.initial_state(keys[1], variant), ids

    def forward(self, implementation, inputs, state, segment_ids=None):
        return _forward(type(self), implementation, inputs, state, segment_ids)

    def values_and_gradients(self, implementation, inputs, state, segment_ids, seed=7, **options):
        """Outputs and the gradients of every float input, with random cotangents of o and of the
        final state."""
        return _values_and_gradients(
            type(self),
            implementation,
            tuple(options.items()),
            inputs,
            state,
            segment_ids,
            jax.random.key(seed),
        )

    def part(self, inputs, start, stop):
        """The inputs of tokens start..stop - 1; an input without a time axis stays whole."""
        length = max(x.shape[1] for x in inputs.values() if x.ndim >= 2)
        return {
            name: (x[:, start:stop] if x.ndim >= 2 and x.shape[:2] == (BATCH, length) else x)
            for name, x in inputs.items()
        }

    # --- the contract -----------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
    def test_values_states_and_gradients_equal_the_reference(self, variant, implementation, dtype):
        inputs, state, ids = self.data(variant, LENGTH, dtype)
        expected = self.values_and_gradients("reference", inputs, state, ids)
        got = self.values_and_gradients(implementation, inputs, state, ids)
        assert got.keys() == expected.keys()
        for name in expected:
            assert got[name].dtype == expected[name].dtype, name
            assert_close(name, got[name], expected[name], TOLERANCE[str(got[name].dtype)])

    @pytest.mark.full
    def test_one_segment_without_state_equals_the_reference(self, variant, implementation):
        inputs, _, _ = self.data(variant, LENGTH, seed=1)
        expected = self.values_and_gradients("reference", inputs, None, None)
        got = self.values_and_gradients(implementation, inputs, None, None)
        for name in expected:
            assert_close(name, got[name], expected[name])

    @pytest.mark.full
    def test_a_single_token_equals_the_reference(self, variant, implementation):
        inputs, state, ids = self.data(variant, 1, seed=2)
        expected = self.values_and_gradients("reference", inputs, state, ids)
        got = self.values_and_gradients(implementation, inputs, state, ids)
        for name in expected:
            assert_close(name, got[name], expected[name])

    def test_parts_with_state_equal_the_whole(self, variant, implementation):
        inputs, state, _ = self.data(variant, LENGTH, seed=3)
        o, final = self.forward(implementation, inputs, state)
        parts = []
        for start in range(0, LENGTH, DOCUMENT):
            o_part, state = self.forward(
                implementation, self.part(inputs, start, start + DOCUMENT), state
            )
            parts.append(o_part)
        assert_close("o", jnp.concatenate(parts, 1), o)
        assert_close("final state", state, final)

    def test_packed_documents_equal_separate_ones(self, variant, implementation):
        inputs, state, _ = self.data(variant, LENGTH, seed=4)
        ids = jnp.broadcast_to(
            jnp.array([5, 0, 5])[jnp.arange(LENGTH) // DOCUMENT], (BATCH, LENGTH)
        )
        o, final = self.forward(implementation, inputs, state, ids)
        last = state
        for document in range(3):
            start, stop = document * DOCUMENT, (document + 1) * DOCUMENT
            first = state if document == 0 else jnp.zeros_like(state)
            o_alone, last = self.forward(implementation, self.part(inputs, start, stop), first)
            assert_close(f"o of document {document}", o[:, start:stop], o_alone)
        assert_close("final state", final, last)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
    def test_what_is_not_finite_ends_with_its_segment(self, variant, implementation, bad):
        inputs, state, _ = self.data(variant, LENGTH, seed=12)
        number_T = np.repeat(np.arange(5), (30, 34, 36, 28, 1))
        ids = jnp.broadcast_to(jnp.asarray(number_T), (BATCH, LENGTH))
        given = [name for name in inputs if name in ACTIVATIONS and inputs[name].ndim > 2]
        spoilt = inputs | {name: inputs[name].at[1, 70:75].set(bad) for name in given}
        others = {"segment": number_T != 2, "chunk": np.arange(LENGTH) // 64 != 1}
        for name, reach in (("reference", "segment"), (implementation, self.isolates)):
            if not reach:
                continue
            expected = self.values_and_gradients(name, inputs, state, ids)
            got = self.values_and_gradients(name, spoilt, state, ids)
            assert not np.isfinite(np.asarray(got["o"], np.float32)).all() or bad == 1e20
            rows = others[reach]
            for tensor, value in got.items():
                if value.shape[:2] == (BATCH, LENGTH):
                    wanted = expected[tensor]
                    np.testing.assert_array_equal(value[:, rows], wanted[:, rows], tensor)
                    np.testing.assert_array_equal(value[0], wanted[0], tensor)
                elif value.shape[0] == BATCH and "state" in tensor:
                    np.testing.assert_array_equal(value, expected[tensor], tensor)

    def test_step_by_step_equals_parallel(self, variant, implementation):
        inputs, state, _ = self.data(variant, DOCUMENT, seed=5)
        o, final = self.forward(implementation, inputs, state)
        steps = []
        for t in range(DOCUMENT):
            o_t, state = self.forward(implementation, self.part(inputs, t, t + 1), state)
            steps.append(o_t)
        assert_close("o", jnp.concatenate(steps, 1), o)
        assert_close("final state", state, final)

    def test_future_tokens_do_not_change_the_past(self, variant, implementation):
        inputs, state, ids = self.data(variant, LENGTH, seed=6)
        other, _, _ = self.data(variant, LENGTH, seed=60)
        cut = 70
        past, future = self.part(inputs, 0, cut), self.part(other, cut, LENGTH)
        changed = {
            name: (
                x
                if x.shape[:2] != (BATCH, LENGTH)
                else jnp.concatenate([past[name], future[name]], 1)
            )
            for name, x in inputs.items()
        }
        o, _ = self.forward(implementation, inputs, state, ids)
        o_changed, _ = self.forward(implementation, changed, state, ids)
        np.testing.assert_array_equal(o[:, :cut], o_changed[:, :cut])
        assert not np.array_equal(o[:, cut:], o_changed[:, cut:])

    @pytest.mark.slow
    @pytest.mark.one_variant
    def test_walking_in_reverse_is_walking_along_flipped_tokens(self, variant, implementation):
        inputs, state, ids = self.data(variant, LENGTH, seed=9)
        expected = _values_and_gradients(
            flipped(type(self)), "reference", (), inputs, state, ids, jax.random.key(7)
        )
        for name in ("reference", implementation):
            got = self.values_and_gradients(name, inputs, state, ids, reverse=True)
            assert got.keys() == expected.keys()
            for tensor in expected:
                assert_close(f"{tensor} of {name}", got[tensor], expected[tensor])

    @pytest.mark.slow
    @pytest.mark.one_variant
    def test_derivatives_of_any_order_equal_those_of_the_reference(self, variant, implementation):
        inputs, state, ids = self.data(variant, 9, seed=10)

        def function(implementation):
            return lambda inputs, state: self.call(inputs, state, ids, implementation)

        assert_derivatives_equal(function(implementation), function("reference"), inputs, state)

    def test_an_empty_batch_has_empty_outputs_and_zero_gradients(self, variant, implementation):
        inputs, state, ids = self.data(variant, DOCUMENT)

        def emptied(x):
            return x[:0] if x.shape[0] == BATCH else x

        shapes = jax.eval_shape(
            functools.partial(self.values_and_gradients, implementation), inputs, state, ids
        )
        got = self.values_and_gradients(
            implementation, *jax.tree.map(emptied, (inputs, state)), ids[:0]
        )
        assert got.keys() == shapes.keys()
        for name, like in shapes.items():
            batched = like.shape[0] == BATCH
            assert got[name].shape == ((0, *like.shape[1:]) if batched else like.shape), name
            assert got[name].dtype == like.dtype, name
            assert not got[name].any(), name

    @pytest.mark.slow
    @pytest.mark.one_variant
    def test_a_bfloat16_initial_state_is_that_state_in_float32(self, variant, implementation):
        inputs, state, ids = self.data(variant, DOCUMENT)
        state = jax.tree.map(lambda x: x.astype("bfloat16"), state)
        wide = jax.tree.map(lambda x: x.astype("float32"), state)
        expected = self.values_and_gradients(implementation, inputs, wide, ids)
        got = self.values_and_gradients(implementation, inputs, state, ids)
        gradient = got.pop("gradient of initial_state")
        assert gradient.dtype == jnp.bfloat16
        assert_close("gradient", gradient, expected["gradient of initial_state"], 2.0**-8)
        for name, value in got.items():
            np.testing.assert_array_equal(value, expected[name], name)

    @pytest.mark.full
    def test_vmap_and_remat_change_nothing(self, variant, implementation):
        inputs, state, _ = self.data(variant, DOCUMENT, seed=8)

        def loss(inputs, state):
            o, final = self.call(inputs, state, None, implementation)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(final))

        gradient = jax.grad(loss)
        expected = jax.jit(gradient)(inputs, state)
        rematerialised = jax.jit(jax.grad(jax.checkpoint(loss)))(inputs, state)
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), (inputs, state))
        mapped = jax.jit(jax.vmap(gradient))(*twice)
        for name in expected:
            assert_close(name, rematerialised[name], expected[name])
            for replica in range(2):
                assert_close(f"{name} of replica {replica}", mapped[name][replica], expected[name])


class SegmentStatesContract:
    """What `num_segments` promises, for the op of `contract`; a test class names it, its variants
    and implementations.

    Segments fill a chunk of 32 tokens, or two and one row of a third, or nothing.
    """

    contract: ClassVar[OpContract]
    variants: ClassVar[tuple[Any, ...]]
    implementations: ClassVar[tuple[str, ...]]
    counts = ((0, 32, 65, 32, 0), (65, 0, 0, 32, 32))

    def data(self, variant: str):
        inputs, state, _ = self.contract.data(variant, LENGTH)
        states = jnp.stack([(1 - 0.3 * s) * state for s in range(5)], axis=1)
        rows = [np.repeat(np.arange(5), row) for row in self.counts]
        return inputs, states, jnp.asarray(np.stack(rows))

    @pytest.mark.parametrize("implementation", ["reference"])
    def test_a_segment_equals_a_call_of_its_own(self, variant, implementation):
        inputs, states, ids = self.data(variant)
        options = {"implementation": implementation, "num_segments": 5}
        call = jax.jit(functools.partial(self.contract.call, **options))
        o, finals = call(inputs, states, ids)
        for row in range(BATCH):
            start = 0
            for segment, count in enumerate(self.counts[row]):
                where = f"segment {segment} of row {row}"
                final = states[row, segment]
                if count:
                    part = self.contract.part(inputs, start, start + count)
                    o_alone, alone = self.contract.forward(implementation, part, states[:, segment])
                    assert_close(f"o of {where}", o[row, start : start + count], o_alone[row])
                    final = alone[row]
                assert_close(f"final state of {where}", finals[row, segment], final)
                start += count

    def test_values_states_and_gradients_equal_the_reference(self, variant, implementation):
        inputs, states, ids = self.data(variant)
        run = functools.partial(self.contract.values_and_gradients, num_segments=5)
        expected = run("reference", inputs, states, ids)
        got = run(implementation, inputs, states, ids)
        assert got["final state"].shape == states.shape
        assert got.keys() == expected.keys()
        for name in expected:
            assert_close(name, got[name], expected[name])

    def test_walking_in_reverse_takes_each_segment_from_its_last_token(
        self, variant, implementation
    ):
        inputs, states, ids = self.data(variant)
        run = functools.partial(self.contract.values_and_gradients, num_segments=5, reverse=True)
        expected = run("reference", inputs, states, ids)
        got = run(implementation, inputs, states, ids)
        assert got.keys() == expected.keys()
        for name in expected:
            assert_close(name, got[name], expected[name])

    @pytest.mark.parametrize("implementation", ["reference"])
    def test_a_segment_in_reverse_equals_a_call_of_its_own(self, variant, implementation):
        inputs, states, ids = self.data(variant)
        options = {"implementation": implementation, "reverse": True}
        o, finals = self.contract.call(inputs, states, ids, num_segments=5, **options)
        part = self.contract.part(inputs, 32, 97)  # segment 2 of row 0
        o_alone, alone = self.contract.call(part, states[:, 2], None, **options)
        assert_close("o", o[0, 32:97], o_alone[0])
        assert_close("final state", finals[0, 2], alone[0])


@functools.cache
def flipped(contract: type[OpContract]) -> type[OpContract]:
    """The contract of the same op, which it calls with its tokens flipped, its outputs flipped
    back."""

    def flip(x: jax.Array) -> jax.Array:
        has_time = x.ndim >= 2 and x.shape[:2] == (BATCH, LENGTH)
        return x[:, ::-1] if has_time else x

    class Flipped(contract):
        @classmethod
        def call(cls, inputs, state, segment_ids, implementation, **options):
            inputs, segment_ids = jax.tree.map(flip, (inputs, segment_ids))
            o, final = super().call(inputs, state, segment_ids, implementation, **options)
            return flip(o), final

    return Flipped


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(contract: type[OpContract], implementation, inputs, state, segment_ids):
    return contract.call(inputs, state, segment_ids, implementation)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _values_and_gradients(
    contract: type[OpContract], implementation, options, inputs, state, segment_ids, key
):
    (o, final), pullback = jax.vjp(
        lambda inputs, state: contract.call(
            inputs, state, segment_ids, implementation, **dict(options)
        ),
        inputs,
        state,
    )
    key_o, key_state = jax.random.split(key)
    cotangents = (
        jax.random.normal(key_o, o.shape, o.dtype),
        jax.random.normal(key_state, final.shape),
    )
    gradients, gradient_state = pullback(cotangents)
    result = {"o": o, "final state": final}
    result |= {f"gradient of {name}": g for name, g in gradients.items()}
    if state is not None:
        result["gradient of initial_state"] = gradient_state
    return result


def pytest_generate_tests(metafunc):
    """Runs every inherited test for each variant and implementation of the class; imported by
    conftest.py. Those marked `one_variant` run for the last variant that is not marked itself, and
    for the others in `make test-all`."""
    contract = metafunc.cls
    if not (hasattr(contract, "variants") and hasattr(contract, "implementations")):
        return
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    values = {"variant": contract.variants, "implementation": contract.implementations}
    if metafunc.definition.get_closest_marker("one_variant"):
        hardest = [x for x in contract.variants if not hasattr(x, "marks")][-1:]
        values["variant"] = tuple(
            x
            if x in hardest
            else pytest.param(getattr(x, "values", [x])[0], marks=pytest.mark.full)
            for x in contract.variants
        )
    for name in values:
        if name in metafunc.fixturenames and name not in given:
            metafunc.parametrize(name, values[name])
