"""Liger without one of its parts, and with other gates.

Lan et al., "Liger", ICML 2025, arXiv 2503.01496: perplexity of Llama-3-8B on validation text, of
the gates (its text has 72.4, 69.5 and 70.5 on average over tasks for GLA, HGRN2 and GSA) none.

    python -m experiments.reproduce --table=liger_ablation --scale=cpu
"""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Liger's parts"
SOURCE = "validation perplexity of Llama-3-8B, arXiv 2503.01496 (ablation)"
METRIC = "Bits per byte of validation text; the published numbers are perplexities"
SCALES = {
    "cpu": (
        "two seeds: the teacher of the table linearisation, four layers of width 64, window 16, 100"
        " steps of LoRA at a rate of 1e-3. The paper's learned feature map is not described and is"
        " left out"
    )
}
MIXER = "model.mixers.liger."
FREE = ("stack/(?!.*(?:gate_map|/lora_[ab])).*", "embedding/.*", "norm/.*", "head_WD")
# row -> (overrides, published)
ROWS: dict[str, tuple[dict[str, Any], float | None]] = {
    "Liger": ({}, 2.96),
    "without a gate": ({f"{MIXER}gate": "none"}, 3.00),
    "without the recurrence": ({f"{MIXER}recurrence_share": 0.0}, 3.01),
    "without the window": ({f"{MIXER}recurrence_share": 1.0}, 3.75),
    "with a new gate projection": (
        {f"{MIXER}gate_projection": True, "optimizer.frozen": FREE},
        3.16,
    ),
    "all weights trained, no LoRA": ({"model.lora_rank": 0, "optimizer.frozen": ()}, 3.23),
    "the gate of HGRN2": ({f"{MIXER}gate": "hgrn2"}, None),
    "the gate of GSA": ({f"{MIXER}gate": "gsa", f"{MIXER}slots": 8}, None),
}


def cells(scale: str) -> list[Cell]:
    del scale
    found: list[Cell] = [
        Computation(
            "softmax, the teacher",
            "after LoRA",
            "linearisation:chain",
            "validation/bits_per_byte",
            overrides={"stages": []},
            seeds=(0, 1),
        )
    ]
    for row, (overrides, published) in ROWS.items():
        for column, steps, rate in (("as converted", 1, 1e-12), ("after LoRA", 100, 1e-3)):
            own = {"steps": steps, "optimizer.lr": rate, f"{MIXER}window": 16, **overrides}
            found.append(
                Computation(
                    row,
                    column,
                    "linearisation:chain",
                    "validation/bits_per_byte",
                    overrides={"stages": [("liger", own)]},
                    seeds=(0, 1),
                    published=published if column == "after LoRA" else None,
                )
            )
    return found


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """A dot for each seed of each row."""
    rows = ["softmax, the teacher", *ROWS]
    for cell, found in results:
        if cell.column == "after LoRA":
            values = found["evaluations"]["validation"]["bits_per_byte"]
            axes.plot(values, [rows.index(cell.row)] * len(values), "o", color="C0")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="bits per byte")
