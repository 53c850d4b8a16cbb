"""State tracking: parity, arithmetic mod 5, and products in a finite group, at lengths beyond those
trained on.

Grazzi, Siems, Zela, Franke, Hutter, Pontil, "Unlocking State-Tracking in Linear RNNs Through
Negative Eigenvalues", ICLR 2025, arXiv 2411.12537, section 5; the arithmetic tasks after Delétang
et al., ICLR 2023, arXiv 2207.02098, the group products after Merrill, Petty, Sabharwal, ICML 2024,
arXiv 2404.08819.

    kind                            a sequence of total length L, and its answer
    parity                          L - 1 bits: the number of ones mod 2
    modular_arithmetic              digit (operator digit)* =, L odd: the value mod 5, products
                                    before sums
    modular_arithmetic_brackets     a nested expression of L - 3 tokens, then =: the value mod 5
    s5, z60                         L group elements: the product of all elements so far

In the first three kinds the last token is the answer. It is absent from the input, and the model
is asked for it at the token before. The group tasks ask for the running product at every token.
Sequences are padded to the longest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from experiments.objectives.next_token import NextToken, token_metrics
from experiments.tasks.sources.random_streams import integers, uniforms
from experiments.training.task import Batch, Examples, Length, LengthOrDefault, Task

MODULUS = 5
# modular_arithmetic: pad 0, + 1, - 2, * 3, = 4, digit d at 5 + d.
PLUS, MINUS, TIMES, EQUALS, DIGITS = 1, 2, 3, 4, 5
# modular_arithmetic_brackets: digit d at d, and these.
BRACKET_PLUS, BRACKET_MINUS, BRACKET_TIMES, OPEN, CLOSE, BRACKET_EQUALS, BRACKET_PAD = range(5, 12)
# Element e maps point i to S5[e, i]; element 0 is the identity.
S5 = np.array(list(permutations(range(5))))
# As numbers in base 5 the elements are sorted, so products are found by bisection. S5_PRODUCT[a, b]
# is a after b; its last row is the filler between two elements of "every_fourth", which leaves b as
# it is.
_CODE = 5 ** np.arange(4, -1, -1)
S5_FILLER = len(S5)
S5_PRODUCT = np.concatenate(
    [np.searchsorted(S5 @ _CODE, S5[:, S5] @ _CODE), np.arange(S5_FILLER)[None]]
)

S5_INPUTS = ("all", "swaps", "three", "every_fourth")

# Tokens, answers and asked, all [n, T]: the answer is asked for at token t where asked_nT[., t],
# and then is answers_nT[., t].
Sequences = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Kind:
    """`generate` maps uniform numbers [n, T] and total lengths [n] to sequences; `shortest` is the
    least length."""

    generate: Callable[..., Sequences]
    vocabulary_size: int
    chance: float
    shortest: int
    group: bool = False


def make(
    kind: str,
    supervision: str = "",
    multiplication: bool = True,
    inputs: str = "all",
    train_max_length: LengthOrDefault = 0,
    test_max_length: LengthOrDefault = 0,
    test_length_grid: tuple[Length, ...] = (),
) -> Task:
    """Sequences drawn afresh; evaluations "in_distribution" (lengths as in training) and "long".

    kind                parity, modular_arithmetic, modular_arithmetic_brackets, s5 or z60
    supervision         of training: "last" asks for the answer alone, "every" for the running
                        answer at every token. "": as published, "last", and "every" for groups.
                        Evaluations always ask as published.
    multiplication      with brackets: operators + - *, or + - alone
    inputs              s5: "all" elements; "swaps" (transpositions and the identity); "three"
                        (elements that move at most three points); "every_fourth": an element every
                        four tokens, filler between, asked at the fourth
    train_max_length    0 stands for 40: L uniform in 3..40 (with brackets from 5, the shortest
                        there is; arithmetic without: odd L only); groups: 32, every sequence of
                        this length
    test_max_length     0 stands for 256: L uniform in train_max_length..256 for "long"; groups:
                        500, this length
    test_length_grid    adds an evaluation "length_<n>" for every n, all sequences of exactly that
                        length

    Metrics: token_metrics and scaled_accuracy = (accuracy - chance) / (1 - chance). Chance is that
    of a uniform answer; with brackets and products 0 is likelier, and answering 0 always scores .09
    in_distribution and .13 on long."""
    _check("kind", kind, tuple(KINDS))
    of = KINDS[kind]
    published = "every" if of.group else "last"
    supervision = supervision or published
    _check("supervision", supervision, ("last", "every"))
    _check("inputs", inputs, S5_INPUTS if kind == "s5" else ("all",))
    if supervision == "every" and not of.group and kind != "parity":
        raise ValueError(
            f"supervision='every' needs a running answer, which {kind} lacks; use"
            " supervision='last'"
        )
    if not multiplication and kind != "modular_arithmetic_brackets":
        raise ValueError(
            f"multiplication=False belongs to modular_arithmetic_brackets; got kind={kind!r}"
        )
    train_max = train_max_length or (32 if of.group else 40)
    test_max = test_max_length or (500 if of.group else 256)
    shortest = 4 if inputs == "every_fourth" else of.shortest
    if not shortest <= train_max <= test_max:
        raise ValueError(
            f"need {shortest} <= train_max_length <= test_max_length for {kind}; got"
            f" {train_max} and {test_max}"
        )
    ranges = {
        "in_distribution": (train_max if of.group else shortest, train_max),
        "long": (test_max if of.group else train_max, test_max),
    } | {f"length_{length}": (length, length) for length in test_length_grid}
    for low, high in ranges.values():
        _check_lengths(kind, shortest, low, high)

    def examples(stream: str, lengths: tuple[int, int], supervision: str) -> Examples:
        def fetch(indices: np.ndarray) -> Batch:
            u_nT = uniforms(f"{kind}/{multiplication}/{inputs}/{stream}", indices, 1 + lengths[1])
            length_n = _draw_lengths(kind, u_nT[:, 0], *lengths)
            tokens_nT, answers_nT, asked_nT = of.generate(
                u_nT[:, 1:], length_n, multiplication=multiplication, inputs=inputs
            )
            if supervision == "last":  # the last of the places that are asked
                asked_nT = asked_nT & (
                    np.cumsum(asked_nT, axis=1) == np.sum(asked_nT, axis=1, keepdims=True)
                )
            return {
                "tokens": tokens_nT.astype(np.int32),
                "targets": np.where(asked_nT, answers_nT, 0).astype(np.int32),
                "weights": asked_nT.astype(np.float32),
            }

        return Examples(fetch)

    def derive(sums: Mapping[str, float]) -> dict[str, float]:
        metrics = token_metrics(sums)
        return metrics | {"scaled_accuracy": (metrics["accuracy"] - of.chance) / (1 - of.chance)}

    return Task(
        sizes={"vocabulary": of.vocabulary_size + (inputs == "every_fourth")},
        train=lambda seed: examples(f"train/{seed}", ranges["in_distribution"], supervision),
        evaluations={name: examples(name, lengths, published) for name, lengths in ranges.items()},
        objective=NextToken(derive=derive),
    )


def parity(u_nT: np.ndarray, length_n: np.ndarray, **_) -> Sequences:
    """Bits 0 and 1 are the tokens 1 and 2, and so are the answers; asked after every bit."""
    is_bit_nT = np.arange(u_nT.shape[1]) < length_n[:, None] - 1
    bits_nT = integers(u_nT, 0, 1) * is_bit_nT
    return (1 + bits_nT) * is_bit_nT, 1 + np.cumsum(bits_nT, axis=1) % 2, is_bit_nT


def modular_arithmetic(u_nT: np.ndarray, length_n: np.ndarray, **_) -> Sequences:
    """Digits at even places, operators at odd ones, `=` at place L - 2, where the answer is
    asked."""
    place_T = np.arange(u_nT.shape[1])
    equals_n1 = length_n[:, None] - 2
    digits_nT, operators_nT = (integers(u_nT, 0, MODULUS - 1), integers(u_nT, PLUS, TIMES))
    tokens_nT = np.where(place_T % 2 == 0, DIGITS + digits_nT, operators_nT) * (place_T < equals_n1)
    tokens_nT = np.where(place_T == equals_n1, EQUALS, tokens_nT)
    # Left to right with the current product kept apart from the sum of the finished ones: * binds
    # closer.
    total_n, product_n = np.zeros_like(length_n), digits_nT[:, 0]
    for place in range(2, u_nT.shape[1], 2):
        operator_n, digit_n = operators_nT[:, place - 1], digits_nT[:, place]
        inside_n, times_n = place < equals_n1[:, 0], operator_n == TIMES
        total_n = np.where(inside_n & ~times_n, total_n + product_n, total_n)
        signed_n = np.where(operator_n == MINUS, -digit_n, digit_n)
        product_n = np.where(
            inside_n, np.where(times_n, product_n * digit_n % MODULUS, signed_n), product_n
        )
    answer_n = DIGITS + (total_n + product_n) % MODULUS
    return (tokens_nT, np.broadcast_to(answer_n[:, None], tokens_nT.shape), place_T == equals_n1)


def modular_arithmetic_brackets(
    u_nT: np.ndarray, length_n: np.ndarray, *, multiplication: bool, **_
) -> Sequences:
    """An expression E(m) of m = L - 3 tokens, `=` at place L - 3, where the answer is asked.

    E(1..4) = d, -d, (d), (-d); E(m) = (E(l) op E(m - 3 - l)) with l uniform in 1..m-4. All
    expressions of the batch are expanded together, one nesting level at a time, and evaluated from
    the innermost level out. The number at a place decides what is written there, and at an opening
    bracket where the expression inside is split."""
    tokens_nT, value_nT = (np.full(u_nT.shape, BRACKET_PAD), np.zeros(u_nT.shape, np.int64))
    size_n, row_n = length_n - 3, np.arange(len(length_n))
    tokens_nT[row_n, size_n] = BRACKET_EQUALS
    row, start, size = row_n, np.zeros_like(size_n), size_n
    levels = []
    while len(row):
        leaf = size < 5
        _write_leaves(tokens_nT, value_nT, u_nT, row[leaf], start[leaf], size[leaf])
        row, start, size = row[~leaf], start[~leaf], size[~leaf]
        left = integers(u_nT[row, start], 1, size - 4)
        middle = start + 1 + left  # the operator's place
        operator = integers(
            u_nT[row, middle], BRACKET_PLUS, BRACKET_TIMES if multiplication else BRACKET_MINUS
        )
        (tokens_nT[row, start], tokens_nT[row, middle], tokens_nT[row, start + size - 1]) = (
            OPEN,
            operator,
            CLOSE,
        )
        levels.append((row, start, middle, operator))
        row = np.concatenate([row, row])
        start, size = (
            np.concatenate([start + 1, middle + 1]),
            np.concatenate([left, size - 3 - left]),
        )
    for row, start, middle, operator in reversed(levels):
        a, b = value_nT[row, start + 1], value_nT[row, middle + 1]
        result = np.select(
            [operator == BRACKET_PLUS, operator == BRACKET_MINUS], [a + b, a - b], a * b
        )
        # No two subexpressions start at the same place.
        value_nT[row, start] = result % MODULUS
    asked_nT = np.arange(u_nT.shape[1]) == size_n[:, None]
    return tokens_nT, np.broadcast_to(value_nT[:, :1], tokens_nT.shape), asked_nT


def _write_leaves(
    tokens_nT: np.ndarray,
    value_nT: np.ndarray,
    u_nT: np.ndarray,
    row: np.ndarray,
    start: np.ndarray,
    size: np.ndarray,
) -> None:
    """Writes d, -d, (d), (-d) of sizes 1..4 and their values."""
    bracketed, negative = size >= 3, size % 2 == 0
    tokens_nT[row[bracketed], start[bracketed]] = OPEN
    tokens_nT[row[bracketed], (start + size - 1)[bracketed]] = CLOSE
    tokens_nT[row[negative], (start + bracketed)[negative]] = BRACKET_MINUS
    place = start + bracketed + negative
    digit = integers(u_nT[row, place], 0, MODULUS - 1)
    tokens_nT[row, place] = digit
    value_nT[row, start] = np.where(negative, -digit, digit) % MODULUS


def s5(u_nT: np.ndarray, length_n: np.ndarray, *, inputs: str, **_) -> Sequences:
    """Permutations of five points, answered by the product x_t ... x_2 x_1: the first element acts
    first.

    With "every_fourth" the fourth token of a group is asked, so that a layer has four steps of its
    own for one element."""
    moved = np.count_nonzero(S5 - np.arange(5), axis=1)
    choices = np.flatnonzero(moved <= {"swaps": 2, "three": 3}.get(inputs, 5))
    tokens_nT = choices[integers(u_nT, 0, len(choices) - 1)]
    place_T, asked_nT = np.arange(u_nT.shape[1]), np.ones(u_nT.shape, bool)
    if inputs == "every_fourth":
        tokens_nT = np.where(place_T % 4 == 0, tokens_nT, S5_FILLER)
        asked_nT = np.broadcast_to(place_T % 4 == 3, u_nT.shape)
    state_n, answers_nT = np.zeros(len(u_nT), np.int64), np.empty_like(tokens_nT)
    for place in place_T:
        answers_nT[:, place] = state_n = S5_PRODUCT[tokens_nT[:, place], state_n]
    return tokens_nT, answers_nT, asked_nT


def z60(u_nT: np.ndarray, length_n: np.ndarray, **_) -> Sequences:
    """The cyclic group of 60 elements: running sums mod 60."""
    tokens_nT = integers(u_nT, 0, 59)
    return tokens_nT, np.cumsum(tokens_nT, axis=1) % 60, np.ones(u_nT.shape, bool)


KINDS = {
    "parity": Kind(parity, vocabulary_size=3, chance=1 / 2, shortest=3),
    "modular_arithmetic": Kind(modular_arithmetic, vocabulary_size=10, chance=1 / 5, shortest=3),
    "modular_arithmetic_brackets": Kind(
        modular_arithmetic_brackets, vocabulary_size=12, chance=1 / 5, shortest=5
    ),
    "s5": Kind(s5, vocabulary_size=120, chance=1 / 120, shortest=1, group=True),
    "z60": Kind(z60, vocabulary_size=60, chance=1 / 60, shortest=1, group=True),
}


def _draw_lengths(kind: str, u_n: np.ndarray, low: int, high: int) -> np.ndarray:
    if kind == "modular_arithmetic":  # uniform over the odd lengths in low..high
        return 2 * integers(u_n, low // 2, (high - 1) // 2) + 1
    return integers(u_n, low, high)


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _check_lengths(kind: str, shortest: int, low: int, high: int) -> None:
    if low < shortest:
        raise ValueError(
            f"a sequence of {kind} has at least {shortest} tokens; got length {low} in"
            " test_length_grid"
        )
    if kind == "modular_arithmetic" and low == high and low % 2 == 0:
        raise ValueError(
            f"a sequence of modular_arithmetic has odd length; got length {low}: use"
            f" {low - 1} or {low + 1}"
        )
