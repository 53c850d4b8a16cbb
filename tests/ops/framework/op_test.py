"""What `op.run` makes of the rules of an implementation, for the smallest op there is: a running
sum."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.framework.op import Op, run

X = jnp.arange(1.0, 7.0).reshape(1, 6, 1)
STATE = jnp.full((1, 1), 10.0)


def implementation(walks_backwards):
    """A module whose rules note what they were given."""
    module = types.ModuleType("sums")
    seen = []

    def direction(x, reverse):
        return x[:, ::-1] if reverse else x

    def forward(x, state, *, reverse=False):
        seen.append(reverse)
        sums = direction(jnp.cumsum(direction(x, reverse), axis=1), reverse) + state[:, None]
        return sums, sums[:, 0] if reverse else sums[:, -1]

    def backward(x, state, dsums, dlast, *, reverse=False):
        seen.append(reverse)
        dsums = dsums.at[:, 0 if reverse else -1].add(dlast)
        dx = direction(jnp.cumsum(direction(dsums, not reverse), axis=1), not reverse)
        return dx, dsums.sum(1)

    module.__dict__.update(forward=forward, backward=backward, seen=seen)
    if walks_backwards:
        module.__dict__["WALKS_BACKWARDS"] = True
    return module


def running_sum(module, x, state, reverse):
    op = Op("running_sum", {"xla": module})
    layouts = {"layouts": ("BTD", "BD"), "outputs": ("BTD", "BD")}
    return run(op, None, x, state, reverse=reverse, **layouts)


@pytest.mark.parametrize("walks_backwards", [True, False])
def test_reverse_walks_from_the_last_token_to_the_first(walks_backwards):
    module = implementation(walks_backwards)
    sums, last = running_sum(module, X, STATE, reverse=True)
    np.testing.assert_array_equal(sums[0, :, 0], [31, 30, 28, 25, 21, 16])
    np.testing.assert_array_equal(last, [[31]])
    weights = jnp.array([1.0, 0.0, 0.0, 100.0, 0.0, 0.0])[None, :, None]

    def weighted(x, state):
        sums, last = running_sum(module, x, state, reverse=True)
        return jnp.sum(weights * sums) + 7 * last.sum()

    dx, dstate = jax.grad(weighted, (0, 1))(X, STATE)
    np.testing.assert_array_equal(dx[0, :, 0], [8, 8, 8, 108, 108, 108])
    np.testing.assert_array_equal(dstate, [[108]])
    # One that can walk backwards is told to, another never hears of it.
    assert set(module.seen) == {walks_backwards}


def test_without_reverse_no_rule_hears_of_it():
    module = implementation(walks_backwards=True)
    sums, _ = running_sum(module, X, STATE, reverse=False)
    np.testing.assert_array_equal(sums[0, :, 0], [11, 13, 16, 20, 25, 31])
    assert set(module.seen) == {False}
