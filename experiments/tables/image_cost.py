"""What a classifier of images costs by the number of its tokens: linear mixers beside softmax.

Liao et al., ViG, AAAI 2025, arXiv 2405.18425, whose claim is a cost in proportion to the tokens: at
1024 x 1024 pixels a fifth of the operations of DeiT-T and a tenth of its memory.

    python -m experiments.reproduce --table=image_cost --scale=cpu
"""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Cost of an image by the number of its tokens"
METRIC = (
    "Milliseconds of the logits of one image, two layers of width 192, float32; the fastest of 5"
    " rounds. In the column of memory, MiB for what is computed on the way"
)
SCALES = {"cpu": "complete. Plain JAX; SOFT has 49 landmarks whatever the size."}
# row -> mixer of computations/image_cost
MIXERS = {
    "softmax (ViT)": "vit",
    "ViG": "vig",
    "SOFT": "soft",
    "Flowformer": "flowformer",
    "SLAB": "slab",
}
SIDES = (14, 28, 56, 112)


def cells(scale: str) -> list[Cell]:
    del scale
    return [
        Computation(
            row,
            f"{side * side} tokens{'' if metric == 'ms' else ', MiB'}",
            "image_cost:by_tokens",
            f"image/{metric}",
            overrides={"mixer": mixer, "side": side},
        )
        for row, mixer in MIXERS.items()
        for metric in ("ms", "mib")
        for side in (SIDES if metric == "ms" else (SIDES[0], SIDES[-1]))
    ]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Milliseconds against tokens, a line for each mixer, and what is proportional."""
    for row in MIXERS:
        points = {
            cell.overrides["side"] ** 2: found["evaluations"]["image"]["ms"][0]
            for cell, found in results
            if cell.row == row and cell.metric == "image/ms"
        }
        if points:
            axes.plot(*zip(*sorted(points.items()), strict=True), "o-", label=row)
    low, high = axes.get_ylim()
    tokens = [side**2 for side in SIDES]
    axes.plot(tokens, [low * n / tokens[0] for n in tokens], "--", color="0.7", label="~ tokens")
    axes.set(xscale="log", yscale="log", ylim=(low, high), xlabel="tokens", ylabel="ms an image")
    axes.legend(fontsize=8)
