"""Numbers of a train step that is compiled for a TPU slice and never run, for tables. Like the plan
it needs libtpu.

Every step is planned by `python -m experiments.plan` in a process of its own, because the compiler
keeps the memory that it took."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.training.checkout import CHECKOUT


def measure(
    *, seed: int, config: str, topology: str, sequence_length: int, settings: tuple[str, ...]
) -> dict[str, dict[str, float | None]]:
    """{"step": numbers} of a `text` config with `settings`, each key=value; None where the step
    does not fit the memory, of which `gigabytes` may still be known. The text is the letter a:
    windows of any length are cut from it, and only their shape counts.

    gigabytes                                   of memory per device
    sent_gigabytes, collectives                 per device and step, every pass of a loop counted
    compute_ms, memory_ms, collectives_ms       modelled, each alone
    tokens_per_second                           if the three run at once

    Raises ValueError for a config that cannot work there."""
    del seed  # nothing is drawn
    with tempfile.TemporaryDirectory() as folder:
        path, text = Path(folder) / "plan.json", Path(folder) / "a.txt"
        text.write_bytes(b"a" * (40 * (sequence_length + 1)))
        settings += (
            f"task.sequence_length={sequence_length}",
            f"task.path={text}",
            f"task.data_dir={folder}",
        )
        command = [sys.executable, "-m", "experiments.plan"]
        command += [f"--config=experiments/configs/{config.replace(':', '.py:', 1)}"]
        command += [f"--topology={topology}", f"--json={path}"]
        command += [f"--config.{setting}" for setting in settings]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
        if not path.exists():
            raise ValueError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        plan = json.loads(path.read_text("utf-8"))
    return {"step": numbers(plan)}


def numbers(plan: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of `measure`, out of a plan as `experiments.plan` writes it."""
    total = plan["memory"].get("total")
    result: dict[str, float | None] = {
        "gigabytes": None if total is None else total / 1e9,
        "sent_gigabytes": None,
        "collectives": None,
        "compute_ms": None,
        "memory_ms": None,
        "collectives_ms": None,
        "tokens_per_second": None,
    }
    # The compiler refuses a step for its temporaries alone; the plan counts what it keeps as well.
    if "time" in plan and not plan["advice"]:
        seconds = plan["time"]["seconds"]
        step_s = plan["time"]["speeds"]["overlapped"]["step_s"]
        result |= {f"{name}_ms": 1e3 * value for name, value in seconds.items()}
        result["sent_gigabytes"] = sum(row["sent_bytes"] for row in plan["collectives"]) / 1e9
        result["collectives"] = float(sum(row["count"] for row in plan["collectives"]))
        tokens = plan["batch_size"] * plan["sequence_length"]
        result["tokens_per_second"] = tokens / step_s
    return result
