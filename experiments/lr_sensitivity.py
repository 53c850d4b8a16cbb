"""How much a model's loss depends on the choice of its learning rate.

Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", ICLR
2024, arXiv 2309.14322:

    sensitivity = mean over learning rates eta of min(l(eta), l_0) - min over eta of l(eta)

with l(eta) the final loss, and l_0 the loss at initialisation: a run that diverged is as good as
one that never began. The paper takes seven rates from 3e-4 to 3e-1.
experiments/sweeps/lr_sensitivity.py is a sweep that is drawn by this."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.rows import origins

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def bounded(loss: float | None, initial_loss: float) -> float:
    """min(loss, initial_loss), where None and NaN are the loss of a run that diverged."""
    if loss is None or math.isnan(loss):
        return initial_loss
    return min(loss, initial_loss)


def sensitivity(losses: Mapping[float, float | None], initial_loss: float) -> float:
    """LR sensitivity of {learning rate: final loss}. Raises ValueError for fewer than two rates."""
    if len(losses) < 2:
        raise ValueError(
            "losses must have at least two learning rates to say how they differ; got"
            f" {sorted(losses)}"
        )
    values = [bounded(loss, initial_loss) for loss in losses.values()]
    return statistics.fmean(values) - min(values)


def draw(axes: Any, results: Sequence[tuple[Any, Mapping[str, Any]]], initial_loss: float) -> None:
    """Final loss against learning rate, a line per row, with its sensitivity; the band spans the
    seeds.

    results: (cell, row) pairs whose cells have the override optimizer.lr and a loss as metric. A
    line whose rows are of several commits or machines has no sensitivity."""
    curves: dict[str, dict[float, list[float]]] = {}
    sources: dict[str, set[str]] = {}
    for cell, row in results:
        sources.setdefault(cell.row, set()).update(origins([row]))
        evaluation, _, metric = cell.metric.partition("/")
        losses = row["evaluations"][evaluation][metric]
        curves.setdefault(cell.row, {})[cell.overrides["optimizer.lr"]] = [
            bounded(loss, initial_loss) for loss in losses
        ]
    for name, curve in curves.items():
        rates = sorted(curve)
        means = {rate: statistics.fmean(curve[rate]) for rate in rates}
        of_rates = f" ({len(rates)} rates)"
        label = name
        if len(sources[name]) > 1:
            label = f"{name}: several commits or machines"
        elif len(rates) > 1:
            label = f"{name}: {sensitivity(means, initial_loss):.3f}{of_rates}"
        (line,) = axes.plot(rates, list(means.values()), "o-", markersize=4, label=label)
        low, high = ([choose(curve[rate]) for rate in rates] for choose in (min, max))
        axes.fill_between(rates, low, high, color=line.get_color(), alpha=0.15)
    axes.axhline(initial_loss, color="0.6", linestyle=":", label="at initialisation")
    axes.set(xscale="log", xlabel="learning rate", ylabel="final loss")
    axes.legend(fontsize=7, title="LR sensitivity", title_fontsize=7)
