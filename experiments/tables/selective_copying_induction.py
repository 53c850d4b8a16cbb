"""Mamba's synthetic tasks: selective copying, and induction heads far beyond the length in
training.

Gu and Dao, "Mamba", COLM 2024, arXiv 2312.00752, tables 1 and 2: S6 in the Mamba block copies
99.8%, S4 in its own block 18.3%. Induction heads that Mamba learns at 256 tokens work up to 2^20
tokens; those of attention with absolute positions fall to 58.6% at 512 and 26.6% at 1,024."""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell

TITLE = "Selective copying and induction heads"
SOURCE = (
    "arXiv 2312.00752, tables 1 and 2 (S4: without a gated block; Transformer: absolute"
    " positions where ours are rotary)"
)
METRIC = "Accuracy; induction heads at one, two, four and eight times the length trained on"
SIZES = True

SCALES = {
    "cpu": (
        "two seeds trained together, two layers of width 32, 1,500 steps of 64 sequences, learning"
        " rate 3e-3; selective copying of 8 tokens out of 64, induction heads trained at 32 tokens."
    ),
    "gpu": (
        "three seeds trained together; selective copying of 16 tokens out of 1,024, 20,000 steps of"
        " 64, learning rate 1e-3; induction heads at 256 tokens, 25,000 steps of 64."
    ),
    "paper": "three seeds, published settings.",
}
COPYING = "selective copying"
FACTORS = (1, 2, 4, 8)
# row -> (config file, published by column)
MODELS: dict[str, tuple[str, dict[str, float]]] = {
    "Transformer": ("transformer", {"induction, 2x": 0.586, "induction, 4x": 0.266}),
    "S4": ("s4", {COPYING: 0.183}),
    "Mamba": ("mamba", {COPYING: 0.998, **{f"induction, {factor}x": 1.0 for factor in FACTORS}}),
    "GLA": ("gla", {}),
    "DeltaNet": ("delta_net", {}),
}


def cells(scale: str) -> list[Cell]:
    return [cell for row in MODELS for cell in (_copying(scale, row), *_heads(scale, row))]


def _seeds(scale: str) -> tuple[int, ...]:
    return (0, 1) if scale == "cpu" else (0, 1, 2)


def _copying(scale: str, row: str) -> Cell:
    mixer, published = MODELS[row]
    overrides: dict[str, Any] = {}
    if scale == "cpu":
        overrides = {"steps": 1_500, "optimizer.warmup_steps": 150}
        overrides |= {"eval.every_steps": 1_500, "checkpoint.every_steps": 500}
    elif scale == "gpu":
        overrides = {"steps": 20_000, "task.length": 1_024 + 17, "optimizer.lr": 1e-3}
    return Cell(
        row=row,
        column=COPYING,
        config=f"{mixer}:selective_copying{',smoke' if scale == 'cpu' else ''}",
        metric="test/accuracy",
        overrides=overrides,
        seeds=_seeds(scale),
        published=published.get(COPYING),
    )


def _heads(scale: str, row: str) -> list[Cell]:
    mixer, published = MODELS[row]
    trained = 32 if scale == "cpu" else 256
    overrides: dict[str, Any] = {}
    if scale == "cpu":
        overrides = {"steps": 1_500, "optimizer.warmup_steps": 150}
        overrides |= {"eval.every_steps": 1_500, "checkpoint.every_steps": 500}
    elif scale == "gpu":
        overrides = {"steps": 25_000, "batch_size": 64}
    return [
        Cell(
            row=row,
            column=f"induction, {factor}x",
            config=f"{mixer}:induction_heads{',smoke' if scale == 'cpu' else ''}",
            metric=f"{'test' if factor == 1 else f'length_{factor * trained}'}/accuracy",
            overrides=overrides,
            seeds=_seeds(scale),
            published=published.get(f"induction, {factor}x"),
        )
        for factor in FACTORS
    ]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Accuracy of induction heads against length, a line per model; the band spans the seeds."""
    drawn = set()
    for cell, row in results:
        if cell.column == COPYING or cell.row in drawn:
            continue
        drawn.add(cell.row)
        points = sorted(
            (int(name.removeprefix("length_")), metrics["accuracy"])
            for name, metrics in row["evaluations"].items()
            if name.startswith("length_")
        )
        lengths, values = zip(*points, strict=True)
        means = [sum(v) / len(v) for v in values]
        (line,) = axes.plot(lengths, means, marker="o", markersize=3, label=cell.row)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(lengths, low, high, alpha=0.12, color=line.get_color())
    axes.set(xlabel="sequence length", ylabel="accuracy on induction heads")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8)
