"""Chains of runs, for tables: a language model of bytes with softmax attention, and what becomes of
it stage by stage, by the commands of the configs.

The runs of one process lie in one temporary folder, so that chains share the stages that they begin
with; above all the teacher."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.training.checkout import CHECKOUT

Stage = tuple[str, Mapping[str, Any]]

# Four layers of 64 channels, windows of 128 bytes.
TEACHER: Stage = (
    "transformer.py:text,smoke",
    {
        "steps": 500,
        "model.depth": 4,
        "model.mixers.transformer.context_length": 128,
        "model.mixers.transformer.key_value_heads": 2,
        "task.sequence_length": 128,
        "eval.every_steps": 500,
        "checkpoint.every_steps": 500,
    },
)
COMMON = {"batch_size": 8, "optimizer.warmup_steps": 0, "optimizer.schedule": "constant"}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Kept until the process ends."""
    return tempfile.TemporaryDirectory(prefix="linearisation-")


def chain(*, seed: int, stages: Sequence[Stage] = ()) -> dict[str, dict[str, Any]]:
    """{evaluation: {metric: number}} of the last run of a chain that begins with the teacher.

    stages    (name of a config that is given the run before, its overrides), in their order"""
    workdir = _trained(TEACHER, "", seed)
    for config, overrides in stages:
        workdir = _trained((f"{config}.py:", {**COMMON, **overrides}), workdir, seed)
    summary = json.loads((Path(workdir) / "summary.json").read_text("utf-8"))
    return {
        name: {metric: values[0] for metric, values in metrics.items()}
        for name, metrics in summary["evaluations"].items()
    }


@functools.cache
def _run(command: tuple[str, ...], workdir: str) -> str:
    subprocess.run(
        [sys.executable, "-m", "experiments.train", *command, f"--workdir={workdir}"],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return workdir


def _trained(stage: Stage, source: str, seed: int) -> str:
    """The workdir of a stage of the run in `source`; one that there is already is not trained
    again."""
    config, overrides = stage
    settings = {
        "checkpoint.every_steps": overrides["steps"],
        "eval.every_steps": overrides["steps"],
    }
    command = (
        f"--config=experiments/configs/{config}{source}",
        *(f"--config.{key}={value}" for key, value in (settings | dict(overrides)).items()),
        f"--config.seeds={(seed,)}",
    )
    name = hashlib.sha256(json.dumps(command).encode()).hexdigest()[:12]
    return _run(command, str(Path(_folder().name, name)))
