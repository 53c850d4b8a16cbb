"""Videos of items that bounce."""

from typing import Any

import numpy as np
import pytest

from experiments.tasks.video_generation import bounced, drawn, make


def test_what_meets_an_edge_turns_around():
    start, speed = np.array([[[1.0, 5.0]]]), np.array([[[2.0, -3.0]]])
    places = bounced(start, speed, np.array([4, 6]), 6)[0, 0]
    assert places.tolist() == [[1, 5], [3, 2], [3, 1], [1, 4], [1, 5], [3, 2]]
    assert bounced(start, speed, np.array([0, 0]), 3).max() == 0


def test_items_are_drawn_where_they_are_and_the_brighter_is_seen():
    items = np.array([0.5, -0.5], np.float32).reshape(1, 2, 1, 1, 1) * np.ones((1, 2, 2, 2, 1))
    places = np.array([[[[0, 0], [1, 1]], [[1, 1], [1, 1]]]])
    video = drawn(items, places, 3)[0, ..., 0]
    want = np.full((2, 3, 3), -1.0)
    want[0, 1:, 1:], want[0, :2, :2] = -0.5, 0.5
    want[1, 1:, 1:] = 0.5
    np.testing.assert_array_equal(video, want)


def test_a_video_follows_from_its_number_and_splits_share_no_item():
    task: Any = make(items=2, frames=3)
    train = task.train(0)
    assert train.length is None
    whole, part = train.fetch(np.arange(6)), train.fetch(np.array([4, 1]))
    np.testing.assert_array_equal(part["image"], whole["image"][[4, 1]])
    assert whole["image"].shape == (6, 3, 16, 16, 1) and whole["image"].dtype == np.float32
    other = task.train(1).fetch(np.arange(6))["image"]
    test = task.evaluation("test").examples.fetch(np.arange(6))
    assert np.abs(other - whole["image"]).max() > 1 and np.abs(test["image"] - other).max() > 1
    assert test["number"].tolist() == [0, 1, 2, 3, 4, 5]
    assert task.sizes["frames"] == 3 and task.sizes["output_channels"] == 2


def test_items_larger_than_a_frame_are_refused():
    with pytest.raises(ValueError, match="size must be at least that of an item, 8 x 8; got 7"):
        make(size=7)
