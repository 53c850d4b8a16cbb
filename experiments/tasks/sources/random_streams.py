"""Random numbers with random access: the numbers of example i of a stream are a function of
(stream, i) alone.

Philox is counter based: behind a key lies one long sequence that can be entered anywhere. Example i
owns the i-th block of it, so examples can be made in any order, by any process, alone or many at a
time, and always come out the same."""

import hashlib
import itertools

import numpy as np

NUMBERS_PER_COUNTER = 4  # Philox-4x64: each counter value yields four 64-bit numbers


def uniforms(stream: str, indices: np.ndarray, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) for each of the examples `indices` [n] of the named stream:
    [n, count]."""
    counters = -(-count // NUMBERS_PER_COUNTER)
    key = np.frombuffer(hashlib.sha256(stream.encode()).digest()[:16], np.uint64)
    bits = np.random.Philox(key=key, counter=0)
    generator = np.random.Generator(bits)
    numbers = np.empty((len(indices), counters * NUMBERS_PER_COUNTER))
    # Consecutive examples lie side by side in the sequence and are filled by one call.
    cuts = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)]
    position = 0
    for start, stop in itertools.pairwise(cuts):
        target = int(indices[start]) * counters
        # A step back is a step forward around the counter's circle.
        bits.advance((target - position) % 2**256)
        generator.random(out=numbers[start:stop])
        position = target + (stop - start) * counters
    return numbers[:, :count]


def integers(uniform: np.ndarray, low: int, high: int | np.ndarray) -> np.ndarray:
    """Uniform integers low..high, both included, from uniform numbers of any shape."""
    return low + (uniform * (high - low + 1)).astype(np.int64)


def normals(uniform: np.ndarray) -> np.ndarray:
    """Standard normal float32 numbers from an even number of uniform ones along the last axis (Box
    and Muller)."""
    half = uniform.shape[-1] // 2
    # 1 - u is in (0, 1] and stays so in float32.
    radius = np.sqrt(-2 * np.log((1 - uniform[..., :half]).astype(np.float32)))
    angle = (2 * np.pi * uniform[..., half:]).astype(np.float32)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
