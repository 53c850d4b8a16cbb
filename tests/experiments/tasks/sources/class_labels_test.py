"""Answers that are tokens, as labels of classes; what the tasks make of it is in
tests/experiments/tasks/long_range_arena_test.py."""

import numpy as np
import pytest

from experiments.objectives.classification import Classification
from experiments.tasks.sources.class_labels import answered_by
from experiments.training.task import Examples, Task, from_arrays

ARRAYS = {
    "tokens": np.arange(8).reshape(2, 4) % 5,
    "targets": np.array([[6], [5]]),
    "weights": np.array([[1.0], [0.0]]),
    "readout_positions": np.array([[1], [3]]),
}
TASK = Task(
    sizes={"vocabulary": 7},
    train=lambda seed: (from_arrays(ARRAYS), from_arrays(ARRAYS)),
    evaluations={"test": from_arrays(ARRAYS)},
    provenance={"of": "a test"},
)


def test_a_token_becomes_a_label_and_the_mask_ends_at_the_question() -> None:
    task = answered_by("class", TASK, 2)
    assert task.sizes == {"vocabulary": 5, "classes": 2} and task.provenance == TASK.provenance
    assert isinstance(task.objective, Classification)
    parts = task.train(0)
    assert not isinstance(parts, Examples) and len(parts) == 2
    scored = task.evaluations["test"]
    assert isinstance(scored, Examples) and scored.length == 2
    for examples in (*parts, scored):
        batch = examples.fetch(np.array([1, 0]))
        np.testing.assert_array_equal(batch["labels"], [0, 1])
        np.testing.assert_array_equal(batch["weights"], [0, 1])
        np.testing.assert_array_equal(batch["mask"], [[True] * 4, [True, True, False, False]])
        np.testing.assert_array_equal(batch["tokens"], ARRAYS["tokens"][::-1])


def test_another_answer_is_refused() -> None:
    assert answered_by("token", TASK, 2) is TASK
    with pytest.raises(ValueError, match="answer must be one of 'token', 'class'; got 'word'"):
        answered_by("word", TASK, 2)
