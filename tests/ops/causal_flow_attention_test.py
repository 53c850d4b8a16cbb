"""Causal flow attention: the contract, and values known otherwise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import FlowState, causal_flow_attention, init_flow_state
from ops.causal_flow_attention import examples
from tests.contracts.ops import OpContract, assert_close

HEADS, KEY, VALUE = (examples.SHAPES["test"][name] for name in ("heads", "key", "value"))


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


class TestCausalFlowAttention(OpContract):
    """The contract's state is one array: the parts of a `FlowState` one behind the other."""

    op = staticmethod(causal_flow_attention)
    examples = examples
    variants = ("language", pytest.param("plain", marks=pytest.mark.full))
    implementations = ("xla",)
    isolates = "chunk"

    def initial_state(self, key, variant):
        """What three tokens leave."""
        _, state = causal_flow_attention(**self.inputs(key, variant, 3, "float32"), clip=5.0)
        return _as_array(state)

    @classmethod
    def call(cls, inputs, state, segment_ids, implementation, **options):
        o, final = causal_flow_attention(
            **inputs,
            clip=5.0,
            initial_state=None if state is None else _as_state(state),
            segment_ids=segment_ids,
            implementation=implementation,
            **options,
        )
        return o, _as_array(final)


def _as_array(state):
    sizes = [math.prod(x.shape[1:]) for x in state]  # an empty batch says nothing of a -1
    parts = [x.astype(jnp.float32).reshape(len(x), n) for x, n in zip(state, sizes, strict=True)]
    return jnp.concatenate(parts, axis=1)


def _as_state(array):
    like, values, start = init_flow_state(len(array), HEADS, KEY, VALUE), [], 0
    for x in like:
        size = math.prod(x.shape[1:])
        values.append(array[:, start : start + size].reshape(x.shape).astype(x.dtype))
        start += size
    return FlowState(*values)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_it_is_the_cumulative_sums_of_the_paper(implementation):
    q, k, v = normal(0, 1, 40, 1, 6), normal(1, 1, 40, 1, 6), normal(2, 1, 40, 1, 5)
    o, _ = causal_flow_attention(q, k, v, eps=0.0, clip=5.0, implementation=implementation)
    q, k, v = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v))
    q, k, t = 1 / (1 + np.exp(-q)), 1 / (1 + np.exp(-k)), np.arange(1, 41)[:, None]
    incoming = (q * k.cumsum(0)).sum(1, keepdims=True)
    outgoing = (k * q.cumsum(0)).sum(1, keepdims=True)
    conserved_in = (q * (k * t / outgoing).cumsum(0)).sum(1, keepdims=True) / t
    conserved_out = (k * (q * t / incoming).cumsum(0)).sum(1, keepdims=True) / t
    share = np.exp(np.clip(conserved_out, -5, 5))
    v = v * t * share / share.cumsum(0)
    want = np.tril(q @ k.T) @ v / incoming / (1 + np.exp(-conserved_in))
    assert_close("o", o[0, :, 0], want)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_first_token_is_a_share_of_its_value(implementation):
    q, k, v = normal(0, 2, 9, 2, 6), normal(1, 2, 9, 2, 6), normal(2, 2, 9, 2, 5)
    ids = jnp.asarray([[0] * 4 + [1] * 5, [0] * 9])
    o, _ = causal_flow_attention(q, k, v, eps=0.0, segment_ids=ids, implementation=implementation)
    assert_close("o", o[:, 0], 0.7310586 * v[:, 0])  # sigmoid(1)
    assert_close("o of the second document", o[0, 4], 0.7310586 * v[0, 4])


def test_equal_tokens_give_a_share_of_the_running_mean():
    q, k = (jnp.broadcast_to(normal(seed, 1, 1, 2, 6), (1, 30, 2, 6)) for seed in (0, 1))
    v = normal(2, 1, 30, 2, 5)
    o, state = causal_flow_attention(q, k, v, eps=0.0)
    mean = v.cumsum(1) / jnp.arange(1, 31)[None, :, None, None]
    assert_close("o", o, 0.7310586 * mean)
    np.testing.assert_array_equal(state.tokens, 30)


def test_only_the_inputs_are_kept_for_the_backward_pass():
    q, k, v = normal(0, 2, 256, 2, 6), normal(1, 2, 256, 2, 6), normal(2, 2, 256, 2, 5)
    _, pullback = jax.vjp(lambda *x: causal_flow_attention(*x)[0], q, k, v)
    kept = sum(residual.size for residual in jax.tree.leaves(pullback))
    state = sum(x.size for x in init_flow_state(2, 2, 6, 5))
    assert kept <= q.size + k.size + v.size + state


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {"q": ones(2, 5, 4, 8), "k": ones(2, 5, 4, 8), "v": ones(2, 5, 4, 6)}
STATE = init_flow_state(2, 4, 8, 6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": ones(2, 5, 8)}),
        ("k", {"k": ones(2, 6, 4, 8)}),
        ("k", {"k": ones(2, 5, 2, 8), "v": ones(2, 5, 2, 6)}),
        ("v", {"v": ones(2, 4, 4, 6)}),
        ("feature_map", {"feature_map": "elu"}),
        ("clip", {"clip": None}),
        ("clip", {"clip": 41}),
        ("eps", {"eps": -1.0}),
        ("initial_state", {"initial_state": tuple(STATE)}),
        (r"initial_state\.tokens", {"initial_state": STATE._replace(tokens=ones(2))}),
        (r"initial_state\.shares", {"initial_state": STATE._replace(shares=ones(2, 3))}),
        ("segment_ids", {"segment_ids": ones(2, 5)}),
        ("implementation", {"implementation": "chunked"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        causal_flow_attention(**GOOD | change)
