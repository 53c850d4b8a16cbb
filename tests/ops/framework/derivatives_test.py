"""Derivatives beyond the gradient; `tests/contracts/ops.py` has those of recurrences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops
from ops import short_convolution
from tests.contracts.ops import assert_close, assert_derivatives_equal
from tests.ops.framework.arguments_test import CALLS

STATIC = ("window", "segment_ids")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "implementation"),
    [
        ("short_convolution", None),
        pytest.param("short_convolution", "pallas_tpu", marks=pytest.mark.slow),
        ("long_convolution", None),
        ("bidirectional_linear_attention", None),
        ("window_attention", None),
        ("diagonal_convolution", None),
        ("state_passing", None),
    ],
)
def test_derivatives_equal_those_of_the_reference(op, implementation):
    static = {name: x for name, x in CALLS[op].items() if name in STATIC}
    rng = np.random.default_rng(0)
    given = {
        name: jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
        for name, x in CALLS[op].items()
        if name not in STATIC
    }

    def function(implementation):
        def call(given):
            outputs = getattr(ops, op)(**given, **static, implementation=implementation)
            return [x for x in jax.tree.leaves(outputs) if x.dtype == jnp.float32]

        return call

    assert_derivatives_equal(function(implementation), function("reference"), given)


X, W = jnp.sin(jnp.arange(24.0)).reshape(2, 6, 2), jnp.cos(jnp.arange(6.0)).reshape(3, 2)


def loss(x, w):
    return jnp.sum(jnp.sin(short_convolution(x, w)[0]))


@pytest.mark.slow
def test_all_ways_to_a_derivative_agree():
    gradient = jax.grad(loss, 1)(X, W)
    forward = jax.jacfwd(loss, 1)(X, W)
    _, linear = jax.linearize(lambda w: loss(X, w), W)
    assert_close("jacfwd", forward, gradient)
    assert_close("linearize", linear(jnp.ones_like(W)), gradient.sum())
    hessian = jax.hessian(loss, 1)(X, W)
    for other in (jax.jacfwd(jax.jacfwd(loss, 1), 1), jax.jacrev(jax.jacfwd(loss, 1), 1)):
        assert_close("hessian", other(X, W), hessian)
    third = jax.jacfwd(jax.hessian(loss, 1), 1)(X, W)
    assert_close("third", jax.jacrev(jax.jacrev(jax.jacrev(loss, 1), 1), 1)(X, W), third)


def test_tangents_of_mapped_and_unmapped_arrays():
    stacked = jnp.stack([X, 2 * X])

    def mean(x, w):
        return jnp.mean(jax.vmap(loss, (0, None))(x, w))

    def one_by_one(x, w):
        return (loss(x[0], w) + loss(x[1], w)) / 2

    directions = jnp.cos(stacked), jnp.sin(W)
    for function in (mean, one_by_one):
        _, tangent = jax.jvp(function, (stacked, W), directions)
        gradients = jax.grad(function, (0, 1))(stacked, W)
        assert_close("tangent", tangent, sum(map(jnp.vdot, gradients, directions)))
    assert_close("dw", jax.grad(mean, 1)(stacked, W), jax.grad(one_by_one, 1)(stacked, W))


def test_a_gradient_is_made_of_the_two_rules_alone():
    for function in (loss, jax.checkpoint(loss)):
        program = str(jax.make_jaxpr(jax.value_and_grad(function, (0, 1)))(X, W))
        assert "tangents_of_op" not in program and "custom_jvp" not in program
    assert "tangents_of_op" in str(jax.make_jaxpr(jax.jacfwd(loss))(X, W))
