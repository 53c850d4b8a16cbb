"""Flow attention: sums against matrices, and what the conservation of flows implies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import bidirectional_linear_attention, flow_attention
from ops.flow_attention import examples
from tests.contracts.noncausal import NonCausalContract
from tests.contracts.ops import assert_close


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


class TestFlowAttention(NonCausalContract):
    op = staticmethod(flow_attention)
    examples = examples
    variants = (
        "published",
        pytest.param("without clip", marks=pytest.mark.slow),
        pytest.param("relu, plain", marks=pytest.mark.full),
    )
    sizes = (2, 50)
    documents = (23, 1, 30, 6)
    masks = ("query_mask", "key_mask")

    def options(self, variant, length):
        return {
            "published": {},
            "without clip": {"clip": None, "eps": 0.0},
            "relu, plain": {
                "feature_map": "relu",
                "competition": False,
                "allocation": False,
                "eps": 0.1,
            },
        }[variant]


def by_definition(q, k, v, clip=1.0):
    """In float64 by normalised matrices: the spec's quadratic view, one head."""
    q, k = 1 / (1 + np.exp(-q)), 1 / (1 + np.exp(-k))
    M = q @ k.T
    by_row, by_column = M / M.sum(1, keepdims=True), M / M.sum(0, keepdims=True)
    share = np.exp(np.clip(by_row.sum(0), -clip, clip))
    c = len(k) * share / share.sum()
    opening = 1 / (1 + np.exp(-by_column.sum(1) * len(q) / len(k)))
    return opening[:, None] * (by_row @ (c[:, None] * v)), c, by_row, by_column


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_it_is_rows_and_columns_normalised(implementation):
    q, k, v = normal(0, 1, 21, 1, 6), normal(1, 1, 34, 1, 6), normal(2, 1, 34, 1, 5)
    o = flow_attention(q, k, v, eps=0.0, implementation=implementation)
    wide = [np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v)]
    want, c, by_row, by_column = by_definition(*wide)
    assert_close("o", o[0, :, 0], want)
    # Nothing is lost: what the sinks let in is what there are of sources, and the reverse.
    assert abs(by_column.sum() - 34) < 1e-9 and abs(by_row.sum() - 21) < 1e-9
    assert np.abs(o).max() <= c.max() * np.abs(v).max()


@pytest.mark.slow
def test_equal_queries_and_equal_keys_give_a_share_of_the_mean():
    q, k = (jnp.broadcast_to(normal(seed, 1, 1, 2, 6), (1, 30, 2, 6)) for seed in (0, 1))
    v = normal(2, 1, 30, 2, 5)
    o = flow_attention(q, k, v, eps=0.0)
    mean = jnp.broadcast_to(v.mean(1, keepdims=True), v.shape)
    assert_close("o", o, 0.7310586 * mean)  # sigmoid(1)


def test_without_competition_and_allocation_it_is_linear_attention():
    q, k, v = normal(0, 2, 40, 2, 6), normal(1, 2, 40, 2, 6), normal(2, 2, 40, 2, 5)
    o = flow_attention(q, k, v, competition=False, allocation=False, eps=0.0)
    features = jax.nn.sigmoid(q), jax.nn.sigmoid(k)
    assert_close("o", o, bidirectional_linear_attention(*features, v, eps=0.0))


def test_sources_in_another_order_change_nothing():
    q, k, v = normal(0, 1, 40, 2, 6), normal(1, 1, 40, 2, 6), normal(2, 1, 40, 2, 5)
    order = np.random.default_rng(0).permutation(40)
    o = flow_attention(q, k, v)
    assert_close("o", flow_attention(q, k[:, order], v[:, order]), o)
    assert_close("o", flow_attention(q[:, order], k, v), o[:, order])


def test_padding_that_both_masks_hide_is_not_there():
    q, k, v = normal(0, 1, 40, 2, 6), normal(1, 1, 40, 2, 6), normal(2, 1, 40, 2, 5)
    mask = jnp.arange(40)[None] < 27
    o = flow_attention(q, k, v, query_mask=mask, key_mask=mask)
    assert_close("o", o[:, :27], flow_attention(q[:, :27], k[:, :27], v[:, :27]))
    np.testing.assert_array_equal(o[:, 27:], 0.0)


def test_large_flows_without_a_clip_are_finite():
    """One source takes nearly all of 200 sinks: e^200 is no float32."""
    q, k = (jnp.abs(normal(seed, 1, 200, 2, 6)) for seed in (0, 1))
    k, v = k.at[:, 0].mul(1e6), normal(2, 1, 200, 2, 5)
    o, pullback = jax.vjp(lambda *x: flow_attention(*x, feature_map="identity", clip=None), q, k, v)
    assert all(np.isfinite(x).all() for x in (o, *pullback(o)))


def test_only_the_inputs_are_kept_for_the_backward_pass():
    q, k, v = normal(0, 2, 256, 2, 6), normal(1, 2, 256, 2, 6), normal(2, 2, 256, 2, 5)
    _, pullback = jax.vjp(flow_attention, q, k, v)
    kept = sum(residual.size for residual in jax.tree.leaves(pullback))
    assert kept <= q.size + k.size + v.size


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {"q": ones(2, 5, 4, 8), "k": ones(2, 5, 4, 8), "v": ones(2, 5, 4, 6)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": ones(2, 5, 8)}),
        ("k", {"k": ones(2, 5, 2, 8), "v": ones(2, 5, 2, 6)}),
        ("v", {"v": ones(2, 4, 4, 6)}),
        ("feature_map", {"feature_map": "elu"}),
        ("clip", {"clip": 0.0}),
        ("eps", {"eps": -1.0}),
        ("query_mask", {"query_mask": ones(2, 5)}),
        ("key_mask", {"key_mask": ones(2, 4, dtype=bool)}),
        ("segment_ids", {"segment_ids": ones(2, 5)}),
        ("implementation", {"implementation": "chunked"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        flow_attention(**GOOD | change)
