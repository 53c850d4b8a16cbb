"""Attention within a ball: the contract in 1 to 3 dimensions, what is seen, and a context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import neighbourhood_attention
from ops.neighbourhood_attention import examples
from tests.contracts.noncausal import NonCausalContract
from tests.contracts.ops import assert_close


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


class TestNeighbourhoodAttention(NonCausalContract):
    """Grids of several tiles in each dimension but those of two; documents are whole rows."""

    op = staticmethod(neighbourhood_attention)
    examples = examples
    variants = ("1", "2", "3")
    sizes = (1, 120)
    documents = (36, 12, 60, 12)

    def options(self, variant, length):
        rows = {"1": (), "2": (12,), "3": (2, 6)}[variant]
        rows = tuple(min(length, x) for x in rows)
        grid = (length // int(np.prod(rows)), *rows)
        return {"grid": grid, "radius": {"1": 5, "2": 2.5, "3": 2}[variant]}


def seen(grid, radius):
    """[T, T]: whether the output of a token depends on the value of another, and only on that."""
    length = int(np.prod(grid))
    x = jnp.zeros((1, length, 1, 1))
    values = jnp.eye(length)[None, :, None, :]
    o = neighbourhood_attention(x, x, values, grid=grid, radius=radius)
    return np.asarray(o[0, :, 0]) > 0


@pytest.mark.parametrize(("radius", "count"), [(2, 9), (4, 45), (8, 193)])
def test_an_interior_token_sees_as_many_as_lie_in_the_open_disc(radius, count):
    side = 2 * radius + 1
    sees = seen((side, side + 2), radius)
    assert sees[radius * (side + 2) + radius].sum() == count
    np.testing.assert_array_equal(sees, sees.T)


def test_edges_cut_the_disc():
    grid, radius = (5, 7), 3
    y, x = (axis.reshape(-1) for axis in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    near = (y[:, None] - y[None]) ** 2 + (x[:, None] - x[None]) ** 2 < radius**2
    np.testing.assert_array_equal(seen(grid, radius), near)
    # sum over the offsets of the disc of how many pairs the grid has of each
    offsets = [(a, b) for a in range(-2, 3) for b in range(-2, 3) if a * a + b * b < 9]
    assert near.sum() == sum((5 - abs(a)) * (7 - abs(b)) for a, b in offsets)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_radius_above_the_diagonal_is_full_attention(implementation):
    q, k, v = (normal(seed, 2, 60, 2, 6) for seed in range(3))
    o = neighbourhood_attention(q, k, v, grid=(6, 10), radius=12, implementation=implementation)
    assert_close("o", o, jax.nn.dot_product_attention(q, k, v))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_radius_of_one_is_the_token_itself(implementation):
    q, k, v = (normal(seed, 2, 60, 2, 6) for seed in range(3))
    o = neighbourhood_attention(q, k, v, grid=(6, 10), radius=1, implementation=implementation)
    assert_close("o", o, v)


@pytest.mark.parametrize("masked", [False, True])
def test_a_context_is_seen_by_all_and_has_gradients(masked):
    arrays = [normal(0, 2, 120, 4, 6), normal(1, 2, 120, 2, 6), normal(2, 2, 120, 2, 5)]
    arrays += [normal(3, 2, 7, 2, 6), normal(4, 2, 7, 2, 5)]
    mask = jnp.asarray([[True] * 5 + [False] * 2, [False] * 7]) if masked else None
    results = []
    for implementation in ("reference", "xla"):

        def call(q, k, v, context_k, context_v, implementation=implementation):
            return neighbourhood_attention(
                *(q, k, v),
                grid=(10, 12),
                radius=2,
                context_k=context_k,
                context_v=context_v,
                context_mask=mask,
                implementation=implementation,
            )

        o, pullback = jax.vjp(call, *arrays)
        results.append((o, *pullback(normal(5, *o.shape))))
    names = ("o", "dq", "dk", "dv", "dcontext_k", "dcontext_v")
    for name, want, got in zip(names, *results, strict=True):
        assert_close(name, got, want)
    assert np.abs(results[0][4]).max() > 0.1
    if masked:
        np.testing.assert_array_equal(results[1][4][1], 0.0)


def test_a_large_key_in_the_context_takes_all_weight():
    q, k, v = (normal(seed, 1, 60, 2, 6) for seed in range(3))
    q = jnp.abs(q) + 1
    context_k, context_v = jnp.full((1, 1, 2, 6), 100.0), normal(3, 1, 1, 2, 6)
    o = neighbourhood_attention(
        q, k, v, grid=(6, 10), radius=3, context_k=context_k, context_v=context_v
    )
    assert_close("o", o, jnp.broadcast_to(context_v, o.shape))


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporary_bytes(rows):
        x = jax.ShapeDtypeStruct((1, rows * 32, 2, 8), jnp.float32)

        def loss(x):
            return jnp.sum(jnp.sin(neighbourhood_attention(x, x, x, grid=(rows, 32), radius=4)))

        return jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes

    # 16 times if it grew with the square.
    assert temporary_bytes(128) < 4.5 * temporary_bytes(32)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {
    "q": ones(2, 12, 4, 8),
    "k": ones(2, 12, 2, 8),
    "v": ones(2, 12, 2, 6),
    "grid": (3, 4),
    "radius": 2,
}
CONTEXT = {"context_k": ones(2, 3, 2, 8), "context_v": ones(2, 3, 2, 6)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": ones(2, 12, 8)}),
        ("k", {"k": ones(2, 6, 2, 8)}),
        ("v", {"v": ones(2, 12, 4, 6)}),
        ("grid", {"grid": (3, 5)}),
        ("grid", {"grid": (3.0, 4)}),
        ("radius", {"radius": 0}),
        ("scale", {"scale": float("inf")}),
        ("context_v", {"context_k": CONTEXT["context_k"]}),
        ("context_k", {**CONTEXT, "context_k": ones(2, 3, 4, 8)}),
        ("context_v", {**CONTEXT, "context_v": ones(2, 4, 2, 6)}),
        ("context_mask", {**CONTEXT, "context_mask": ones(2, 4, dtype=bool)}),
        ("context_mask", {"context_mask": ones(2, 4, dtype=bool)}),
        ("key_mask", {"key_mask": ones(2, 12)}),
        ("segment_ids", {"segment_ids": ones(2, 12)}),
        ("implementation", {"implementation": "flash"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        neighbourhood_attention(**GOOD | change)
