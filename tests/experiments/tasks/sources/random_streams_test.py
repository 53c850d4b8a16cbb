"""Random numbers by (stream, example): independent of company, uniform or normal."""

import math

import numpy as np

from experiments.tasks.sources.random_streams import integers, normals, uniforms


def test_numbers_of_an_example_do_not_depend_on_its_company() -> None:
    together = uniforms("stream", np.arange(50), 7)
    chosen = np.array([41, 3, 4, 5, 0, 49])
    np.testing.assert_array_equal(uniforms("stream", chosen, 7), together[chosen])


def test_streams_and_examples_differ() -> None:
    numbers = np.concatenate([uniforms(stream, np.arange(100), 9) for stream in ("a", "b")])
    assert len(np.unique(numbers)) == numbers.size


def test_integers_are_uniform_and_normals_normal() -> None:
    numbers = uniforms("stream", np.arange(1000), 100)
    counts = np.bincount(integers(numbers, 3, 7).ravel(), minlength=8)
    assert not counts[:3].any()
    np.testing.assert_allclose(counts[3:], 20_000, atol=5 * math.sqrt(20_000))
    values = normals(numbers).astype(np.float64)
    moments = [np.mean(values**power) for power in (1, 2, 3, 4)]
    # The variances of the first four powers of a standard normal variable are 1, 2, 15 and 96.
    np.testing.assert_array_less(
        np.abs(np.array(moments) - [0, 1, 0, 3]),
        4 * np.sqrt([1, 2, 15, 96]) / math.sqrt(values.size),
    )
