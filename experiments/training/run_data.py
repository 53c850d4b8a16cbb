"""The data and the files that make a run what it is, beside its config: kept or recorded when it
starts, compared wherever it goes on or is used.

run.json has the task's provenance, with names and hashes of its data; "sizes", so that a model can
be built without them; and "kept", the hashes of files of which the workdir has a copy."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from experiments.training import run_record
from experiments.training.config import Config
from experiments.training.progress import warn
from experiments.training.refined_schedule import norms_sha256
from experiments.training.task import Task

HASH = "_sha256"
# Options of tasks that say where their data are, for messages.
PLACES = ("path", "validation_path", "test_path", "dataset", "data_dir", "tokenizer")


def facts(config: Config, task: Task) -> dict[str, Any]:
    """What a run's record says of its data: "provenance", "sizes" and "kept"."""
    kept = {option: _sha256(content) for option, content in task.kept.items()}
    return {"provenance": provenance(config, task), "sizes": dict(task.sizes), "kept": kept}


def provenance(config: Config, task: Task) -> dict[str, Any]:
    """The task's, and the hash of the gradient norms that a refined schedule is made of."""
    norms = norms_sha256(config.optimizer.schedule)
    return dict(task.provenance) | ({"schedule_sha256": norms} if norms else {})


def keep_files(workdir: Path, task: Task) -> None:
    """Writes the files that the run in `workdir` keeps, where they are missing."""
    for option in _kept(workdir):
        file = kept_file(workdir, option)
        if not file.exists():
            partial = file.with_name(f"{file.name}.partial")
            partial.write_bytes(task.kept[option])
            partial.replace(file)


def kept_file(workdir: Path, option: str) -> Path:
    """Where a run keeps the file that an option named."""
    return workdir / f"{option}.json"


def with_kept_files(config: Config, workdir: Path) -> Config:
    """The config of the run in `workdir` with the files that it keeps in the place of the options
    they came from; `config` itself for a run that keeps none.

    A file that is missing is made from its option again. Raises ValueError for one that is not the
    one that was kept."""
    for option, sha256 in _kept(workdir).items():
        file = kept_file(workdir, option)
        if not file.exists():
            continue
        if (found := _sha256(file.read_bytes())) != sha256:
            raise ValueError(
                f"{str(file)!r} is not the {option} that the run was trained with (its sha256"
                f" begins {found[:12]}, not {sha256[:12]}); restore it, or remove it if what"
                f" config.task.{option} names still is that one"
            )
        given = Path(str(config.task[option])).expanduser()
        if given.is_file() and _sha256(given.read_bytes()) != sha256:
            warn(
                f"{str(given)!r} has changed since the run in {workdir} began; the run keeps to its"
                f" own, {str(file)!r}"
            )
        config = ConfigDict(config)
        config.task = ConfigDict(config.task.to_dict() | {option: str(file)})
    return config


def task_without_data(workdir: Path) -> Task | None:
    """The task of the run in `workdir` with its sizes and kept files alone, for a model that is to
    be built and not trained or evaluated; None where the record does not say them, or a file is
    missing."""
    record = run_record.read(workdir) or {}
    files = {option: kept_file(workdir, option) for option in _kept(workdir)}
    if "sizes" not in record or not all(file.is_file() for file in files.values()):
        return None
    kept = {option: file.read_bytes() for option, file in files.items()}
    return Task(record["sizes"], _unread, {}, provenance=record.get("provenance", {}), kept=kept)


def check_same_data(
    workdir: Path, config: Config, now: Mapping[str, Any], remedy: str | None
) -> None:
    """Raises ValueError if the data of the run in `workdir` were others than those of provenance
    `now`, with what differs and `remedy`; with remedy None only warns.

    Warns of what a record that is older than these hashes does not say. Without a record there is
    nothing to compare."""
    record = run_record.read(workdir)
    if record is None:
        return
    then = record.get("provenance", {})
    unknown = [name for name in now if name.endswith(HASH) and name not in then]
    if unknown:
        warn(
            f"{workdir / run_record.FILE} does not say {', '.join(unknown)}, as it is older than"
            " they are: the data are taken for those that the run was trained on"
        )
    changed = _differences(then, now)
    if not changed:
        return
    places = [f"{name}={config.task[name]!r}" for name in PLACES if config.task.get(name)]
    where = f" with {', '.join(places)}" if places else ""
    message = (
        f"the data of config.task{where} are not those that the run in {workdir} was trained on:"
        f" {'; '.join(changed)}"
    )
    if remedy is None:
        warn(message)
    else:
        raise ValueError(f"{message}. Restore them, or {remedy}")


def check_same_tokenizer(workdir: Path, task: Task) -> None:
    """Raises ValueError if the run in `workdir` had another tokenizer than `task` has now."""
    then = (run_record.read(workdir) or {}).get("provenance", {})
    if _other_tokenizer(then, task.provenance):
        raise ValueError(
            f"the tokenizer of the run in {workdir} ({_tokenizer(then)}) is neither in"
            f" {kept_file(workdir, 'tokenizer')} nor what config.task.tokenizer gives now"
            f" ({_tokenizer(task.provenance)}); restore one of them, or the text it was trained on"
        )


def check_source(source: Path, config: Config, task: Task, *, tokens: bool) -> None:
    """Warns if the run in `source`, whose weights a run of `config` starts from, had other data;
    raises ValueError if it had another tokenizer, and `tokens`: what belongs to single tokens
    is taken, too."""
    record = run_record.read(source)
    if record is None:
        warn(
            f"config.init_from: {source} has no {run_record.FILE}: whether its data are those of"
            " this run is not known"
        )
        return
    then, now = record.get("provenance", {}), task.provenance
    name = record["config"].get("task", {}).get("name")
    if name != config.task.name:
        warn(f"config.init_from: the run in {source} learned {name}, this one {config.task.name}")
        return
    if tokens and _other_tokenizer(then, now):
        raise ValueError(
            f"the run in {source} had another tokenizer ({_tokenizer(then)}) than this one"
            f" ({_tokenizer(now)}), so that its tokens mean another text; take its own, with"
            f" config.task.tokenizer={_its_tokenizer(source, then)}"
        )
    if changed := _differences(then, now):
        warn(f"config.init_from: the run in {source} had other data: {'; '.join(changed)}")


def _other_tokenizer(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if "tokenizer" not in then or "tokenizer" not in now:
        return False
    name = f"tokenizer{HASH}"
    if name in then and name in now:
        return then[name] != now[name]
    # An older record: what is trained on the same text is the same.
    trained = str(now["tokenizer"]).startswith("bpe-")
    other_text = then.get("text_sha256") != now["text_sha256"]
    return then["tokenizer"] != now["tokenizer"] or (trained and other_text)


def _its_tokenizer(source: Path, then: Mapping[str, Any]) -> str:
    file = kept_file(source, "tokenizer")
    return str(file) if file.exists() else str(then["tokenizer"])


def _tokenizer(provenance: Mapping[str, Any]) -> str:
    parts = (provenance.get("tokenizer"), provenance.get(f"tokenizer{HASH}"))
    return ", ".join(_short(part) for part in parts if part)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "name: then -> now" for all that is in both and differs. Of things with a hash the hash
    alone counts: the same text may lie in a folder of another name."""
    both = [name for name in then if name in now]
    other = [name for name in both if json.dumps(then[name]) != json.dumps(now[name])]
    same = {name.removesuffix(HASH) for name in both if name.endswith(HASH) and name not in other}
    return [
        f"{name}: {_short(then[name])} -> {_short(now[name])}" for name in other if name not in same
    ]


def _short(value: Any) -> str:
    text = str(value)
    hexadecimal = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if hexadecimal else text


def _kept(workdir: Path) -> Mapping[str, str]:
    return (run_record.read(workdir) or {}).get("kept", {})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _unread(seed: int) -> NoReturn:
    raise AssertionError(f"the data of this run were not read (seed {seed})")
