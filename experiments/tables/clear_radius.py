"""CLEAR: how far a token of a diffusion transformer must see, what that costs, and what its teacher
helps.

Liu, Tan, Wang, "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", NeurIPS
2025, arXiv 2412.16112: FID to the images of the model itself, FLUX at 64 x 64 tokens, 15.53, 14.27
and 11.07 for radius 8, 16 and 32, and 13.07, 13.72 and 8.85 where it teaches.

    python -m experiments.reproduce --table=clear_radius --scale=cpu
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Softmax attention within discs: CLEAR"
SOURCE = "the paper has FID of larger models, which stands in the file of the table"
METRIC = (
    "Squared difference of the velocity to the teacher's on test images at ten times, and the error"
    " itself; GFLOPs of attention in a layer of FLUX at 64 x 64 tokens with 512 of text, by the"
    " paper's formula with the radius times 8, and of the pairs that the op weighs"
)
SCALES = {
    "cpu": (
        "two seeds, 3,500 training images of MNIST at 16 x 16 pixels, 8 x 8 tokens: four layers of"
        " width 64, batches of 32; a teacher of 800 steps of its own for each seed, 200 steps for"
        " each student, of whose parameters those of attention are trained. 200 test images, the"
        " average of the parameters. No text."
    )
}
SEEDS = (0, 1)
RECIPE = "diffusion_mnist_subset,smoke"
# row -> radius here; the grid of FLUX is eight times as wide
RADII = {
    "radius 1, a token sees itself": 1.0,
    "radius 2, 9 keys": 2.0,
    "radius 4, 45 keys": 4.0,
    "all": 12.0,
}
ALONE = (("task.distil_output", 0.0), ("task.distil_features", 0.0))
STILL = (("steps", 1), ("optimizer.lr", 1e-9), ("optimizer.warmup_steps", 0))
WAYS = {"before": (*ALONE, *STILL), "flow alone": ALONE, "taught": ()}
COSTS = {"GFLOPs, formula": "layer/formula", "GFLOPs, counted": "layer/counted"}


def cells(scale: str) -> list[Cell]:
    del scale
    given = {"recipe": RECIPE, "changes": (*_lengths(800), ("task.objective", "flow"))}
    trained = [
        Computation(
            row,
            f"{what}, {way}",
            "converted:student",
            metric,
            overrides={
                **given,
                "config": "clear",
                "student_changes": (
                    *_lengths(200),
                    ("model.mixers.clear.radius", radius),
                    *changes,
                ),
            },
            seeds=SEEDS,
        )
        for row, radius in RADII.items()
        for what, metric in (("to the teacher", "test/to_teacher"), ("error", "test/mse"))
        for way, changes in WAYS.items()
    ]
    computed = [
        Computation(
            row,
            column,
            "clear_cost:of_layer",
            metric,
            overrides={"side": 64, "radius": 8 * radius, "width": 3072, "text": 512},
        )
        for row, radius in RADII.items()
        for column, metric in COSTS.items()
    ]
    return [*trained, *computed]


def _lengths(steps: int) -> tuple[tuple[str, Any], ...]:
    return (
        ("steps", steps),
        ("batch_size", 32),
        ("optimizer.warmup_steps", steps // 10),
        ("eval.every_steps", steps),
        ("checkpoint.every_steps", steps),
    )


def orderings(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """A smaller disc is farther from the teacher, and so is what is not taught."""
    of = {(cell.row, cell.column): cell for cell in cells}
    _, small, large, _ = RADII
    pairs = [
        (of[small, f"to the teacher, {way}"], of[large, f"to the teacher, {way}"]) for way in WAYS
    ]
    return pairs + [
        (of[row, "to the teacher, flow alone"], of[row, "to the teacher, taught"])
        for row in (small, large)
    ]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """The difference to the teacher against the radius, a line for each way, a dot for each
    seed."""
    for number, way in enumerate(WAYS):
        points = [
            (RADII[cell.row], value)
            for cell, found in results
            if cell.column == f"to the teacher, {way}"
            for value in found["evaluations"]["test"]["to_teacher"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=f"C{number}", label=way)
    axes.set(xscale="log", yscale="symlog", xlabel="radius", ylabel="difference to the teacher")
    axes.legend(fontsize=8)
