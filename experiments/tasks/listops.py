"""ListOps: the value of a nested expression of lists, as in the Long Range Arena.

    [MAX 4 [SM 7 8 2 ] [MIN 3 9 ] 0 ]  is  7

Operators are MAX, MIN, MED (the median, rounded down) and SM (the sum modulo 10) over two or more arguments, digits or
lists. (Nangia and Bowman, NAACL 2018, arXiv 1804.06028; lengths and depths from Tay et al., "Long Range Arena", ICLR
2021, arXiv 2011.04006.)

Digits are tokens 0 .. 9, then the four opening brackets with their operators, the closing bracket, and padding; the
answer d is token 16 + d, asked after the last bracket.

A tree grows from its root: an argument is a list with probability 1/4 down to the greatest depth, with 2 to `arguments`
arguments, all numbers equally likely; trees of other lengths than asked for are thrown away. Departure: 96,000 training
examples of our own, not the released ones, which were drawn by this rule.
"""

import random
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from experiments.task import Batch, Examples, Task

OPERATORS: tuple[Callable[[Sequence[int]], int], ...] = (
    max,
    min,
    lambda values: int(statistics.median(values)),
    lambda values: sum(values) % 10,
)
DIGITS = 10
OPEN, CLOSE, PADDING, ANSWER = DIGITS, 14, 15, 16
LISTS = 0.25  # of the arguments, as long as they may be lists
TRIES = 1_000_000


def make(
    shortest: int = 500,
    longest: int = 2000,
    depth: int = 10,
    arguments: int = 10,
    train_examples: int = 96_000,
    test_examples: int = 2_000,
) -> Task:
    """Evaluations "validation" and "test", each of `test_examples` examples.

    shortest, longest   numbers of tokens, all examples padded to the longest
    depth               of lists in lists, at most; 1: no list in a list
    arguments           of a list, at most
    train_examples      a finite training set; 0: without end

    Metrics: token_metrics; guessing has accuracy 0.1. Raises ValueError for options that allow no expression.
    """
    fewest = 4  # the brackets and two digits
    if not fewest <= shortest <= longest or depth < 1 or arguments < 2:
        raise ValueError(
            f"need {fewest} <= shortest <= longest, depth >= 1 and arguments >= 2; got"
            f" shortest={shortest}, longest={longest}, depth={depth},"
            f" arguments={arguments}"
        )
    most = sum(2 * arguments**level for level in range(depth)) + arguments**depth
    if shortest > most:
        raise ValueError(
            f"shortest must be at most {most}, the longest expression of depth={depth}"
            f" and arguments={arguments}; got {shortest}"
        )
    if train_examples < 0 or test_examples < 1:
        raise ValueError(
            "train_examples must be at least 0 and test_examples at least 1; got"
            f" {train_examples} and {test_examples}"
        )

    def examples(stream: str, length: int | None) -> Examples:
        def fetch(indices: np.ndarray) -> Batch:
            tokens = np.full((len(indices), longest), PADDING, np.int32)
            answers = np.empty((len(indices), 1), np.int32)
            ends = np.empty((len(indices), 1), np.int32)
            for row, index in enumerate(indices.tolist()):
                rng = random.Random(f"listops/{stream}/{index}")
                expression, value = draw(rng, shortest, longest, depth, arguments)
                tokens[row, : len(expression)] = expression
                answers[row], ends[row] = ANSWER + value, len(expression) - 1
            return {
                "tokens": tokens,
                "targets": answers,
                "weights": np.ones((len(indices), 1), np.float32),
                "readout_positions": ends,
            }

        return Examples(fetch, length)

    return Task(
        vocabulary_size=ANSWER + DIGITS,
        sequence_length=longest,
        train=lambda seed: examples(f"train/{seed}", train_examples or None),
        evaluations={
            name: examples(name, test_examples) for name in ("validation", "test")
        },
    )


def draw(
    rng: random.Random, shortest: int, longest: int, depth: int, arguments: int
) -> tuple[list[int], int]:
    """Tokens and value of an expression. Raises ValueError if none of a million trees had such a length."""
    for _ in range(TRIES):
        tokens: list[int] = []
        value = _grow(rng, tokens, longest, depth, arguments, first=True)
        if value is not None and len(tokens) >= shortest:
            return tokens, value
    raise ValueError(
        f"no expression of depth={depth} and arguments={arguments} had from"
        f" shortest={shortest} to longest={longest} tokens in {TRIES} tries"
    )


def _grow(
    rng: random.Random,
    tokens: list[int],
    longest: int,
    depth: int,
    arguments: int,
    first: bool = False,
) -> int | None:
    """Appends an argument, a list if it is the `first`, and returns its value; None once there are too many tokens."""
    if not first and (depth == 0 or rng.random() > LISTS):
        value = int(rng.random() * DIGITS)
        tokens.append(value)
        return value
    operator = int(rng.random() * len(OPERATORS))
    tokens.append(OPEN + operator)
    values = []
    for _ in range(2 + int(rng.random() * (arguments - 1))):
        value = _grow(rng, tokens, longest, depth - 1, arguments)
        if value is None or len(tokens) >= longest:
            return None
        values.append(value)
    tokens.append(CLOSE)
    return OPERATORS[operator](values)
