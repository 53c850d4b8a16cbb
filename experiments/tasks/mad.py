"""The six synthetic tasks of MAD. Poli, Thomas, Nguyen, Ponnusamy, Deiseroth, Kersting, Suzuki,
Hie, Ermon, Ré, Zhang, Massaroli, "Mechanistic Design and Scaling of Hybrid Architectures", ICML
2024, arXiv 2403.17844.

    V is the size of the vocabulary, L the length of a sequence.

    kind                a sequence, and what is asked for
    recall              k v k v ... k v; a key has one value, and the last key occurred before:
                        the values of keys seen before
    noisy_recall        the same with pairs of noise tokens in between: the same
    fuzzy_recall        the same with keys and values of 1 to 3 tokens, padded at the left: the same
    memorisation        k INSERT k INSERT ..., one map from keys to values for all sequences: the
                        value at every INSERT
    selective_copying   n data tokens among BLANKs, COPY, n BLANKs: the data in order, at the end
    compression         L - 1 random tokens, COMPRESS: all tokens, from the last state

The recall tasks are trained on every next token, predictable or not, as published (`targets_only`
asks for the values alone). Compression needs a model that reads one state:
models/networks/compressor.py.

Departure: accuracy is over all targets. The authors average it over target classes; since values
are drawn uniformly, the two differ by sampling only."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from experiments.tasks.sources.random_streams import integers, uniforms
from experiments.training.memory import check_held
from experiments.training.task import Batch, Examples, Length, LengthOrDefault, Task, from_arrays
from models.parts.options import Probability, Range

BLOCK = 1024  # examples drawn together
MOTIF = 3  # tokens of the longest fuzzy key or value


def make(
    kind: str,
    length: LengthOrDefault = 0,
    vocabulary_size: Annotated[int, Range(0, 2**20)] = 0,
    train_examples: Annotated[int, Range(-1, 2**31 - 1)] = 0,
    noise: Probability = 0.2,
    copied: Length = 16,
    targets_only: bool = False,
    test_lengths: tuple[Length, ...] = (),
) -> Task:
    """A finite training set, or fresh sequences; evaluations "test", of fresh sequences like those
    of training, and "length_<L>" for every L of test_lengths.

    kind                see the top of the file
    length              L; 0: as published (128; memorisation and compression 32, selective_copying
                        256)
    vocabulary_size     V; 0: as published (16; noisy_recall 32, half of it noise; memorisation 256)
    train_examples      a finite training set; 0: as published (12,800; memorisation 256), -1:
                        without end
    noise               noisy_recall: share of pairs that are noise
    copied              selective_copying: n
    targets_only        the recall tasks: train on what is tested instead of on every token
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    of = KINDS[kind]
    length, vocabulary_size = length or of.length, vocabulary_size or of.vocabulary
    train_examples = train_examples or of.examples
    if targets_only and kind not in RECALL:
        raise ValueError(f"targets_only belongs to {', '.join(RECALL)}; got kind={kind!r}")
    for size in (length, *test_lengths):
        of.check(size, vocabulary_size, copied)
    # Tokens, targets and weights of four bytes; twice, while blocks become one.
    check_held("config.task.train_examples", 2 * 3 * 4 * length * max(train_examples, 0))
    options = f"mad/{kind}/{vocabulary_size}/{noise}/{copied}"

    def draw(stream: str, size: int, testing: bool, indices: np.ndarray) -> Batch:
        count = of.numbers(size, vocabulary_size, copied)
        numbers = uniforms(f"{options}/{size}/{stream}", indices, count)
        tokens, targets, asked = of.generate(numbers, size, vocabulary_size, copied, noise, testing)
        if kind in RECALL and not testing and not targets_only:
            asked = targets != of.padding(vocabulary_size)
        return {
            "tokens": tokens.astype(np.int32),
            "targets": targets.astype(np.int32),
            "weights": asked.astype(np.float32),
        }

    def training(seed: int) -> Examples:
        one = functools.partial(draw, f"train/{seed}", length, False)
        if train_examples < 0:
            return Examples(one)
        starts = range(0, train_examples, BLOCK)
        blocks = [one(np.arange(s, min(s + BLOCK, train_examples))) for s in starts]
        names = blocks[0]
        return from_arrays(
            {name: np.concatenate([block[name] for block in blocks]) for name in names}
        )

    def test(size: int) -> Examples:
        return Examples(functools.partial(draw, "test", size, True))

    return Task(
        sizes={"vocabulary": vocabulary_size},
        train=training,
        evaluations={
            "test": test(length),
            **{f"length_{size}": test(size) for size in test_lengths},
        },
    )


# Tokens, targets and whether they are asked for, all [n, T].
Sequences = tuple[np.ndarray, np.ndarray, np.ndarray]


def recall(u, length, vocabulary_size, copied, noise, testing) -> Sequences:
    return _pairs(u, length, vocabulary_size // 2, 0, noise=0.0)


def noisy_recall(u, length, vocabulary_size, copied, noise, testing) -> Sequences:
    quarter = vocabulary_size // 4
    return _pairs(u, length, quarter, vocabulary_size - 2 * quarter, noise)


def _pairs(u, length, keys, noise_tokens, noise) -> Sequences:
    """Keys 0 .. keys - 1, values the next `keys` tokens, then noise; L/2 pairs, the last a key that
    occurred."""
    pairs, rows = length // 2, np.arange(len(u))
    u_map, u_keys, u_noise, u_probe, u_tokens = np.split(
        u[:, : keys + 5 * pairs], np.cumsum([keys, pairs, pairs, pairs]), axis=1
    )
    value_of = integers(u_map, keys, 2 * keys - 1)
    key_nP = integers(u_keys, 0, keys - 1)
    noisy_nP = u_noise < noise
    noisy_nP[:, -1] = False
    # At least one pair before the probe is real, whatever the noise; the probe repeats the key of a
    # random one.
    noisy_nP[rows, np.argmax(u_noise[:, :-1], axis=1)] = False
    order = np.where(noisy_nP, 2.0, u_probe)[:, :-1]
    key_nP[:, -1] = key_nP[rows, np.argmin(order, axis=1)]
    value_nP = np.take_along_axis(value_of, key_nP, axis=1)
    same = (key_nP[:, :, None] == key_nP[:, None, :]) & ~noisy_nP[:, None, :]
    seen_nP = (same & np.tri(pairs, k=-1, dtype=bool)).any(axis=2) & ~noisy_nP

    sequence = np.stack([key_nP, value_nP], axis=2)
    if noise_tokens:
        tokens = integers(u_tokens, 2 * keys, 2 * keys + noise_tokens - 1)
        tokens = tokens.reshape(sequence.shape)
        sequence = np.where(noisy_nP[:, :, None], tokens, sequence)
    sequence = sequence.reshape(len(u), 2 * pairs)
    asked = np.zeros(sequence.shape, bool)
    asked[:, ::2] = seen_nP
    return sequence[:, :-1], sequence[:, 1:], asked[:, :-1]


def fuzzy_recall(u, length, vocabulary_size, copied, noise, testing) -> Sequences:
    """Pairs fill L + 1 tokens from the right, the probe last; the rest at the left is padding."""
    tokens = np.full((len(u), length + 1), vocabulary_size - 1)
    asked = np.zeros(tokens.shape, bool)
    for row, numbers in enumerate(u):
        motifs, pairs = _fuzzy_pairs(iter(numbers), length + 1, vocabulary_size, testing)
        start = length + 1 - len(motifs)
        tokens[row, start:] = motifs
        seen = set()
        for key, value in pairs:
            start += len(key)
            asked[row, start : start + len(value)] = key in seen
            start += len(value)
            seen.add(key)
    return tokens[:, :-1], tokens[:, 1:], asked[:, 1:]


def _fuzzy_pairs(draw, room, vocabulary_size, testing):
    """All tokens, at most `room`, and the (key, value) pairs that they form. The last key is that
    of another pair, chosen at random."""
    half = (vocabulary_size - 1) // 2
    values = vocabulary_size - 1 - half
    value_of: dict[tuple[int, ...], tuple[int, ...]] = {}

    def motif(first: int, count: int, shortest: int) -> tuple[int, ...]:
        size, pool = int(integers(next(draw), shortest, MOTIF)), list(range(count))
        return tuple(first + pool.pop(int(next(draw) * len(pool))) for _ in range(size))

    def pair() -> tuple[tuple[int, ...], tuple[int, ...]]:
        key = motif(0, half, MOTIF if testing else 1)
        if key not in value_of:
            value_of[key] = motif(half, values, 1)
        return key, value_of[key]

    probe = pair()
    pairs, size = [probe], 2 * sum(map(len, probe))
    while True:
        following = pair()
        size += sum(map(len, following))
        if size > room:
            break
        pairs.append(following)
    place = int(next(draw) * len(pairs))
    pairs[0], pairs[place] = pairs[place], pairs[0]
    pairs.append(probe)
    return [token for key, value in pairs for token in key + value], pairs


def memorisation(u, length, vocabulary_size, copied, noise, testing) -> Sequences:
    keys = (vocabulary_size - 1) // 2
    fixed = uniforms(f"mad/memorisation/map/{vocabulary_size}", np.arange(1), keys)[0]
    value_of = integers(fixed, keys, vocabulary_size - 2)
    key_nP = integers(u[:, : length // 2], 0, keys - 1)
    tokens = np.full((len(u), length), vocabulary_size - 1)
    tokens[:, ::2] = key_nP
    targets = np.zeros_like(tokens)
    targets[:, 1::2] = value_of[key_nP]
    asked = np.zeros(tokens.shape, bool)
    asked[:, 1::2] = True
    return tokens, targets, asked


def selective_copying(u, length, vocabulary_size, copied, noise, testing) -> Sequences:
    copy, blank = vocabulary_size - 1, vocabulary_size - 2
    context = length - copied - 1  # data and blanks; the last of it is data
    u_data, u_places = np.split(u[:, : copied + context - 1], [copied], axis=1)
    data = integers(u_data, 0, vocabulary_size - 3)
    places = np.sort(np.argsort(u_places, axis=1)[:, : copied - 1], axis=1)
    last = np.full((len(u), 1), context - 1)
    tokens = np.full((len(u), length), blank)
    np.put_along_axis(tokens, np.concatenate([places, last], 1), data, axis=1)
    tokens[:, context] = copy
    targets = np.zeros_like(tokens)
    targets[:, -copied:] = data
    asked = np.zeros(tokens.shape, bool)
    asked[:, -copied:] = True
    return tokens, targets, asked


def compression(u, length, vocabulary_size, copied, noise, testing) -> Sequences:
    tokens = integers(u[:, :length], 0, vocabulary_size - 2)
    tokens[:, -1] = vocabulary_size - 1
    return tokens, tokens, np.ones(tokens.shape, bool)


@dataclass(frozen=True)
class Kind:
    """A kind of sequence. `generate` turns uniform numbers [n, numbers(L, V, copied)] into
    sequences; `check` raises ValueError for impossible sizes."""

    generate: Callable[..., Sequences]
    check: Callable[[int, int, int], None]
    numbers: Callable[[int, int, int], int]
    length: int = 128
    vocabulary: int = 16
    examples: int = 12_800

    def padding(self, vocabulary_size: int) -> int:
        """The token that is never a training target: none but in fuzzy_recall."""
        return vocabulary_size - 1 if self.generate is fuzzy_recall else -1


def _check_even(length: int, vocabulary_size: int, copied: int) -> None:
    if length < 4 or length % 2 or vocabulary_size < 8 or vocabulary_size % 4:
        raise ValueError(
            "recall and memorisation need an even length >= 4 and a vocabulary_size"
            f" that is a multiple of 4 and >= 8; got {length} and {vocabulary_size}"
        )


def _check_fuzzy(length: int, vocabulary_size: int, copied: int) -> None:
    if length < 4 * MOTIF or vocabulary_size < 2 * MOTIF + 1:
        raise ValueError(
            f"fuzzy_recall needs length >= {4 * MOTIF} and vocabulary_size >="
            f" {2 * MOTIF + 1}; got {length} and {vocabulary_size}"
        )


def _check_copying(length: int, vocabulary_size: int, copied: int) -> None:
    if copied < 1 or length < 2 * copied + 1 or vocabulary_size < 3:
        raise ValueError(
            "selective_copying needs copied >= 1, length >= 2 copied + 1 and"
            f" vocabulary_size >= 3; got {copied}, {length} and {vocabulary_size}"
        )


def _check_compression(length: int, vocabulary_size: int, copied: int) -> None:
    if length < 2 or vocabulary_size < 3:
        raise ValueError(
            "compression needs length >= 2 and vocabulary_size >= 3; got"
            f" {length} and {vocabulary_size}"
        )


PAIRS = (
    "recall",
    "noisy_recall",
)  # one token shorter than they are long: tokens and targets are shifts of one
RECALL = (*PAIRS, "fuzzy_recall")


def _pair_numbers(length: int, vocabulary_size: int, copied: int) -> int:
    return vocabulary_size + 3 * length


KINDS = {
    "recall": Kind(recall, _check_even, _pair_numbers),
    "noisy_recall": Kind(noisy_recall, _check_even, _pair_numbers, vocabulary=32),
    # Two numbers per token at most, and a first and a last pair that do not count.
    "fuzzy_recall": Kind(fuzzy_recall, _check_fuzzy, lambda length, v, n: 2 * length + 32),
    "memorisation": Kind(
        memorisation,
        _check_even,
        lambda length, v, n: length,
        length=32,
        vocabulary=256,
        examples=256,
    ),
    "selective_copying": Kind(
        selective_copying, _check_copying, lambda length, v, n: length, length=256
    ),
    "compression": Kind(compression, _check_compression, lambda length, v, n: length, length=32),
}
