"""Training on one NVIDIA GPU, with the kernels and without: tokens per second of
`experiments.train` itself.

    python -m experiments.benchmarks.gpu_training
    python -m experiments.benchmarks.gpu_training --minutes=8 --only=gla

GLA, DeltaNet and Mamba of about 125 million parameters, bfloat16, 65,536 tokens a step, in
sequences of 2K to 64K: each run is the command that a user would type, in a process of its own,
with `--config.kernels=True` and then `False`. Writes experiments/results/bench_gpu_training.json
and .md after every run; what was not reached is a gap. The utilisation is that of the log
(experiments/training/speed.py), a share of the floor that the matmuls set."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments.training import command_line, run_record
from experiments.training.checkout import CHECKOUT, RESULTS
from experiments.training.metrics_file import FILE

NAME = "bench_gpu_training"
TOKENS = 65_536
LENGTHS = (2_048, 8_192, 32_768, 65_536)
STEPS, LOG_EVERY = 24, 8
# Layers, for about 125 million parameters.
MODELS = {"gla": 10, "delta_net": 10, "mamba": 19}
WIDTH = 1024


@dataclass(frozen=True)
class Run:
    """One training, of a model at a length of sequences, with kernels or without."""

    model: str
    length: int
    kernels: bool

    @property
    def name(self) -> str:
        return f"{self.model} {self.length} {'kernels' if self.kernels else 'xla'}"

    def overrides(self) -> dict[str, Any]:
        """What the run sets in the config of its model."""
        return {
            "model.width": WIDTH,
            "model.depth": MODELS[self.model],
            "task.sequence_length": self.length,
            "batch_size": TOKENS // self.length,
            "compute_dtype": "bfloat16",
            "kernels": self.kernels,
            "steps": STEPS,
            "log_every_steps": LOG_EVERY,
            "optimizer.lr": 1e-4,
            "optimizer.warmup_steps": 0,
            "eval.examples": 1,
        }


def runs() -> Iterator[Run]:
    """All runs, the shortest sequences of every model first."""
    for length in LENGTHS:
        for model in MODELS:
            for kernels in (True, False):
                yield Run(model, length, kernels)


def measure(run: Run, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The row of a run: speeds of its last logged steps, or why there are none."""
    settings = run.overrides() | (overrides or {})
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "experiments.train"]
        command += [f"--config=experiments/configs/{run.model}.py:text"]
        command += [f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
        row = {"model": run.model, "length": run.length, "kernels": run.kernels}
        if done.returncode:
            return row | {"gap": (done.stderr.strip().splitlines() or ["?"])[-1][:200]}
        lines = (Path(workdir) / FILE).read_text().splitlines()
        speeds = [x for x in map(json.loads, lines) if "speed/steps_per_second" in x]
        summary = json.loads((Path(workdir) / "summary.json").read_text())
    last = speeds[-1]
    return row | {
        "parameters": summary["parameters"],
        "tokens_per_second": last["speed/tokens_per_second_per_device"],
        "utilisation": last.get("speed/model_flops_utilisation"),
        "loss": last["train/loss"],
    }


def report(minutes: float, only: str) -> None:
    """Measures all runs whose name contains `only`, until the time is used up. Raises ValueError
    without a GPU."""
    # This process only asks what is there; the memory is for those that train.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(f"training on a GPU needs an NVIDIA GPU; this machine has {device}")
    until = time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []
    for run in runs():
        if only in run.name and time.monotonic() < until:
            rows.append(measure(run))
            print(json.dumps(rows[-1]), flush=True)
            save({"environment": run_record.environment(), "rows": rows})


def save(record: dict[str, Any]) -> None:
    """Writes the record and its page."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{NAME}.md").write_text(page(record))


HEADING = """\
# Training on a GPU, measured

{environment}

Made by `python -m experiments.benchmarks.gpu_training`: tokens per second of `experiments.train`,
{tokens:,} tokens a step, bfloat16, by length of the sequences; in brackets the model FLOPs
utilisation.

| model | tokens | kernels | xla | ratio |
|---|---|---|---|---|
"""


def page(record: dict[str, Any]) -> str:
    """The rows as Markdown; what was not measured says so."""
    environment = record.get("environment")
    where = json.dumps(environment) if environment else "Not measured yet on any GPU."
    rows = {(x["model"], x["length"], x["kernels"]): x for x in record.get("rows", ())}
    lines = [HEADING.format(environment=where, tokens=TOKENS)]
    for model in MODELS:
        for length in LENGTHS:
            pair = [rows.get((model, length, kernels)) for kernels in (True, False)]
            cells = [_cell(row) for row in pair]
            cells.append(_ratio(pair))
            lines.append(f"| {model} | {length:,} | {' | '.join(cells)} |\n")
    return "".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    if "gap" in row:
        return row["gap"]
    share = row["utilisation"]
    text = f"{row['tokens_per_second']:,.0f}"
    return text if share is None else f"{text} ({share:.1%})"


def _ratio(pair: Sequence[dict[str, Any] | None]) -> str:
    kernels, plain = ((row or {}).get("tokens_per_second") for row in pair)
    return f"{kernels / plain:.2f}" if kernels and plain else ""


def main() -> None:
    report(flags.FLAGS.minutes, flags.FLAGS.only)


if __name__ == "__main__":
    flags.DEFINE_float("minutes", 20, "For how long.", lower_bound=0)
    flags.DEFINE_string("only", "", "Only runs with this in their name.")
    command_line.run(main)
