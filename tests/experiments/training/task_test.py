"""What all tasks share: batches, epochs, replicas, processes, resumption, evaluation and losses."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1

from experiments.configs import linear_self_attention
from experiments.objectives.objective import next_token_loss, squared_error_loss, token_metrics
from experiments.tasks.sources.random_streams import integers, normals, uniforms
from experiments.training.task import (
    Examples,
    Task,
    available_tasks,
    configured_task,
    evaluation_batches,
    find_task,
    from_arrays,
    tokens_read,
    train_batches,
)


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
    return Task(vocabulary_size=8, train=train, evaluations={"validation": numbered(10)})


def take(task: Task, steps: int, **options: Any) -> np.ndarray:
    """Tokens of the first batches, [steps, ..., B]."""
    batches = train_batches(task, **{"seeds": (0,), "batch_size": 4} | options)
    return np.stack([next(batches)["tokens"][..., 0] for _ in range(steps)])


PARITY = find_task("state_tracking", {"kind": "parity"})


# Random numbers


def test_numbers_of_an_example_do_not_depend_on_its_company() -> None:
    together = uniforms("stream", np.arange(50), 7)
    chosen = np.array([41, 3, 4, 5, 0, 49])
    np.testing.assert_array_equal(uniforms("stream", chosen, 7), together[chosen])


def test_streams_and_examples_differ() -> None:
    numbers = np.concatenate([uniforms(stream, np.arange(100), 9) for stream in ("a", "b")])
    assert len(np.unique(numbers)) == numbers.size


def test_integers_are_uniform_and_normals_normal() -> None:
    numbers = uniforms("stream", np.arange(1000), 100)
    counts = np.bincount(integers(numbers, 3, 7).ravel(), minlength=8)
    assert not counts[:3].any()
    np.testing.assert_allclose(counts[3:], 20_000, atol=5 * math.sqrt(20_000))
    values = normals(numbers).astype(np.float64)
    moments = [np.mean(values**power) for power in (1, 2, 3, 4)]
    # The variances of the first four powers of a standard normal variable are 1, 2, 15 and 96.
    np.testing.assert_array_less(
        np.abs(np.array(moments) - [0, 1, 0, 3]),
        4 * np.sqrt([1, 2, 15, 96]) / math.sqrt(values.size),
    )


# Batches


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
        return Examples(lambda indices: {"tokens": np.zeros((len(indices), length))}, count)

    for parts in (of_length(300, 7), (of_length(300, 7), of_length(100, 64), of_length(50, 3))):
        task = task_of(lambda seed, parts=parts: parts)
        batches = train_batches(task, seeds=(0,), batch_size=4)
        for steps in (0, 1, 2, 3, 37):
            batches.set_state({"next_index": 0})
            read = sum(next(batches)["tokens"].size for _ in range(steps))
            assert tokens_read(task, seed=0, batch_size=4, steps=steps) == read


def test_an_empty_training_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no training examples"):
        train_batches(task_of(lambda seed: numbered(0)), seeds=(0,), batch_size=4)


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
    task = task_of(lambda seed: numbered(4))
    seen = []
    for index in range(processes):
        batches = evaluation_batches(
            task,
            "validation",
            examples=7,
            batch_size=4,
            rows=np.arange(4).reshape(processes, -1)[index],
        )
        for batch in batches:
            assert batch["tokens"].shape == (4 // processes, 1)
            seen += batch["tokens"][batch["weights"] > 0].tolist()
    assert sorted(seen) == list(range(7))


def test_an_evaluation_with_fewer_examples_is_used_up() -> None:
    batches = list(
        evaluation_batches(
            task_of(lambda seed: numbered(4)), "validation", examples=1000, batch_size=5
        )
    )
    assert [batch["weights"].sum() for batch in batches] == [5, 5]


def test_metrics_do_not_depend_on_the_batch_size() -> None:
    def model(tokens: jax.Array) -> tuple[jax.Array, None]:
        return jax.nn.one_hot((tokens * tokens + 1) % 3, 3), None

    loss, metrics = jax.jit(functools.partial(next_token_loss, model)), []
    for batch_size in (100, 8):
        sums = [
            loss(batch)[1]
            for batch in evaluation_batches(
                PARITY, "in_distribution", examples=100, batch_size=batch_size
            )
        ]
        metrics.append(PARITY.derive({name: sum(float(s[name]) for s in sums) for name in sums[0]}))
    assert 0 < metrics[0]["accuracy"] < 1
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


def test_training_and_evaluation_streams_differ() -> None:
    train, evaluation = PARITY.train(0), PARITY.evaluations["in_distribution"]
    assert isinstance(train, Examples)
    assert not np.array_equal(
        train.fetch(np.arange(9))["tokens"], evaluation.fetch(np.arange(9))["tokens"]
    )


def test_an_unknown_evaluation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="evaluation must be one of in_distribution, long; got 'test'"
    ):
        evaluation_batches(PARITY, "test", examples=8, batch_size=8)


# Losses


def test_next_token_loss_is_the_mean_log_loss_of_the_weighted_targets() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
    targets = rng.integers(0, 7, (3, 5))
    # The first sequence has 1.5 of 2.5 right, the second no weight at all, the third what is asked
    # right and no more.
    weights = np.array([[1, 0, 0.5, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], np.float32)
    targets[0, [0, 2]] = logits[0, [0, 2]].argmax(axis=-1)
    targets[0, 3] = logits[0, 3].argmin()
    targets[2] = logits[2].argmin(axis=-1)
    targets[2, 1] = logits[2, 1].argmax()
    logits[1] = np.nan  # a sequence without weight must not reach the loss
    jitted = jax.jit(functools.partial(next_token_loss, lambda tokens: (jnp.asarray(logits), None)))
    loss, sums = jitted({"tokens": targets, "targets": targets, "weights": weights})
    log_probs = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    expected = -sum(
        weights[b, t] * log_probs[b, t, targets[b, t]] for b in (0, 2) for t in range(5)
    )
    assert float(loss) == pytest.approx(expected / 3.5, rel=1e-6)
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {
            "loss_sum": expected,
            "weight_sum": 3.5,
            "correct_sum": 2.5,
            "sequence_correct_sum": 1,
            "sequence_sum": 2,
        },
        rel=1e-6,
    )
    metrics = token_metrics({name: float(value) for name, value in sums.items()})
    assert metrics["accuracy"] == pytest.approx(2.5 / 3.5)


def test_z_loss_adds_the_square_of_log_z_to_the_scalar_alone() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 3, 7)).astype(np.float32)
    weights = np.array([[1, 0, 0.5], [0, 0, 0]], np.float32)
    batch = {
        "tokens": np.zeros((2, 3), int),
        "targets": rng.integers(0, 7, (2, 3)),
        "weights": weights,
    }

    def model(tokens: Any) -> Any:
        return jnp.asarray(logits), None

    plain, sums = next_token_loss(model, batch)
    loss, same_sums = next_token_loss(model, batch, z_loss=0.1)
    log_z = np.log(np.exp(logits).sum(axis=-1))
    expected = 0.1 * (log_z[0, 0] ** 2 + 0.5 * log_z[0, 2] ** 2) / 1.5
    assert float(loss - plain) == pytest.approx(expected, rel=1e-5)
    assert jax.tree.map(float, sums) == jax.tree.map(float, same_sums)


def test_z_loss_needs_logits() -> None:
    config: Any = linear_self_attention.get_config("icl_regression,smoke")
    config.z_loss = 1e-4
    with pytest.raises(ValueError, match=r"config\.z_loss is for tasks with a vocab"):
        configured_task(config)


def test_next_token_loss_passes_on_what_the_batch_tells_the_model() -> None:
    seen = {}

    def model(tokens: jax.Array, **inputs: jax.Array) -> tuple[jax.Array, None]:
        seen.update(inputs)
        return jnp.zeros((2, 3, 4)), None

    told = {
        name: np.zeros((2, 3), np.int32)
        for name in ("positions", "segment_ids", "readout_positions")
    }
    batch = {"tokens": np.zeros((2, 9), np.int32), "targets": np.zeros((2, 3), np.int32)} | told
    batch |= {"weights": np.ones((2, 3), np.float32), "bytes": np.array([3.0, 4.0], np.float32)}
    _, sums = jax.jit(functools.partial(next_token_loss, model))(batch)
    assert set(seen) == set(told)
    assert float(sums["bytes_sum"]) == 7
    assert float(sums["sequence_correct_sum"]) == 2


def test_squared_error_loss_is_the_mean_over_weighted_prompts() -> None:
    prompts: Any = {
        "examples": np.array([1.0, 2.0, np.nan], np.float32),
        "target": np.array([3.0, 2.0, 0.0], np.float32),
        "weights": np.array([1.0, 1.0, 0.0], np.float32),
    }
    loss, sums = squared_error_loss(lambda examples: jnp.asarray(examples), prompts)
    assert float(loss) == 2
    assert {name: float(value) for name, value in sums.items()} == {
        "loss_sum": 4,
        "weight_sum": 2,
        "target_square_sum": 13,
    }


# Tasks by name


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    known = {"icl_regression", "images", "mqar", "state_tracking", "text"}
    assert known <= set(available_tasks())
    assert not {"random_streams", "text_corpus"} & set(available_tasks())
    with pytest.raises(
        ValueError, match=r"task must be one of .*icl_regression, .*, text, .*; got 'parity'"
    ):
        find_task("parity", {})


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError,
        match=("task mqar has no option 'pairs'; known options in task: train, test, vocab"),
    ):
        find_task("mqar", {"pairs": 4})


def test_arrays_in_memory_are_looked_up_by_row() -> None:
    examples = from_arrays({"tokens": np.arange(10).reshape(5, 2)})
    assert examples.length == 5
    np.testing.assert_array_equal(examples.fetch(np.array([4, 0]))["tokens"], [[8, 9], [0, 1]])
