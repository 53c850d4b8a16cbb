"""Where segments start and go on, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from ops.framework import segments

# Ids that come back, a segment of one token, and a row that is one segment.
IDS = jnp.array([[5, 5, 0, 5, 5], [1, 1, 1, 1, 1], [2, 3, 3, 3, 3], [4, 4, 4, 4, 0]])
ANSWERS = {
    "starts": ["00110", "00000", "01000", "00001"],
    "continues": ["11001", "11111", "10111", "11110"],
    "numbers": ["00122", "00000", "01111", "00001"],
    "reaches_start": ["11000", "11111", "10000", "11110"],
    "reaches_end": ["00011", "11111", "01111", "00001"],
}


@pytest.mark.parametrize("question", ANSWERS)
def test_a_segment_is_a_run_of_equal_ids(question):
    expected = np.array([[int(letter) for letter in row] for row in ANSWERS[question]])
    got = getattr(segments, question)(IDS)
    assert got.dtype == (jnp.int32 if question == "numbers" else jnp.bool_)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("question", ANSWERS)
def test_a_single_token_goes_on_with_what_came_before(question):
    got = getattr(segments, question)(jnp.array([[3], [0]]))
    wanted = question not in ("starts", "numbers")
    np.testing.assert_array_equal(got, [[wanted], [wanted]])


@pytest.mark.parametrize("question", ANSWERS)
def test_no_ids_are_one_segment(question):
    assert getattr(segments, question)(None) is None


@pytest.mark.parametrize("question", [q for q in ANSWERS if q != "numbers"])
def test_walking_in_reverse_is_walking_along_flipped_tokens(question):
    ask = getattr(segments, question)
    np.testing.assert_array_equal(ask(IDS, reverse=True), ask(IDS[:, ::-1])[:, ::-1])
