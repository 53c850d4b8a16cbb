"""How much attention's loss depends on the choice of its learning rate, with and without QK-norm
and z-loss.

    python -m launch.sweep --sweep=experiments/sweeps/lr_sensitivity.py --scale=tiny \
        --report=lr_sensitivity.html

Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", ICLR
2024, arXiv 2309.14322:

    sensitivity = mean over learning rates eta of min(l(eta), l_0) - min over eta of l(eta)

with l(eta) the final loss, and l_0 the loss at initialisation: a run that diverged is as good as
one that never began. As in the paper: seven rates, AdamW with (0.9, 0.95), clipping at 1, a warm-up
of 5% and cosine to 1e-5. Unlike there, weight decay is multiplied by the learning rate. The
figure is runs/lr_sensitivity/lr_sensitivity_<scale>.png."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.rows import origins, value_of
from experiments.reporting.table import Cell, grid

TITLE = "Learning-rate sensitivity with and without QK-norm and z-loss"
METRIC = "Validation loss, nats per byte"
SCALES = {
    "tiny": "width 16, one layer, 30 steps of 4 x 32 bytes, three rates: shows that it runs",
    "cpu": "widths 32 and 64, two layers, 400 steps of 8 sequences of 128 bytes",
    "gpu": "widths 128 to 1,024, eight layers, 5,000 steps of 64 sequences of 512 bytes",
}
# scale -> widths, depth, steps, batch size, sequence length
SETTINGS = {
    "tiny": ((16,), 1, 30, 4, 32),
    "cpu": ((32, 64), 2, 400, 8, 128),
    "gpu": ((128, 256, 512, 1024), 8, 5_000, 64, 512),
}
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
# Logits start near 0, and one of 256 bytes follows.
INITIAL_LOSS = math.log(256)


def cells(scale: str) -> list[Cell]:
    widths, depth, steps, batch_size, length = SETTINGS[scale]
    options = {
        "model.width": widths,
        "model.mixers.transformer.qk_norm": (False, True),
        "z_loss": (0.0, 1e-4),
        "optimizer.lr": LEARNING_RATES[1::2] if scale == "tiny" else LEARNING_RATES,
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


def bounded(loss: float | None, initial_loss: float) -> float:
    """min(loss, initial_loss), where None and NaN are the loss of a run that diverged."""
    if loss is None or math.isnan(loss):
        return initial_loss
    return min(loss, initial_loss)


def sensitivity(losses: Mapping[float, float | None], initial_loss: float) -> float:
    """LR sensitivity of {learning rate: final loss}. Raises ValueError for fewer than two rates."""
    if len(losses) < 2:
        raise ValueError(
            "losses must have at least two learning rates to say how they differ; got"
            f" {sorted(losses)}"
        )
    values = [bounded(loss, initial_loss) for loss in losses.values()]
    return statistics.fmean(values) - min(values)


def draw(
    axes: Any, results: Sequence[tuple[Any, Mapping[str, Any]]], initial_loss: float = INITIAL_LOSS
) -> None:
    """Final loss against learning rate, a line per row, with its sensitivity; the band spans the
    seeds.

    results: (cell, row) pairs whose cells have the override optimizer.lr and a loss as metric. A
    line whose rows are of several commits or machines has no sensitivity."""
    curves: dict[str, dict[float, list[float]]] = {}
    sources: dict[str, set[str]] = {}
    for cell, row in results:
        sources.setdefault(cell.row, set()).update(origins([row]))
        losses = [bounded(loss, initial_loss) for loss in value_of(cell, row)]
        curves.setdefault(cell.row, {})[cell.overrides["optimizer.lr"]] = losses
    for name, curve in curves.items():
        rates = sorted(curve)
        means = {rate: statistics.fmean(curve[rate]) for rate in rates}
        label = name
        if len(sources[name]) > 1:
            label = f"{name}: several commits or machines"
        elif len(rates) > 1:
            label = f"{name}: {sensitivity(means, initial_loss):.3f} ({len(rates)} rates)"
        (line,) = axes.plot(rates, list(means.values()), "o-", markersize=4, label=label)
        low, high = ([choose(curve[rate]) for rate in rates] for choose in (min, max))
        axes.fill_between(rates, low, high, color=line.get_color(), alpha=0.15)
    axes.axhline(initial_loss, color="0.6", linestyle=":", label="at initialisation")
    axes.set(xscale="log", xlabel="learning rate", ylabel="final loss")
    axes.legend(fontsize=7, title="LR sensitivity", title_fontsize=7)
