"""How examples become batches.

Order, epochs, replicas and processes are arithmetic on indices, done here once; grain runs it on
threads ahead of the training step and keeps the place in a state that is one number. Batch i is a
function of (seed, i): not of the number of processes, not of how often the run was interrupted."""

import hashlib
import sys
from collections.abc import Sequence

import grain
import grain.experimental
import numpy as np

from experiments.training.task import Batch, Examples, Task

# Threads hide the making of a batch behind the step; eight batches bridge the hiccups of a disk.
READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


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


def units_read(task: Task, *, seed: int, batch_size: int, steps: int) -> float:
    """How many units of the objective's work (such as tokens, padding included) a run with `seed`
    has read after `steps` steps.

    Like the batches a function of the step: interruptions do not change it."""
    parts = task.train(seed)
    parts = (parts,) if isinstance(parts, Examples) else parts
    sizes = [batch_size * task.objective.work(part.fetch(np.arange(1))).count for part in parts]
    if len(set(sizes)) == 1:
        return steps * sizes[0]
    per_step = _mix([grain.MapDataset.source([size]).repeat() for size in sizes], parts)
    # Never None, as elements of a filtered dataset may be.
    return sum(per_step[step] or 0 for step in range(steps))


def evaluation_batches(
    source: Examples, *, examples: int, batch_size: int, rows: np.ndarray | None = None
) -> grain.IterDataset[Batch]:
    """The first `examples` examples, or all if there are fewer, as an iterable over batches
    [B, ...].

    All batches have the same shape: rows that fill up the last one have zero "weights" and "bytes"
    and so do not count. `batch_size` and `rows` are as in `train_batches`."""
    if examples < 1:
        raise ValueError(f"examples must be at least 1 to evaluate; got {examples}")
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
    if examples.length is not None and examples.length < 1:
        raise ValueError("there are no training examples")

    def batch(step: int) -> Batch:
        places = step * batch_size + rows
        if examples.length is None:
            indices, epochs = places, np.zeros_like(places)
        else:
            indices, epochs = _shuffled(places, examples.length, order)
        return examples.seen(indices, epochs)

    return grain.MapDataset.range(sys.maxsize).map(batch)


def _shuffled(places: np.ndarray, length: int, order: str) -> tuple[np.ndarray, np.ndarray]:
    """The indices and epochs [n] of places [n] in an endless stream, shuffled in every epoch."""
    epochs, within = np.divmod(places, length)
    seeds = {epoch: _shuffle_seed(order, epoch) for epoch in set(epochs.tolist())}
    indices = [
        grain.experimental.index_shuffle(place, max_index=length - 1, seed=seeds[epoch], rounds=4)
        for epoch, place in zip(epochs.tolist(), within.tolist(), strict=True)
    ]
    return np.array(indices), epochs


def _shuffle_seed(order: str, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{order}/{epoch}".encode()).digest()[:4])


def _stack(replicas: Sequence[Batch]) -> Batch:
    return {name: np.stack([replica[name] for replica in replicas]) for name in replicas[0]}
