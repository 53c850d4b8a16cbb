"""Tasks by name, their sizes and evaluations."""

from typing import Any

import numpy as np
import pytest

from experiments.configs import linear_self_attention
from experiments.training.task import available_tasks, configured_task, find_task, from_arrays

PARITY = find_task("state_tracking", {"kind": "parity"})


def test_an_unknown_evaluation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="evaluation must be one of in_distribution, long; got 'test'"
    ):
        PARITY.evaluation("test")


def test_z_loss_needs_logits() -> None:
    config: Any = linear_self_attention.get_config("icl_regression,smoke")
    config.z_loss = 1e-4
    with pytest.raises(ValueError, match=r"config\.z_loss is for tasks with a vocab"):
        configured_task(config)


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    known = {"icl_regression", "images", "mqar", "state_tracking", "text"}
    assert known <= set(available_tasks())
    assert not {"random_streams", "text_corpus"} & set(available_tasks())
    with pytest.raises(
        ValueError, match=r"task.name must be one of .*icl_regression, .*, text, .*; got 'parity'"
    ):
        find_task("parity", {})


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError,
        match=("task mqar has no option 'pairs'; known options in task: train, test, vocab"),
    ):
        find_task("mqar", {"pairs": 4})


def test_arrays_in_memory_are_looked_up_by_row() -> None:
    examples = from_arrays({"tokens": np.arange(10).reshape(5, 2)})
    assert examples.length == 5
    np.testing.assert_array_equal(examples.fetch(np.array([4, 0]))["tokens"], [[8, 9], [0, 1]])
