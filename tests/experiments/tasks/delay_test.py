"""The delay task: band-limited signals, equally frequent levels, answers from the past."""

from typing import Any

import numpy as np
import pytest

from experiments.training.task import Examples, find_task


def batch(n=200, name="test", **options):
    task: Any = find_task("delay", options)
    train = task.train(0)
    assert isinstance(train, Examples)
    examples = task.evaluations["test"] if name == "test" else train
    return task, examples.fetch(np.arange(n))


def test_the_answer_is_the_token_that_many_steps_ago():
    task, arrays = batch(sequence_length=64, delay=5, levels=4)
    tokens, targets = arrays["tokens"], arrays["targets"]
    assert (task.sizes["vocabulary"], tokens.shape[1]) == (4, 64)
    np.testing.assert_array_equal(targets[:, 5:], tokens[:, :-5])
    np.testing.assert_array_equal(arrays["weights"][0], [0] * 5 + [1] * 59)
    assert {name: array.dtype for name, array in arrays.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "weights": np.float32,
    }


def test_levels_are_equally_frequent_and_neighbours_alike():
    _, arrays = batch(sequence_length=128, delay=0, levels=8, bandwidth=0.1)
    tokens = arrays["tokens"]
    frequency = np.bincount(tokens.ravel(), minlength=8) / tokens.size
    np.testing.assert_allclose(frequency, 1 / 8, atol=0.02)
    assert np.abs(np.diff(tokens, axis=1)).mean() < 1
    _, rough = batch(sequence_length=128, delay=0, levels=8, bandwidth=1.0)
    assert np.abs(np.diff(rough["tokens"], axis=1)).mean() > 2


def test_training_and_test_signals_differ_and_come_back_the_same():
    (_, train), (_, test), (_, again) = (batch(4, name) for name in ("train", "test", "train"))
    np.testing.assert_array_equal(train["tokens"], again["tokens"])
    assert (train["tokens"] != test["tokens"]).mean() > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": 256}, "need delay < sequence_length; got delay=256, sequence_length=256"),
        ({"levels": 1}, r"levels must be an integer in \[2, 1048576\]; got 1"),
        ({"bandwidth": 0.001}, "bandwidth must leave a frequency, .* got 0.001"),
        ({"bandwidth": 2.0}, r"bandwidth must be a finite number in \(0, 1\]; got 2.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        find_task("delay", options)
