"""mmMamba's three stages and its start, one with or without the other.

Liao et al., "Multimodal Mamba", 2025, arXiv 2502.13145: a vision-language model of 2.6B on TextVQA,
of softmax attention 66.0.

    python -m experiments.reproduce --table=mm_mamba_stages --scale=cpu
"""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "mmMamba's stages"
SOURCE = "TextVQA of a vision-language model of 2.6B, arXiv 2502.13145: larger is better"
METRIC = "Validation text: bits per byte, and the divergence from the teacher where it is learned"
SCALES = {
    "cpu": (
        "two seeds: the teacher of the table linearisation, four layers of width 64; 100 steps a"
        " stage at rates of 1e-3, 5e-4 and 3e-4, the last six times the published one"
    )
}
MIXER = "model.mixers.mm_mamba."
RATES = (1e-3, 5e-4, 3e-4)
INHERITED = {f"{MIXER}start": "default"}
# row -> (stages that are trained, overrides of all, published)
ROWS: dict[str, tuple[tuple[int, ...], dict[str, Any], float | None]] = {
    "inherited, stages 1, 2, 3": ((1, 2, 3), INHERITED, 41.9),
    "mimic, stages 1, 2, 3": ((1, 2, 3), {}, 47.7),
    "mimic, stage 1": ((1,), {}, 13.5),
    "mimic, stage 2": ((2,), {}, 25.5),
    "mimic, stage 3": ((3,), {}, 40.0),
    "mimic, stages 2, 3": ((2, 3), {}, 41.1),
    "mimic, stages 1, 3": ((1, 3), {}, 42.5),
    "without Delta on the input": ((1, 2, 3), {f"{MIXER}input_scale": False}, None),
}


def _stages(trained: tuple[int, ...], overrides: dict[str, Any]) -> list[Any]:
    """All three, of which one that is not trained has a step that changes nothing."""
    return [
        (
            "mm_mamba",
            {
                "steps": 100 if stage in trained else 1,
                "optimizer.lr": rate if stage in trained else 1e-12,
                "optimizer.weight_decay": 0.0,
                **overrides,
            },
        )
        for stage, rate in enumerate(RATES, start=1)
    ]


def cells(scale: str) -> list[Cell]:
    del scale
    teacher: dict[str, Any] = {"stages": []}
    columns = {"bits per byte": "bits_per_byte", "divergence": "divergence"}
    found: list[Cell] = [
        Computation(
            "softmax, the teacher",
            "bits per byte",
            "linearisation:chain",
            "validation/bits_per_byte",
            overrides=teacher,
            seeds=(0, 1),
            published=66.0,
        )
    ]
    found += [
        Computation(
            row,
            column,
            "linearisation:chain",
            f"validation/{metric}",
            overrides={"stages": _stages(trained, overrides)},
            seeds=(0, 1),
            published=published if column == "bits per byte" else None,
        )
        for row, (trained, overrides, published) in ROWS.items()
        for column, metric in columns.items()
    ]
    return found


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """A dot for each seed of each row."""
    rows = ["softmax, the teacher", *ROWS]
    for cell, found in results:
        if cell.column == "bits per byte":
            values = found["evaluations"]["validation"]["bits_per_byte"]
            axes.plot(values, [rows.index(cell.row)] * len(values), "o", color="C0")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="bits per byte")
