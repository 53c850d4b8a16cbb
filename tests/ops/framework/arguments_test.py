"""What public functions take besides JAX arrays, and how they refuse what they do not take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops

X = np.ones((2, 5, 2, 4), np.float32)  # [B, T, H, K]
IDS = np.array([[0, 0, 1, 1, 1]] * 2)
ROWS = X[:, :, 0]  # [B, T, D]
STEPS = {"x": ROWS, "delta": ROWS, "A": -np.ones((4, 3)), "B": X[:, :, 0, :3], "C": X[:, :, 0, :3]}
SYSTEM = {"A": np.zeros((4, 3, 3)), "B": np.ones((4, 3)), "C": np.ones((4, 1, 3))}
CALLS = {
    "gated_linear_attention": {"q": X, "k": X, "v": X, "segment_ids": IDS},
    "delta_rule": {"q": X, "k": X, "v": X, "beta": X[..., 0], "segment_ids": IDS},
    "selective_scan": {**STEPS, "segment_ids": IDS},
    "diagonal_scan": {"a": X[0, 0, 0], "b": ROWS, "segment_ids": IDS},
    "short_convolution": {"x": ROWS, "w": X[0, :3, 0], "segment_ids": IDS},
    "long_convolution": {"u": ROWS, "kernel": X[0, :, 0].T, "segment_ids": IDS},
    "window_attention": {"q": X, "k": X, "v": X, "window": 3, "segment_ids": IDS},
    "bidirectional_linear_attention": {"q": X, "k": X, "v": X, "segment_ids": IDS},
    "dense_scan": {"u": ROWS, **SYSTEM, "segment_ids": IDS},
    "diagonal_convolution": {"u": ROWS, "a": SYSTEM["B"], "b": SYSTEM["B"], "c": SYSTEM["B"]},
    "state_passing": {"A": SYSTEM["A"], "written": X[:, :, :1, :3].repeat(4, 2)},
}


@pytest.mark.parametrize("op", CALLS)
def test_arrays_of_numpy_are_taken_as_those_of_jax(op):
    call = getattr(ops, op)
    got = call(**CALLS[op])
    expected = call(**{name: jnp.asarray(x) if np.ndim(x) else x for name, x in CALLS[op].items()})
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)
    for value, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(value, jax.Array) and value.dtype == wanted.dtype
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("op", CALLS)
def test_what_is_no_array_of_floats_is_refused_by_name(op):
    call, first = getattr(ops, op), next(iter(CALLS[op]))
    array = CALLS[op][first]
    for wrong, got in ((array.tolist(), "a list"), (array.astype(int), "int"), ("x", "a str")):
        with pytest.raises(
            ValueError, match=rf"^{first} must be a floating-point array; got {got}"
        ):
            call(**CALLS[op] | {first: wrong})


@pytest.mark.parametrize("op", [name for name in CALLS if "segment_ids" in CALLS[name]])
def test_segment_ids_that_are_no_integers_are_refused(op):
    for wrong, got in ((IDS.tolist(), "a list"), (IDS > 0, "bool"), (IDS / 2, "float64")):
        with pytest.raises(ValueError, match=f"segment_ids must be an integer array; got {got}"):
            getattr(ops, op)(**CALLS[op] | {"segment_ids": wrong})


ONE_WAY = ("long_convolution", "window_attention", "bidirectional_linear_attention")
WRONG = [
    ("gated_linear_attention", "num_segments", True, "an integer >= 1 or None; got True"),
    ("delta_rule", "num_segments", 2.0, "an integer >= 1 or None; got 2.0"),
    ("delta_rule", "num_segments", -1, "an integer >= 1 or None; got -1"),
    ("window_attention", "window", True, "an integer >= 1, the token itself included; got True"),
    ("gated_linear_attention", "scale", "2", "None or a finite number; got '2'"),
    ("window_attention", "scale", float("nan"), "None or a finite number; got nan"),
    ("delta_rule", "scale", True, "None or a finite number; got True"),
    ("delta_rule", "scale", X[0, 0, 0], "None or a finite number; got array"),
    ("bidirectional_linear_attention", "eps", float("inf"), "a number >= 0; got inf"),
    ("bidirectional_linear_attention", "normalise", 2, "True or False; got 2"),
    ("selective_scan", "delta_softplus", 1, "True or False; got 1"),
    ("selective_scan", "eigenvalue_range", 1, r"\(0, 1\) or \(-1, 1\); got 1"),
    ("dense_scan", "kernel", SYSTEM["B"], "None or a function of the length"),
    *((op, "reverse", "no", "True or False; got 'no'") for op in CALLS if op not in ONE_WAY),
]


@pytest.mark.parametrize(("op", "name", "value", "message"), WRONG)
def test_choices_that_are_none_are_refused_by_name(op, name, value, message):
    with pytest.raises(ValueError, match=f"^{name} must be {message}"):
        getattr(ops, op)(**CALLS[op] | {name: value})


def test_numbers_of_numpy_are_numbers():
    call = CALLS["gated_linear_attention"]
    o, states = ops.gated_linear_attention(
        **call, num_segments=np.int64(2), scale=np.float32(0.5), reverse=np.bool_(False)
    )
    expected = ops.gated_linear_attention(**call, num_segments=2, scale=0.5)
    np.testing.assert_array_equal(o, expected[0])
    np.testing.assert_array_equal(states, expected[1])


@pytest.mark.parametrize("op", ["gated_linear_attention", "delta_rule", "window_attention"])
def test_a_traced_scale_says_what_to_do_instead(op):
    call = getattr(ops, op)
    message = r"scale must be known while tracing.*got .*float32.*: multiply an argument by"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda scale: call(**CALLS[op], scale=scale))(2.0)
