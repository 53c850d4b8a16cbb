"""How long a small run takes, from the command to its last step: whole processes, without compiled
programs to begin with and with them, and milliseconds per step.

    python -m experiments.benchmarks.small_runs
    python -m experiments.benchmarks.small_runs --models=delta_net,mom --recipe=mqar,smoke \\
        --rounds=5 --seeds=4
    python -m experiments.benchmarks.small_runs --beside=../before

Each run is the command that a user would type, in a process of its own. Every round has all of
them in turn, those of the checkout named by --beside between ours, so that a machine which others
use slows all alike; what is printed is the least of the rounds. Processor seconds are the
process's own, over all cores. With --seeds=n the last columns are a step of n seeds together, and
that over n steps of one: above 1, together is slower than one after another.

cold and warm: with an empty cache of compiled programs and with the one that the run before it
left; both in a temporary folder."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags

from experiments.training import command_line
from experiments.training.checkout import CHECKOUT

MODELS = ("delta_net", "gla", "mamba", "mom", "transformer")
Measured = Mapping[str, float]


def measure(checkout: Path, config: str, cache: Path, overrides: Sequence[str] = ()) -> Measured:
    """One training in a process of its own: wall and processor seconds, and milliseconds a step.

    Raises ValueError, with the last line that it wrote, if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "experiments.train", f"--config={config}"]
        command += [f"--workdir={folder}/run", *overrides]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        # The other checkout's modules must not be looked for in this one.
        environment["PYTHONPATH"] = str(checkout)
        began = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=checkout, env=environment, stdout=output, stderr=output
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        if process.returncode:
            last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
            raise ValueError(f"{' '.join(command)} failed in {checkout}: {' '.join(last)}")
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text("utf-8"))
    return {
        "wall_s": seconds,
        "processor_s": usage.ru_utime + usage.ru_stime,
        "step_ms": 1000 / summary["steps_per_second"],
    }


def one_round(
    checkouts: Sequence[Path], config: str, seeds: int, overrides: Sequence[str] = ()
) -> Iterator[tuple[Path, str, Measured]]:
    """(checkout, "cold", "warm" or "seeds", what was measured), the checkouts taking turns."""
    together = [*overrides, f"--config.seeds={tuple(range(seeds))}"]
    kinds = {"cold": overrides, "warm": overrides} | ({"seeds": together} if seeds > 1 else {})
    with tempfile.TemporaryDirectory() as folder:
        for kind, flags_of_kind in kinds.items():
            for number, checkout in enumerate(checkouts):
                cache = Path(folder) / str(number)
                yield checkout, kind, measure(checkout, config, cache, flags_of_kind)


def least(rows: Sequence[tuple[Path, str, Measured]], checkout: Path) -> dict[str, float]:
    """ "<kind> <measure>" -> the least of all rounds in a checkout."""
    found: dict[str, float] = {}
    for where, kind, measured in rows:
        if where == checkout:
            for name, value in measured.items():
                key = f"{kind} {name}"
                found[key] = min(value, found.get(key, value))
    # A step does not depend on where its program came from.
    found["step_ms"] = min(found.pop("cold step_ms"), found.pop("warm step_ms"))
    return found


def line(name: str, ours: Mapping[str, float], others: Mapping[str, float], seeds: int) -> str:
    """A row of the table: ours, and in brackets how often it goes into the other checkout's."""
    columns = ["cold wall_s", "cold processor_s", "warm wall_s", "warm processor_s", "step_ms"]
    columns += ["seeds step_ms"] if seeds > 1 else []
    cells = [
        f"{ours[column]:.2f}" + (f" ({others[column] / ours[column]:.2f}x)" if others else "")
        for column in columns
    ]
    if seeds > 1:
        cells.append(f"{ours['seeds step_ms'] / (seeds * ours['step_ms']):.2f}")
    return " | ".join([name, *cells])


def report(
    models: Sequence[str], recipe: str, rounds: int, seeds: int, beside: Path | None
) -> None:
    heads = ["cold s", "processor s", "warm s", "processor s", "ms a step"]
    heads += [f"ms a step of {seeds} seeds", f"over {seeds} steps of one"] if seeds > 1 else []
    print(" | ".join([f"{recipe}, least of {rounds}", *heads]), flush=True)
    checkouts = [CHECKOUT, *([beside] if beside else [])]
    for model in models:
        config = f"experiments/configs/{model}.py:{recipe}"
        rows = [row for _ in range(rounds) for row in one_round(checkouts, config, seeds)]
        others = least(rows, beside) if beside else {}
        print(line(model, least(rows, CHECKOUT), others, seeds), flush=True)


def main() -> None:
    options = flags.FLAGS
    for name, value in (("rounds", options.rounds), ("seeds", options.seeds)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1; got {value}")
    beside = Path(options.beside).expanduser().absolute() if options.beside else None
    if beside and not (beside / "experiments" / "train.py").is_file():
        raise ValueError(f"--beside must be a checkout of this project; got {beside}")
    report(options.models, options.recipe, options.rounds, options.seeds, beside)


if __name__ == "__main__":
    flags.DEFINE_list("models", list(MODELS), "Names of files in experiments/configs.")
    flags.DEFINE_string("recipe", "mqar,smoke", "What they train.")
    flags.DEFINE_integer("rounds", 3, "How often everything is measured.")
    flags.DEFINE_integer("seeds", 1, "Also time this many seeds trained together.")
    flags.DEFINE_string("beside", "", "Another checkout, measured in turns with this one.")
    command_line.run(main)
