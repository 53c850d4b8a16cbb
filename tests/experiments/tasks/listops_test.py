"""ListOps: expressions are well formed, and their values are what an evaluator of their own
finds."""

import random
from typing import Any

import numpy as np
import pytest

from experiments.tasks.listops import draw
from experiments.training.task import Examples, find_task

NAMES = [*map(str, range(10)), "[MAX", "[MIN", "[MED", "[SM", "]"]


def batch(n=300, name="test", **options):
    task: Any = find_task("listops", {"shortest": 8, "longest": 60, "depth": 4, **options})
    train = task.train(0)
    assert isinstance(train, Examples)
    examples = train if name == "train" else task.evaluations[name]
    return task, examples.fetch(np.arange(n))


def evaluate(words):
    """Value and greatest depth of an expression, with a stack of lists."""
    stack, deepest = [[]], 0
    for word in words:
        if word == "]":
            operator, *values = stack.pop()
            assert len(values) >= 2
            half = len(values) // 2
            ordered = sorted(values)
            stack[-1].append(
                {
                    "[MAX": ordered[-1],
                    "[MIN": ordered[0],
                    "[MED": (ordered[half] + ordered[-half - 1]) // 2,
                    "[SM": sum(values) % 10,
                }[operator]
            )
        elif word.startswith("["):
            stack.append([word])
            deepest = max(deepest, len(stack) - 1)
        else:
            stack[-1].append(int(word))
    ((value,),) = stack
    return value, deepest


def test_the_answer_is_the_value_of_the_expression():
    task, arrays = batch()
    assert task.sizes["vocabulary"] == 16 + 10
    depths, ends = [], arrays["readout_positions"][:, 0]
    for tokens, target, end in zip(arrays["tokens"], arrays["targets"][:, 0], ends, strict=True):
        assert np.all(tokens[end + 1 :] == 15)
        value, depth = evaluate([NAMES[token] for token in tokens[: end + 1]])
        assert target == 16 + value
        depths.append(depth)
    assert ends.min() >= 7 and ends.max() <= 59 and ends.max() - ends.min() > 40
    assert set(depths) == {1, 2, 3, 4}
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        "tokens": ((300, 60), np.int32),
        "targets": ((300, 1), np.int32),
        "weights": ((300, 1), np.float32),
        "readout_positions": ((300, 1), np.int32),
    }


def test_what_is_drawn_is_drawn_as_published():
    """Given the lengths nothing is uniform, so only short lists are counted: all of them fit."""
    _, arrays = batch(2000, shortest=4, longest=200, depth=1, arguments=5)
    tokens, ends = arrays["tokens"], arrays["readout_positions"][:, 0]
    operators = np.bincount(tokens[:, 0], minlength=14)[10:14]
    np.testing.assert_allclose(operators / 2000, 1 / 4, atol=0.04)
    arguments = np.bincount(ends - 1)[2:]
    np.testing.assert_allclose(arguments / 2000, 1 / 4, atol=0.04)
    digits = np.bincount(tokens[tokens < 10], minlength=10)
    np.testing.assert_allclose(digits / digits.sum(), 1 / 10, atol=0.02)
    _, arrays = batch(2000, shortest=4, longest=200, depth=2, arguments=2)
    # Of the two arguments a quarter are lists.
    lists = np.sum((arrays["tokens"] >= 10) & (arrays["tokens"] < 14), axis=1) - 1
    np.testing.assert_allclose(lists.mean() / 2, 1 / 4, atol=0.03)


def test_the_published_lengths_can_be_drawn():
    tokens, value = draw(random.Random(0), 500, 2000, 10, 10)
    assert 500 <= len(tokens) <= 2000
    assert evaluate([NAMES[token] for token in tokens])[0] == value


def test_splits_and_seeds_differ_and_come_back_the_same():
    streams = [batch(50, name)[1]["tokens"] for name in ("train", "validation", "test")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(np.all(streams[one] == streams[other], axis=1)) < 0.1
    np.testing.assert_array_equal(streams[0], batch(50, "train")[1]["tokens"])
    task, _ = batch(1)
    other = task.train(1)
    assert isinstance(other, Examples) and other.length == 96_000
    assert np.any(other.fetch(np.arange(50))["tokens"] != streams[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortest": 3}, "4 <= shortest <= longest.*got shortest=3"),
        ({"longest": 7}, "4 <= shortest <= longest.*longest=7"),
        ({"arguments": 1}, r"arguments must be an integer in \[2, 100\]; got 1"),
        ({"depth": 1, "arguments": 5}, "shortest must be at most 7, .* got 8"),
        ({"train_examples": -1}, r"train_examples must be an integer in \[0, 2\^31\); got -1"),
        ({"test_examples": 0}, r"test_examples must be an integer in \[1, 2\^31\); got 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batch(1, **options)


def test_lengths_that_never_come_are_named(monkeypatch):
    monkeypatch.setattr("experiments.tasks.listops.TRIES", 100)
    with pytest.raises(ValueError, match="from shortest=30 to longest=30 tokens in 100"):
        draw(random.Random(0), 30, 30, 3, 3)
