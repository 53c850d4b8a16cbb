"""Feature maps that learn the weights of a trained softmax attention: how near they come, how
peaked they are, and whether they rise with the scores.

Zhang et al., "The Hedgehog & the Porcupine", ICLR 2024, arXiv 2402.04347: BERT converted, Matthews
correlation on CoLA, of softmax 58.8.

    python -m experiments.reproduce --table=hedgehog_conversion --scale=cpu
"""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Maps that learn the weights of softmax attention"
SOURCE = "Matthews correlation of converted BERT on CoLA, arXiv 2402.04347"
METRIC = (
    "Of validation text, means over layers, heads and tokens: divergence of the weights from those"
    " of softmax, nats; their entropy; the share of neighbours, sorted by score, at which they rise"
)
SCALES = {
    "cpu": (
        "two seeds: the teacher of the table linearisation, four layers of width 64, and 150 steps"
        " of the maps at a rate of 1e-2"
    )
}
# row -> (map, whether it learns, published)
ROWS: dict[str, tuple[str, bool, float | None]] = {
    "1 + ELU as it starts": ("elu", False, 28.1),
    "1 + ELU": ("elu", True, None),
    "ReLU: T2R": ("relu", True, None),
    "Hedgehog as it starts": ("softmax", False, None),
    "Hedgehog": ("softmax", True, None),
    "Hedgehog, exp": ("exp", True, None),
}
COLUMNS = {
    "divergence": "transfer_error",
    "entropy": "entropy",
    "entropy of softmax": "softmax_entropy",
    "monotonicity": "monotonicity",
}
MIXER = "model.mixers.hedgehog."


def cells(scale: str) -> list[Cell]:
    del scale
    return [
        Computation(
            row,
            column,
            "linearisation:chain",
            f"validation/{metric}",
            overrides={"stages": [("hedgehog", _overrides(kind, learns))]},
            seeds=(0, 1),
            published=published if column == "divergence" else None,
        )
        for row, (kind, learns, published) in ROWS.items()
        for column, metric in COLUMNS.items()
    ]


def _overrides(kind: str, learns: bool) -> dict[str, Any]:
    options = {f"{MIXER}feature_map": kind, f"{MIXER}context_length": 128}
    return options | {"steps": 150 if learns else 1, "optimizer.lr": 1e-2 if learns else 1e-12}


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Divergence against entropy, a dot for each seed, and the entropy of softmax."""
    for number, row in enumerate(ROWS):
        for cell, found in results:
            if cell.row == row and cell.column == "divergence":
                values = found["evaluations"]["validation"]
                axes.plot(
                    values["entropy"], values["transfer_error"], "o", color=f"C{number}", label=row
                )
                axes.axvline(values["softmax_entropy"][0], color="0.8", zorder=0)
    axes.set(xlabel="entropy of the weights, nats", ylabel="divergence from softmax, nats")
    axes.legend(fontsize=7)
