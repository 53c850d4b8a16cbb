"""Learning-rate sensitivity of attention, with and without QK-norm and z-loss (Wortsman et al.,
ICLR 2024, arXiv 2309.14322).

    python -m launch.sweep --sweep=experiments/sweeps/lr_sensitivity.py --scale=tiny \
        --report=lr_sensitivity.html

The figure is runs/lr_sensitivity/lr_sensitivity_<scale>.png. As in the paper: seven rates, AdamW
with (0.9, 0.95), clipping at 1, a warm-up of 5% and cosine to 1e-5. Other than there, weight decay
is multiplied by the learning rate."""

import math
from collections.abc import Mapping
from typing import Any

from experiments import lr_sensitivity
from experiments.reporting.table import Cell, grid

TITLE = "Learning-rate sensitivity with and without QK-norm and z-loss"
METRIC = "Validation loss, nats per byte"
SCALES = {
    "tiny": "width 16, one layer, 30 steps of 4 x 32 bytes, three rates: shows that it runs",
    "cpu": "widths 32 and 64, two layers, 400 steps of 8 sequences of 128 bytes",
    "gpu": "widths 128 to 1,024, eight layers, 5,000 steps of 64 sequences of 512 bytes",
}
# scale -> widths, depth, steps, batch size, sequence length
SIZES = {
    "tiny": ((16,), 1, 30, 4, 32),
    "cpu": ((32, 64), 2, 400, 8, 128),
    "gpu": ((128, 256, 512, 1024), 8, 5_000, 64, 512),
}
# Logits start near 0, and one of 256 bytes follows.
INITIAL_LOSS = math.log(256)


def cells(scale: str) -> list[Cell]:
    widths, depth, steps, batch_size, length = SIZES[scale]
    rates = lr_sensitivity.LEARNING_RATES
    options = {
        "model.width": widths,
        "model.mixers.transformer.qk_norm": (False, True),
        "z_loss": (0.0, 1e-4),
        "optimizer.lr": rates[1::2] if scale == "tiny" else rates,
    }
    shared = {
        "model.depth": depth,
        "steps": steps,
        "batch_size": batch_size,
        "task.sequence_length": length,
        "optimizer.warmup_steps": max(steps // 20, 1),
        "optimizer.end_lr": 1e-5,
        "optimizer.b2": 0.95,
        "eval.every_steps": steps,
        "checkpoint.every_steps": steps,
        # A diverged run goes on to its end, with a loss that counts as the initial one.
        "max_rejected_steps": steps + 1,
    }
    return grid(
        "transformer:text,smoke" if scale == "tiny" else "transformer:text",
        "validation/loss",
        options,
        row="Attention",
        overrides=shared,
    )


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    lr_sensitivity.draw(axes, results, INITIAL_LOSS)
