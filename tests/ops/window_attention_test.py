"""Window attention: the block form against one masked softmax, states, segments, and limits known
otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import WindowState, init_window_state, window_attention
from ops.window_attention import examples
from ops.window_attention.api import pad_window_state
from tests.contracts.ops import TOLERANCE, assert_close
from tests.ops.gated_linear_attention_test import BFLOAT16_L2, assert_l2_close

BATCH, HEADS, KEY_HEADS, KEY, VALUE = (
    examples.SHAPES["test"][name] for name in ("batch", "heads", "key_heads", "key", "value")
)
attend = jax.jit(
    window_attention, static_argnames=("window", "scale", "activation", "implementation")
)


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def attention_inputs(seed, length, dtype="float32"):
    """Weights of a window are as unequal as with q and k of twice and once the size one."""
    shape = {**examples.SHAPES["test"], "length": length}
    inputs = examples.inputs(shape, "", "float32", jax.random.key(seed))
    inputs["q"] *= 2 * KEY**0.5  # keys have norm one
    return {name: x.astype(dtype) for name, x in inputs.items()}


def random_state(seed, window, dtype="float32"):
    """Some of the past is there, some is not."""
    return WindowState(
        k=normal((seed, 3), BATCH, window - 1, KEY_HEADS, KEY, dtype=dtype),
        v=normal((seed, 4), BATCH, window - 1, KEY_HEADS, VALUE, dtype=dtype),
        valid=normal((seed, 5), BATCH, window - 1) > -0.5,
    )


def random_ids(seed, length):
    # Ids come back.
    return jnp.asarray(
        np.cumsum(np.random.default_rng(seed).random((BATCH, length)) < 0.06, axis=1) % 3
    )


def part(inputs, start, stop):
    return {name: x[:, start:stop] for name, x in inputs.items()}


def assert_states_close(got, expected):
    np.testing.assert_array_equal(got.valid, expected.valid)
    assert_close("final k", got.k, expected.k)
    assert_close("final v", got.v, expected.v)


@functools.partial(jax.jit, static_argnames=("window", "activation", "implementation"))
def pull_back(inputs, state, segment_ids, cotangents, *, window, activation, implementation):
    def outputs(inputs, past):
        initial = None if past is None else state._replace(k=past[0], v=past[1])
        o, final = window_attention(
            **inputs,
            window=window,
            activation=activation,
            initial_state=initial,
            segment_ids=segment_ids,
            implementation=implementation,
        )
        return (o, final.k, final.v), final.valid

    past = None if state is None else (state.k, state.v)
    values, pullback, valid = jax.vjp(outputs, inputs, past, has_aux=True)
    return values, valid, *pullback(cotangents)


def values_and_gradients(
    inputs, state, segment_ids, *, window, implementation, activation="softmax"
):
    """Outputs and the gradients of all float inputs, with random cotangents of o and of the final
    keys and values."""
    length, dtype = inputs["q"].shape[1], inputs["q"].dtype
    past = min(window - 1, length + (0 if state is None else state.valid.shape[1]))
    cotangents = (
        normal(7, BATCH, length, HEADS, VALUE, dtype=dtype),
        normal(8, BATCH, past, KEY_HEADS, KEY, dtype=dtype),
        normal(9, BATCH, past, KEY_HEADS, VALUE, dtype=dtype),
    )
    values, valid, gradients, of_past = pull_back(
        inputs,
        state,
        segment_ids,
        cotangents,
        window=window,
        activation=activation,
        implementation=implementation,
    )
    result = dict(zip(("o", "final k", "final v"), values, strict=True)) | {"valid": valid}
    result |= {f"gradient of {name}": g for name, g in gradients.items()}
    if of_past is not None:
        result |= {"gradient of initial k": of_past[0], "gradient of initial v": of_past[1]}
    return result


# (length, window): whole and ragged blocks; windows shorter than the shortest block, longer than
# the sequence, of one.
SIZES = ((129, 37), (70, 5), (64, 33), (33, 32), (40, 1), (7, 20), (1, 6), (1, 1))
# Windows so wide that blocks of queries take turns, shorter and longer than the sequence.
WIDE = ((1300, 1100), (1100, 2000))


def sizes(*fast):
    return pytest.mark.parametrize(
        ("length", "window"),
        [pytest.param(*size, marks=() if size in fast else pytest.mark.full) for size in SIZES],
    )


@sizes((129, 37), (70, 5))
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_values_states_and_gradients_equal_the_reference(length, window, dtype):
    inputs, state = attention_inputs(0, length, dtype), random_state(0, window, dtype)
    ids = random_ids(0, length)
    expected = values_and_gradients(inputs, state, ids, window=window, implementation="reference")
    got = values_and_gradients(inputs, state, ids, window=window, implementation="xla")
    np.testing.assert_array_equal(got.pop("valid"), expected.pop("valid"))
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype == dtype, name
        assert_close(name, got[name], expected[name], TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("length", "window"),
    [pytest.param(*WIDE[0], marks=pytest.mark.slow)]
    + [pytest.param(*size, marks=pytest.mark.full) for size in WIDE[1:]],
)
@pytest.mark.parametrize("state", [True, pytest.param(False, marks=pytest.mark.full)])
def test_wide_windows_equal_the_reference(length, window, state):
    inputs = attention_inputs(0, length)
    first = random_state(0, window) if state else None
    expected, got = (
        values_and_gradients(
            inputs, first, random_ids(0, length) // 2, window=window, implementation=implementation
        )
        for implementation in ("reference", "xla")
    )
    np.testing.assert_array_equal(got.pop("valid"), expected.pop("valid"))
    for name in expected:
        assert_close(name, got[name], expected[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "window"),
    [(70, 5), *(pytest.param(*size, marks=pytest.mark.full) for size in SIZES + WIDE[:1])],
)
def test_squares_of_logits_equal_the_reference(length, window):
    inputs, state = attention_inputs(0, length), random_state(0, window)
    expected, got = (
        values_and_gradients(
            inputs,
            state,
            random_ids(0, length),
            window=window,
            activation="squared_relu",
            implementation=implementation,
        )
        for implementation in ("reference", "xla")
    )
    np.testing.assert_array_equal(got.pop("valid"), expected.pop("valid"))
    for name in expected:
        assert_close(name, got[name], expected[name])


def test_the_kernel_of_tpus_is_for_softmax():
    inputs = attention_inputs(0, 128, "bfloat16")
    with pytest.raises(ValueError, match=r"pallas_tpu.* softmax"):
        attend(**inputs, window=3, activation="squared_relu", implementation="pallas_tpu")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_weights_of_squares_are_squares_of_positive_logits(implementation):
    length, window, scale = 9, 4, 0.25
    inputs = attention_inputs(15, length)
    o, _ = attend(
        **inputs,
        window=window,
        scale=scale,
        activation="squared_relu",
        implementation=implementation,
    )
    q, k, v = (np.asarray(inputs[name], np.float64) for name in "qkv")
    want = np.zeros(o.shape)
    for t in range(length):
        for s in range(max(0, t - window + 1), t + 1):
            for h in range(HEADS):
                of_key = h // (HEADS // KEY_HEADS)
                logit = scale * np.sum(q[:, t, h] * k[:, s, of_key], axis=-1)
                weight = np.where(logit > 0, logit, 0) ** 2
                want[:, t, h] += weight[:, None] * v[:, s, of_key]
    assert_close("o", o, want)


# (length, window): whole and ragged blocks, several blocks of keys, windows shorter than a block
# and longer than T.
@pytest.mark.parametrize(
    ("length", "window"),
    [
        pytest.param(130, 40, marks=pytest.mark.slow),
        pytest.param(300, 500, marks=pytest.mark.full),
        pytest.param(512, 140, marks=pytest.mark.full),
        pytest.param(128, 2, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("state", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_kernel_of_tpus_equals_the_reference(length, window, state):
    inputs = attention_inputs(0, length, "bfloat16")
    first = random_state(0, window, "bfloat16") if state else None
    expected, got = (
        values_and_gradients(
            inputs, first, random_ids(0, length), window=window, implementation=implementation
        )
        for implementation in ("reference", "pallas_tpu")
    )
    np.testing.assert_array_equal(got.pop("valid"), expected.pop("valid"))
    for name in expected:
        assert got[name].dtype == jnp.bfloat16, name
        assert_l2_close(name, got[name], expected[name], BFLOAT16_L2)


@sizes((70, 5))
def test_no_initial_state_is_an_empty_one(length, window):
    inputs = attention_inputs(1, length)
    empty = init_window_state(BATCH, min(window, length + 1), KEY_HEADS, KEY, VALUE)
    expected = values_and_gradients(inputs, empty, None, window=window, implementation="reference")
    got = values_and_gradients(inputs, None, None, window=window, implementation="xla")
    for name in got:
        assert_close(name, got[name], expected[name])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_window_that_holds_all_tokens_costs_no_more_than_they_do(implementation):
    inputs, parts = attention_inputs(1, 12), (slice(0, 5), slice(5, 6), slice(6, 12))
    o, final = attend(**inputs, window=13, implementation=implementation)
    endless = functools.partial(attend, window=np.int64(10**9), implementation=implementation)
    got, state = endless(**inputs)
    assert_close("o", got, o)
    assert_states_close(state, final)
    outputs, state = [], None
    for rows in parts:  # the state grows with the tokens
        y, state = endless(**{name: x[:, rows] for name, x in inputs.items()}, initial_state=state)
        outputs.append(y)
    assert_close("o in parts", jnp.concatenate(outputs, 1), o)
    assert_states_close(state, final)
    room = pad_window_state(state, 20)
    assert room.k.shape[1] == 19 and room.valid[:, 7:].all() and not room.valid[:, :7].any()


@pytest.mark.parametrize("window", [37, 5])
def test_parts_with_state_equal_the_whole(window):
    length, cut = 129, 43
    inputs, state = attention_inputs(2, length), random_state(3, window)
    o, final = attend(**inputs, window=window, initial_state=state)
    parts = []
    for start in range(0, length, cut):
        o_part, state = attend(
            **part(inputs, start, start + cut), window=window, initial_state=state
        )
        parts.append(o_part)
    assert_close("o", jnp.concatenate(parts, 1), o)
    assert_states_close(state, final)


@pytest.mark.parametrize("window", [37, pytest.param(5, marks=pytest.mark.full)])
def test_packed_documents_equal_separate_ones(window):
    length, cut = 129, 43
    inputs, state = attention_inputs(4, length), random_state(5, window)
    ids = jnp.broadcast_to(jnp.array([5, 0, 5])[jnp.arange(length) // cut], (BATCH, length))
    o, final = attend(**inputs, window=window, initial_state=state, segment_ids=ids)
    for document in range(3):
        start, stop = document * cut, (document + 1) * cut
        first = state if document == 0 else init_window_state(BATCH, window, KEY_HEADS, KEY, VALUE)
        o_alone, last = attend(**part(inputs, start, stop), window=window, initial_state=first)
        assert_close(f"o of document {document}", o[:, start:stop], o_alone)
    assert_states_close(final, last)


@pytest.mark.parametrize("window", [7, 1])
def test_step_by_step_equals_parallel(window):
    length = 43
    inputs, state = attention_inputs(6, length), random_state(7, window)
    o, final = attend(**inputs, window=window, initial_state=state)
    steps = []
    for t in range(length):
        o_t, state = attend(**part(inputs, t, t + 1), window=window, initial_state=state)
        steps.append(o_t)
    assert_close("o", jnp.concatenate(steps, 1), o)
    assert_states_close(state, final)


@pytest.mark.parametrize("window", [37, 5])
def test_a_token_reaches_the_outputs_of_its_window_and_no_others(window):
    length, at = 129, 50
    inputs = attention_inputs(8, length)
    o, _ = attend(**inputs, window=window)
    changed = inputs | {name: inputs[name].at[:, at].add(1.0) for name in ("k", "v")}
    o_changed, _ = attend(**changed, window=window)
    same = np.asarray(o == o_changed).all(axis=(0, 2, 3))
    reached = np.zeros(length, bool)
    reached[at : at + window] = True
    np.testing.assert_array_equal(same, ~reached)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_window_as_long_as_the_sequence_is_causal_attention(implementation):
    length = 50
    inputs = attention_inputs(9, length) | {"v": normal(10, BATCH, length, KEY_HEADS, KEY)}
    expected = jax.nn.dot_product_attention(inputs["q"], inputs["k"], inputs["v"], is_causal=True)
    for window in (length, 3 * length):
        o, _ = attend(**inputs, window=window, implementation=implementation)
        assert_close("o", o, expected)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_ids_that_come_back_start_a_new_segment(implementation):
    inputs = attention_inputs(11, 5)
    ids = jnp.array([[0, 0, 1, 1, 0], [3, 3, 3, 3, 3]])
    o, state = attend(**inputs, window=4, segment_ids=ids, implementation=implementation)
    # Softmax over itself only.
    alone = jnp.repeat(inputs["v"][0, 4], HEADS // KEY_HEADS, axis=0)
    np.testing.assert_array_equal(o[0, 4], alone)
    np.testing.assert_array_equal(state.valid, [[False, False, True], [True, True, True]])
    np.testing.assert_array_equal(state.k[0, :2], 0.0)
    np.testing.assert_array_equal(state.v[1], inputs["v"][1, 2:])


def test_large_logits_are_finite_with_finite_gradients():
    inputs = attention_inputs(12, 70)
    inputs["q"] = 1e4 * inputs["q"]
    values = values_and_gradients(inputs, None, None, window=5, implementation="xla")
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in values.values())


@pytest.mark.slow
def test_memory_grows_with_the_length_times_the_window():
    def temporary_bytes(length):
        inputs = jax.eval_shape(lambda: attention_inputs(0, length))
        gradient = jax.jit(jax.grad(lambda inputs: window_attention(**inputs, window=64)[0].sum()))
        return gradient.lower(inputs).compile().memory_analysis().temp_size_in_bytes

    # 16 times if it grew with the square.
    assert temporary_bytes(4096) < 4.5 * temporary_bytes(1024)


@pytest.mark.full
def test_vmap_and_remat_change_nothing():
    window, length = 5, 70
    inputs, state = attention_inputs(13, length), random_state(14, window)

    def loss(inputs, past):
        o, final = window_attention(
            **inputs, window=window, initial_state=WindowState(*past, state.valid)
        )
        return jnp.sin(o).sum() + jnp.sin(final.k).sum() + jnp.sin(final.v).sum()

    gradient = jax.grad(loss, argnums=(0, 1))
    arguments = (inputs, (state.k, state.v))
    expected = jax.jit(gradient)(*arguments)
    rematerialised = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1)))(*arguments)
    mapped = jax.jit(jax.vmap(gradient))(*jax.tree.map(lambda x: jnp.stack([x, x]), arguments))
    for (path, want), again, both in zip(
        jax.tree.leaves_with_path(expected),
        jax.tree.leaves(rematerialised),
        jax.tree.leaves(mapped),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        assert_close(name, again, want)
        assert_close(name, both[0], want)
        assert_close(name, both[1], want)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {"q": ones(2, 5, 4, 8), "k": ones(2, 5, 2, 8), "v": ones(2, 5, 2, 6), "window": 3}
STATE = WindowState(k=ones(2, 2, 2, 8), v=ones(2, 2, 2, 6), valid=ones(2, 2, dtype=bool))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": ones(2, 5, 8)}),
        ("q", {"q": ones(2, 5, 4, 8, dtype=np.int32)}),
        ("k", {"k": ones(2, 5, 2, 7)}),
        ("k", {"k": ones(2, 5, 3, 8)}),
        ("v", {"v": ones(2, 5, 4, 6)}),
        ("window", {"window": 0}),
        ("window", {"window": 2.0}),
        ("window", {"window": True}),
        ("scale", {"scale": "1"}),
        ("initial_state", {"initial_state": tuple(STATE)}),
        (r"initial_state\.k", {"initial_state": STATE._replace(k=ones(2, 3, 2, 8))}),
        (r"initial_state\.v", {"initial_state": STATE._replace(v=ones(2, 2, 2, 8))}),
        (r"initial_state\.valid", {"initial_state": STATE._replace(valid=ones(2, 2))}),
        ("segment_ids", {"segment_ids": ones(2, 5)}),
        ("activation", {"activation": "relu"}),
        ("implementation", {"implementation": "flash"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        window_attention(**GOOD | change)
