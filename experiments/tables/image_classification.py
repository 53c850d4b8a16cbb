"""Models of images at equal parameters: ViG's parts one after the other, SOFT, Flowformer, SLAB and
softmax.

Published: top-1 on ImageNet-1K at 224 x 224 of the smallest models, ViG-T (Liao et al., AAAI 2025,
arXiv 2405.18425), SOFT-Tiny (Lu et al., arXiv 2110.11945 and 2207.03341), Flowformer (Wu et al.,
arXiv 2202.06258), SLAB-DeiT-T (Guo et al., arXiv 2405.11582) and DeiT-T, which differ in size and
training: they are for orientation."""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell, Choice

TITLE = "Classification of images"
SOURCE = "top-1 of the smallest models on ImageNet-1K, arXiv 2405.18425, 2110.11945, 2202.06258"
METRIC = "Test accuracy; in the second column of the same weights on the images enlarged to 16 x 16"
SIZES = True
SCALES = {
    "cpu": (
        "three seeds, the 1,257 training digits of 8 x 8 pixels by patches of 2: four layers of"
        " width 32, the MLPs' inner width chosen so that all have 57,000 parameters to 0.3 %;"
        " 1,000 steps of 32, the best of three learning rates on the 180 validation images. There"
        " are 360 test images: a difference below 0.02 says little."
    ),
    "gpu": "three seeds, CIFAR-100 by patches of 4, 100 epochs, the sizes of the recipes.",
}
RATES = Choice({"optimizer.lr": (1e-3, 3e-3, 1e-2)}, "validation/accuracy")
# row -> (config, options of the mixer, inner width of the MLPs at cpu, published)
ROWS: dict[str, tuple[str, dict[str, Any], int, float | None]] = {
    "GLA, one direction": (
        "vig",
        {"directions": "forward", "kernel_size": 0, "blend": False},
        153,
        None,
    ),
    "+ both directions, one gate": (
        "vig",
        {"gates": "shared", "kernel_size": 0, "blend": False},
        153,
        None,
    ),
    "+ direction-wise gates": ("vig", {"kernel_size": 0, "blend": False}, 149, None),
    "+ convolution": ("vig", {"blend": False}, 144, None),
    "ViG": ("vig", {}, 128, 0.772),
    "ViG without decay": ("vig", {"gates": "none"}, 144, None),
    "softmax (ViT)": ("vit", {}, 148, 0.722),
    "SOFT": ("soft", {}, 163, 0.793),
    "SOFT, normalised": ("soft", {"normalise": True}, 163, 0.794),
    "Flowformer": ("flowformer", {"heads": 2}, 148, 0.806),
    "SLAB": ("slab", {}, 131, 0.743),
}
COLUMNS = {"test": "test/accuracy", "test, enlarged": "test_at_16/accuracy"}


def cells(scale: str) -> list[Cell]:
    columns = COLUMNS if scale == "cpu" else {"test": "test/accuracy"}
    return [_cell(scale, row, column) for row in ROWS for column in columns]


def _cell(scale: str, row: str, column: str) -> Cell:
    config, options, inner, published = ROWS[row]
    overrides: dict[str, Any] = {
        f"model.mixers.{config}.{name}": value for name, value in options.items()
    }
    if scale == "cpu":
        overrides |= {
            "task.enlarged": (16,),
            "steps": 1_000,
            "model.depth": 4,
            "model.mlp": "gelu",
            "model.norm": "progressive_batch" if config == "slab" else "layer",
            "model.mlp_width": inner,
            "optimizer.warmup_steps": 100,
            "eval.every_steps": 1_000,
            "checkpoint.every_steps": 500,
        }
        if config == "slab":
            overrides["model.norm_steps"] = 666
    return Cell(
        row=row,
        column=column,
        config=f"{config}:{'digits,smoke' if scale == 'cpu' else 'cifar100'}",
        metric=COLUMNS[column],
        overrides=overrides,
        seeds=(0, 1, 2),
        published=published if column == "test" else None,
        choice=RATES if scale == "cpu" else None,
    )


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """A bar for each model and size of image; whiskers span the seeds."""
    for place, row in enumerate(ROWS):
        for number, column in enumerate(COLUMNS):
            for cell, found in results:
                if (cell.row, cell.column) != (row, column):
                    continue
                evaluation, metric = cell.metric.split("/")
                values = found["evaluations"][evaluation][metric]
                mean = sum(values) / len(values)
                axes.barh(
                    place + 0.4 * number,
                    mean,
                    0.4,
                    xerr=[[mean - min(values)], [max(values) - mean]],
                    color=f"C{number}",
                    label=column if place == 0 else None,
                )
    axes.set_yticks([place + 0.2 for place in range(len(ROWS))], ROWS, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy", xlim=(0, 1))
    axes.legend(fontsize=7)
