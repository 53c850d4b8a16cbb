"""Attention within windows: the contract in 1 to 3 dimensions, and what a shift does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import shifted_window_attention
from ops.shifted_window_attention import examples
from tests.contracts.noncausal import BATCH, NonCausalContract
from tests.contracts.ops import assert_close


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


class TestShiftedWindowAttention(NonCausalContract):
    op = staticmethod(shifted_window_attention)
    examples = examples
    # Dimensions; of two with grouped heads, of three with a bias.
    variants = ("1", "2", "3")
    sizes = (1, 120)
    documents = (36, 12, 60, 12)

    def shape(self, variant, length):
        return super().shape(variant, length) | ({"heads": 4} if variant == "2" else {})

    def inputs(self, key, variant, length, dtype):
        inputs = super().inputs(key, variant, length, dtype)
        if variant == "3":
            tokens = int(np.prod(self.options(variant, length)["window"]))
            inputs["bias"] = jax.random.normal(jax.random.fold_in(key, 1), (2, tokens, tokens))
        return inputs

    def options(self, variant, length):
        if length == 1:
            return {"grid": (1,) * int(variant), "window": (1,) * int(variant)}
        rows = length // 12
        return {
            "1": {"grid": (length,), "window": (6,), "shift": (4,)},
            "2": {"grid": (rows, 12), "window": (rows // 2, 4), "shift": (rows // 4, 1)},
            "3": {"grid": (rows, 2, 6), "window": (rows // 2, 2, 3), "shift": (1, 0, 2)},
        }[variant]

    @pytest.mark.parametrize("variant", ["rows"])
    def test_packed_documents_equal_separate_ones(self, variant, implementation):
        """Documents of whole windows."""
        inputs = self.inputs(jax.random.key(1), "2", 120, "float32")
        ids = jnp.broadcast_to(jnp.repeat(jnp.asarray([5, 0, 5]), 40)[None], (BATCH, 120))
        given = {"window": (2, 2), "implementation": implementation}
        o = shifted_window_attention(**inputs, grid=(12, 10), segment_ids=ids, **given)
        for start in (0, 40, 80):
            part = {name: x[:, start : start + 40] for name, x in inputs.items()}
            alone = shifted_window_attention(**part, grid=(4, 10), **given)
            assert_close("o", o[:, start : start + 40], alone)


def full_attention(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    weights = np.exp(np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1]))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshv->bthv", weights, v)


GRID = (6, 10)
Q, K, V = (normal(seed, 2, 60, 2, size) for seed, size in enumerate((6, 6, 5)))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_window_as_large_as_the_grid_is_full_attention(implementation):
    o = shifted_window_attention(Q, K, V, grid=GRID, window=GRID, implementation=implementation)
    assert_close("o", o, full_attention(Q, K, V))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_every_window_is_full_attention_of_its_own_also_those_that_the_edges_cut(implementation):
    o = shifted_window_attention(
        Q, K, V, grid=GRID, window=(3, 5), shift=(1, 2), implementation=implementation
    ).reshape(2, *GRID, 2, 5)
    q, k, v = (x.reshape(2, *GRID, *x.shape[2:]) for x in (Q, K, V))
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        for columns in (slice(0, 2), slice(2, 7), slice(7, 10)):
            part = [x[:, rows, columns] for x in (q, k, v)]
            flat = [x.reshape(2, -1, *x.shape[3:]) for x in part]
            got = o[:, rows, columns].reshape(2, -1, 2, 5)
            assert_close(f"{rows}, {columns}", got, full_attention(*flat))


def test_a_bias_belongs_to_pairs_of_places_in_the_window():
    """Of 2 x 2 tokens; the first sees the last of its window alone."""
    bias = jnp.zeros((2, 4, 4)).at[:, 0, 3].set(200.0)
    o = shifted_window_attention(Q, K, V, grid=GRID, window=(2, 2), bias=bias)
    o, v = (x.reshape(2, *GRID, 2, 5) for x in (o, V))
    assert_close("o", o[:, ::2, ::2], v[:, 1::2, 1::2])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_document_whose_keys_are_hidden_has_zeros_beside_one_in_the_same_window(implementation):
    o = shifted_window_attention(
        *(x[:, :4] for x in (Q, K, V)),
        grid=(4,),
        window=(4,),
        key_mask=jnp.asarray([[True, True, False, False]] * 2),
        segment_ids=jnp.asarray([[0, 0, 1, 1]] * 2),
        implementation=implementation,
    )
    np.testing.assert_array_equal(o[:, 2:], 0.0)
    assert (np.abs(o[:, :2]) > 0).all()


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporary_bytes(rows):
        x = jax.ShapeDtypeStruct((1, rows * 32, 2, 8), jnp.float32)

        def loss(x):
            o = shifted_window_attention(x, x, x, grid=(rows, 32), window=(4, 4), shift=(2, 2))
            return jnp.sum(jnp.sin(o))

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
    "window": (3, 2),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": ones(2, 12, 8)}),
        ("k", {"k": ones(2, 6, 2, 8)}),
        ("v", {"v": ones(2, 12, 4, 6)}),
        ("grid", {"grid": (3, 5)}),
        ("grid", {"grid": (1, 1, 3, 4)}),
        ("grid", {"grid": 12}),
        ("window", {"window": (2, 2)}),
        ("window", {"window": (3,)}),
        ("window", {"window": (3, 0)}),
        ("shift", {"shift": (3, 0)}),
        ("shift", {"shift": (1,)}),
        ("scale", {"scale": float("nan")}),
        ("bias", {"bias": ones(4, 5, 6)}),
        ("key_mask", {"key_mask": ones(2, 12)}),
        ("segment_ids", {"segment_ids": ones(2, 12)}),
        ("implementation", {"implementation": "flash"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        shifted_window_attention(**GOOD | change)
