"""How the loss of GLA falls with parameters and tokens, and how sure that is: the runs of a scaling
law, its fit and its figure.

    python -m launch.sweep --sweep=experiments/sweeps/scaling_law.py --scale=cpu
    python -m experiments.sweeps.scaling_law --rows=runs/scaling_law/scaling_law.jsonl --scale=cpu \
        --metric=validation/loss --out=scaling_law.png

The second command fits the rows of any sweep whose runs differ in parameters and tokens. Every
number of tokens needs a run of its own, because the learning rate decays over the whole run.

Hoffmann et al., "Training Compute-Optimal Large Language Models", NeurIPS 2022, arXiv 2203.15556,
approach 3:

    L(N, D) = E + A / N^alpha + B / D^beta                                      (Eq. 2)

N      parameters of the run, embeddings included
D      training tokens, those seen twice counted twice
L      its metric, a positive number such as nats per token, mean over seeds

The fit minimises the Huber loss of log L (Eq. 3), here by Gauss-Newton steps from the best of a
grid of starts. Bands are percentiles over a bootstrap of the residuals. (A sweep is a small grid:
resampled runs would often have a single value of N or D.) They are a little narrow: over 30
planted laws with 25 runs each, bands of 5 to 95% held 85% of the numbers. Beside the law stand the
power laws in N alone and in D alone, L = (x_c / x)^alpha, of Kaplan et al., 2020, arXiv 2001.08361,
from the runs with the most tokens and with the most parameters."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from scipy.optimize import least_squares
from scipy.special import huber

from experiments.reporting.rows import origins
from experiments.reporting.table import Cell, grid
from experiments.training import command_line

TITLE = "Scaling of GLA in parameters and tokens"
METRIC = "Validation loss, nats per byte"
SIZES = True
SCALES = {
    "tiny": "three widths, 10 to 40 steps of 4 sequences of 32 bytes: shows that it runs",
    "cpu": "four widths, 100 to 800 steps of 8 sequences of 128 bytes, two layers",
    "gpu": "four widths, 1,000 to 16,000 steps of 64 sequences of 1,024 bytes, eight layers",
}
# scale -> widths, depth, steps, batch size, sequence length
SETTINGS = {
    "tiny": ((16, 32, 64), 1, (10, 20, 40), 4, 32),
    "cpu": ((32, 64, 128, 256), 2, (100, 200, 400, 800), 8, 128),
    "gpu": ((128, 256, 512, 1024), 8, (1_000, 4_000, 8_000, 16_000), 64, 1024),
}

HUBER = 1e-3  # of log L, as published
RESAMPLES = 200
BAND = (5, 95)  # percentiles
FEWEST_VALUES = 3  # of N and of D: two cannot tell an exponent from an offset
NAMES = ("E", "A", "B", "alpha", "beta")

# Exponents depend on data, architecture and schedule: for comparison, not as a target.
PUBLISHED: dict[str, dict[str, float]] = {
    "Hoffmann et al., 2022": {"E": 1.69, "A": 406.4, "B": 410.7} | {"alpha": 0.34, "beta": 0.28},
    "the same data refitted, Besiroglu et al., 2024": {"E": 1.8172, "A": 482.01}
    | {"B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
}
PUBLISHED_POWER_LAWS = {"parameters": 0.076, "tokens": 0.095}  # Kaplan et al., 2020


def cells(scale: str) -> list[Cell]:
    widths, depth, steps, batch_size, length = SETTINGS[scale]
    shared = {
        "model.depth": depth,
        "batch_size": batch_size,
        "task.sequence_length": length,
        "optimizer.warmup_steps": min(steps) // 10,
        "eval.every_steps": max(steps),
        "checkpoint.every_steps": min(steps),
    }
    return grid(
        "gla:text,smoke" if scale == "tiny" else "gla:text",
        "validation/loss",
        {"model.width": widths, "steps": steps},
        row="GLA",
        overrides=shared,
    )


class Points(NamedTuple):
    """One run each: parameters, tokens, loss, all [n]."""

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray


def points(rows: Iterable[Mapping[str, Any]], metric: str) -> Points:
    """The runs of result rows. metric: "<evaluation>/<metric>". Raises ValueError for a row without
    it."""
    evaluation, _, name = metric.partition("/")
    found = []
    for row in rows:
        values = row["evaluations"].get(evaluation, {}).get(name)
        if not values or None in values or row.get("tokens") is None:
            raise ValueError(
                f"every row must have tokens and a finite number for the metric; {row['row']} /"
                f" {row['column']} has {row.get('tokens')} tokens and {values} for {metric!r}, of"
                f" the evaluations {', '.join(row['evaluations'])}"
            )
        found.append((row["parameters"], row["tokens"], np.mean(values)))
    return Points(*np.array(found, np.float64).reshape(-1, 3).T)


def predict(law: Sequence[float] | np.ndarray, parameters: Any, tokens: Any) -> Any:
    """L(N, D) of a law (E, A, B, alpha, beta)."""
    E, A, B, alpha, beta = law
    return E + A / parameters**alpha + B / tokens**beta


def fit(data: Points) -> np.ndarray:
    """The law (E, A, B, alpha, beta) of the points.

    Raises ValueError if there are fewer than six points, or fewer than three values of N or of D,
    or if a number is not positive."""
    sizes = [len(np.unique(x)) for x in (data.parameters, data.tokens)]
    if len(data.loss) <= len(NAMES) or min(sizes) < FEWEST_VALUES:
        raise ValueError(
            f"a scaling law of {len(NAMES)} numbers needs at least {len(NAMES) + 1} runs"
            f" with {FEWEST_VALUES} different numbers of parameters and of tokens; got"
            f" {len(data.loss)} runs with {sizes[0]} and {sizes[1]}"
        )
    if min(map(np.min, data)) <= 0:
        raise ValueError(
            "parameters, tokens and losses must be positive to take logarithms; the"
            f" least are {', '.join(f'{np.min(x):g}' for x in data)}"
        )
    return _minimise(data, _starts(float(np.mean(np.log(data.loss)))))


def _starts(loss_log: float) -> list[np.ndarray]:
    """Laws in the coordinates of `_minimise`: shares of the three terms in the loss at the data's
    centre, exponents."""
    starts = []
    for E, split in product((0.1, 0.4, 0.7, 0.95), (0.1, 0.5, 0.9)):
        shares = np.log([E, (1 - E) * split, (1 - E) * (1 - split)]) + loss_log
        exponents = product((0.1, 0.3, 0.6, 1.0), repeat=2)
        starts += [np.append(shares, exponent) for exponent in exponents]
    return starts


def _minimise(data: Points, starts: Sequence[np.ndarray], tried: int = 8) -> np.ndarray:
    """The best law from the best starts, on logarithms of E, A and B and centred logarithms of N
    and D.

    Steps are Gauss-Newton's, a dozen instead of the hundreds of L-BFGS; the objective is the same,
    Huber's."""
    N_log, D_log, L_log = map(np.log, data)
    N_mean, D_mean = np.mean(N_log), np.mean(D_log)
    N_log, D_log = N_log - N_mean, D_log - D_mean
    ones = np.ones_like(N_log)

    def terms(theta: np.ndarray) -> np.ndarray:
        e, a, b, alpha, beta = theta
        return np.stack([e * ones, a - alpha * N_log, b - beta * D_log])

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce(terms(theta)) - L_log

    def jacobian(theta: np.ndarray) -> np.ndarray:
        parts = terms(theta)
        E, A, B = np.exp(parts - np.logaddexp.reduce(parts))
        return np.stack([E, A, B, -A * N_log, -B * D_log], axis=1)

    def distance(theta: np.ndarray) -> float:
        return float(np.sum(huber(HUBER, residuals(theta))))

    options: dict[str, Any] = {"jac": jacobian, "loss": "huber", "f_scale": HUBER}
    found = [
        least_squares(residuals, theta, xtol=1e-10, max_nfev=300, **options).x
        for theta in sorted(starts, key=distance)[:tried]
    ]
    e, a, b, alpha, beta = min(found, key=distance)
    return np.array([np.exp(e), np.exp(a + alpha * N_mean), np.exp(b + beta * D_mean), alpha, beta])


def bootstrap(data: Points, law: np.ndarray) -> np.ndarray:
    """Laws [RESAMPLES, 5] of data in which residuals of log L are drawn anew, scaled for the five
    fitted numbers."""
    fitted = predict(law, data.parameters, data.tokens)
    residuals = np.log(data.loss) - np.log(fitted)
    residuals *= np.sqrt(len(residuals) / (len(residuals) - len(NAMES)))
    E, A, B, alpha, beta = law
    centre = [np.exp(np.mean(np.log(x))) for x in (data.parameters, data.tokens)]
    terms = (E, A / centre[0] ** alpha, B / centre[1] ** beta)
    start = np.append(np.log(np.maximum(terms, 1e-300)), (alpha, beta))
    random = np.random.default_rng(0)
    laws = []
    for _ in range(RESAMPLES):
        drawn = random.choice(residuals, len(residuals))
        resampled = data._replace(loss=fitted * np.exp(drawn))
        laws.append(_minimise(resampled, [start]))
    return np.array(laws)


def fit_power_law(x: np.ndarray, loss: np.ndarray) -> tuple[float, float, float]:
    """(alpha, low, high) of L = (x_c / x)^alpha by least squares on logarithms, with the band of
    its bootstrap.

    Raises ValueError for fewer than three different x.
    """
    if len(np.unique(x)) < FEWEST_VALUES:
        raise ValueError(
            f"a power law needs at least {FEWEST_VALUES} different sizes; got {len(np.unique(x))}"
        )
    slope, offset = np.polyfit(np.log(x), np.log(loss), 1)
    fitted = offset + slope * np.log(x)
    residuals = (np.log(loss) - fitted) * np.sqrt(len(x) / (len(x) - 2))
    drawn = np.random.default_rng(0).choice(residuals, (RESAMPLES, len(x)))
    slopes = np.polyfit(np.log(x), (fitted + drawn).T, 1)[0]
    low, high = np.percentile(-slopes, BAND)
    return -slope, low, high


def report(data: Points, law: np.ndarray, laws: np.ndarray) -> str:
    """The law with bands, and what is published, as lines of text."""
    low, high = np.percentile(laws, BAND, axis=0)
    lines = [f"L(N, D) = E + A / N^alpha + B / D^beta over {len(data.loss)} runs"]
    lines += [f"bands: percentiles {BAND[0]} and {BAND[1]} of {RESAMPLES} resamples"]
    for place, name in enumerate(NAMES):
        others = ", ".join(f"{known[name]:g}" for known in PUBLISHED.values())
        ours = f"{law[place]:.4g} [{low[place]:.4g}, {high[place]:.4g}]"
        lines.append(f"    {name:6} {ours:34} published {others}")
    lines.append(f"published: {'; '.join(PUBLISHED)}")
    for name, other in (("parameters", "tokens"), ("tokens", "parameters")):
        most = getattr(data, other) == np.max(getattr(data, other))
        alpha, *band = fit_power_law(getattr(data, name)[most], data.loss[most])
        lines.append(
            f"L = (x_c / x)^alpha in {name}, most {other}: alpha {alpha:.4g} [{band[0]:.4g},"
            f" {band[1]:.4g}], published {PUBLISHED_POWER_LAWS[name]:g} (Kaplan et al., 2020)"
        )
    return "\n".join(lines)


def draw_law(axes: Any, data: Points, laws: Sequence[Any] | np.ndarray, over: str) -> None:
    """Loss against "parameters" or "tokens", a line for every value of the other; bands from
    `laws`, if any."""
    other = "tokens" if over == "parameters" else "parameters"
    x, groups = getattr(data, over), getattr(data, other)
    grid = np.geomspace(np.min(x) / 1.3, np.max(x) * 1.3, 60)
    for place, value in enumerate(np.unique(groups)):
        colour = f"C{place}"
        here = groups == value
        label = f"{value:.3g} {other}"
        axes.plot(x[here], data.loss[here], "o", color=colour, markersize=4, label=label)
        if len(laws):
            sizes = {over: grid, other: np.full_like(grid, value)}
            losses = [predict(law, **sizes) for law in laws]
            low, middle, high = np.percentile(losses, (BAND[0], 50, BAND[1]), axis=0)
            axes.plot(grid, middle, color=colour, linewidth=1)
            axes.fill_between(grid, low, high, color=colour, alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel=over, ylabel="loss")
    axes.legend(fontsize=7)


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Loss against tokens, with the fitted law once there are runs enough of one commit and
    machine."""
    rows = [row for _, row in results]
    data = points(rows, results[0][0].metric)
    laws: Any = ()
    if len(origins(rows)) == 1:
        with contextlib.suppress(ValueError):  # too few so far
            laws = bootstrap(data, fit(data))
    draw_law(axes, data, laws, "tokens")


def main() -> None:
    options = flags.FLAGS
    lines = Path(options.rows).expanduser().read_text("utf-8").splitlines()
    # A run that was recorded twice counts once, as it was last.
    rows = {row["config_hash"]: row for row in map(json.loads, lines)}
    chosen = [r for r in rows.values() if options.scale in ("", r["scale"])]
    if len(found := origins(chosen)) > 1 and not options.mixed:
        raise ValueError(
            "--rows must be of one commit and one kind of machine, or --mixed be set;"
            f" got {'; '.join(sorted(found))}"
        )
    data = points(chosen, options.metric)
    law = fit(data)
    laws = bootstrap(data, law)
    print(report(data, law, laws))
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, over in zip(figure.subplots(1, 2), ("parameters", "tokens"), strict=True):
        draw_law(axes, data, laws, over)
    figure.savefig(options.out, dpi=140)
    print(f"Figure: {options.out}")


if __name__ == "__main__":
    flags.DEFINE_string("rows", None, "Result rows of a sweep, .jsonl.", required=True)
    flags.DEFINE_string("metric", None, "<evaluation>/<metric>.", required=True)
    flags.DEFINE_string("scale", "", "Only rows of this scale (default: all).")
    flags.DEFINE_bool("mixed", False, "One law over several commits or machines.")
    flags.DEFINE_string("out", "scaling_law.png", "The figure.")
    command_line.run(main)
