"""State-tracking sequences against evaluators that share nothing with the generators."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from experiments.training.task import Batch, Examples, find_task

SAMPLES = np.arange(1000)
ARITHMETIC = [
    ("modular_arithmetic", True),
    ("modular_arithmetic_brackets", True),
    ("modular_arithmetic_brackets", False),
]
SYMBOLS = {"modular_arithmetic": " +-*=01234", "modular_arithmetic_brackets": "01234+-*()= "}
PERMUTATIONS = list(itertools.permutations(range(5)))


def make(kind: str, **options: Any) -> Any:
    return find_task("state_tracking", {"kind": kind, **options})


def train(task: Any, seed: int = 0) -> Batch:
    examples = task.train(seed)
    assert isinstance(examples, Examples)
    return examples.fetch(SAMPLES)


def read(kind: str, tokens: np.ndarray) -> str:
    return "".join(SYMBOLS[kind][token] for token in tokens).rstrip(" ")


def answers(batch: Batch) -> np.ndarray:
    return batch["targets"][batch["weights"] > 0]


@pytest.mark.parametrize("evaluation", ["in_distribution", "long"])
def test_parity_asks_after_the_last_bit_for_the_number_of_ones(evaluation: str) -> None:
    batch = make("parity").evaluations[evaluation].fetch(SAMPLES)
    low, high = {"in_distribution": (3, 40), "long": (40, 256)}[evaluation]
    assert batch["tokens"].shape == (1000, high)
    lengths = set()
    for tokens, targets, weights in zip(
        *(batch[name] for name in ("tokens", "targets", "weights")), strict=True
    ):
        bits = tokens[tokens != 0]
        lengths.add(len(bits) + 1)
        assert not tokens[len(bits) :].any(), "bits, then padding"
        assert np.flatnonzero(weights).tolist() == [len(bits) - 1]
        assert targets[len(bits) - 1] == 1 + list(bits).count(2) % 2
    assert low <= min(lengths) <= low + 3 and high - 3 <= max(lengths) <= high


def test_parity_may_ask_at_every_bit_in_training_but_not_in_evaluation() -> None:
    task = make("parity", supervision="every")
    batch = train(task)
    for tokens, targets, weights in zip(
        *(batch[name] for name in ("tokens", "targets", "weights")), strict=True
    ):
        running = 0
        for token, target, weight in zip(tokens, targets, weights, strict=True):
            running ^= int(token == 2)
            assert weight == (token != 0)
            assert target == (1 + running if weight else 0)
    np.testing.assert_array_equal(batch["tokens"], train(make("parity"))["tokens"])
    evaluated = task.evaluations["in_distribution"].fetch(SAMPLES)
    np.testing.assert_array_equal(evaluated["weights"].sum(axis=1), 1)


@pytest.mark.parametrize(("kind", "multiplication"), ARITHMETIC)
@pytest.mark.parametrize("evaluation", ["in_distribution", "long"])
def test_arithmetic_asks_at_the_equals_sign_for_the_value(
    kind: str, multiplication: bool, evaluation: str
) -> None:
    batch = make(kind, multiplication=multiplication).evaluations[evaluation].fetch(SAMPLES)
    low, high = {"in_distribution": (3, 40), "long": (40, 256)}[evaluation]
    # The answer, and with brackets one place of padding.
    slack = 2 if kind == "modular_arithmetic" else 3
    first_digit = SYMBOLS[kind].index("0")
    for tokens, targets, weights in zip(
        *(batch[name] for name in ("tokens", "targets", "weights")), strict=True
    ):
        text = read(kind, tokens)
        expression, rest = text.split("=")
        assert rest == "", "the answer is not in the input"
        assert low <= len(expression) + slack <= high
        assert "*" not in expression or multiplication
        assert np.flatnonzero(weights).tolist() == [len(expression)]
        assert targets[len(expression)] == first_digit + eval(expression) % 5, text


def test_arithmetic_without_brackets_has_odd_length() -> None:
    batch = make("modular_arithmetic").evaluations["long"].fetch(SAMPLES)
    lengths = {int(np.flatnonzero(weights)[0]) + 2 for weights in batch["weights"]}
    assert all(length % 2 for length in lengths)
    assert min(lengths) == 41 and max(lengths) == 255


def test_all_operators_and_forms_occur() -> None:
    rows = train(make("modular_arithmetic_brackets"))["tokens"]
    text = " ".join(read("modular_arithmetic_brackets", row) for row in rows)
    for piece in ("(1)", "(-1)", "+-1", "*(", ")-", "0=", "-1="):
        assert piece in text, piece
    text = " ".join(
        read("modular_arithmetic", row) for row in train(make("modular_arithmetic"))["tokens"]
    )
    counts = np.array([text.count(operator) for operator in "+-*"])
    np.testing.assert_allclose(
        counts / counts.sum(), 1 / 3, atol=4 * math.sqrt(2 / 9 / counts.sum())
    )


@pytest.mark.parametrize("inputs", ["all", "swaps", "three", "every_fourth"])
def test_s5_answers_with_the_running_product(inputs: str) -> None:
    batch = train(make("s5", inputs=inputs))
    assert batch["tokens"].shape == (1000, 32)
    elements = {tuple(PERMUTATIONS[token]) for token in np.unique(batch["tokens"]) if token < 120}
    moved = {sum(image != point for point, image in enumerate(element)) for element in elements}
    expected = {"swaps": (11, {0, 2}), "three": (31, {0, 2, 3})}
    assert (len(elements), moved) == expected.get(inputs, (120, {0, 2, 3, 4, 5}))
    for row in range(100):
        points = list(range(5))
        for place, token in enumerate(batch["tokens"][row]):
            if inputs == "every_fourth" and place % 4:
                assert token == 120
            else:
                points = [PERMUTATIONS[token][point] for point in points]
            asked = inputs != "every_fourth" or place % 4 == 3
            assert batch["weights"][row, place] == asked
            assert batch["targets"][row, place] == (
                PERMUTATIONS.index(tuple(points)) if asked else 0
            )


def test_z60_answers_with_the_running_sum() -> None:
    batch = make("z60").evaluations["long"].fetch(np.arange(50))
    assert batch["tokens"].shape == (50, 500)
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        assert targets.tolist() == [sum(tokens[: place + 1]) % 60 for place in range(500)]


def test_groups_may_ask_for_the_last_product_alone() -> None:
    every, last = train(make("s5")), train(make("s5", supervision="last"))
    assert np.all(last["weights"] == np.eye(32)[-1])
    np.testing.assert_array_equal(last["targets"][:, -1], every["targets"][:, -1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("parity", {}),
        ("modular_arithmetic_brackets", {"multiplication": False}),
        ("s5", {}),
        ("z60", {}),
    ],
)
def test_answers_are_balanced_so_a_constant_scores_nothing(
    kind: str, options: dict[str, Any]
) -> None:
    task = make(kind, **options)
    found = answers(task.evaluations["in_distribution"].fetch(np.arange(4000)))
    counts = np.bincount(found)[np.unique(found)]
    chance = 1 / len(counts)
    # Answers are independent, also those of one sequence: products of independent uniform elements
    # are such elements.
    deviation = 5 * math.sqrt(chance * (1 - chance) * len(found))
    np.testing.assert_allclose(counts, chance * len(found), atol=deviation)
    sums = {"loss_sum": 0, "sequence_correct_sum": 0, "sequence_sum": 1}
    constant = task.objective.metrics(
        sums | {"correct_sum": counts.max(), "weight_sum": len(found)}
    )
    assert abs(constant["scaled_accuracy"]) <= deviation / len(found) / (1 - chance)


def test_products_in_brackets_make_zero_likely() -> None:
    task = make("modular_arithmetic_brackets")
    shares = {
        name: np.mean(answers(examples.fetch(np.arange(8000))) == 0)
        for name, examples in task.evaluations.items()
    }
    # The documented scores of the constant 0: .09 and .13.
    assert (shares["in_distribution"] - 0.2) / 0.8 == pytest.approx(0.09, abs=0.02)
    assert (shares["long"] - 0.2) / 0.8 == pytest.approx(0.13, abs=0.02)


def test_scaled_accuracy_is_zero_at_chance_and_one_at_the_top() -> None:
    sums = {"loss_sum": 0, "weight_sum": 10, "sequence_correct_sum": 0, "sequence_sum": 1}
    derive = make("modular_arithmetic").objective.metrics
    assert derive(sums | {"correct_sum": 2})["scaled_accuracy"] == pytest.approx(0)
    assert derive(sums | {"correct_sum": 10})["scaled_accuracy"] == 1
    assert derive(sums | {"correct_sum": 6})["scaled_accuracy"] == pytest.approx(0.5)


def test_a_length_grid_adds_evaluations_of_one_length() -> None:
    task = make("parity", test_length_grid=(64, 128))
    assert list(task.evaluations) == ["in_distribution", "long", "length_64", "length_128"]
    batch = task.evaluations["length_128"].fetch(SAMPLES)
    assert batch["tokens"].shape == (1000, 128)
    assert np.all(batch["weights"] == np.eye(128)[126]), "127 bits, asked at the last"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dyck"}, "kind must be one of 'parity', .*; got 'dyck'"),
        (
            {"kind": "parity", "supervision": "first"},
            "supervision must be one of 'last', 'every'; got 'first'",
        ),
        (
            {"kind": "modular_arithmetic", "supervision": "every"},
            "needs a running answer, which modular_arithmetic lacks",
        ),
        ({"kind": "parity", "inputs": "swaps"}, "inputs must be one of 'all'; got 'swaps'"),
        (
            {"kind": "parity", "multiplication": False},
            "belongs to modular_arithmetic_brackets; got kind='parity'",
        ),
        (
            {"kind": "parity", "train_max_length": 2},
            "need 3 <= train_max_length <= test_max_length for parity; got 2",
        ),
        ({"kind": "parity", "test_max_length": 20}, "need 3 <= .*; got 40 and 20"),
        (
            {"kind": "s5", "inputs": "every_fourth", "train_max_length": 3},
            "need 4 <= train_max_length",
        ),
        (
            {"kind": "modular_arithmetic", "test_length_grid": (64,)},
            "odd length; got length 64: use 63 or 65",
        ),
        ({"kind": "parity", "test_length_grid": (2,)}, "at least 3 tokens; got length 2"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_task("state_tracking", options)
