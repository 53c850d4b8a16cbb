"""Sounds of any length, separated chunk by chunk.

Neighbouring chunks overlap. Of a model that was trained by a scale-invariant error neither the
loudness nor the order of what it returns means anything, and both may differ from chunk to chunk:

    g = argmin |x - sum_q g_q e_q|^2                the estimates e of a chunk x, added up, are it
    order = argmax sum_q <a_q, g b_order(q)>        a, b: what two chunks say of their overlap

and in the overlap the one fades into the other. The order is lost only where an overlap is silent.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy.optimize import linear_sum_assignment

ALIKE = 0.05  # smallest over largest singular value, of estimates of length 1: a cosine of 0.995
# (chunks [B, C], lengths [B]) -> estimates [B, Q, C] of the first lengths[b] samples of each.
Separate = Callable[[np.ndarray, np.ndarray], np.ndarray]


def chunks_of(length: int, chunk: int, overlap: int) -> list[tuple[int, int]]:
    """(begin, end) of each chunk of a sound; the last is shorter, but longer than the overlap,
    unless it is the only one. Raises ValueError unless 0 <= overlap < chunk."""
    if not 0 <= overlap < chunk:
        raise ValueError(f"overlap must be in [0, {chunk}), the length of a chunk; got {overlap}")
    count = max(1, math.ceil((length - overlap) / (chunk - overlap)))
    begins = [number * (chunk - overlap) for number in range(count)]
    return [(begin, min(begin + chunk, length)) for begin in begins]


def separated(
    separate: Separate, mixture_T: np.ndarray, *, chunk: int, overlap: int, batch: int
) -> np.ndarray:
    """The sources [Q, T] of a mixture [T], float32; `separate` is called with `batch` chunks at a
    time, always of `chunk` samples, filled up with zeros."""
    length = len(mixture_T)
    spans = chunks_of(length, chunk, overlap)
    found_QT = None
    for (begin, end), estimate_QC in zip(
        spans, _estimates(separate, mixture_T, spans, chunk, batch), strict=True
    ):
        part_QC = scaled(estimate_QC, mixture_T[begin:end])
        if found_QT is None:
            found_QT = np.zeros((len(part_QC), length), np.float32)
        elif overlap:
            before_QO, now_QO = found_QT[:, begin : begin + overlap], part_QC[:, :overlap]
            part_QC = part_QC[same_order(before_QO, now_QO)]
            share_O = (np.arange(overlap) + 0.5) / overlap
            part_QC[:, :overlap] *= share_O
            part_QC[:, :overlap] += (1 - share_O) * before_QO
        found_QT[:, begin:end] = part_QC
    assert found_QT is not None
    return found_QT


def scaled(estimate_QC: np.ndarray, mixture_C: np.ndarray) -> np.ndarray:
    """The estimates, each times the number for which their sum is nearest to the mixture; of those
    that are hardly anything but multiples of each other equal shares, not large differences."""
    estimate_QC = np.asarray(estimate_QC, np.float64)
    size_Q1 = np.linalg.norm(estimate_QC, axis=1, keepdims=True)
    unit_QC = estimate_QC / np.where(size_Q1 > 0, size_Q1, 1.0)
    gain_Q, *_ = np.linalg.lstsq(unit_QC.T, np.asarray(mixture_C, np.float64), rcond=ALIKE)
    return gain_Q[:, None] * unit_QC


def same_order(before_QO: np.ndarray, now_QO: np.ndarray) -> np.ndarray:
    """For each source of `before` the number of the one of `now` that is most like it, by the
    largest sum of inner products."""
    _, order_Q = linear_sum_assignment(before_QO @ now_QO.T, maximize=True)
    return order_Q


def _estimates(
    separate: Separate, mixture_T: np.ndarray, spans: list[tuple[int, int]], chunk: int, batch: int
) -> Iterator[np.ndarray]:
    for first in range(0, len(spans), batch):
        several = spans[first : first + batch]
        chunks_BC = np.zeros((batch, chunk), np.float32)
        lengths_B = np.zeros(batch, np.int32)
        for row, (begin, end) in enumerate(several):
            chunks_BC[row, : end - begin] = mixture_T[begin:end]
            lengths_B[row] = end - begin
        estimates_BQC = separate(chunks_BC, lengths_B)
        for row, (begin, end) in enumerate(several):
            yield estimates_BQC[row, :, : end - begin]
