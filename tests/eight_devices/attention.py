"""Window and ring attention on eight devices: values of one device, and what travels."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import P

import ops
from tests.contracts.ops import TOLERANCE, assert_close
from tests.eight_devices.mesh import collectives, mesh_of


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
        check_window_attention(window, (1, 1, 4, 1), True, state=False, activation="squared_relu")


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("window", [5, 20])
def test_window_attention_in_bfloat16(window, state_dtype):
    """What neighbours lend is rounded once more than what one device adds up."""
    dtypes = ("bfloat16", state_dtype)
    check_window_attention(window, (1, 1, 4, 1), True, True, dtypes=dtypes, tolerance=2.0**-6)


def check_window_attention(
    window,
    shape,
    packed,
    state,
    activation="softmax",
    dtypes=("float32", "float32"),
    tolerance=TOLERANCE["float32"],
):
    """dtypes: of q, k and v, and of the state before them."""
    batch, length, heads, key_heads, size, past = 2, 32, 4, 2, 8, window - 1

    def normal(seed: int, *shape: int, dtype: Any = "float32") -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, dtype)

    arrays = [normal(0, batch, length, heads, size, dtype=dtypes[0])]
    arrays += [normal(i, batch, length, key_heads, size, dtype=dtypes[0]) for i in (1, 2)]
    arrays += [normal(i, batch, past, key_heads, size, dtype=dtypes[1]) for i in (3, 4)]
    valid = jnp.broadcast_to(jnp.arange(past)[None] >= past // 3, (batch, past))
    starts = jax.random.uniform(jax.random.key(5), (batch, length)) < 0.06
    ids = jnp.cumsum(starts, axis=1) if packed else None

    def outputs(q, k, v, k_past, v_past):
        first = ops.WindowState(k_past, v_past, valid) if state else None
        o, last = ops.window_attention(
            *(q, k, v), window=window, activation=activation, initial_state=first, segment_ids=ids
        )
        return (o, last.k, last.v), last.valid

    def everything(*arrays):
        values, pullback, valid = jax.vjp(outputs, *arrays, has_aux=True)
        cotangents = tuple(normal(6 + i, *x.shape, dtype=x.dtype) for i, x in enumerate(values))
        return values, valid, pullback(cotangents)

    expected = jax.jit(everything)(*arrays)
    with jax.set_mesh(mesh_of(*shape)):
        got = jax.jit(lambda *arrays: everything(*arrays))(*arrays)
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert value.dtype == wanted.dtype
        assert_close(jax.tree_util.keystr(path), value, wanted, tolerance)


@pytest.mark.parametrize(
    ("shape", "packed", "key_heads"),
    [
        ((1, 1, 4, 1), True, 2),
        ((2, 1, 2, 2), False, 1),  # one key head of two devices' query heads
        pytest.param((1, 1, 8, 1), True, 2, marks=pytest.mark.full),
        pytest.param((2, 1, 2, 2), True, 2, marks=pytest.mark.full),
        pytest.param((1, 1, 4, 1), False, 2, marks=pytest.mark.full),
    ],
)
def test_linear_attention_in_both_directions(shape, packed, key_heads):
    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape)

    # A document over three devices, one that ends with a device, and short ones.
    ids = jnp.asarray([[0] * 5 + [1] * 19 + [0] * 8, [0] * 8 + [1] * 2 + [2] * 3 + [3] * 19])
    mask = jax.random.uniform(jax.random.key(5), ids.shape) < 0.8
    q, do = normal(0, 2, 32, 4, 8), normal(1, 2, 32, 4, 6)
    k, v = normal(2, 2, 32, key_heads, 8), normal(3, 2, 32, key_heads, 6)

    def everything(q, k, v):
        o, pullback = jax.vjp(
            lambda q, k, v: ops.bidirectional_linear_attention(
                *(jax.nn.elu(q) + 1, jax.nn.elu(k) + 1, v),
                key_mask=mask,
                segment_ids=ids if packed else None,
            ),
            *(q, k, v),
        )
        return o, *pullback(do)

    expected = jax.jit(everything)(q, k, v)
    with jax.set_mesh(mesh_of(*shape)):
        got = jax.jit(lambda *arrays: everything(*arrays))(q, k, v)
    for name, value, wanted in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        assert_close(name, value, wanted)


def test_linear_attention_in_both_directions_sends_one_state_forward_and_one_backward():
    mesh = mesh_of(1, 1, 8, 1)
    x = jax.ShapeDtypeStruct(
        (1, 64, 2, 16), jnp.float32, sharding=jax.NamedSharding(mesh, P(None, "sequence"))
    )

    def outputs(q, k, v):
        return ops.bidirectional_linear_attention(q, k, v)

    def gradients(q, k, v, do):
        return jax.vjp(outputs, q, k, v)[1](do)

    state = "f32[1,2,16,17]{3,2,1,0}"
    with jax.set_mesh(mesh):
        assert collectives(outputs, x, x, x) == {"all-reduce": [state]}
        assert collectives(gradients, x, x, x, x) == {"all-reduce": [state, state]}


def windows(q, k, v, landmarks, ids):
    del landmarks
    return ops.shifted_window_attention(
        q, k, v, grid=(8, 4), window=(4, 2), shift=(2, 1), segment_ids=ids
    )


def neighbourhoods(q, k, v, landmarks, ids):
    return ops.neighbourhood_attention(
        q, k, v, grid=(8, 4), radius=3, context_k=landmarks, context_v=landmarks, segment_ids=ids
    )


def lines(q, k, v, landmarks, ids):
    """As many neighbours as the next device has not."""
    mask = jax.random.uniform(jax.random.key(5), q.shape[:2]) < 0.8
    return ops.neighbourhood_attention(
        *(q, k[:, :, :2], v[:, :, :2]), grid=(32,), radius=20, key_mask=mask, segment_ids=ids
    )


def gaussian(q, k, v, landmarks, ids):
    del k
    given = {} if ids is None else {"documents": ids, "landmark_documents": ids[:, ::8]}
    return ops.gaussian_attention(q, landmarks, v, normalise=True, **given)[0]


def flow(q, k, v, landmarks, ids):
    del landmarks
    return ops.flow_attention(q, k, v, segment_ids=ids, clip=None)


def causal_flow(q, k, v, landmarks, ids):
    del landmarks
    o, state = ops.causal_flow_attention(q, k, v, segment_ids=ids)
    return o, state[1:]


@pytest.mark.parametrize("call", [gaussian, flow, causal_flow, windows, neighbourhoods, lines])
@pytest.mark.parametrize(
    ("shape", "packed"),
    [
        ((2, 1, 2, 2), True),
        pytest.param((1, 1, 4, 1), False, marks=pytest.mark.full),
        pytest.param((2, 1, 4, 1), True, marks=pytest.mark.full),
    ],
)
def test_attention_without_an_order_and_by_flows(call, shape, packed):
    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape)

    ids = jnp.asarray([[0] * 5 + [1] * 19 + [2] * 8, [0] * 8 + [1] * 2 + [2] * 3 + [3] * 19])
    arrays = [*(normal(seed, 2, 32, 4, 8) for seed in range(3)), normal(3, 2, 4, 4, 8)]

    def everything(*arrays):
        values, pullback = jax.vjp(lambda *arrays: call(*arrays, ids if packed else None), *arrays)
        return values, pullback(jax.tree.map(lambda x: normal(9, *x.shape), values))

    expected = jax.jit(everything)(*arrays)
    with jax.set_mesh(mesh_of(*shape)):
        got = jax.jit(lambda *arrays: everything(*arrays))(*arrays)
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert_close(jax.tree_util.keystr(path), value, wanted)


def test_neighbourhoods_send_the_rows_within_reach():
    mesh = mesh_of(1, 1, 4, 1)
    cut = jax.NamedSharding(mesh, P(None, "sequence"))
    x = jax.ShapeDtypeStruct((1, 16 * 4, 2, 8), jnp.float32, sharding=cut)

    def outputs(q, k, v):
        return ops.neighbourhood_attention(q, k, v, grid=(16, 4), radius=3)

    def gradients(q, k, v, do):
        return jax.vjp(outputs, q, k, v)[1](do)

    with jax.set_mesh(mesh):
        there, back = collectives(outputs, x, x, x), collectives(gradients, x, x, x, x)
    rows = "f32[1,8,2,8]"  # two rows of four tokens, before and behind, of keys and of values
    for found, times in ((there, 4), (back, 8)):
        assert set(found) == {"collective-permute"}
        sent = [shape for shape in found["collective-permute"] if rows in shape]
        assert sum(shape.count(rows) for shape in sent) in (times, 2 * times), found


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
        (1, length, heads, 8), jnp.float32, sharding=jax.NamedSharding(mesh, P(None, "sequence"))
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
