"""Norms of batches in a transformer of images: LayerNorm, BatchNorm, RepBN and PRepBN, with softmax
and with simplified linear attention, and what folding them saves.

Guo et al., "SLAB", ICML 2024, arXiv 2405.11582: DeiT-T on ImageNet-1K, 72.2 with LayerNorm, 73.6
with PRepBN, 74.3 with simplified linear attention besides.

    python -m experiments.reproduce --table=slab_norms --scale=cpu
"""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Norms of batches, and folding them"
SOURCE = "top-1 of DeiT-T on ImageNet-1K, arXiv 2405.11582"
METRIC = (
    "Test accuracy, under running statistics; milliseconds of the logits of 16 images before and"
    " after the norms are folded into the maps behind them, and the largest difference that it"
    " makes, over the largest logit"
)
SCALES = {
    "cpu": (
        "three seeds, the 1,257 training digits of 8 x 8 pixels by patches of 2: six layers of"
        " width 32; 1,000 steps of 32, learning rate 3e-3; PRepBN goes over in 666 steps. 360 test"
        " images: a difference below 0.02 says little. Times: two layers of width 192, 196 tokens."
    )
}
PROGRESSIVE = {"model.norm": "progressive_batch", "model.norm_steps": 666}
# row -> (config, overrides, published)
ROWS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "LN, softmax": ("vit", {"model.norm": "layer"}, 0.722),
    "BN, softmax": ("vit", {"model.norm": "batch"}, None),
    "RepBN, softmax": ("vit", {"model.norm": "rep_batch"}, None),
    "PRepBN, softmax": ("vit", PROGRESSIVE, 0.736),
    "PRepBN with eta = 0, softmax": (
        "vit",
        PROGRESSIVE | {"model.norm_eta": 0.0, "optimizer.frozen": (".*/eta",)},
        None,
    ),
    "LN, SLA": ("slab", {"model.norm": "layer"}, None),
    "LN, SLA without convolution": (
        "slab",
        {"model.norm": "layer", "model.mixers.slab.kernel_size": 0},
        None,
    ),
    "PRepBN, SLA": ("slab", PROGRESSIVE, 0.743),
}
# Rows whose norms are timed.
TIMED = {"LN, SLA": "layer", "PRepBN, SLA": "progressive_batch"}
COSTS = {"ms": "ms", "ms, folded": "folded_ms", "difference": "difference"}


def cells(scale: str) -> list[Cell]:
    del scale
    trained = [
        Cell(
            row=row,
            column="accuracy",
            config=f"{config}:digits,smoke",
            metric="test/accuracy",
            overrides={
                "steps": 1_000,
                "model.depth": 6,
                "optimizer.lr": 3e-3,
                "optimizer.warmup_steps": 100,
                "eval.every_steps": 1_000,
                "checkpoint.every_steps": 500,
                **overrides,
            },
            seeds=(0, 1, 2),
            published=published,
        )
        for row, (config, overrides, published) in ROWS.items()
    ]
    computed = [
        Computation(row, column, "image_cost:folded", f"batch/{metric}", overrides={"norm": norm})
        for row, norm in TIMED.items()
        for column, metric in COSTS.items()
    ]
    return [*trained, *computed]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """A bar of accuracy for each row; whiskers span the seeds."""
    for place, row in enumerate(ROWS):
        for cell, found in results:
            if (cell.row, cell.column) == (row, "accuracy"):
                values = found["evaluations"]["test"]["accuracy"]
                mean = sum(values) / len(values)
                whiskers = [[mean - min(values)], [max(values) - mean]]
                axes.barh(place, mean, xerr=whiskers, color="C0")
    axes.set_yticks(range(len(ROWS)), ROWS, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy", xlim=(0, 1))
