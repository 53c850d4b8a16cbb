"""Multi-query associative recall (MQAR). Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Ré,
"Zoology: Measuring and Improving Recall in Efficient Language Models", ICLR 2024, arXiv 2312.04927;
settings of unequal length after "Based", ICML 2024, arXiv 2402.18668.

    k_1 v_1 k_2 v_2 ... k_N v_N   . k_j . . k_i . ...         the model answers k_j with v_j

Each key returns once, at a gap drawn with a power law; its value is the target at the key's own
place and never an input."""

import functools
from typing import Annotated

import numpy as np

from experiments.tasks.sources.random_streams import integers, uniforms
from experiments.training.memory import check_held
from experiments.training.task import Batch, Examples, Length, Task, Vocabulary, from_arrays
from models.parts.options import Range, Size

BLOCK = 1024  # examples drawn together


def make(
    train: tuple[tuple[Length, Size, Size], ...] = ((64, 4, 100_000),),
    test: tuple[tuple[Length, Size], ...] = (),
    vocabulary_size: Vocabulary = 8192,
    power: Annotated[float, Range(0, 10, ("low",))] = 0.01,
    random_non_queries: bool = False,
) -> Task:
    """A finite training set, the same in every epoch; evaluations "length_<L>_pairs_<N>", 4 N <= L,
    drawn without end.

    train                   (L, N, examples) per setting; a batch never mixes settings
    test                    (L, N) per evaluation; (): the settings of `train`
    vocabulary_size         keys are 1 .. vocabulary_size/2 - 1, values the upper half
    power                   a: gap i has weight a i^(a - 1), so that with a = .01 short gaps
                            prevail, nearly as 1/i
    random_non_queries      the places that hold no pair and no query are random tokens, not 0

    Logits are computed at the N queries alone (readout_positions). All sequences of an evaluation
    have N targets, so `accuracy` is also the mean over sequences of their accuracies, the published
    metric."""
    if not train:
        raise ValueError("train must list at least one setting (length, pairs, examples); got ()")
    test = test or tuple((length, pairs) for length, pairs, _ in train)
    for length, pairs in (*(setting[:2] for setting in train), *test):
        if length % 2 or not 1 <= pairs <= length // 4:
            raise ValueError(
                "a setting (length, pairs) needs an even length and 1 <= 4 pairs <="
                f" length; got {(length, pairs)}"
            )
        if vocabulary_size % 2 or pairs > vocabulary_size // 2 - 1:
            raise ValueError(
                "vocabulary_size must be even and at least 2 (pairs + 1) ="
                f" {2 * (pairs + 1)}; got {vocabulary_size}"
            )
    # int32 tokens, targets, places and float32 weights; twice, while blocks become one.
    held = sum(2 * 4 * (length + 3 * pairs) * count for length, pairs, count in train)
    check_held("config.task.train", held)
    options = f"mqar/{vocabulary_size}/{power}/{random_non_queries}"

    def draw(stream: str, length: int, pairs: int, indices: np.ndarray) -> Batch:
        numbers = uniforms(
            f"{options}/{length}/{pairs}/{stream}",
            indices,
            2 * pairs + (length - 2 * pairs) // 2 + length,
        )
        return recall_sequences(numbers, length, pairs, vocabulary_size, power, random_non_queries)

    def training_set(seed: int, length: int, pairs: int, count: int) -> Examples:
        """Drawn once, in blocks: rows in random order are much faster to look up than to draw
        again."""
        blocks = [
            draw(f"train/{seed}", length, pairs, np.arange(start, min(start + BLOCK, count)))
            for start in range(0, count, BLOCK)
        ]
        return from_arrays(
            {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        )

    return Task(
        sizes={"vocabulary": vocabulary_size},
        train=lambda seed: tuple(training_set(seed, *setting) for setting in train),
        evaluations={
            f"length_{length}_pairs_{pairs}": Examples(
                functools.partial(draw, "test", length, pairs)
            )
            for length, pairs in test
        },
    )


def recall_sequences(
    uniform: np.ndarray,
    length: int,
    pairs: int,
    vocabulary_size: int,
    power: float,
    random_non_queries: bool,
) -> Batch:
    """Sequences from uniform numbers [n, 2 pairs + gaps + length], gaps = (length - 2 pairs) /
    2."""
    gaps, context = (length - 2 * pairs) // 2, 2 * pairs
    u_keys, u_values, u_gaps, u_tokens = np.split(uniform, np.cumsum([pairs, pairs, gaps]), axis=1)
    keys_nN = draw_distinct(u_keys, 1, vocabulary_size // 2 - 1)
    values_nN = draw_distinct(u_values, vocabulary_size // 2, vocabulary_size - 1)
    # Drawing N gaps one after another without replacement is a race of exponential clocks with the
    # weights as rates.
    weights = power * np.arange(1, gaps + 1) ** (power - 1)
    gap_nN = np.argsort(-np.log1p(-u_gaps) / weights, axis=1)[:, :pairs]
    query_nN = context + 2 * gap_nN

    tokens_nT = (
        integers(u_tokens, 0, vocabulary_size - 1)
        if random_non_queries
        else np.zeros(u_tokens.shape, np.int64)
    )
    tokens_nT[:, 0:context:2], tokens_nT[:, 1:context:2] = keys_nN, values_nN
    np.put_along_axis(tokens_nT, query_nN, keys_nN, axis=1)
    return {
        "tokens": tokens_nT.astype(np.int32),
        "targets": values_nN.astype(np.int32),
        "weights": np.ones(values_nN.shape, np.float32),
        "readout_positions": query_nN.astype(np.int32),
    }


def draw_distinct(uniform: np.ndarray, low: int, high: int) -> np.ndarray:
    """N distinct integers of low..high in random order for each row of [n, N] uniform ones (a
    shuffle stopped at N)."""
    rows, count = uniform.shape
    pool = np.tile(np.arange(low, high + 1, dtype=np.int32), (rows, 1))
    row = np.arange(rows)
    for place in range(count):
        chosen = integers(uniform[:, place], place, high - low)
        pool[row, chosen], pool[:, place] = pool[:, place].copy(), pool[row, chosen]
    return pool[:, :count]
