"""Checkpoints of a run: asynchronous, sharded, checked when read, never trusted because they exist.

A step directory holds `model` (params, variables), `optimizer` (opt_state, window) and `data`: the
state of the iterator over batches, one number and the same in all processes, so that their number
may change. Evaluation reads `model` alone. The first two carry a checksum of every array, computed
on the devices before saving: storage detects files cut short, but a flipped bit in an array would
otherwise load without a word."""

import errno
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import NamedSharding, P
from orbax.checkpoint import v1

from experiments.training.mesh import parameter_name
from experiments.training.progress import warn

policies = v1.training.preservation_policies
LARGE_BYTES = 2**24
ROOM_BYTES = 2**20  # for the small ones beside the largest


def one_array_at_a_time(tree: Any) -> Any:
    """A context in which a save of `tree` has no more in memory beside it than its largest array;
    otherwise it would have a copy of everything."""
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    limits: Any = dict.fromkeys(
        ("transfer_concurrent_bytes", "write_concurrent_bytes"), largest + ROOM_BYTES
    )
    return v1.Context(memory_options=v1.options.MemoryOptions(**limits))


class DamagedCheckpointError(Exception):
    """A checkpoint that cannot be read, or whose contents are not what was saved."""


def steps(directory: Path) -> list[int]:
    """Steps with a committed checkpoint, ascending. Saves that were cut off have another name until
    they are whole."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def _checksums(tree: Any) -> Any:
    """uint32 [] per array, as `_sums` makes them: of large arrays one after another, as a CPU needs
    a buffer of the size of each."""
    leaves, structure = jax.tree.flatten(tree)
    large = [leaf.size * leaf.dtype.itemsize > LARGE_BYTES for leaf in leaves]
    sums = iter(_sums([leaf for leaf, alone in zip(leaves, large, strict=True) if not alone]))
    return structure.unflatten(
        _sums([leaf])[0] if alone else next(sums) for leaf, alone in zip(leaves, large, strict=True)
    )


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """uint32 [] per array: the sum of its words, each times an odd number of its place, so that
    order counts too.

    Elementwise and a sum: every device reads its own part only, also where that lies in the memory
    of the host."""

    def checksum(leaf: jax.Array) -> jax.Array:
        if jax.typeof(leaf).memory_space != jax.memory.Space.Device:
            leaf = jax.device_put(leaf, jax.memory.Space.Device)
        words = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
        words = jax.lax.bitcast_convert_type(
            words, jnp.dtype(f"uint{8 * words.dtype.itemsize}")
        ).astype(jnp.uint32)
        place = jnp.zeros(words.shape, jnp.uint32)
        for axis in range(words.ndim):
            place = place * jnp.uint32(2654435769) + jax.lax.broadcasted_iota(
                jnp.uint32, words.shape, axis
            )
        return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)

    return [checksum(leaf) for leaf in leaves]


def _storable(tree: Any) -> Any:
    """Random keys as the numbers behind them; everything else as it is (and not copied)."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def restore(
    directory: Path, step: int, wanted: Mapping[str, Any], data: Any = None
) -> dict[str, Any]:
    """Parts of one checkpoint. `wanted` maps their names to trees of jax.ShapeDtypeStruct with
    shardings.

    `data`, an iterator with one element per step, is moved to the saved place. Raises
    DamagedCheckpointError, or ValueError if the checkpoint is whole but of another shape than
    wanted."""
    path = directory / str(step)
    abstract = {}
    for name, tree in wanted.items():
        shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
        stored = _abstract(jax.eval_shape(_storable, tree), shardings)
        checksums = jax.eval_shape(_checksums, stored)
        on_device = jax.tree.map(lambda leaf: NamedSharding(leaf.mesh, P()), shardings)
        _check_shapes(path, name, stored)
        abstract[name] = {"tree": stored, "checksums": _abstract(checksums, on_device)}
    try:
        place = {} if data is None else {"data": data.get_state()}
        loaded = v1.load_checkpointables(str(path), {**abstract, **place})
    # The storage layers have no error of their own for damage: for bytes that are missing or make
    # no sense they raise errors of many types. The cause stays attached.
    except Exception as error:
        raise DamagedCheckpointError(f"{path} ({type(error).__name__})") from error
    if data is not None and loaded["data"]["next_index"] != step:
        raise DamagedCheckpointError(f"{path} (its next batch is {loaded['data']['next_index']})")
    parts = {}
    for name, tree in wanted.items():
        numbers, checksums = loaded[name]["tree"], loaded[name]["checksums"]
        same = jax.device_get(jax.tree.map(jnp.array_equal, _checksums(numbers), checksums))
        for leaf_path, equal in jax.tree.leaves_with_path(same):
            if not equal:
                raise DamagedCheckpointError(
                    f"{path} (wrong checksum of {name} array {parameter_name(leaf_path)})"
                )
        keys = jax.tree.map(_is_key, tree)
        parts[name] = jax.tree.map(
            lambda leaf, key: jax.random.wrap_key_data(leaf) if key else leaf, numbers, keys
        )
    if data is not None:
        data.set_state(loaded["data"])
    return parts


def _abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and types of `tree` with shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def restore_latest(
    directory: Path, wanted: Mapping[str, Any], data: Any = None
) -> tuple[int, dict[str, Any], list[str]] | None:
    """The newest checkpoint that is whole: its step, its parts, and what is wrong with the newer
    ones.

    None if there is no checkpoint. Raises ValueError if all are damaged, or if the newest whole one
    has other shapes."""
    damaged = []
    for step in reversed(steps(directory)):
        try:
            return step, restore(directory, step, wanted, data), damaged
        except DamagedCheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise ValueError(
            f"every checkpoint is damaged ({'; '.join(damaged)}); use another"
            " --workdir, or restore the directory"
        )
    return None


def stored_shapes(directory: Path, name: str) -> Any:
    """Shapes and types of part `name` of the newest checkpoint that can say them, a tree of
    jax.ShapeDtypeStruct. Raises DamagedCheckpointError if none can."""
    problems = []
    for step in reversed(steps(directory)):
        try:
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype),
                _metadata(directory / str(step), name),
            )
        except DamagedCheckpointError as error:
            problems.append(str(error))
    raise DamagedCheckpointError("; ".join(problems))


def _metadata(path: Path, name: str) -> Any:
    """What a checkpoint says of the arrays of its part `name`."""
    try:
        metadata: Any = v1.metadata(str(path), checkpointable_name=name).metadata
    # As in `restore`: damaged metadata raises errors of many types, which stay attached.
    except Exception as error:
        raise DamagedCheckpointError(
            f"{path} ({type(error).__name__} in the metadata of {name})"
        ) from error
    if metadata is None:
        raise DamagedCheckpointError(f"{path} (the metadata of {name} cannot be read)")
    return metadata["tree"]


def _check_shapes(path: Path, name: str, tree: Any) -> None:
    old = {
        parameter_name(leaf_path): tuple(leaf.shape)
        for leaf_path, leaf in jax.tree.leaves_with_path(_metadata(path, name))
    }
    new = {
        parameter_name(leaf_path): leaf.shape for leaf_path, leaf in jax.tree.leaves_with_path(tree)
    }
    if old == new:
        return
    leaf = next(leaf for leaf in sorted({*old, *new}) if old.get(leaf) != new.get(leaf))
    shapes = [
        f"shape {shapes[leaf]}" if leaf in shapes else "no such array" for shapes in (old, new)
    ]
    raise ValueError(
        f"checkpoint {path} does not fit this config: {name} array {leaf} has"
        f" {shapes[0]} in the checkpoint and {shapes[1]} in the config; check"
        " config.model, config.optimizer.name, config.seeds and the vocabulary"
    )


@dataclass(frozen=True)
class Best:
    """Which value of an evaluation counts, and whether "max" or "min" is best; metric "" keeps no
    best checkpoint."""

    metric: str
    mode: str

    def score(self, metrics: Any) -> float:
        """Larger is better, for a mapping from metrics to values or None; -inf without a value."""
        value = (metrics or {}).get(self.metric)
        if value is None or np.isnan(value):
            return -np.inf
        return value if self.mode == "max" else -value


@dataclass(frozen=True)
class FirstBest:
    """Keeps the best checkpoint, the oldest of several that are equally good: the one that the
    summary names. The library's own policy keeps the newest."""

    best: Best

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """One bool for each checkpoint."""
        del context
        scores = [self.best.score(checkpoint.metrics) for checkpoint in checkpoints]
        top = max(scores, default=-np.inf)
        first = min(
            (c.step for c, score in zip(checkpoints, scores, strict=True) if score == top),
            default=None,
        )
        return [top > -np.inf and checkpoint.step == first for checkpoint in checkpoints]


class Checkpoints:
    """Saves of one run. `keep` newest and the best one by `best` stay; older ones are removed as
    new ones commit."""

    def __init__(self, directory: Path, *, keep: int, best: Best):
        self.best = best
        policy: Any = policies.AnyPreservationPolicy([policies.LatestN(keep), FirstBest(best)])
        self._directory = directory
        self._checkpointer = v1.training.Checkpointer(
            str(directory), preservation_policy=policy, cleanup_tmp_directories=True
        )

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether `metrics` beat those of every checkpoint so far."""
        if not self.best.metric:
            return False
        scores = [
            self.best.score(checkpoint.metrics) for checkpoint in self._checkpointer.checkpoints
        ]
        return self.best.score(metrics) > max(scores, default=-np.inf)

    def save(
        self, step: int, parts: Mapping[str, Any], data: Any, metrics: Mapping[str, float] | None
    ) -> None:
        """Returns when the arrays are copied from the devices; writing goes on behind the next
        steps."""
        stored = {name: _storable(tree) for name, tree in parts.items()}
        items = {
            name: {"tree": tree, "checksums": _checksums(tree)} for name, tree in stored.items()
        }
        with self._naming_a_full_disk():
            self._checkpointer.save_checkpointables_async(
                step,
                {**items, "data": data.get_state()},
                force=True,
                metrics=dict(metrics) if metrics else None,
            )

    def close(self) -> None:
        """Waits until everything is written. Raises OSError if the disk is full."""
        with self._naming_a_full_disk():
            self._checkpointer.close()

    @contextmanager
    def _naming_a_full_disk(self) -> Iterator[None]:
        """What goes wrong behind the steps is raised by the next call, as whatever the storage
        layer makes of it."""
        try:
            yield
        # Of a full disk it makes an OSError or a ValueError; all others pass as they are.
        except Exception as error:
            code = getattr(error, "errno", None)
            code = errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else code
            if code not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                code,
                f"{os.strerror(code)}: a checkpoint could not be saved, those before it stay; make"
                " room, and the same command goes on",
                str(self._directory),
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except OSError as error:
            # What ended the run counts more than what could not be saved after it.
            if kind is None:
                raise
            warn(str(error))


def set_aside_unusable(workdir: Path, newest: int) -> None:
    """Moves checkpoints out of the sequence into damaged_checkpoints/: those after `newest`, the
    newest whole one, whose places the run will need, and those whose metrics are unreadable, on
    which a `Checkpoints` cannot be opened.

    Nothing is deleted.
    """
    directory, aside = workdir / "checkpoints", workdir / "damaged_checkpoints"
    for step in steps(directory):
        if step <= newest and _metrics_readable(directory / str(step)):
            continue
        aside.mkdir(exist_ok=True)
        names = itertools.chain([str(step)], (f"{step}.{copy}" for copy in itertools.count(1)))
        target = next(aside / name for name in names if not (aside / name).exists())
        (directory / str(step)).rename(target)
        warn(f"moved {directory / str(step)} to {target}")


def _metrics_readable(path: Path) -> bool:
    file = path / "metrics" / "metrics"
    try:
        return not file.exists() or isinstance(json.loads(file.read_text("utf-8")), dict)
    except ValueError:
        return False
