"""Induction heads. Olsson et al., "In-context Learning and Induction Heads", 2022, arXiv
2209.11895, in the form of Gu and Dao, "Mamba", COLM 2024, arXiv 2312.00752, section 4.1.2:

    random tokens .. SPECIAL v .. random tokens SPECIAL        the model answers v

SPECIAL, the last token of the vocabulary, occurs once before the end, anywhere; every sequence is
fresh. Trained at one length and tested at others, it shows what a model can still find."""

import functools

import numpy as np

from experiments.tasks.sources.random_streams import integers, uniforms
from experiments.training.task import Batch, Examples, Length, Task, Vocabulary


def make(
    length: Length = 256, vocabulary_size: Vocabulary = 16, test_lengths: tuple[Length, ...] = ()
) -> Task:
    """Fresh sequences of `length` tokens for training; evaluations "test", of such sequences, and
    "length_<L>" for every L of test_lengths."""
    for size in (length, *test_lengths):
        if size < 3 or vocabulary_size < 3:
            raise ValueError(
                f"lengths and vocabulary_size must be at least 3; got {size} and {vocabulary_size}"
            )

    def draw(stream: str, size: int, indices: np.ndarray) -> Batch:
        name = f"induction_heads/{vocabulary_size}/{size}/{stream}"
        numbers = uniforms(name, indices, size + 1)
        tokens = integers(numbers[:, :size], 0, vocabulary_size - 2)
        first = integers(numbers[:, -1], 0, size - 3)
        rows = np.arange(len(indices))
        answer = tokens[rows, first + 1]
        tokens[rows, first] = tokens[:, -1] = vocabulary_size - 1
        return {
            "tokens": tokens.astype(np.int32),
            "targets": answer[:, None].astype(np.int32),
            "weights": np.ones((len(indices), 1), np.float32),
            "readout_positions": np.full((len(indices), 1), size - 1, np.int32),
        }

    def test(size: int) -> Examples:
        return Examples(functools.partial(draw, "test", size))

    return Task(
        sizes={"vocabulary": vocabulary_size},
        train=lambda seed: Examples(functools.partial(draw, f"train/{seed}", length)),
        evaluations={
            "test": test(length),
            **{f"length_{size}": test(size) for size in test_lengths},
        },
    )
