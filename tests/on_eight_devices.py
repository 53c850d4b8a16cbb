"""What ops and models compute on eight devices, cut along batch, time and heads, is what they compute on one.

Not collected by itself: the number of devices is that of a process. `tests/sequence_parallel_test.py` runs it in one of
its own.
"""

import importlib
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from jax.sharding import AxisType, Mesh

import ops
from ops.sequence_parallel import CARRIED
from tests import (
    delta_rule_test,
    diagonal_scan_test,
    gated_linear_attention_test,
    model_contract_test,
    selective_scan_test,
    short_convolution_test,
)
from tests.op_contract import assert_close

AXES = ("data", "fsdp", "sequence", "tensor")
CONTRACTS = {
    "gated_linear_attention": gated_linear_attention_test.TestGatedLinearAttention,
    "delta_rule": delta_rule_test.TestDeltaRule,
    "selective_scan": selective_scan_test.TestSelectiveScan,
    "diagonal_scan": diagonal_scan_test.TestDiagonalScan,
    "short_convolution": short_convolution_test.TestShortConvolution,
}
LENGTH = 64


def mesh_of(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)


def variants(contract: Any) -> list[str]:
    """Without the marks of the contract's own parametrisation."""
    return [getattr(variant, "values", (variant,))[0] for variant in contract.variants]


IN_MAKE_TEST = {
    ("gated_linear_attention", "vector", "all_gather", (2, 1, 2, 2)),
    ("gated_linear_attention", "none", "pipelined", (1, 1, 4, 1)),
    ("delta_rule", "scalar", "all_gather", (2, 1, 2, 2)),
    ("selective_scan", "positive", "all_gather", (2, 1, 2, 2)),
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
    [
        pytest.param(*case, marks=() if case in IN_MAKE_TEST else pytest.mark.full)
        for case in CASES
    ],
)
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.full)])
def test_values_states_and_gradients_of_ops(op, variant, method, shape, packed):
    contract = CONTRACTS[op]()
    inputs, state, ids = contract.data(variant, LENGTH)
    # A document that ends where a device's tokens end, beside those that do not.
    ids = ids.at[0, LENGTH // 2 :].add(5) if packed else None
    expected = contract.values_and_gradients("chunked", inputs, state, ids)
    with jax.set_mesh(mesh_of(*shape)), ops.sequence_method(method):
        # The program is a function of the method too, which jax's cache of traces does not know.
        run = jax.jit(
            lambda inputs, state, ids: values_and_gradients(
                contract, inputs, state, ids
            )
        )
        got = run(inputs, state, ids)
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
                ("selective_scan", "positive"),
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
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.full)])
def test_state_passing(method, shape, packed):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    A, written, state = 0.5 * normal(4, 3, 3), normal(2, 16, 4, 3), normal(2, 4, 3)
    keeps = jnp.asarray(rng.random((2, 16)) < 0.7) if packed else None
    cotangents = normal(*written.shape), normal(*state.shape)

    def run(implementation):
        def call(A, written, state):
            return ops.state_passing(
                A,
                written,
                keeps=keeps,
                initial_state=state,
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


def values_and_gradients(
    contract, inputs, state, ids, implementation="chunked", **options
):
    """As `OpContract.values_and_gradients`, untraced so far."""
    key_o, key_state = jax.random.split(jax.random.key(7))
    (o, final), pullback = jax.vjp(
        lambda inputs, state: contract.call(
            inputs, state, ids, implementation, **options
        ),
        inputs,
        state,
    )
    gradients, gradient_state = pullback(
        (
            jax.random.normal(key_o, o.shape, o.dtype),
            jax.random.normal(key_state, final.shape),
        )
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
        pytest.param(
            "gated_linear_attention", "vector", "all_gather", marks=pytest.mark.full
        ),
        pytest.param(
            "gated_linear_attention", "constant", "ring", marks=pytest.mark.full
        ),
    ],
)
def test_a_state_per_segment_goes_on_from_device_to_device(op, variant, method):
    """Each device has its tokens sorted by segment; on one device, all of a segment follow each other."""
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
                contract, inputs, states, ids, num_segments=segments
            )
        )(inputs, states, jnp.asarray(ids))

    expected = run(Sorted)
    with jax.set_mesh(mesh_of(1, 1, devices, 1)), ops.sequence_method(method):
        got = run(contract)
    for name, value in expected.items():
        assert_close(name, got[name], value)


def test_gradients_of_shared_inputs_are_added_up_in_float32():
    # Devices contribute 257, seven times, and 265: 2064 in bfloat16, but 2048 if each is rounded first.
    x = jnp.arange(8 * 265) % 265 < jnp.where(jnp.arange(8 * 265) < 7 * 265, 257, 265)
    x = x.astype(jnp.bfloat16)[None, :, None]

    def output_sum(w):
        y, _ = ops.short_convolution(x, w)
        return jnp.sum(y.astype(jnp.float32))

    with jax.set_mesh(mesh_of(1, 1, 8, 1)):
        gradient = jax.jit(jax.grad(output_sum))(jnp.ones((1, 1), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16 and float(gradient[0, 0]) == 2064


@pytest.mark.parametrize(
    ("window", "shape"),
    [
        (5, (2, 1, 2, 2)),  # the halo is on the neighbour
        (20, (1, 1, 4, 1)),  # it is not: keys and values of all devices
        pytest.param(1, (1, 1, 4, 1), marks=pytest.mark.full),
        pytest.param(5, (1, 1, 4, 1), marks=pytest.mark.full),
        pytest.param(9, (1, 1, 4, 1), marks=pytest.mark.full),
        pytest.param(10, (1, 1, 4, 1), marks=pytest.mark.full),
        pytest.param(40, (2, 1, 2, 2), marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize(
    ("packed", "state"),
    [
        (True, True),
        pytest.param(False, False, marks=pytest.mark.full),
        pytest.param(False, True, marks=pytest.mark.full),
    ],
)
def test_window_attention(window, shape, packed, state):
    check_window_attention(window, shape, packed, state)


@pytest.mark.parametrize(
    ("window", "shape", "packed"),
    [
        (40, (2, 1, 4, 1), True),
        pytest.param(20, (1, 1, 4, 1), True, marks=pytest.mark.full),
        pytest.param(12, (1, 1, 8, 1), False, marks=pytest.mark.full),
        pytest.param(40, (2, 1, 2, 2), False, marks=pytest.mark.full),
    ],
)
def test_ring_attention(window, shape, packed):
    with ops.sequence_method("ring"):
        check_window_attention(window, shape, packed, state=False)


@pytest.mark.full
@pytest.mark.parametrize("method", ["all_gather", "ring"])
@pytest.mark.parametrize("window", [5, 20])
def test_window_attention_by_squares(window, method):
    """A ring is for softmax: squares take all keys and values in either case."""
    with ops.sequence_method(method):
        check_window_attention(
            window, (1, 1, 4, 1), True, state=False, activation="squared_relu"
        )


def check_window_attention(window, shape, packed, state, activation="softmax"):
    batch, length, heads, key_heads, size, past = 2, 32, 4, 2, 8, window - 1

    def normal(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape)

    arrays = [normal(0, batch, length, heads, size)]
    arrays += [normal(i, batch, length, key_heads, size) for i in (1, 2)]
    arrays += [normal(i, batch, past, key_heads, size) for i in (3, 4)]
    valid = jnp.broadcast_to(jnp.arange(past)[None] >= past // 3, (batch, past))
    starts = jax.random.uniform(jax.random.key(5), (batch, length)) < 0.06
    ids = jnp.cumsum(starts, axis=1) if packed else None

    def outputs(q, k, v, k_past, v_past):
        first = ops.WindowState(k_past, v_past, valid) if state else None
        o, last = ops.window_attention(
            *(q, k, v),
            window=window,
            activation=activation,
            initial_state=first,
            segment_ids=ids,
        )
        return (o, last.k, last.v), last.valid

    def everything(*arrays):
        values, pullback, valid = jax.vjp(outputs, *arrays, has_aux=True)
        cotangents = tuple(normal(6 + i, *x.shape) for i, x in enumerate(values))
        return values, valid, pullback(cotangents)

    expected = jax.jit(everything)(*arrays)
    with jax.set_mesh(mesh_of(*shape)):
        got = jax.jit(lambda *arrays: everything(*arrays))(*arrays)
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert_close(jax.tree_util.keystr(path), value, wanted)


EXACT = 1e-5  # of the largest value: sums in another order


def assert_same_on_a_mesh(shape, run, params, *given):
    """All that `run(params, *given)` returns is on a mesh what it is on one device.

    To EXACT; or, where the last bits of the parameters decide about more than that (the gradients of models with a
    delta rule at random weights), no further than it goes when each of them is changed.
    """
    expected = jax.jit(run)(params, *given)
    with jax.set_mesh(mesh_of(*shape)):
        got = jax.jit(lambda *given: run(*given))(params, *given)
    errors = relative_errors(got, expected)
    if all(error <= EXACT for error in errors.values()):
        return
    nudged = [
        relative_errors(jax.jit(run)(last_bits_changed(params, seed), *given), expected)
        for seed in range(4)
    ]
    for name, error in errors.items():
        limit = max(EXACT, *(of_leaf[name] for of_leaf in nudged))
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.1e}"


def relative_errors(got: Any, expected: Any) -> dict[str, float]:
    """Of each leaf the largest error over the largest value."""
    errors = {}
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert value.shape == wanted.shape
        value, wanted = (np.asarray(x, np.float64) for x in (value, wanted))
        scale = np.abs(wanted).max(initial=0.0) or 1.0
        error = np.abs(value - wanted).max(initial=0.0) / scale
        errors[jax.tree_util.keystr(path)] = error
    return errors


def last_bits_changed(params: Any, seed: int) -> Any:
    """Every parameter one float32 number further up or down."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    nudged = [
        jnp.nextafter(x, jnp.inf * jax.random.rademacher(key, x.shape, x.dtype))
        for x, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, nudged)


WIDTH = 4


def layer_of(name: str, **options: Any) -> Any:
    return importlib.import_module(f"models.{name}").Mixer(
        WIDTH,
        depth=1,
        rngs=nnx.Rngs(0),
        param_dtype=jnp.float32,
        compute_dtype=jnp.float32,
        state_size=8,
        **options,
    )


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("s4d", {}, (1, 1, 4, 1)),
        pytest.param("s4", {"kernel_length": 64}, (2, 1, 2, 2), marks=pytest.mark.full),
        pytest.param("s4d", {"init": "real"}, (1, 1, 4, 1), marks=pytest.mark.full),
        pytest.param("lssl", {"channels": 2}, (1, 1, 8, 1), marks=pytest.mark.full),
    ],
)
def test_convolutions_of_time_invariant_layers(name, options, shape):
    """What models are tested with below, documents and a state, takes the recurrence."""
    graphdef, params = nnx.split(layer_of(name, **options))
    rng = np.random.default_rng(0)
    x, do = (
        jnp.asarray(rng.standard_normal((2, 64, WIDTH)), jnp.float32) for _ in "xo"
    )

    def loss(params, x):
        y, state = nnx.merge(graphdef, params)(x)
        ends = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(state))
        return jnp.sum(y * do) + ends, (y, state)

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    assert_same_on_a_mesh(shape, run, params, x)


# --- What travels -----------------------------------------------------------------------------------------------------


def collectives(function: Any, *arrays: Any) -> dict[str, list[str]]:
    """Kinds of collectives in the compiled program, and the shapes of their results."""
    program = jax.jit(function).lower(*arrays).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    found: dict[str, list[str]] = {}
    for shape, kind in re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", program):
        found.setdefault(kind, []).append(shape)
    return found


def loss_of(op: str) -> Any:
    def loss(q, k, v, g, ids):
        g = -jnp.abs(g)
        if op == "delta_rule":
            o, _ = ops.delta_rule(q, k, v, jnp.exp(g), g, segment_ids=ids)
        else:
            o, _ = ops.gated_linear_attention(q, k, v, g, segment_ids=ids)
        return jnp.sum(jnp.sin(o))

    return loss


def arguments(mesh: Mesh, length: int, packed: bool) -> list[Any]:
    cut = jax.NamedSharding(mesh, P(None, "sequence"))

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=cut)

    matrix = array(1, length, 2, 16)
    ids = array(1, length, dtype=jnp.int32) if packed else None
    return [matrix, matrix, matrix, array(1, length, 2), ids]


@pytest.mark.parametrize("op", ["gated_linear_attention", "delta_rule"])
def test_one_gather_forward_and_one_backward_whose_size_is_not_that_of_time(op):
    mesh, programs = mesh_of(1, 1, 8, 1), []
    with jax.set_mesh(mesh):
        for length in (64, 512):
            given = arguments(mesh, length, packed=False)
            gradient = jax.grad(loss_of(op), argnums=(0, 1, 2, 3))
            programs.append(
                [collectives(loss_of(op), *given), collectives(gradient, *given)]
            )
    short, long = programs
    assert short == long
    forward, both = short
    # The loss itself is one sum over devices.
    assert len(forward.pop("all-gather")) == 1 and set(forward) == {"all-reduce"}
    assert len(both.pop("all-gather")) == 2 and set(both) <= {"all-reduce"}


@pytest.mark.parametrize(
    "name",
    [
        "s4",
        pytest.param("s4d", marks=pytest.mark.full),
        pytest.param("lssl", marks=pytest.mark.full),
    ],
)
def test_time_invariant_layers_gather_states_alone(name):
    """As convolutions too, each device of its part."""
    layer = layer_of(name, kernel_length=512) if name == "s4" else layer_of(name)
    graphdef, params = nnx.split(layer)
    mesh, programs = mesh_of(1, 1, 8, 1), []

    def loss(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)[0]))

    with jax.set_mesh(mesh):
        cut = jax.NamedSharding(mesh, P(None, "sequence"))
        for length in (64, 512):
            x = jax.ShapeDtypeStruct((2, length, WIDTH), jnp.float32, sharding=cut)
            programs.append(
                [collectives(loss, params, x), collectives(jax.grad(loss), params, x)]
            )
    short, long = programs
    # The sums are the loss, and gradients of parameters.
    for forward, both in programs:
        assert len(forward["all-gather"]) == 1 and len(both["all-gather"]) == 2
        assert set(forward) == set(both) == {"all-gather", "all-reduce"}
    assert [found["all-gather"] for found in short] == [
        found["all-gather"] for found in long
    ]


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
    # Whether a segment goes on from the device before: asked once, and once more where the forward pass is repeated.
    assert 1 <= len(found["collective-permute"]) <= 2


def test_ring_sends_a_state_from_device_to_device():
    mesh = mesh_of(1, 1, 8, 1)
    with jax.set_mesh(mesh), ops.sequence_method("ring"):
        given = arguments(mesh, 64, packed=False)
        gradient = jax.grad(loss_of("gated_linear_attention"), argnums=(0, 1, 2, 3))
        found = collectives(gradient, *given)
    assert len(found["collective-permute"]) == 2 * 7 and "all-gather" not in found


def test_ring_attention_gathers_nothing():
    mesh = mesh_of(1, 1, 8, 1)
    cut = jax.NamedSharding(mesh, P(None, "sequence"))
    x = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32, sharding=cut)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(ops.window_attention(q, k, v, window=64)[0]))

    with jax.set_mesh(mesh), ops.sequence_method("ring"):
        found = collectives(jax.grad(loss, (0, 1, 2)), x, x, x)
    assert set(found) == {"collective-permute"}


def test_ring_attention_in_a_scan_over_layers_holds_the_logits_of_one_block():
    mesh, length, heads = mesh_of(1, 1, 8, 1), 8 * 1024, 2
    x = jax.ShapeDtypeStruct(
        (1, length, heads, 8),
        jnp.float32,
        sharding=jax.NamedSharding(mesh, P(None, "sequence")),
    )

    def loss(x):
        def layer(x, _):
            return ops.window_attention(x, x, x, window=length)[0], None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, length=3)[0]))

    with jax.set_mesh(mesh), ops.sequence_method("ring"):
        program = str(jax.jit(jax.grad(loss)).trace(x).jaxpr)
    shapes = re.findall(r"\[(\d+(?:,\d+)*)\]", program)
    sizes = {math.prod(map(int, shape.split(","))) for shape in shapes}
    block = heads * 512 * length // 8  # 512 queries, the keys of one device
    assert f"{heads},1,512,{length // 8}]" in program
    assert max(sizes) <= block


def test_mixture_of_memories_sends_states_and_no_tokens():
    """Between devices go the memories, the last inputs of their convolutions, gradients of parameters, and the indices
    of documents; tokens are sorted where they are."""
    mesh, sizes = mesh_of(1, 1, 8, 1), []
    graphdef, params, variables = nnx.split(
        model_contract_test.make("mom"), nnx.Param, ...
    )

    def loss(params, tokens):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params, variables)(tokens)[0]))

    with jax.set_mesh(mesh):
        cut = jax.NamedSharding(mesh, P(None, "sequence"))
        for length in (64, 512):
            tokens = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=cut)
            found = collectives(jax.grad(loss), params, tokens)
            assert set(found) <= {"all-gather", "all-reduce"}
            shapes = re.findall(r"f32\[([\d,]*)\]", str(found))
            sizes.append(
                [math.prod(map(int, s.split(","))) if s else 1 for s in shapes]
            )
    assert sizes[0] == sizes[1]


# --- Models -----------------------------------------------------------------------------------------------------------

ROWS = model_contract_test.ALL
MODELS_IN_MAKE_TEST = {"delta_net", "mamba"}
# One or three heads or channels, which two devices cannot share.
INDIVISIBLE = {
    "gla_convolution",
    "gated_delta_net_negative",
    "lightnet_one",
    "mamba2_norm_before_gate",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in MODELS_IN_MAKE_TEST else pytest.mark.full
        )
        for name in ROWS
    ],
)
@pytest.mark.parametrize(
    "shape", [(1, 2, 4, 1), pytest.param((2, 1, 2, 2), marks=pytest.mark.full)]
)
def test_loss_state_and_gradients_of_models(name, shape):
    if shape[3] > 1 and name in INDIVISIBLE:
        pytest.skip(
            "a number of heads or channels that the tensor axis does not divide"
        )
    rng, vocabulary = np.random.default_rng(0), model_contract_test.VOCABULARY
    lm = model_contract_test.make(name)
    tokens = jnp.asarray(rng.integers(0, vocabulary, (2, 32)), jnp.int32)
    # Documents that start anywhere, and in one sequence on the last token of each device: a memory that this token is
    # not routed to still holds the document before when the next device begins.
    starts = rng.random((2, 32)) < 0.08
    starts[0, 32 // shape[2] - 1 :: 32 // shape[2]] = True
    ids = jnp.cumsum(jnp.asarray(starts), axis=1)
    graphdef, params, variables = nnx.split(lm, nnx.Param, ...)

    def loss(params, tokens, ids, state):
        model = nnx.merge(graphdef, params, variables)
        logits, state = model(tokens, state, segment_ids=ids)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen), (logits, state)

    run = jax.value_and_grad(loss, has_aux=True)
    assert_same_on_a_mesh(shape, run, params, tokens, ids, lm.init_state(2))


# --- Bad input --------------------------------------------------------------------------------------------------------


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
