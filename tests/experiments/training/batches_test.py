"""What all tasks share: batches, epochs, replicas, processes, resumption, evaluation."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1

from experiments.training.batches import evaluation_batches, train_batches, units_read
from experiments.training.task import Examples, Task, find_task


def numbered(length: int | None, offset: int = 0) -> Examples:
    """Examples that are their own numbers."""
    return Examples(
        lambda indices: {
            "tokens": offset + indices[:, None],
            "weights": np.ones((len(indices), 1), np.float32),
        },
        length,
    )


def task_of(train: Any) -> Task:
    return Task({"vocabulary": 8}, train=train, evaluations={"validation": numbered(10)})


def take(task: Task, steps: int, **options: Any) -> np.ndarray:
    """Tokens of the first batches, [steps, ..., B]."""
    batches = train_batches(task, **{"seeds": (0,), "batch_size": 4} | options)
    return np.stack([next(batches)["tokens"][..., 0] for _ in range(steps)])


PARITY = find_task("state_tracking", {"kind": "parity"})


def test_every_epoch_is_another_permutation_of_all_examples() -> None:
    tokens = take(task_of(lambda seed: numbered(12)), steps=9).reshape(3, 12)
    np.testing.assert_array_equal(np.sort(tokens, axis=1), np.tile(np.arange(12), (3, 1)))
    assert len({tuple(epoch) for epoch in tokens}) == 3


def test_a_batch_may_hold_the_end_of_one_epoch_and_the_beginning_of_the_next() -> None:
    tokens = take(task_of(lambda seed: numbered(6)), steps=3).ravel()
    np.testing.assert_array_equal(
        np.sort(tokens.reshape(2, 6), axis=1), np.tile(np.arange(6), (2, 1))
    )


def test_a_stream_is_taken_in_order() -> None:
    np.testing.assert_array_equal(
        take(task_of(lambda seed: numbered(None)), steps=3).ravel(), np.arange(12)
    )


def test_seeds_give_other_orders_and_other_examples() -> None:
    shuffled = task_of(lambda seed: numbered(40))
    assert not np.array_equal(take(shuffled, 10), take(shuffled, 10, seeds=(1,)))
    assert not np.array_equal(take(PARITY, 1), take(PARITY, 1, seeds=(1,)))


@pytest.mark.parametrize("length", [40, None])
def test_a_replica_sees_what_it_would_see_alone(length: int | None) -> None:
    task = task_of(lambda seed: numbered(length, offset=1000 * seed))
    together = take(task, 5, seeds=(3, 1))
    assert together.shape == (5, 2, 4)
    np.testing.assert_array_equal(together[:, 0], take(task, 5, seeds=(3,)))
    np.testing.assert_array_equal(together[:, 1], take(task, 5, seeds=(1,)))


@pytest.mark.parametrize("length", [40, None])
def test_processes_share_the_batch_of_one_process(length: int | None) -> None:
    task = task_of(lambda seed: numbered(length))
    shares = [take(task, 6, rows=rows) for rows in (np.arange(2), np.array([2, 3]))]
    assert not set(shares[0][0]) & set(shares[1][0])
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), take(task, 6))


def test_parts_never_share_a_batch_and_alternate_in_proportion() -> None:
    tokens = take(task_of(lambda seed: (numbered(300), numbered(100, offset=1000))), steps=40)
    of_second = tokens >= 1000
    assert np.all(of_second.all(axis=1) | ~of_second.any(axis=1))
    assert of_second.any(axis=1).sum() == 10


def test_the_tokens_read_are_those_of_the_batches() -> None:
    def of_length(count: int, length: int) -> Examples:
        return Examples(
            lambda indices: dict.fromkeys(("tokens", "targets"), np.zeros((len(indices), length))),
            count,
        )

    for parts in (of_length(300, 7), (of_length(300, 7), of_length(100, 64), of_length(50, 3))):
        task = task_of(lambda seed, parts=parts: parts)
        batches = train_batches(task, seeds=(0,), batch_size=4)
        for steps in (0, 1, 2, 3, 37):
            batches.set_state({"next_index": 0})
            read = sum(next(batches)["tokens"].size for _ in range(steps))
            assert units_read(task, seed=0, batch_size=4, steps=steps) == read


def test_an_empty_training_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no training examples"):
        train_batches(task_of(lambda seed: numbered(0)), seeds=(0,), batch_size=4)


# Augmentation


def jittered(length: int | None) -> Examples:
    """Numbered examples, each with a token that tells its number and how often it was seen."""

    def augment(batch: Any, indices: np.ndarray, epochs: np.ndarray) -> Any:
        return batch | {"tokens": 100 * epochs[:, None] + indices[:, None]}

    return replace(numbered(length), augment=augment)


def test_examples_see_the_epoch_in_training_and_resume_exactly() -> None:
    task = replace(task_of(lambda seed: jittered(6)), evaluations={"test": jittered(6)})
    tokens = take(task, steps=9).ravel()
    np.testing.assert_array_equal(np.sort(tokens[:12]), [*range(6), *range(100, 106)])
    np.testing.assert_array_equal(np.sort(tokens[30:]), range(500, 506))
    plain = take(task_of(lambda seed: numbered(6)), steps=9).ravel()
    np.testing.assert_array_equal(tokens % 100, plain)
    batches = train_batches(task, seeds=(0,), batch_size=4)
    batches.set_state({"next_index": 5})
    np.testing.assert_array_equal(next(batches)["tokens"][:, 0], tokens[20:24])


def test_an_evaluation_sees_examples_as_they_are() -> None:
    (batch,) = evaluation_batches(jittered(6), examples=6, batch_size=6)
    np.testing.assert_array_equal(batch["tokens"][:, 0], np.arange(6))


# Resumption


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_state_is_one_number_and_resumes_exactly(seeds: tuple[int, ...]) -> None:
    batches = train_batches(PARITY, seeds=seeds, batch_size=4)
    for _ in range(3):
        next(batches)
    state = batches.get_state()
    assert state == {"next_index": 3}
    expected = [next(batches) for _ in range(4)]
    resumed = train_batches(PARITY, seeds=seeds, batch_size=4)
    resumed.set_state(state)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, batch, next(resumed))


def test_orbax_saves_and_restores_the_iterator(tmp_path: Path) -> None:
    with v1.training.Checkpointer(str(tmp_path)) as checkpointer:
        batches = train_batches(PARITY, seeds=(0,), batch_size=4)
        next(batches)
        checkpointer.save_checkpointables(1, {"data": batches})
        expected = next(batches)
        resumed = train_batches(PARITY, seeds=(0,), batch_size=4)
        checkpointer.load_checkpointables(1, {"data": resumed})
        jax.tree.map(np.testing.assert_array_equal, expected, next(resumed))


# Evaluation


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_that_fill_up_the_last_batch_have_no_weight(processes: int) -> None:
    seen = []
    for index in range(processes):
        batches = evaluation_batches(
            numbered(10), examples=7, batch_size=4, rows=np.arange(4).reshape(processes, -1)[index]
        )
        for batch in batches:
            assert batch["tokens"].shape == (4 // processes, 1)
            seen += batch["tokens"][batch["weights"] > 0].tolist()
    assert sorted(seen) == list(range(7))


def test_an_evaluation_with_fewer_examples_is_used_up() -> None:
    batches = list(evaluation_batches(numbered(10), examples=1000, batch_size=5))
    assert [batch["weights"].sum() for batch in batches] == [5, 5]


def test_metrics_do_not_depend_on_the_batch_size() -> None:
    def model(tokens: jax.Array) -> tuple[jax.Array, None]:
        return jax.nn.one_hot((tokens * tokens + 1) % 3, 3), None

    evaluation = PARITY.evaluations["in_distribution"]
    assert isinstance(evaluation, Examples)
    loss, metrics = jax.jit(functools.partial(PARITY.objective, model)), []
    for batch_size in (100, 8):
        sums = [
            loss(batch, jax.random.key(0))[1]
            for batch in evaluation_batches(evaluation, examples=100, batch_size=batch_size)
        ]
        totals = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
        metrics.append(PARITY.objective.metrics(totals))
    assert 0 < metrics[0]["accuracy"] < 1
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


def test_training_and_evaluation_streams_differ() -> None:
    train, evaluation = PARITY.train(0), PARITY.evaluations["in_distribution"]
    assert isinstance(train, Examples) and isinstance(evaluation, Examples)
    assert not np.array_equal(
        train.fetch(np.arange(9))["tokens"], evaluation.fetch(np.arange(9))["tokens"]
    )
