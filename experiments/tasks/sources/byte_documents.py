"""Documents as bytes, and a question about them after the last: what classification and matching of
text share.

Tokens 0 .. 255 are the bytes; each document ends with MARK, and behind the last one is PADDING.
Class c is token ANSWER + c, asked at the last MARK."""

from collections.abc import Sequence

import numpy as np

from experiments.training.task import Batch

MARK, PADDING, ANSWER = 256, 257, 258


def ask(examples: Sequence[Sequence[bytes]], labels: Sequence[int], length: int) -> Batch:
    """A batch of examples, all of equally many documents. A document with its mark is cut to
    `length` tokens."""
    size = length * len(examples[0])
    tokens = np.full((len(examples), size), PADDING, np.int32)
    ends = np.empty((len(examples), 1), np.int32)
    for row, documents in enumerate(examples):
        end = 0
        for document in documents:
            kept = np.frombuffer(document[: length - 1], np.uint8)
            tokens[row, end : end + len(kept)] = kept
            end += len(kept) + 1
            tokens[row, end - 1] = MARK
        ends[row] = end - 1
    return {
        "tokens": tokens,
        "targets": ANSWER + np.array(labels, np.int32).reshape(-1, 1),
        "weights": np.ones(ends.shape, np.float32),
        "readout_positions": ends,
    }
