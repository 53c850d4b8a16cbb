"""run.json: what a run is, written before its first step, so that no number exists without its
origin."""

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.training import config as configs
from experiments.training.checkout import commit_here, git
from experiments.training.config import Config
from experiments.training.progress import warn

FILE = "run.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def environment() -> dict[str, Any]:
    """Commit and whether files differ from it (as `commit_here`), versions, devices."""
    devices = jax.devices()
    commit, dirty = commit_here()
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": (
            {"python": platform.python_version()}
            | {package: importlib.metadata.version(package) for package in PACKAGES}
        ),
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "device_count": len(devices),
        "process_count": jax.process_count(),
    }


def read(workdir: Path) -> dict[str, Any] | None:
    """The record of the run in `workdir`, or None if there is none. Raises ValueError for a file
    that is no such record."""
    record = read_json(workdir / FILE)
    if record is None:
        return None
    parts = {"config": dict, "continued": list}
    for name, kind in parts.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise ValueError(
                f"{workdir / FILE} must be the record of a run, with {', '.join(parts)}; restore"
                " it, or use another --workdir"
            )
    return record


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None for one that is not finished. A file that is no
    summary is none, with a warning: the run writes it anew."""
    path = workdir / "summary.json"
    try:
        summary = read_json(path)
    except ValueError as error:
        summary, problem = {}, str(error)
    else:
        problem = f"{path} is not the summary of a run"
    if summary is None:
        return None
    if not isinstance(summary, dict) or not {"workdir", "step", "evaluations"} <= summary.keys():
        warn(f"{problem}: it is written anew")
        return None
    return summary


def read_config(workdir: Path) -> Config:
    """The config of the run in `workdir`. Raises ValueError if there is no run."""
    record = read(workdir)
    if record is None:
        raise ValueError(
            f"{workdir} holds no run ({FILE} is missing); give the --workdir of a run"
            " of experiments.train"
        )
    return configs.from_json(record["config"])


def check_continues(workdir: Path, config: Config) -> None:
    """Raises ValueError if `workdir` holds a run with another config, with what differs, or
    what a run leaves without a record of what it is of."""
    record, saved = read(workdir), workdir / "checkpoints"
    if saved.exists() and not saved.is_dir():
        raise ValueError(f"{saved} must be a directory; it is a file")
    if record is None:
        left = [name for name in ("summary.json", "metrics.jsonl") if (workdir / name).exists()]
        if saved.is_dir() and any(path.name.isdigit() for path in saved.iterdir()):
            left = ["checkpoints"]
        if left:
            raise ValueError(
                f"{workdir} has {left[0]} but no {FILE}, which says of which run; restore it, or"
                " use another --workdir"
            )
        return
    changed = configs.differences(record["config"], configs.to_json(config))
    if changed:
        raise ValueError(
            f"{workdir} holds a run with another config ({'; '.join(changed)}); "
            "use another --workdir, or the same config to continue that run"
        )


def check_same_everywhere(
    workdir: Path, config: Config, provenance: Mapping[str, Any] | None = None
) -> None:
    """Raises ValueError, in every process, unless all of them have the same workdir, commit, config
    and provenance; says which entries differ. Otherwise processes would wait for each other in
    different programs, or train on different data."""
    if not jax.distributed.is_initialized():
        return
    own = {
        "--workdir": str(workdir),
        "commit": git("rev-parse", "HEAD"),
        **{f"config.{key}": value for key, value in configs.flatten(config)},
        **{f"data: {key}": value for key, value in (provenance or {}).items()},
    }
    text = json.dumps(own, sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    if np.all(digests == digest):
        return
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.frombuffer(text.ljust(longest), np.uint8)
    texts = multihost_utils.process_allgather(padded)
    everywhere = [json.loads(bytes(row)) for row in texts]
    differences = []
    for key in sorted(set().union(*everywhere)):
        # The first process with each value: of thousands, these are the few that tell.
        places: dict[str, int] = {}
        for place, values in enumerate(everywhere):
            places.setdefault(json.dumps(values.get(key, "(absent)")), place)
        if len(places) > 1:
            found = (f"{value} in process {place}" for value, place in places.items())
            differences.append(f"{key}: {', '.join(found)}")
    raise ValueError(f"all processes of a run must be started alike; got {'; '.join(differences)}")


def write(workdir: Path, config: Config, facts: Mapping[str, Any], *, step: int) -> None:
    """Records a run that starts, or appends to "continued" of one that goes on from `step`."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = read(workdir)
    if record is None:
        record = {
            "started": now,
            "config": configs.to_json(config),
            **facts,
            **environment(),
            "continued": [],
        }
    else:
        record["continued"].append({"started": now, "step": step, **environment()})
    write_json(workdir / FILE, record)


def read_json(path: Path) -> Any:
    """The value in `path`, or None if there is no such file. Raises ValueError for a file that is
    not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); restore it, or use another --workdir"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` in one move, so that a reader sees the old file or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names `path` in an OSError that names no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Holds `workdir` for this process (of several, the first); the system lets go when the process
    ends in any way.

    Raises ValueError if another process holds it.
    """
    if jax.process_index() > 0:
        yield
        return
    descriptor = os.open(workdir / "lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {workdir}; wait for it, or use another --workdir"
            ) from None
        yield
    finally:
        os.close(descriptor)
