"""Multi-query associative recall: accuracy of two-layer models, a gated short convolution under the
mixer of the row.

The models of Based (Arora et al., ICML 2024, arXiv 2402.18668), the task of Zoology (Arora et al.,
ICLR 2024, arXiv 2312.04927). Both publish figures, no numbers: full attention recalls everything at
every width; a recurrence recalls more, the larger its state is."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.table import Cell

TITLE = "Multi-query associative recall"
SOURCE = "no numbers are published, only figures (arXiv 2312.04927, 2402.18668)"
METRIC = "Accuracy of the values that are asked for"
SIZES = True

SCALES = {
    "cpu": (
        "two seeds trained together, 8 pairs in 32 tokens, vocabulary of 64, 1,200"
        " steps of 32 sequences, one learning rate (1e-2). Guessing among the values"
        " that occur gives 0.125. Decays of Gated DeltaNet and Mamba-2 start as"
        " published, which at these sizes is short for some heads. Mamba learns this"
        " task slowly; arXiv 2405.21060 finds it far behind Mamba-2 on it, too."
    ),
    "gpu": (
        "three seeds trained together, 16 pairs in 256 tokens, vocabulary of 8,192,"
        " 100,000 sequences for 8 epochs, one learning rate (2.2e-3)."
    ),
    "paper": (
        "three seeds, 64 epochs; the papers take the best of four learning rates, this"
        " one (2.2e-3)."
    ),
}

# row -> (config file, its overrides)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Attention": ("transformer", {}),
    "Linear attention": ("linear_attention", {}),
    "RetNet": ("retnet", {}),
    "Lightning Attention": ("lightning", {}),
    "Based": ("based", {}),
    "GLA": ("gla", {}),
    "Mamba": ("mamba", {}),
    "Mamba-2": ("mamba2", {}),
    "DeltaNet": ("delta_net", {}),
    "Gated DeltaNet": ("gated_delta_net", {}),
    "MoM": ("mom", {}),
}
WIDTHS = {"cpu": (16, 32, 64), "gpu": (64, 128), "paper": (64, 128, 256, 512)}


def cells(scale: str) -> list[Cell]:
    return [_cell(scale, row, width) for row in MODELS for width in WIDTHS[scale]]


def _cell(scale: str, row: str, width: int) -> Cell:
    mixer, overrides = MODELS[row]
    overrides = {"model.width": width, **overrides}
    if scale == "cpu":
        overrides |= {"steps": 1_200, "optimizer.warmup_steps": 120}
        overrides |= {"eval.every_steps": 1_200, "checkpoint.every_steps": 600}
        overrides |= {"model.embedding_std": round(width**-0.5, 6)}
    elif scale == "gpu":
        overrides |= {"steps": 3_125, "optimizer.warmup_steps": 312}
    return Cell(
        row=row,
        column=f"width {width}",
        config=f"recall:{mixer},smoke" if scale == "cpu" else f"recall:{mixer}",
        metric=("length_32_pairs_8" if scale == "cpu" else "length_256_pairs_16") + "/accuracy",
        overrides=overrides,
        seeds=(0, 1) if scale == "cpu" else (0, 1, 2),
    )


# Of the figures of arXiv 2312.04927: what is more accurate than what, at every width.
FIGURES = (
    ("Attention", "RetNet"),
    ("Attention", "GLA"),
    ("Attention", "Mamba"),
    ("GLA", "RetNet"),
    ("Mamba", "RetNet"),
)


def orderings(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Those of the figures, and that a recurrence recalls more with the largest state than with the
    smallest."""
    of = {(cell.row, cell.column): cell for cell in cells}
    columns = list(dict.fromkeys(cell.column for cell in cells))
    found = [(of[one, column], of[other, column]) for column in columns for one, other in FIGURES]
    recurrences = [row for row in MODELS if row != "Attention"]
    return found + [(of[row, columns[-1]], of[row, columns[0]]) for row in recurrences]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Accuracy against bytes of state, a line per model; the band spans the seeds."""
    by_row: dict[str, list[tuple[int, list[float]]]] = {}
    for cell, row in results:
        values = row["evaluations"][cell.metric.split("/")[0]]["accuracy"]
        by_row.setdefault(cell.row, []).append((row["state_bytes"], values))
    for row, points in by_row.items():
        state_bytes, values = zip(*sorted(points), strict=True)
        means = [sum(v) / len(v) for v in values]
        (line,) = axes.plot(state_bytes, means, marker="o", markersize=3, label=row)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(state_bytes, low, high, alpha=0.12, color=line.get_color())
    axes.set(xlabel="bytes of state per sequence", ylabel="accuracy", ylim=(0, 1.05))
    axes.set_xscale("log")
    axes.legend(fontsize=7, ncols=2)
