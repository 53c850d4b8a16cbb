"""One layer of linear self-attention learns one step of gradient descent: trained risk against the
closed form.

Zhang, Frei, Bartlett, "Trained Transformers Learn Linear Models In-Context", JMLR 2024, arXiv
2306.09927, theorem 4.1 and section 4.3; Mahankali, Hashimoto, Ma, "One Step of Gradient Descent is
Provably the Optimal In-Context Learner with One Layer of Linear Self-Attention", ICLR 2024, arXiv
2307.03576. The numbers beside ours are theirs as formulas, evaluated by
experiments/tables/computations/icl_closed_form.py."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.reporting.table import Cell
from experiments.tables.computations import icl_closed_form as closed_form

TITLE = "In-context regression by linear self-attention"
SOURCE = "the closed form of the best one-layer model (arXiv 2306.09927, 2307.03576)"
METRIC = (
    "Risk E (prediction - w.x)^2 in dimension 5; kappa multiplies all inputs, M counts"
    " the examples of a test prompt"
)

SCALES = {
    "cpu": (
        "two seeds trained together, 1,000 steps of 1,024 prompts, lr 1e-2; 65,536 test prompts."
    ),
    "gpu": (
        "three seeds trained together, 4,000 steps of 4,096 prompts, lr 1e-2; 65,536 test prompts."
    ),
}
SPECTRA = {"isotropic": (1.0,) * 5, "eigenvalues 1/4, 1/2, 1, 2, 4": (0.25, 0.5, 1.0, 2.0, 4.0)}
EXAMPLES = (5, 20, 80)
LENGTHS = (5, 20, 80, 200)
SCALES_OF_INPUT = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
# The number of training examples of the run that is also tested under shifts.
SHIFTED = 20


def cells(scale: str) -> list[Cell]:
    result = []
    for row, spectrum in SPECTRA.items():
        for count in EXAMPLES:
            overrides: dict[str, Any] = {"task.covariance": spectrum, "task.examples": count}
            if count == SHIFTED:
                overrides |= {
                    "task.test_lengths": LENGTHS,
                    "task.test_input_scales": SCALES_OF_INPUT,
                }
            if scale == "gpu":
                overrides |= {"steps": 4_000, "batch_size": 4_096}
            column = f"{count} examples"
            shared = {"config": "linear_self_attention:icl_regression", "overrides": overrides}
            seeds = (0, 1) if scale == "cpu" else (0, 1, 2)
            result.append(
                Cell(
                    row,
                    column,
                    metric="in_distribution/loss",
                    published=risk(spectrum, count),
                    seeds=seeds,
                    **shared,
                )
            )
            if count == SHIFTED:
                for metric, published in shifts(spectrum).items():
                    heading = {
                        "length_200": f"{count} examples, M = 200",
                        "scale_2": f"{count} examples, kappa = 2",
                    }
                    if metric in heading:
                        result.append(
                            Cell(
                                row,
                                heading[metric],
                                metric=f"{metric}/loss",
                                published=published,
                                seeds=seeds,
                                **shared,
                            )
                        )
    return result


def risk(spectrum: tuple[float, ...], count: int) -> float:
    """The least risk of one layer trained on prompts of `count` examples."""
    return _risk(spectrum, count, count, 1.0)


def shifts(spectrum: tuple[float, ...]) -> dict[str, float]:
    """What the model trained on SHIFTED examples should have at other lengths and input scales, by
    evaluation."""
    lengths = {f"length_{length}": _risk(spectrum, SHIFTED, length, 1.0) for length in LENGTHS}
    return lengths | {
        f"scale_{scale:g}": _risk(spectrum, SHIFTED, SHIFTED, scale) for scale in SCALES_OF_INPUT
    }


def _risk(spectrum: tuple[float, ...], train_count: int, test_count: int, scale: float) -> float:
    covariance = np.diag(spectrum)
    P = closed_form.optimal_preconditioner(covariance, train_count)
    shifted = scale**2 * covariance
    return float(closed_form.risk(P, test_count, shifted, shifted))


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Risk under a change of input scale, over that of the prediction 0: trained (dots) on the
    closed form (line)."""
    drawn = set()
    for cell, result in results:
        evaluations = result["evaluations"]
        if cell.row in drawn or "scale_2" not in evaluations:
            continue
        drawn.add(cell.row)
        spectrum = SPECTRA[cell.row]
        fine = np.linspace(0.4, 2.05, 60)
        zero = [scale**2 * sum(spectrum) for scale in fine]
        (line,) = axes.plot(
            fine,
            [_risk(spectrum, SHIFTED, SHIFTED, s) / z for s, z in zip(fine, zero, strict=True)],
            label=cell.row,
        )
        for scale in SCALES_OF_INPUT:
            values = evaluations[f"scale_{scale:g}"]["normalised_loss"]
            axes.plot([scale] * len(values), values, "o", color=line.get_color(), markersize=4)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.text(0.42, 1.08, "prediction 0", fontsize=8, color="0.4")
    axes.set(
        xlabel="scale of the test inputs (1: as in training)",
        ylabel="normalised risk",
        yscale="log",
    )
    axes.legend(fontsize=8)
