"""LiT: linear attention for a diffusion transformer, its convolution and heads, and what it takes
over from softmax attention.

Wang et al., "LiT: Delving into a Simple(d) Linear Diffusion Transformer for Image Generation", ICCV
2025: FID of DiT-S/2 on ImageNet at 256 x 256 pixels, which is not measured here.

    python -m experiments.reproduce --table=lit --scale=cpu
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Linear attention in a diffusion transformer: LiT"
SOURCE = "the paper has FID, DiT-S/2 on ImageNet, in brackets: the lower the better"
METRIC = (
    "Error of the noise in test images at ten times, with the average of the parameters, and the"
    " difference to what the teacher says; the lower the better"
)
SCALES = {
    "cpu": (
        "two seeds, the 1,257 training digits of 8 x 8 pixels by patches of 2: four layers of width"
        " 64, 400 steps of 64; a teacher of 1,200 steps of its own for each seed. 200 test images."
    )
}
RECIPE = "diffusion_digits,smoke"
STEPS, TEACHER_STEPS = 400, 1_200
SEEDS = (0, 1)
LIT = "model.mixers.lit."
# What is trained from nothing: row -> (config, overrides)
FRESH: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax [68.40]": ("dit", {}),
    "ReLU linear, 2 heads [88.46 with 6]": ("lit", {f"{LIT}kernel_size": 0}),
    "+ convolution, 1 head": ("lit", {f"{LIT}heads": 1}),
    "+ convolution, 2 heads [63.24]": ("lit", {f"{LIT}heads": 2}),
    "+ convolution, 4 heads": ("lit", {f"{LIT}heads": 4}),
    "+ convolution, 16 heads [78.76 with 96]": ("lit", {f"{LIT}heads": 16}),
}
PLAIN = (("task.distil_output", 0.0), ("task.distil_variance", 0.0))
TWO_HEADS = ((f"{LIT}heads", 2),)
# What is made of the teacher: row -> changes of lit.py's config
TAUGHT: dict[str, Any] = {
    "2 heads, all but attention inherited [54.80]": PLAIN,
    "2 heads, all inherited [55.29]": (*PLAIN, ("init_except", ())),
    "2 heads, all but attention, noise taught [51.13]": (("task.distil_variance", 0.0),),
    "2 heads, all but attention, noise and variance taught [50.79]": (),
}
TEACHER = f"softmax, {TEACHER_STEPS:,} steps: the teacher"
COLUMNS = {"error": "test/mse", "to the teacher": "test/to_teacher"}


def cells(scale: str) -> list[Cell]:
    del scale
    fresh = [
        Cell(
            row,
            "error",
            f"{config}:{RECIPE}",
            "test/mse",
            overrides={**dict(_lengths(STEPS)), **overrides},
            seeds=SEEDS,
        )
        for row, (config, overrides) in FRESH.items()
    ]
    given = {"recipe": RECIPE, "changes": _lengths(TEACHER_STEPS)}
    teacher = Computation(
        TEACHER, "error", "converted:teacher", "test/mse", overrides=given, seeds=SEEDS
    )
    taught = [
        Computation(
            row,
            column,
            "converted:student",
            metric,
            overrides={
                **given,
                "config": "lit",
                "student_changes": (*_lengths(STEPS), *TWO_HEADS, *changes),
            },
            seeds=SEEDS,
        )
        for row, changes in TAUGHT.items()
        for column, metric in COLUMNS.items()
    ]
    return [*fresh, teacher, *taught]


def _lengths(steps: int) -> tuple[tuple[str, Any], ...]:
    return (
        ("steps", steps),
        ("optimizer.warmup_steps", steps // 10),
        ("eval.every_steps", steps),
        ("checkpoint.every_steps", steps),
    )


def orderings(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """The paper's orders of FID: the first of a pair has the larger one."""
    rows = {cell.row: cell for cell in cells if cell.column == "error"}
    worse = list(FRESH)
    taught = list(TAUGHT)
    pairs = [
        (worse[1], worse[0]),
        (worse[0], worse[3]),
        (worse[5], worse[3]),
        (worse[3], taught[0]),
        (taught[0], taught[2]),
        (taught[2], taught[3]),
    ]
    return [(rows[first], rows[second]) for first, second in pairs]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """A dot for each seed of each row."""
    names = [*FRESH, TEACHER, *TAUGHT]
    for cell, found in results:
        if cell.column == "error":
            values = found["evaluations"]["test"]["mse"]
            axes.plot(values, [names.index(cell.row)] * len(values), "o", color="C0")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="error of the noise")
