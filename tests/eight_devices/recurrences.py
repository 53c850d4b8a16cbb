"""What recurrences compute on eight devices, cut along batch, time and heads, is what they compute
on one; what travels between devices is states."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, Mesh

import ops
from ops.framework.sequence_parallel import CARRIED
from ops.selective_scan import gating
from ops.state_passing import examples as state_passing_examples
from tests.contracts.ops import assert_close
from tests.eight_devices.mesh import AXES, collectives, mesh_of
from tests.ops import (
    delta_rule_test,
    dense_scan_test,
    diagonal_scan_test,
    gated_linear_attention_test,
    selective_scan_test,
    short_convolution_test,
)

CONTRACTS = {
    "gated_linear_attention": gated_linear_attention_test.TestGatedLinearAttention,
    "delta_rule": delta_rule_test.TestDeltaRule,
    "selective_scan": selective_scan_test.TestSelectiveScan,
    "diagonal_scan": diagonal_scan_test.TestDiagonalScan,
    "short_convolution": short_convolution_test.TestShortConvolution,
}
LENGTH = 64


@pytest.fixture(autouse=True)
def several_chunks_on_a_device(monkeypatch):
    # So that states are kept on the way as they are of long sequences.
    monkeypatch.setattr(gating, "CHUNK", 8)


def variants(contract: Any) -> list[str]:
    """Without the marks of the contract's own parametrisation."""
    return [getattr(variant, "values", (variant,))[0] for variant in contract.variants]


IN_MAKE_TEST = {
    ("gated_linear_attention", "vector", "all_gather", (2, 1, 2, 2)),
    ("gated_linear_attention", "none", "pipelined", (1, 1, 4, 1)),
    ("delta_rule", "scalar", "all_gather", (2, 1, 2, 2)),
    ("selective_scan", "gated", "all_gather", (2, 1, 2, 2)),
    ("diagonal_scan", "complex, per token", "all_gather", (1, 1, 4, 1)),
    ("short_convolution", "4 taps", "all_gather", (2, 1, 2, 2)),
}
WAYS = (
    ("all_gather", (1, 1, 2, 1)),
    ("all_gather", (1, 1, 4, 1)),
    ("all_gather", (1, 1, 8, 1)),
    ("all_gather", (2, 1, 2, 2)),
    ("all_gather", (1, 2, 1, 2)),
    ("ring", (1, 1, 4, 1)),
    ("ring", (2, 1, 4, 1)),
    ("pipelined", (1, 1, 4, 1)),
    ("pipelined", (1, 1, 8, 1)),
)
CASES = [
    (op, variant, *way)
    for op, contract in CONTRACTS.items()
    for variant in variants(contract)
    for way in WAYS
]


@pytest.mark.parametrize(
    ("op", "variant", "method", "shape"),
    [pytest.param(*case, marks=() if case in IN_MAKE_TEST else pytest.mark.full) for case in CASES],
)
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.full)])
def test_values_states_and_gradients_of_ops(op, variant, method, shape, packed):
    contract = CONTRACTS[op]()
    inputs, state, ids = contract.data(variant, LENGTH)
    # A document that ends where a device's tokens end, beside those that do not.
    ids = ids.at[0, LENGTH // 2 :].add(5) if packed else None
    expected = contract.values_and_gradients("xla", inputs, state, ids)
    with jax.set_mesh(mesh_of(*shape)), ops.sequence_method(method):
        # The program is a function of the method too, which jax's cache of traces does not know.
        run = jax.jit(lambda inputs, state, ids: values_and_gradients(contract, inputs, state, ids))
        got = run(inputs, state, ids)
    for name, value in expected.items():
        assert_close(name, got[name], value)


REVERSED_IN_MAKE_TEST = {
    ("gated_linear_attention", "vector", "ring", (1, 1, 4, 1)),
    ("selective_scan", "gated", "all_gather", (2, 1, 2, 2)),
}


@pytest.mark.parametrize(
    ("op", "variant", "method", "shape"),
    [
        pytest.param(*case, marks=() if case in REVERSED_IN_MAKE_TEST else pytest.mark.full)
        for case in CASES
    ],
)
def test_walking_in_reverse(op, variant, method, shape):
    contract = CONTRACTS[op]()
    inputs, state, ids = contract.data(variant, LENGTH)
    ids = ids.at[0, LENGTH // 2 :].add(5)
    expected = contract.values_and_gradients("xla", inputs, state, ids, reverse=True)
    with jax.set_mesh(mesh_of(*shape)), ops.sequence_method(method):
        got = jax.jit(lambda *case: values_and_gradients(contract, *case, reverse=True))(
            inputs, state, ids
        )
    for name, value in expected.items():
        assert_close(name, got[name], value)


@pytest.mark.parametrize(
    ("op", "variant"),
    [
        ("short_convolution", "4 taps"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("gated_linear_attention", "vector"),
                ("delta_rule", "scalar"),
                ("selective_scan", "gated"),
                ("diagonal_scan", "complex, per token"),
            )
        ),
    ],
)
def test_tpu_kernels_on_cut_batches_times_and_heads(op, variant):
    contract = CONTRACTS[op]()
    inputs, state, ids = contract.data(variant, LENGTH)
    expected = contract.values_and_gradients("reference", inputs, state, ids)
    with jax.set_mesh(mesh_of(2, 1, 2, 2)):
        run = jax.jit(lambda *case: values_and_gradients(contract, *case, "pallas_tpu"))
        got = run(inputs, state, ids)
    for name, value in expected.items():
        assert_close(name, got[name], value)


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("all_gather", (2, 1, 2, 2)),
        ("ring", (1, 1, 4, 1)),
        pytest.param("pipelined", (1, 1, 4, 1), marks=pytest.mark.full),
        pytest.param("all_gather", (1, 1, 8, 1), marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.full)])
def test_state_passing(method, shape, packed, reverse):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    sizes = {**state_passing_examples.SHAPES["test"], "length": 16, "systems": 4}
    A, written = state_passing_examples.inputs(sizes, "", "float32", jax.random.key(0)).values()
    state = normal(2, 4, sizes["state"])
    keeps = jnp.asarray(rng.random((2, 16)) < 0.7) if packed else None
    cotangents = normal(*written.shape), normal(*state.shape)

    def run(implementation):
        def call(A, written, state):
            return ops.state_passing(
                A,
                written,
                keeps=keeps,
                initial_state=state,
                reverse=reverse,
                implementation=implementation,
            )

        values, pullback = jax.vjp(call, A, written, state)
        return values, pullback(cotangents)

    expected = run("reference")
    with jax.set_mesh(mesh_of(*shape)), ops.sequence_method(method):
        got = jax.jit(lambda: run(None))()
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert_close(jax.tree_util.keystr(path), value, wanted)


@pytest.mark.parametrize("reverse", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_dense_scan_in_parts_is_one_scan(reverse):
    contract = dense_scan_test.TestDenseScan()
    inputs, state, ids = contract.data("dense", LENGTH)
    ids = ids.at[0, LENGTH // 2 :].add(5)
    expected = contract.values_and_gradients("xla", inputs, state, ids, reverse=reverse)
    with jax.set_mesh(mesh_of(2, 1, 4, 1)):
        got = jax.jit(lambda *case: values_and_gradients(contract, *case, reverse=reverse))(
            inputs, state, ids
        )
    for name, value in expected.items():
        assert_close(name, got[name], value)


def values_and_gradients(contract, inputs, state, ids, implementation="xla", **options):
    """As `OpContract.values_and_gradients`, untraced so far."""
    key_o, key_state = jax.random.split(jax.random.key(7))
    (o, final), pullback = jax.vjp(
        lambda inputs, state: contract.call(inputs, state, ids, implementation, **options),
        inputs,
        state,
    )
    gradients, gradient_state = pullback(
        (jax.random.normal(key_o, o.shape, o.dtype), jax.random.normal(key_state, final.shape))
    )
    return {
        "o": o,
        "final state": final,
        **{f"gradient of {name}": g for name, g in gradients.items()},
        "gradient of initial_state": gradient_state,
    }


@pytest.mark.parametrize(
    ("op", "variant", "method"),
    [
        ("delta_rule", "scalar", "all_gather"),
        pytest.param("delta_rule", "vector", "ring", marks=pytest.mark.full),
        pytest.param("gated_linear_attention", "vector", "all_gather", marks=pytest.mark.full),
        pytest.param("gated_linear_attention", "constant", "ring", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("reverse", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_state_per_segment_goes_on_from_device_to_device(op, variant, method, reverse):
    """Each device has its tokens sorted by segment; on one device, all of a segment follow each
    other."""
    contract, segments, devices = CONTRACTS[op](), 3, 4
    inputs, state, _ = contract.data(variant, LENGTH)
    batch = len(state)
    states = jnp.stack([(1 - 0.3 * s) * state for s in range(segments)], axis=1)
    draws = np.random.default_rng(0).integers(0, segments, (batch, devices, 16))
    draws[0, 1] = 2  # a device on which two segments are empty
    ids = np.sort(draws, axis=-1).reshape(batch, LENGTH)
    order = np.argsort(ids, axis=1, kind="stable")

    def sorted_by_segment(x):
        has_time = x.shape[:2] == (batch, LENGTH)
        return x[np.arange(batch)[:, None], order] if has_time else x

    class Sorted:
        """The op on tokens sorted by segment, its outputs in the order of the inputs."""

        @staticmethod
        def call(inputs, states, ids, implementation, **options):
            inputs = jax.tree.map(sorted_by_segment, inputs)
            o, final = contract.call(
                inputs, states, sorted_by_segment(ids), implementation, **options
            )
            return o[np.arange(batch)[:, None], np.argsort(order, axis=1)], final

    def run(contract):
        return jax.jit(
            lambda inputs, states, ids: values_and_gradients(
                contract, inputs, states, ids, num_segments=segments, reverse=reverse
            )
        )(inputs, states, jnp.asarray(ids))

    expected = run(Sorted)
    with jax.set_mesh(mesh_of(1, 1, devices, 1)), ops.sequence_method(method):
        got = run(contract)
    for name, value in expected.items():
        assert_close(name, got[name], value)


@pytest.mark.parametrize("method", ["all_gather", "ring"])
def test_a_state_that_has_overflowed_ends_where_another_starts(method):
    a, b = jnp.full((1,), 2.0**40), jnp.ones((1, 16, 1))
    # Four tokens on each device. That of the third comes in infinite, and ends on its third token.
    ids = jnp.asarray([[0] * 10 + [1] * 3 + [2] * 3])

    def run(b):
        return ops.diagonal_scan(a, b, segment_ids=ids)

    expected = run(b)
    with jax.set_mesh(mesh_of(1, 1, 4, 1)), ops.sequence_method(method):
        got = jax.jit(lambda b: run(b))(b)
    for value, wanted in zip(got, expected, strict=True):
        np.testing.assert_array_equal(value, wanted)
    assert np.isinf(expected[0]).sum() == 6 and np.isfinite(expected[1]).all()


def test_gradients_of_shared_inputs_are_added_up_in_float32():
    # Devices contribute 257, seven times, and 265: 2064 in bfloat16, but 2048 if each is rounded
    # first.
    x = jnp.arange(8 * 265) % 265 < jnp.where(jnp.arange(8 * 265) < 7 * 265, 257, 265)
    x = x.astype(jnp.bfloat16)[None, :, None]

    def output_sum(w):
        y, _ = ops.short_convolution(x, w)
        return jnp.sum(y.astype(jnp.float32))

    with jax.set_mesh(mesh_of(1, 1, 8, 1)):
        gradient = jax.jit(jax.grad(output_sum))(jnp.ones((1, 1), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16 and float(gradient[0, 0]) == 2064


@pytest.mark.parametrize(
    ("op", "variant", "implementation", "platform"),
    [
        ("gated_linear_attention", "vector", "pallas_tpu", "tpu"),
        ("gated_linear_attention", "constant", "pallas_tpu", "tpu"),
        ("delta_rule", "scalar", "pallas_tpu", "tpu"),
        ("selective_scan", "gated", "pallas_tpu", "tpu"),
        ("selective_scan", "", "xla", "cpu"),
        ("diagonal_scan", "complex, per token", "pallas_tpu", "tpu"),
        ("diagonal_scan", "complex, per token", "xla", "cpu"),
        ("short_convolution", "4 taps", "pallas_tpu", "tpu"),
        ("short_convolution", "4 taps", "xla", "cpu"),
    ],
)
def test_a_walk_in_reverse_flips_no_tokens(op, variant, implementation, platform):
    contract, length = CONTRACTS[op](), 19  # of a device's part: no other size is the same
    case = contract.data(variant, 4 * length)
    with jax.set_mesh(mesh_of(1, 1, 4, 1)):
        run = jax.jit(
            lambda *case: values_and_gradients(contract, *case, implementation, reverse=True)
        )
        program = run.trace(*case).lower(lowering_platforms=(platform,)).as_text()
    flipped = re.findall(
        r"stablehlo\.reverse .*-> tensor<(\S+)>|reverse .* : tensor<(\S+)>", program
    )
    assert not [shape for shape in flipped if str(length) in "".join(shape).split("x")]


# --- What travels ---------------------------------------------------------------------------------


def loss_of(op: str, reverse: bool = False) -> Any:
    def loss(q, k, v, g, ids):
        g = -jnp.abs(g)
        options = {"segment_ids": ids, "reverse": reverse}
        if op == "delta_rule":
            o, _ = ops.delta_rule(q, k, v, jnp.exp(g), g, **options)
        else:
            o, _ = ops.gated_linear_attention(q, k, v, g, **options)
        return jnp.sum(jnp.sin(o))

    return loss


def arguments(mesh: Mesh, length: int, packed: bool) -> list[Any]:
    cut = jax.NamedSharding(mesh, P(None, "sequence"))

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=cut)

    matrix = array(1, length, 2, 16)
    ids = array(1, length, dtype=jnp.int32) if packed else None
    return [matrix, matrix, matrix, array(1, length, 2), ids]


@pytest.mark.parametrize(
    ("op", "reverse"),
    [
        ("gated_linear_attention", True),
        ("delta_rule", False),
        pytest.param("gated_linear_attention", False, marks=pytest.mark.full),
        pytest.param("delta_rule", True, marks=pytest.mark.full),
    ],
)
def test_one_gather_forward_and_one_backward_whose_size_is_not_that_of_time(op, reverse):
    mesh, programs = mesh_of(1, 1, 8, 1), []
    with jax.set_mesh(mesh):
        for length in (64, 512):
            given = arguments(mesh, length, packed=False)
            loss = loss_of(op, reverse)
            gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
            programs.append([collectives(loss, *given), collectives(gradient, *given)])
    short, long = programs
    assert short == long
    forward, both = short
    # The loss itself is one sum over devices.
    assert len(forward.pop("all-gather")) == 1 and set(forward) == {"all-reduce"}
    assert len(both.pop("all-gather")) == 2 and set(both) <= {"all-reduce"}


def test_rematerialisation_that_keeps_what_came_in_gathers_it_once():
    mesh = mesh_of(1, 1, 8, 1)
    keep = jax.checkpoint_policies.save_only_these_names(CARRIED)
    loss = loss_of("gated_linear_attention")
    with jax.set_mesh(mesh):
        given = arguments(mesh, 64, packed=True)
        found = collectives(
            jax.grad(jax.checkpoint(loss, policy=keep), argnums=(0, 1, 2, 3)), *given
        )
    assert len(found["all-gather"]) == 2
    # Whether a segment goes on from the device before: asked once, and once more where the forward
    # pass is repeated.
    assert 1 <= len(found["collective-permute"]) <= 2


@pytest.mark.parametrize("reverse", [pytest.param(False, marks=pytest.mark.full), True])
def test_ring_sends_a_state_from_device_to_device(reverse):
    mesh = mesh_of(1, 1, 8, 1)
    with jax.set_mesh(mesh), ops.sequence_method("ring"):
        given = arguments(mesh, 64, packed=False)
        loss = loss_of("gated_linear_attention", reverse)
        gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
        found = collectives(gradient, *given)
    assert len(found["collective-permute"]) == 2 * 7 and "all-gather" not in found


# --- Bad input ------------------------------------------------------------------------------------


def test_a_size_that_does_not_divide_names_the_axes():
    def call(batch: int, length: int, heads: int) -> Any:
        x = jnp.zeros((batch, length, heads, 4))
        return ops.gated_linear_attention(x, x, x)

    with jax.set_mesh(mesh_of(1, 2, 2, 2)):
        with pytest.raises(ValueError, match=r"length of gated.*, sequence=2; got 5"):
            call(2, 5, 2)
        with pytest.raises(ValueError, match=r"batch size of gated.*, fsdp=2; got 1"):
            call(1, 4, 2)
        with pytest.raises(ValueError, match=r"heads.* of gated.*, tensor=2; got 3"):
            call(2, 4, 3)
    with (
        pytest.raises(ValueError, match="sequence_method must be one of all_gather"),
        ops.sequence_method("star"),
    ):
        pass


def test_explicit_axes_are_refused():
    x = jnp.zeros((2, 4, 2, 4))
    mesh = jax.make_mesh((1, 1, 4, 2), AXES, axis_types=(AxisType.Explicit,) * 4)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="must be of type Auto"):
        ops.gated_linear_attention(x, x, x)


def test_an_op_inside_a_shard_map_is_local():
    mesh = mesh_of(1, 1, 4, 1)
    x = jax.random.normal(jax.random.key(0), (1, 16, 1, 4))
    with jax.set_mesh(mesh):
        local = jax.shard_map(
            lambda x: ops.gated_linear_attention(x, x, x)[0],
            in_specs=P(None, "sequence"),
            out_specs=P(None, "sequence"),
            check_vma=False,
        )
        o = jax.jit(local)(x)
    parts = [ops.gated_linear_attention(p, p, p)[0] for p in jnp.split(x, 4, axis=1)]
    assert_close("o", o, jnp.concatenate(parts, axis=1))
