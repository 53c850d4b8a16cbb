"""Loss of GLA against parameters and tokens: the runs of a scaling law (Hoffmann et al., arXiv
2203.15556).

    python -m launch.sweep --sweep=experiments/sweeps/scaling_law.py --scale=cpu
    python -m experiments.scaling_law --rows=runs/scaling_law/scaling_law.jsonl --scale=cpu \\
        --metric=validation/loss

Every number of tokens is a run of its own, since the learning rate decays over the whole of it.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from experiments import scaling_law
from experiments.reporting.rows import origins
from experiments.reporting.table import Cell, grid

TITLE = "Scaling of GLA in parameters and tokens"
METRIC = "Validation loss, nats per byte"
SCALES = {
    "tiny": "three widths, 10 to 40 steps of 4 sequences of 32 bytes: shows that it runs",
    "cpu": "four widths, 100 to 800 steps of 8 sequences of 128 bytes, two layers",
    "gpu": "four widths, 1,000 to 16,000 steps of 64 sequences of 1,024 bytes, eight layers",
}
# scale -> widths, depth, steps, batch size, sequence length
SIZES = {
    "tiny": ((16, 32, 64), 1, (10, 20, 40), 4, 32),
    "cpu": ((32, 64, 128, 256), 2, (100, 200, 400, 800), 8, 128),
    "gpu": ((128, 256, 512, 1024), 8, (1_000, 4_000, 8_000, 16_000), 64, 1024),
}


def cells(scale: str) -> list[Cell]:
    widths, depth, steps, batch_size, length = SIZES[scale]
    shared = {
        "model.depth": depth,
        "batch_size": batch_size,
        "task.sequence_length": length,
        "optimizer.warmup_steps": min(steps) // 10,
        "eval.every_steps": max(steps),
        "checkpoint.every_steps": min(steps),
    }
    return grid(
        "gla:text,smoke" if scale == "tiny" else "gla:text",
        "validation/loss",
        {"model.width": widths, "steps": steps},
        row="GLA",
        overrides=shared,
    )


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Loss against tokens, with the fitted law once there are runs enough of one commit and
    machine."""
    rows = [row for _, row in results]
    data = scaling_law.points(rows, results[0][0].metric)
    laws: Any = ()
    if len(origins(rows)) == 1:
        with contextlib.suppress(ValueError):  # too few so far
            laws = scaling_law.bootstrap(data, scaling_law.fit(data))
    scaling_law.draw(axes, data, laws, "tokens")
