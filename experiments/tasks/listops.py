"""ListOps: the value of a nested expression of lists, as in the Long Range Arena.

    [MAX 4 [SM 7 8 2 ] [MIN 3 9 ] 0 ]  is  7

Operators are MAX, MIN, MED (the median, rounded down) and SM (the sum modulo 10) over two or more
arguments, digits or lists. (Nangia and Bowman, NAACL 2018, arXiv 1804.06028; lengths and depths
from Tay et al., "Long Range Arena", ICLR 2021, arXiv 2011.04006.)

Digits are tokens 0 .. 9, then the four opening brackets with their operators, the closing bracket,
and padding; the answer d is token 16 + d, asked after the last bracket.

With `data_dir` the expressions are the released ones; their parentheses, which say nothing more,
are left out. Without it they are our own, drawn by the same rule. A tree grows from its root: an
argument is a list with probability 1/4 down to the greatest depth, with 2 to `arguments` arguments,
all numbers equally likely; trees of other lengths than asked for are thrown away."""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np

from experiments.tasks.sources.class_labels import answered_by
from experiments.tasks.sources.lra_release import Table, open_table, released
from experiments.training.task import Batch, Examples, Length, Task
from models.parts.options import Count, Range, Size

OPERATORS: tuple[Callable[[Sequence[int]], int], ...] = (
    max,
    min,
    lambda values: int(statistics.median(values)),
    lambda values: sum(values) % 10,
)
DIGITS = 10
OPEN, CLOSE, PADDING, ANSWER = DIGITS, 14, 15, 16
WORDS = (*map(str, range(DIGITS)), "[MAX", "[MIN", "[MED", "[SM", "]")
TOKENS = {word.encode(): token for token, word in enumerate(WORDS)}
FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
LISTS = 0.25  # of the arguments, as long as they may be lists
TRIES = 1_000_000


def make(
    shortest: Length = 500,
    longest: Length = 2000,
    depth: Annotated[int, Range(1, 100)] = 10,
    arguments: Annotated[int, Range(2, 100)] = 10,
    train_examples: Count = 96_000,
    test_examples: Size = 2_000,
    data_dir: str = "",
    answer: str = "token",
) -> Task:
    """Evaluations "validation" and "test", each of `test_examples` examples.

    shortest, longest   numbers of tokens, all examples padded to the longest
    depth               of lists in lists, at most; 1: no list in a list
    arguments           of a list, at most
    train_examples      a finite training set; 0: without end
    data_dir            a directory with basic_train.tsv, basic_val.tsv and basic_test.tsv of the
                        release (lra_release.py), of 96,000, 2,000 and 2,000 expressions: those, and
                        of the other options only `longest` counts
    answer              "token": the value is a token of the vocabulary, for a language model;
                        "class": a label, for a network with a head of classes

    Guessing has accuracy 0.1. Raises ValueError for options that allow no
    expression, and for files that are missing or damaged."""
    if data_dir:
        return answered_by(answer, _released(data_dir, longest), DIGITS)
    fewest = 4  # the brackets and two digits
    if not fewest <= shortest <= longest:
        raise ValueError(
            f"need {fewest} <= shortest <= longest; got shortest={shortest}, longest={longest}"
        )
    most = sum(2 * arguments**level for level in range(depth)) + arguments**depth
    if shortest > most:
        raise ValueError(
            f"shortest must be at most {most}, the longest expression of depth={depth}"
            f" and arguments={arguments}; got {shortest}"
        )

    def examples(stream: str, length: int | None) -> Examples:
        def fetch(indices: np.ndarray) -> Batch:
            return _batch(
                [
                    draw(
                        random.Random(f"listops/{stream}/{index}"),
                        shortest,
                        longest,
                        depth,
                        arguments,
                    )
                    for index in indices.tolist()
                ],
                longest,
            )

        return Examples(fetch, length)

    task = Task(
        sizes={"vocabulary": ANSWER + DIGITS},
        train=lambda seed: examples(f"train/{seed}", train_examples or None),
        evaluations={name: examples(name, test_examples) for name in ("validation", "test")},
    )
    return answered_by(answer, task, DIGITS)


def _batch(expressions: Sequence[tuple[list[int], int]], longest: int) -> Batch:
    tokens = np.full((len(expressions), longest), PADDING, np.int32)
    for row, (expression, _) in enumerate(expressions):
        tokens[row, : len(expression)] = expression
    return {
        "tokens": tokens,
        "targets": np.array([[ANSWER + value] for _, value in expressions], np.int32),
        "weights": np.ones((len(expressions), 1), np.float32),
        "readout_positions": np.array(
            [[len(expression) - 1] for expression, _ in expressions], np.int32
        ),
    }


def _released(data_dir: str, longest: int) -> Task:
    directory = released(data_dir, "listops-1000", tuple(FILES.values()))

    tables = {
        split: open_table(
            directory / name, ("Source", "Target"), label="Target", classes=DIGITS, header=True
        )
        for split, name in FILES.items()
    }

    def examples(split: str) -> Examples:
        table = tables[split]

        def fetch(indices: np.ndarray) -> Batch:
            return _batch(_read(table, indices, longest), longest)

        return Examples(fetch, len(table.labels))

    return Task(
        sizes={"vocabulary": ANSWER + DIGITS},
        train=lambda seed: examples("train"),
        evaluations={split: examples(split) for split in ("validation", "test")},
        provenance={
            "expressions": f"files of {directory.name}",
            **{f"{table.path.name}_sha256": table.sha256 for table in tables.values()},
        },
    )


def _read(table: Table, indices: np.ndarray, longest: int) -> list[tuple[list[int], int]]:
    """Tokens and values of released expressions."""
    expressions = []
    for index, (source, _) in zip(indices.tolist(), table.rows(indices), strict=True):
        words = [word for word in source.split() if word not in (b"(", b")")]
        unknown = next((word for word in words if word not in TOKENS), None)
        if unknown is not None or not words:
            raise ValueError(
                f"{table.place(index)}: Source must be an expression of parentheses and"
                f" {' '.join(WORDS)}; got {unknown or source}"
            )
        if len(words) > longest:
            raise ValueError(
                f"longest must be at least {len(words)}, the tokens of"
                f" {table.place(index)}; got {longest}"
            )
        tokens = [TOKENS[word] for word in words]
        expressions.append((tokens, int(table.labels[index])))
    return expressions


def draw(
    rng: random.Random, shortest: int, longest: int, depth: int, arguments: int
) -> tuple[list[int], int]:
    """Tokens and value of an expression. Raises ValueError if none of a million trees has a length
    that is asked for."""
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
    """Appends an argument, a list if it is the `first`, and returns its value; None once there are
    too many tokens."""
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
