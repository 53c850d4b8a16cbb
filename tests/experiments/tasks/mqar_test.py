"""Multi-query associative recall: what a sequence holds, the law of the gaps, the training set."""

from typing import Any

import numpy as np
import pytest

from experiments.tasks.mqar import draw_distinct
from experiments.tasks.sources.random_streams import uniforms
from experiments.training.batches import train_batches
from experiments.training.task import Batch, Examples, find_task

LENGTH, PAIRS, VOCABULARY = 64, 8, 64


def make(**options: Any) -> Any:
    return find_task(
        "mqar", {"train": ((LENGTH, PAIRS, 100),), "vocabulary_size": VOCABULARY} | options
    )


def draw(examples: int = 1000, **options: Any) -> Batch:
    return make(**options).evaluations[f"length_{LENGTH}_pairs_{PAIRS}"].fetch(np.arange(examples))


@pytest.mark.parametrize("random_non_queries", [False, True])
def test_every_query_is_a_key_of_the_context_and_its_target_the_value(
    random_non_queries: bool,
) -> None:
    batch = draw(random_non_queries=random_non_queries)
    for row in range(1000):
        tokens, queries = batch["tokens"][row], batch["readout_positions"][row]
        context = dict(zip(tokens[0 : 2 * PAIRS : 2], tokens[1 : 2 * PAIRS : 2], strict=True))
        assert len(context) == PAIRS and len(set(context.values())) == PAIRS, (
            "keys and values are distinct"
        )
        assert all(1 <= key < VOCABULARY // 2 for key in context)
        assert all(VOCABULARY // 2 <= value < VOCABULARY for value in context.values())
        assert len(set(queries)) == PAIRS and queries.min() >= 2 * PAIRS and not np.any(queries % 2)
        # The oracle: look the query up in the context.
        assert [context[token] for token in tokens[queries]] == batch["targets"][row].tolist()
        assert set(tokens[queries]) == set(context), "every key is asked once"
        filler = np.delete(tokens[2 * PAIRS :], queries - 2 * PAIRS)
        assert random_non_queries or not filler.any()
    np.testing.assert_array_equal(batch["weights"], 1)


def test_random_filler_is_uniform_over_the_vocabulary() -> None:
    batch = draw(random_non_queries=True)
    odd = batch["tokens"][:, 2 * PAIRS + 1 :: 2]  # never a query
    counts = np.bincount(odd.ravel(), minlength=VOCABULARY)
    np.testing.assert_allclose(
        counts, odd.size / VOCABULARY, atol=5 * np.sqrt(odd.size / VOCABULARY)
    )


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_the_first_gap_follows_the_power_law(power: float) -> None:
    batch = draw(examples=20_000, power=power)
    gaps = (batch["readout_positions"][:, 0] - 2 * PAIRS) // 2
    weights = power * np.arange(1, (LENGTH - 2 * PAIRS) // 2 + 1) ** (power - 1)
    expected = weights / weights.sum()
    counts = np.bincount(gaps, minlength=len(expected))
    np.testing.assert_array_less(
        np.abs(counts / 20_000 - expected), 4.5 * np.sqrt(expected / 20_000)
    )


def test_later_gaps_are_drawn_from_what_is_left() -> None:
    batch = make(test=((12, 2),)).evaluations["length_12_pairs_2"].fetch(np.arange(20_000))
    first, second = ((batch["readout_positions"] - 4) // 2).T
    weights = 0.01 * np.arange(1, 5) ** (0.01 - 1)
    expected = np.zeros((4, 4))
    for i in range(4):
        rest = np.where(np.arange(4) == i, 0, weights)
        expected[i] = weights[i] / weights.sum() * rest / rest.sum()
    counts = np.zeros((4, 4))
    np.add.at(counts, (first, second), 1)
    assert not counts.diagonal().any()
    np.testing.assert_allclose(
        counts / 20_000, expected, atol=4.5 * np.sqrt(expected.max() / 20_000)
    )


def test_a_partial_shuffle_draws_every_ordered_choice_equally_often() -> None:
    drawn = draw_distinct(uniforms("stream", np.arange(24_000), 2), 5, 8)
    pairs, counts = np.unique(drawn, axis=0, return_counts=True)
    assert (
        len(pairs) == 12
        and np.all(pairs[:, 0] != pairs[:, 1])
        and pairs.min() == 5
        and pairs.max() == 8
    )
    np.testing.assert_allclose(counts, 2000, atol=5 * np.sqrt(2000))


def test_the_training_set_is_the_same_in_every_epoch_and_for_every_count() -> None:
    batches = train_batches(make(), seeds=(7,), batch_size=100)
    epochs = [next(batches) for _ in range(2)]
    rows = [{row.tobytes() for row in epoch["tokens"]} for epoch in epochs]
    assert rows[0] == rows[1] and len(rows[0]) == 100
    assert not np.array_equal(epochs[0]["tokens"], epochs[1]["tokens"]), "but in another order"
    (larger,) = as_parts(make(train=((LENGTH, PAIRS, 3000),)).train(7))
    (smaller,) = as_parts(make().train(7))
    np.testing.assert_array_equal(
        larger.fetch(np.arange(100))["tokens"], smaller.fetch(np.arange(100))["tokens"]
    )


def test_seeds_have_training_sets_of_their_own() -> None:
    sets = [as_parts(make().train(seed))[0].fetch(np.arange(100))["tokens"] for seed in (0, 1)]
    assert not {row.tobytes() for row in sets[0]} & {row.tobytes() for row in sets[1]}


def test_batches_of_different_settings_alternate() -> None:
    task = make(train=((LENGTH, PAIRS, 300), (16, 2, 100)))
    assert set(task.evaluations) == {"length_64_pairs_8", "length_16_pairs_2"}
    batches = train_batches(task, seeds=(0,), batch_size=10)
    shapes = [next(batches)["tokens"].shape for _ in range(40)]
    assert shapes.count((10, LENGTH)) == 30 and shapes.count((10, 16)) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ()}, "train must list at least one setting"),
        ({"train": ((63, 4, 10),)}, r"even length and 1 <= 4 pairs <= length; got \(63, 4\)"),
        ({"test": ((64, 17),)}, r"1 <= 4 pairs <= length; got \(64, 17\)"),
        ({"vocabulary_size": 16}, r"at least 2 \(pairs \+ 1\) = 18; got 16"),
        ({"power": 0.0}, r"config.task.power must be a finite number in \(0, 10\]; got 0.0"),
        ({"train": ((64, 4, 0),)}, r"config.task.train must be .*; got \(\(64, 4, 0\),\)"),
        ({"vocabulary_size": 65}, "vocabulary_size must be even"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def as_parts(examples: Examples | tuple[Examples, ...]) -> tuple[Examples, ...]:
    assert isinstance(examples, tuple)
    return examples
