"""Runs made of public checkpoints, and public checkpoints of runs."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.conversion.reading import TOKENIZER, Checkpoint, parameter_shapes, read_checkpoint
from experiments.conversion.writing import write_checkpoint
from experiments.training import checkpoints, run_data, run_record
from experiments.training.mesh import parameter_name
from experiments.training.run_loading import LoadedRun
from experiments.training.state import by_path, initial_model, seed_array

# What of config.json is about tokens and not about numbers, and the files that go with them.
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
PUBLIC = "public"  # folder of a workdir with what came along


@dataclass(frozen=True)
class _Start:
    """The place of a run before its first batch, as a checkpoint wants it."""

    def get_state(self) -> dict[str, int]:
        return {"next_index": 0}


def bring_in(
    folder: Path, workdir: Path, *, dtype: str = "keep", context_length: int = 0
) -> tuple[str, ...]:
    """Makes `workdir` a run at step 0 of the checkpoint in `folder`, which may be a file *.gguf, as
    `read_checkpoint` reads it; returns warnings.

    Raises ValueError, before anything is written, also for a workdir that has something in it."""
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ValueError(f"{workdir} must be new or empty: it would become a run")
    tokenizer = (workdir / TOKENIZER).expanduser().absolute()
    checkpoint = read_checkpoint(
        folder, dtype=dtype, context_length=context_length, tokenizer=tokenizer
    )
    workdir.mkdir(parents=True, exist_ok=True)
    _keep_files(folder, workdir, checkpoint.public)
    origin = {"folder": str(folder.absolute()), "model_type": checkpoint.public["model_type"]}
    facts = run_data.facts(checkpoint.config, checkpoint.task) | {"checkpoint": origin}
    run_record.write(workdir, checkpoint.config, facts, step=0)
    run_data.keep_files(workdir, checkpoint.task)
    _save(workdir, checkpoint)
    return checkpoint.warnings


def _keep_files(folder: Path, workdir: Path, public: Mapping[str, Any]) -> None:
    """What an export must give back beside tensors and tokenizer."""
    (workdir / PUBLIC).mkdir()
    for name in TOKEN_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, workdir / PUBLIC / name)
    run_record.write_json(workdir / PUBLIC / "config.json", public)


def _save(workdir: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint of step 0; takes the arrays out of `checkpoint`, so that none is there
    twice."""
    blueprint, config = checkpoint.blueprint, checkpoint.config
    seeds = seed_array(config.seeds)
    variables = jax.jit(lambda: initial_model(blueprint, seeds)[1])()
    params = jax.tree.map_with_path(
        lambda path, _: jnp.asarray(checkpoint.params.pop(parameter_name(path))),
        parameter_shapes(blueprint, config),
    )
    best = checkpoints.Best("", "max")
    with (
        checkpoints.one_array_at_a_time(params),
        checkpoints.Checkpoints(workdir / "checkpoints", keep=1, best=best) as saves,
    ):
        saves.save(0, {"model": {"params": params, "variables": variables}}, _Start(), None)


def bring_out(
    run: LoadedRun,
    folder: Path,
    *,
    family: str | None = None,
    dtype: str = "keep",
    replica: int = 0,
) -> str:
    """Writes a run to `folder` as `write_checkpoint` does, with the tokenizer that the run has;
    family None is that of the checkpoint which it began with, if it did."""
    if not 0 <= replica < len(run.seeds):
        raise ValueError(f"--replica must be in 0..{len(run.seeds) - 1}; got {replica}")
    origin = run_record.read(run.workdir) or {}
    kept = run.workdir / PUBLIC
    original = run_record.read_json(kept / "config.json") or {}
    written = write_checkpoint(
        folder,
        run.config,
        by_path(run.replica(replica)[0]),
        family=family or origin.get("checkpoint", {}).get("model_type"),
        dtype=dtype,
        extra={key: original[key] for key in TOKEN_KEYS if key in original},
    )
    for file in (run.workdir / TOKENIZER, *(kept / name for name in TOKEN_FILES)):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return written
