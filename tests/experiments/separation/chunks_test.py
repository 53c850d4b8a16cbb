"""Sounds in chunks, against a separator that knows the answer but neither order nor loudness."""

import itertools

import numpy as np
import pytest

from experiments.separation.chunks import chunks_of, scaled, separated

SOURCES = np.random.default_rng(0).standard_normal((3, 103)).astype(np.float32)


class Oracle:
    """Returns the sources of each chunk in a random order, each times a random number."""

    def __init__(self, chunk: int, overlap: int):
        self.spans = iter(chunks_of(SOURCES.shape[1], chunk, overlap))
        self.rng = np.random.default_rng(1)

    def __call__(self, chunks_BC: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        found = np.zeros((len(chunks_BC), 3, chunks_BC.shape[1]), np.float32)
        for row, (length, chunk) in enumerate(zip(lengths_B, chunks_BC, strict=True)):
            if length == 0:  # fills up the batch
                continue
            begin, end = next(self.spans)
            assert end - begin == length and not np.any(chunk[length:])
            np.testing.assert_allclose(chunk[:length], SOURCES[:, begin:end].sum(0), atol=1e-5)
            order, scale = self.rng.permutation(3), self.rng.uniform(-3, 3, 3)
            found[row, :, :length] = scale[:, None] * SOURCES[order, begin:end]
        return found


@pytest.mark.parametrize("overlap", [4, 10, 19])
@pytest.mark.parametrize("batch", [1, 3])
def test_sources_keep_their_order_and_loudness_from_chunk_to_chunk(overlap, batch):
    mixture = SOURCES.sum(axis=0)
    got = separated(Oracle(20, overlap), mixture, chunk=20, overlap=overlap, batch=batch)
    first = [int(np.argmax(np.abs(SOURCES[:, :20] @ source[:20]))) for source in got]
    assert sorted(first) == [0, 1, 2]
    np.testing.assert_allclose(got, SOURCES[first], atol=1e-4)


@pytest.mark.parametrize("length", [1, 19, 20, 21, 103])
def test_chunks_cover_a_sound_and_none_is_within_the_one_before(length):
    for overlap in (0, 7, 19):
        spans = chunks_of(length, 20, overlap)
        assert spans[0][0] == 0 and spans[-1][1] == length
        for (begin, end), (following, last) in itertools.pairwise(spans):
            assert end - begin == 20 and following == end - overlap and last > end


def test_estimates_that_are_alike_share_the_mixture():
    """Least squares alone would take 100 times their difference."""
    one = SOURCES[0, :20].astype(np.float64)
    other, mixture = one + 0.01 * SOURCES[1, :20], one + SOURCES[1, :20]
    got = scaled(np.stack((one, other)), mixture)
    share = np.linalg.norm(got, axis=1) / np.linalg.norm(mixture)
    assert np.all(share < 0.6)
    lone = scaled(np.stack((one, 0 * one)), 3 * one)
    np.testing.assert_allclose(lone, [3 * one, 0 * one], atol=1e-12)


def test_silence_is_silence_and_an_overlap_as_long_as_a_chunk_is_refused():
    silence = np.zeros(50, np.float32)
    got = separated(lambda x, n: np.zeros((1, 2, 20)), silence, chunk=20, overlap=5, batch=1)
    assert got.shape == (2, 50) and not np.any(got)
    with pytest.raises(ValueError, match=r"overlap must be in \[0, 20\).* got 20"):
        chunks_of(50, 20, 20)
