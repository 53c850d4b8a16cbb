"""LinGen's two branches against their equations, and the orders in which it walks."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import lingen
from models.lingen import ORDERS, adjacency, coarse, from_order, in_order
from ops import gated_linear_attention
from tests.support.layers import FLOAT32, array, merge, randomised, weight

GRID = (3, 4, 2)
TOKENS = np.random.default_rng(0).standard_normal((2, 24, 16)).astype(np.float32)


def build(layer: int = 0, **options: Any) -> Any:
    options = {"heads": 2, "state_heads": 2, "state_size": 4, "windows": (2, 2, 2), **options}
    return randomised(
        lambda: lingen.Mixer(16, depth=4, layer=layer, rngs=nnx.Rngs(0), **FLOAT32, **options)
    )


def index(order: int, grid: tuple[int, ...], t: int, y: int, x: int) -> int:
    """Where a token stands in a walk."""
    frames, rows, columns = grid
    return (
        (t * rows + y) * columns + x,
        (t * columns + x) * rows + y,
        (y * columns + x) * frames + t,
        (x * rows + y) * frames + t,
    )[order]


@pytest.mark.parametrize("order", range(4))
def test_an_order_is_its_index_map_and_is_undone(order):
    x = jnp.asarray(TOKENS)
    walked = jax.jit(in_order, static_argnums=1)(x, GRID, order)
    places = list(itertools.product(*map(range, GRID)))
    where = [index(order, GRID, *place) for place in places]
    assert sorted(where) == list(range(24))
    np.testing.assert_array_equal(np.asarray(walked)[:, where], TOKENS)
    back = jax.jit(from_order, static_argnums=1)(walked, GRID, order)
    np.testing.assert_array_equal(back, TOKENS)
    # Neighbours along the fastest axis are neighbours in the walk.
    fastest = ORDERS[order][-1]
    for place in places:
        after = [p + (axis == fastest) for axis, p in enumerate(place)]
        if after[fastest] < GRID[fastest]:
            assert index(order, GRID, *after) == index(order, GRID, *place) + 1


def test_without_decay_the_sum_of_both_walks_knows_no_order():
    def walks(order):
        q, k, v = (in_order(x, GRID, order).reshape(2, 24, 2, 8) for x in arrays)
        o = sum(gated_linear_attention(q, k, v, reverse=way)[0] for way in (False, True))
        return from_order(jnp.asarray(o).reshape(2, 24, 16), GRID, order)

    arrays = [jnp.asarray(np.random.default_rng(n).standard_normal(TOKENS.shape)) for n in range(3)]
    want, *others = jax.jit(lambda: [walks(order) for order in range(4)])()
    for got in others:
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))


def test_neighbours_are_nearer_in_four_orders_than_in_one():
    # Of (2, 2, 2) in order 0: neighbours along columns, rows and frames are 1, 2 and 4 apart.
    assert adjacency((2, 2, 2), (0,)) == pytest.approx(7 / 3)
    assert adjacency((2, 2, 2), (0, 1, 2, 3)) == 1.0
    assert adjacency((8, 8, 8), (0,)) == pytest.approx((1 + 8 + 64) / 3)


def windowed(mixer, x_TD, grid, shift):
    """Softmax attention among the tokens of a window, by its definition; windows of 2 x 2 x 2."""
    places = np.array(list(itertools.product(*map(range, grid))))
    size = np.minimum(2, grid)
    by = np.where(size == grid, 0, size // 2) * shift
    padded = -(-np.array(grid) // size) * size
    rolled = (places - by) % padded
    windows, side = rolled // size, places < by
    near = (windows[:, None] == windows[None]).all(-1) & (side[:, None] == side[None]).all(-1)
    q, k, v = (
        (x_TD @ weight(m) + array(m.bias)).reshape(len(x_TD), 2, -1)
        for m in (mixer.query, mixer.key, mixer.value)
    )
    scores = np.where(near, np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    o = np.einsum("hts,shk->thk", p / p.sum(axis=-1, keepdims=True), v)
    return merge(o) @ weight(mixer.output) + array(mixer.output.bias)


@pytest.mark.parametrize("layer", [0, 3])
def test_windows_are_shifted_in_odd_layers_and_padded(layer):
    mixer = build(layer, mamba=False)
    got = jax.jit(lambda m, x: m(x, grid=GRID)[0])(mixer, TOKENS)
    want = [windowed(mixer, x.astype(np.float64), GRID, layer % 2) for x in TOKENS]
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("layer", [2, pytest.param(1, marks=pytest.mark.full)])
def test_the_walk_is_of_the_layers_order_with_the_means_before_it(layer):
    mixer = build(layer, windows=(), review=(1, 2, 1))

    def walk(m, x):
        places = [index(layer, GRID, *p) for p in itertools.product(*map(range, GRID))]
        z = jnp.zeros_like(x).at[:, np.array(places)].set(x)
        means = jnp.stack(
            [x.reshape(2, *GRID, 16)[:, :, r : r + 2].mean((1, 2, 3)) for r in (0, 2)], 1
        )
        z = jnp.concatenate((means, z), axis=1)
        u = m.walk.forward(z)[0] + m.walk.backward(z[:, ::-1])[0][:, ::-1]
        return m(x, grid=GRID)[0], u[:, 2:][:, np.array(places)]

    got, want = jax.jit(walk)(mixer, jnp.asarray(TOKENS))
    np.testing.assert_allclose(got, want, atol=3e-5 * float(jnp.abs(want).max()))


def test_both_branches_add_up():
    both = build(1, scan="row_major")

    @jax.jit
    def parts(m, x):
        return m(x, grid=GRID)[0], m.walk(x)[0] + m.windowed(x, GRID)

    got, want = parts(both, jnp.asarray(TOKENS))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_means_are_over_the_parts_of_the_grid():
    got = coarse(jnp.asarray(TOKENS), GRID, (3, 2, 1))
    want = TOKENS.reshape(2, 3, 2, 2, 2, 16).mean(axis=(3, 4)).reshape(2, 6, 16)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"scan": "zigzag"}, {}, "scan must be one of 'rotary', 'row_major'; got 'zigzag'"),
        ({"windows": (2, 2)}, {}, r"windows must be \(\) or \(frames, rows, columns\)"),
        ({"windows": (), "mamba": False}, {}, "mamba must be True without windows"),
        ({"heads": 3}, {}, "heads must divide the 16 channels"),
        ({"review": (2, 1, 1)}, {"grid": GRID}, r"review must divide the grid \(3, 4, 2\)"),
        ({}, {"grid": (3, 4)}, "grid must be 1 to 3 integers whose product is"),
        ({}, {"grid": GRID, "segment_ids": 0}, "segment_ids must be None on a grid, with"),
    ],
)
def test_what_cannot_be_is_refused(options, given, message):
    with pytest.raises(ValueError, match=message):
        build(**options)(jnp.asarray(TOKENS), **given)
