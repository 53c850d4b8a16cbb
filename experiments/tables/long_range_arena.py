"""The Long Range Arena: ten systems that read both sides of a token.

S4: Gu, Goel, Re, arXiv 2111.00396, with the later recipe of arXiv 2206.12037. S4D: arXiv
2206.11893, table of initialisations, "inv". S5: arXiv 2208.04933. LRU: arXiv 2303.06349. S4-PTD and
S5-PTD: arXiv 2310.01698, of which we know some columns. TransNormer: arXiv 2210.10340, of which we
know one. LSSL and Monarch Mixer have no numbers of these tasks; SeqBoat's we could not verify and
leave out.

At CPU size expressions and drawings are our own, far shorter than the released ones: nothing
compares with what is published beside it but the order of the rows."""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell

TITLE = "Long Range Arena"
SOURCE = "the papers of the rows; of S4 arXiv 2206.12037, where it has the later recipe"
METRIC = "Test accuracy"
SIZES = True

SCALES = {
    "cpu": (
        "two seeds trained together, two layers of width 32, 3,000 steps of 32 sequences, the"
        " learning rate of the smoke recipe; ListOps with expressions of 8 to 64 tokens, Pathfinder"
        " with drawings of 16 x 16. Guessing has 0.1 and 0.5."
    ),
    "paper": "one seed, published settings; the data are to be brought.",
}
# column -> (config argument at CPU size, at the published one)
TASKS = {
    "ListOps": ("listops,smoke", "lra_listops"),
    "text": ("", "lra_text"),
    "retrieval": ("", "lra_retrieval"),
    "image": ("", "lra_image"),
    "Pathfinder": ("pathfinder,smoke", "lra_pathfinder"),
    "Path-X": ("", "lra_pathx"),
}
UNKNOWN = (None,) * 6
PTD = {"init": "ptd"}
# row -> (config file, options of its mixer, published by column in percent)
ROWS: dict[str, tuple[str, Mapping[str, Any], tuple[float | None, ...]]] = {
    "LSSL": ("lssl", {}, UNKNOWN),
    "S4": ("s4", {}, (59.60, 86.82, 90.90, 88.65, 94.20, 96.35)),
    "S4D": ("s4d", {"init": "inv"}, (60.18, 87.34, 91.09, 87.83, 93.78, 92.80)),
    "S4-PTD": ("s4d", PTD, (None, None, None, None, None, 96.39)),
    "S5": ("s5", {}, (62.15, 89.31, 91.40, 88.00, 95.33, 98.58)),
    "S5-PTD": ("s5", PTD, (None, None, None, 87.92, None, 98.52)),
    "LRU": ("lru", {}, (60.2, 89.4, 89.9, None, 95.1, 94.2)),
    "SeqBoat": ("seqboat", {}, UNKNOWN),
    "Monarch Mixer": ("monarch_mixer", {}, UNKNOWN),
    "TransNormer": ("transnormer", {}, (None, None, None, None, 76.80, None)),
}
CPU = {
    "steps": 3_000,
    "optimizer.warmup_steps": 300,
    "eval.every_steps": 1_500,
    "checkpoint.every_steps": 500,
    "eval.examples": 2_000,
}


def cells(scale: str) -> list[Cell]:
    return [
        _cell(scale, row, column, argument[scale != "cpu"])
        for row in ROWS
        for column, argument in TASKS.items()
        if argument[scale != "cpu"]
    ]


def _cell(scale: str, row: str, column: str, argument: str) -> Cell:
    mixer, options, published = ROWS[row]
    options = dict(options)
    if scale != "cpu" and (row, column) == ("S5-PTD", "ListOps"):
        options["blocks"] = 1  # those of S5 are of size 2, and cannot be perturbed
    percent = published[list(TASKS).index(column)]
    overrides = {f"model.mixers.{mixer}.{name}": value for name, value in options.items()}
    return Cell(
        row=row,
        column=column,
        config=f"{mixer}:{argument}",
        metric="test/accuracy",
        overrides=overrides | (CPU if scale == "cpu" else {}),
        seeds=(0, 1) if scale == "cpu" else (0,),
        published=None if percent is None else percent / 100,
    )


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Accuracy of each row, a bar for each column; dots are seeds."""
    rows = list(dict.fromkeys(cell.row for cell, _ in results))
    columns = list(dict.fromkeys(cell.column for cell, _ in results))
    height = 0.8 / max(len(columns), 1)
    for number, column in enumerate(columns):
        for cell, row in results:
            if cell.column != column:
                continue
            evaluation, metric = cell.metric.split("/")
            values = row["evaluations"][evaluation][metric]
            place = rows.index(cell.row) + (number - (len(columns) - 1) / 2) * height
            label = column if cell.row == rows[0] else None
            mean = sum(values) / len(values)
            axes.barh(place, mean, height=height, color=f"C{number}", label=label)
            axes.plot(values, [place] * len(values), "k.", markersize=3)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy", xlim=(0, 1))
    axes.legend(fontsize=8)
