"""The six synthetic tasks of MAD for the main mixers.

Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", ICML 2024, arXiv 2403.17844:
means over all difficulties of a task, best of six learning rates and weight decays, at equal state
size. The row of DeltaNet is that of Yang et al., NeurIPS 2024, arXiv 2406.06484."""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell

TITLE = "MAD: recall, memory, selection and compression"
SOURCE = (
    "means over all difficulties, best of six settings, arXiv 2403.17844 (DeltaNet:"
    " arXiv 2406.06484)"
)
METRIC = "Accuracy on test sequences"
SIZES = True

SCALES = {
    "cpu": (
        "two seeds trained together, two layers of width 64, one setting per task:"
        " recall and copying at 64 tokens (8 copied), trained on what is tested, fuzzy"
        " recall too; 600 steps of 32 sequences, learning rate 3e-3. Easier and shorter"
        " than the published settings, so the numbers beside ours are for orientation."
    ),
    "gpu": (
        "three seeds trained together, base setting of each task, 50 epochs (5,000"
        " steps of 128), learning rate 5e-4, weight decay 0.1."
    ),
    "paper": "three seeds, base setting of each task, 200 epochs, one learning rate.",
}
# column -> task.kind
TASKS = {
    "compression": "compression",
    "fuzzy recall": "fuzzy_recall",
    "recall": "recall",
    "memorisation": "memorisation",
    "noisy recall": "noisy_recall",
    "selective copying": "selective_copying",
}
# row -> (config file, published numbers in the order of TASKS)
MODELS: dict[str, tuple[str, tuple[float, ...]]] = {
    "Transformer": ("transformer", (0.516, 0.298, 0.941, 0.852, 0.868, 0.996)),
    "Mamba": ("mamba", (0.527, 0.067, 0.904, 0.895, 0.901, 0.863)),
    "GLA": ("gla", (0.388, 0.069, 0.808, 0.633, 0.816, 0.886)),
    "DeltaNet": ("delta_net", (0.422, 0.357, 1.0, 0.528, 1.0, 1.0)),
    "Gated DeltaNet": ("gated_delta_net", ()),
}


def cells(scale: str) -> list[Cell]:
    return [_cell(scale, row, column) for row in MODELS for column in TASKS]


def _cell(scale: str, row: str, column: str) -> Cell:
    mixer, published = MODELS[row]
    kind = TASKS[column]
    overrides: dict[str, Any] = {"task.kind": kind}
    if kind == "compression":
        overrides["model.name"] = "compressor"
    if scale == "cpu":
        if kind in ("compression", "memorisation"):
            overrides |= {"task.length": 32, "task.targets_only": False}
        if kind == "selective_copying":
            overrides["task.targets_only"] = False
        overrides |= {"eval.every_steps": 600, "checkpoint.every_steps": 300}
    elif scale == "gpu":
        overrides["steps"] = 5_000
    return Cell(
        row=row,
        column=column,
        config=f"{mixer}:mad,smoke" if scale == "cpu" else f"{mixer}:mad",
        metric="test/accuracy",
        overrides=overrides,
        seeds=(0, 1) if scale == "cpu" else (0, 1, 2),
        published=dict(zip(TASKS, published, strict=False)).get(column),
    )


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Groups of bars, a group per task and a bar per model; whiskers span the seeds."""
    width = 0.8 / len(MODELS)
    for number, model in enumerate(MODELS):
        for place, column in enumerate(TASKS):
            for cell, row in results:
                if (cell.row, cell.column) != (model, column):
                    continue
                values = row["evaluations"]["test"]["accuracy"]
                mean = sum(values) / len(values)
                axes.bar(
                    place + (number - (len(MODELS) - 1) / 2) * width,
                    mean,
                    width,
                    yerr=[[mean - min(values)], [max(values) - mean]],
                    color=f"C{number}",
                    label=model if place == 0 else None,
                )
    axes.set_xticks(range(len(TASKS)), TASKS, fontsize=7)
    axes.set(ylabel="accuracy", ylim=(0, 1.05))
    axes.legend(fontsize=7, ncols=len(MODELS), loc="upper center")
