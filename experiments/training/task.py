"""What a task is, and how its examples become batches.

A task's data is random access: `Examples.fetch(indices)` makes or reads the examples with these
numbers, many at a time. Order, epochs, replicas and processes are arithmetic on indices, done here
once; grain runs it on threads ahead of the training step and keeps the place in a state that is one
number. Batch i is a function of (seed, i): not of the number of processes, not of how often the run
was interrupted."""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import grain.experimental
import numpy as np

from experiments.objectives.objective import next_token_loss, token_metrics
from experiments.training.checkout import CHECKOUT

Batch = dict[str, np.ndarray]
Loss = Callable[[Any, Any], tuple[Any, dict[str, Any]]]

# What a model reads along time, [n, T, ...]: a batch has one of them, and its length is that of the
# batch.
SEQUENCES = ("tokens", "examples")

# Threads hide the making of a batch behind the step; eight batches bridge the hiccups of a disk.
READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


@dataclass(frozen=True)
class Examples:
    """Numbered examples. `fetch`, a pure function, maps indices [n] to a dict of arrays [n, ...].

    length      how many there are, each numbered below it; training shuffles them anew every epoch.
                None: a stream without end, every example fresh, taken in order.

    Every batch has float "weights" [n, ...]; an example whose weights are all zero does not count.
    """

    fetch: Callable[[np.ndarray], Batch]
    length: int | None = None


def from_arrays(arrays: Batch) -> Examples:
    """The rows of arrays [length, ...] that are held in memory."""
    return Examples(
        lambda indices: {name: array[indices] for name, array in arrays.items()},
        len(next(iter(arrays.values()))),
    )


@dataclass(frozen=True)
class Task:
    """What is learned, from which examples, and how it is scored.

    vocabulary_size     0 where examples are vectors, not tokens
    train               seed -> examples, a function of the seed; or a tuple of examples which never
                        share a batch (their lengths differ), whose batches then alternate in
                        proportion to their numbers of examples
    evaluations         name -> examples, the same for all seeds, none of them drawn from the
                        training stream or split
    loss                (model, batch) -> (scalar, sums); see experiments/objectives/objective.py
    derive              sums over an evaluation -> its metrics
    provenance          facts that are recorded with every result
    """

    vocabulary_size: int
    train: Callable[[int], Examples | tuple[Examples, ...]]
    evaluations: Mapping[str, Examples]
    loss: Loss = next_token_loss
    derive: Callable[[Mapping[str, float]], dict[str, float]] = token_metrics
    provenance: Mapping[str, Any] = field(default_factory=dict)


def batch_length(batch: Mapping[str, np.ndarray], axis: int = 1) -> int:
    """T of a batch whose time axis is `axis`. Raises ValueError for a batch without a sequence."""
    for name in SEQUENCES:
        if name in batch:
            return batch[name].shape[axis]
    raise ValueError(f"a batch must have one of {', '.join(SEQUENCES)}; got {', '.join(batch)}")


def lengths(task: Task, seed: int) -> dict[str, int]:
    """T of everything that a run with `seed` reads: training batches (each part of them) and
    evaluations, by name."""
    parts = task.train(seed)
    named = (
        {"training batches": parts}
        if isinstance(parts, Examples)
        else {f"training part {number}": part for number, part in enumerate(parts)}
    )
    named |= {f"evaluation {name}": part for name, part in task.evaluations.items()}
    return {name: batch_length(part.fetch(np.arange(1))) for name, part in named.items()}


def available_tasks() -> tuple[str, ...]:
    """Names of the files in experiments/tasks that define `make`."""
    files = (CHECKOUT / "experiments/tasks").glob("*.py")
    return tuple(
        sorted(
            file.stem
            for file in files
            if re.search(r"^def make\(", file.read_text("utf-8"), re.MULTILINE)
        )
    )


def find_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task of experiments/tasks/<name>.py, made with `options`.

    Raises ValueError for a name or an option that does not exist, with those that do.
    """
    if name not in available_tasks():
        raise ValueError(
            f"task must be one of {', '.join(available_tasks())} (files in"
            f" experiments/tasks); got {name!r}"
        )
    make = importlib.import_module(f"experiments.tasks.{name}").make
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            raise ValueError(
                f"task {name} has no option {option!r}; known options in task: {', '.join(known)}"
            )
    return make(**options)


def configured_task(config: Any) -> Task:
    """The task of a run's config, with the loss that it trains.

    Raises ValueError as `find_task`, and for a z-loss where there are no logits.
    """
    options = config.task.to_dict()
    task = find_task(options.pop("name"), options)
    if not config.z_loss:
        return task
    if task.loss is not next_token_loss:
        raise ValueError(
            "config.z_loss is for tasks with a vocabulary; got"
            f" {config.z_loss} for {config.task.name}"
        )
    loss = functools.partial(next_token_loss, z_loss=config.z_loss)
    return dataclasses.replace(task, loss=loss)


def train_batches(
    task: Task, *, seeds: Sequence[int], batch_size: int, rows: np.ndarray | None = None
) -> grain.DatasetIterator[Batch]:
    """An endless iterator over training batches: dicts of arrays [B, ...], or [R, B, ...] for R > 1
    seeds.

    Every seed is a replica with a data stream of its own, the one it would have alone. `batch_size`
    is that of one replica over all processes; `rows` are those of its rows that are wanted here
    (None: all). The iterator's state {"next_index": step} is saved and restored by orbax, or by
    get_state and set_state."""
    rows = np.arange(batch_size) if rows is None else rows
    replicas = [_replica_batches(task, seed, batch_size, rows) for seed in seeds]
    dataset = replicas[0]
    if len(replicas) > 1:
        dataset = grain.experimental.ZipMapDataset(replicas).map(_stack)
    return iter(dataset.to_iter_dataset(READ_OPTIONS))


def tokens_read(task: Task, *, seed: int, batch_size: int, steps: int) -> int:
    """How many places of sequences a run with `seed` has read after `steps` steps, padding
    included.

    Like the batches a function of the step: interruptions do not change it.
    """
    parts = task.train(seed)
    parts = (parts,) if isinstance(parts, Examples) else parts
    sizes = [batch_size * batch_length(part.fetch(np.arange(1))) for part in parts]
    if len(set(sizes)) == 1:
        return steps * sizes[0]
    per_step = _mix([grain.MapDataset.source([size]).repeat() for size in sizes], parts)
    # Never None, as elements of a filtered dataset may be.
    return sum(per_step[step] or 0 for step in range(steps))


def evaluation_batches(
    task: Task, name: str, *, examples: int, batch_size: int, rows: np.ndarray | None = None
) -> grain.IterDataset[Batch]:
    """The first `examples` examples of an evaluation, or all if it has fewer, as an iterable over
    batches [B, ...].

    All batches have the same shape: rows that fill up the last one have zero "weights" and "bytes"
    and so do not count. `batch_size` and `rows` are as in `train_batches`. Raises ValueError for an
    evaluation that does not exist."""
    if name not in task.evaluations:
        raise ValueError(f"evaluation must be one of {', '.join(task.evaluations)}; got {name!r}")
    if examples < 1:
        raise ValueError(f"examples must be at least 1 to evaluate {name!r}; got {examples}")
    source = task.evaluations[name]
    count = examples if source.length is None else min(examples, source.length)
    rows = np.arange(batch_size) if rows is None else rows

    def batch(step: int) -> Batch:
        indices = step * batch_size + rows
        arrays = source.fetch(np.minimum(indices, count - 1))
        counting = {name: arrays[name].copy() for name in ("weights", "bytes") if name in arrays}
        for array in counting.values():
            array[indices >= count] = 0
        return arrays | counting

    return grain.MapDataset.range(-(-count // batch_size)).map(batch).to_iter_dataset(READ_OPTIONS)


def _replica_batches(task: Task, seed: int, batch_size: int, rows: np.ndarray) -> grain.MapDataset:
    parts = task.train(seed)
    if isinstance(parts, Examples):
        return _batches(parts, f"{seed}", batch_size, rows)
    datasets = [
        _batches(part, f"{seed}/{number}", batch_size, rows) for number, part in enumerate(parts)
    ]
    return _mix(datasets, parts)


def _mix(datasets: Sequence[grain.MapDataset], parts: Sequence[Examples]) -> grain.MapDataset:
    """The elements of `datasets`, one for each part, in proportion to the parts' lengths."""
    return grain.MapDataset.mix(datasets, weights=[part.length or 1 for part in parts])


def _batches(examples: Examples, order: str, batch_size: int, rows: np.ndarray) -> grain.MapDataset:
    """Element i is the wanted rows of global batch i; `order` names the shuffle."""
    if examples.length is None:
        return grain.MapDataset.range(sys.maxsize).map(
            lambda step: examples.fetch(step * batch_size + rows)
        )
    if examples.length < 1:
        raise ValueError("there are no training examples")
    length = examples.length

    def batch(step: int) -> Batch:
        epochs, places = np.divmod(step * batch_size + rows, length)
        seeds = {epoch: _shuffle_seed(order, epoch) for epoch in set(epochs.tolist())}
        indices = [
            grain.experimental.index_shuffle(
                place, max_index=length - 1, seed=seeds[epoch], rounds=4
            )
            for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)
        ]
        return examples.fetch(np.array(indices))

    return grain.MapDataset.range(sys.maxsize).map(batch)


def _shuffle_seed(order: str, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{order}/{epoch}".encode()).digest()[:4])


def _stack(replicas: Sequence[Batch]) -> Batch:
    return {name: np.stack([replica[name] for replica in replicas]) for name in replicas[0]}
