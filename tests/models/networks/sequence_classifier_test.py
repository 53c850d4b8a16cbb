"""The classifier of sequences: what is pooled, what a head compares, and that padding is not
read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.networks.sequence_classifier import build, pooled
from tests.support.layers import FLOAT32, array, randomised
from tests.support.mixers import SegmentMean, add_mixers

TOKENS = jnp.arange(12).reshape(2, 6) % 7
LENGTHS = np.array([[3], [5]])
MASK = jnp.asarray(np.arange(6)[None] < LENGTHS)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    add_mixers(monkeypatch, segment_mean=SegmentMean)


def classifier(documents: int = 1, vocabulary: int = 7, channels: int = 0, **model: Any) -> Any:
    config = {"width": 8, "depth": 1, "pattern": ("segment_mean",), "mlp": "none"} | model
    sizes = {"classes": 3, "documents": documents, "vocabulary": vocabulary, "channels": channels}
    return randomised(lambda: build(config, rngs=nnx.Rngs(0), **sizes, **FLOAT32))


def call(model: Any, *arguments: Any, **inputs: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, a, i: m(*a, **i))(model, arguments, inputs))


@pytest.mark.parametrize("norm", ["rms", "batch"])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_is_not_read(pooling, norm):
    model = classifier(pooling=pooling, norm=norm)
    model.eval()  # a batch norm is then a map of each token
    logits = call(model, jnp.where(MASK, TOKENS, 6), mask=MASK)
    alone = [call(model, TOKENS[i : i + 1, :length])[0] for i, (length,) in enumerate(LENGTHS)]
    np.testing.assert_allclose(logits, alone, atol=1e-5)


def test_pools_are_of_the_tokens_of_each_document():
    x = jax.random.normal(jax.random.key(0), (1, 5, 3))
    of = jnp.asarray([[[0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]], bool)
    for pooling, want in {
        "mean": (x[0, 1] + x[0, 2]) / 2,
        "first": x[0, 1],
        "last": x[0, 2],
    }.items():
        got = pooled(x, of, pooling)[0]
        np.testing.assert_allclose(got[0], want, rtol=1e-6)
        np.testing.assert_array_equal(got[1], x[0, 3])
        np.testing.assert_array_equal(got[2], np.zeros(3))


def test_two_documents_are_read_apart_and_compared_however_they_are_packed():
    model = classifier(documents=2, head_width=5)
    first, second = TOKENS[:, :3], TOKENS[:, 3:5]
    tokens = jnp.concatenate([first, second, jnp.full((2, 1), 6)], axis=1)
    mask = jnp.array([[True] * 5 + [False]] * 2)
    logits = call(model, tokens, mask=mask)

    one = classifier()
    one = nnx.merge(nnx.graphdef(one), nnx.merge_state(nnx.state(one), _shared(model)))

    def encoded(document):
        x, _ = one.hidden(document)
        return np.asarray(jnp.mean(one.norm(x), axis=1), np.float64)

    a, b = encoded(first), encoded(second)
    h = np.concatenate([a, b, a * b, a - b], axis=-1) @ array(model.comparison.kernel)
    h = np.maximum(h + array(model.comparison.bias), 0)
    want = h @ array(model.head.kernel) + array(model.head.bias)
    np.testing.assert_allclose(logits, want, atol=2e-5 * np.abs(want).max())

    ids = jnp.array([[0, 0, 0, 1, 1, 2]] * 2)
    np.testing.assert_allclose(call(model, tokens, segment_ids=ids), logits, atol=1e-5)
    with pytest.raises(ValueError, match="2 documents must divide evenly; got 5"):
        model(TOKENS[:, :5])


def _shared(model: Any) -> Any:
    state = nnx.state(model)
    return nnx.State({name: state[name] for name in ("embedding", "stack", "norm")})


def test_numbers_are_scaled_and_mapped():
    model = classifier(vocabulary=0, encoder="linear", input_mean=3.0, input_std=2.0)
    linear = model.embedding.linear
    want = ((np.asarray(TOKENS)[..., None] - 3) / 2) @ array(linear.kernel) + array(linear.bias)
    np.testing.assert_allclose(model.embedding(TOKENS), want, atol=1e-5)
    two = classifier(vocabulary=0, channels=2, encoder="linear")
    assert two(jnp.ones((2, 4, 2))).shape == (2, 3)
    with pytest.raises(ValueError, match=r"numbers must be \[B, T, 2\] .*; got \(2, 4, 3\)"):
        two(jnp.ones((2, 4, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of 'mean', 'first', 'last'; got 'max'"),
        ({"encoder": "pixels"}, "encoder must be one of 'embedding', 'linear'; got 'pixels'"),
        ({"vocabulary": 0}, "encoder='embedding' needs a task with a vocabulary"),
        ({"documents": 3}, "reads 1 document or compares 2; got 3"),
        ({"input_std": 0.0}, r"input_std must be a finite number in \(0, 3.4e38\]; got 0.0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options)


def test_the_small_model_of_s4d_has_about_200_000_parameters_and_one_read_for_each_side():
    """Sequential CIFAR in colour, with B of ones, which the authors leave out."""
    config = {"width": 128, "depth": 4, "pattern": ("s4d",), "mlp": "none", "norm": "layer"}
    config |= {"pre_norm": False, "encoder": "linear", "dropout": 0.1}

    def count(*, causal, without=""):
        mixers = {"s4d": {"state_size": 64, "causal": causal, "dropout": 0.1}}
        model = nnx.eval_shape(
            lambda: build(
                config | {"mixers": mixers},
                classes=10,
                channels=3,
                rngs=nnx.Rngs(0, dropout=1),
                **FLOAT32,
            )
        )
        leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return sum(leaf.size for path, leaf in leaves if not without or without not in str(path))

    assert count(causal=True, without="write") == 201_482
    assert count(causal=False) - count(causal=True) == 4 * 128 * 64
