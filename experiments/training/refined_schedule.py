"""A learning-rate schedule from the gradient norms of a first run: refined linear decay.

Defazio, Cutkosky, Mehta, Mishchenko, "When, Why and How Much? Adaptive Learning Rate Scheduling by
Refinement", 2023, arXiv 2310.07831. With weights w_t >= 0 and step sizes

    eta_t = w_t (sum_{p > t} w_p) / (sum_p w_p)

gradient descent from distance D of the optimum x* ends with

    f(x_T) - f(x*)  <=  (D^2 + sum_t w_t^2 |g_t|^2) / (2 sum_t w_t),

which is least for w_t proportional to |g_t|^-2. Constant norms give linear decay to zero; norms
that fall give a warm-up and a steeper end. The norms G_t of the first run are smoothed by a median
filter before that.

For optimizers that normalise the gradient, as all of ours do, the paper weights by the inverse of
its l1 norm. Runs log the l2 norm (before clipping, mean over a window of steps), which stands in
for it: the two differ by a factor that cancels as long as the gradient does not become sparser or
denser.

Authors' code: https://github.com/facebookresearch/adaptive_scheduling
"""

import hashlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from scipy.ndimage import median_filter

from experiments.training import run_record
from experiments.training.config import REFINED
from experiments.training.metrics_file import FILE, read_rows

SMOOTHING = 0.1  # width of the median filter as a fraction of the run, our choice
FEWEST_WINDOWS = 10
NORMALISED = 1  # exponent of 1 / G for optimizers that normalise the gradient
GRADIENT_DESCENT = 2  # and for those that do not


def smooth(norms_T: np.ndarray, fraction: float = SMOOTHING) -> np.ndarray:
    """Median over 2 floor(fraction T / 2) + 1 neighbours; the start is repeated, the end
    reflected."""
    half = int(fraction * len(norms_T)) // 2
    padded = np.pad(np.pad(norms_T, (half, 0), "edge"), (0, half), "reflect")
    return median_filter(padded, size=2 * half + 1)[half : len(padded) - half]


def refine(norms_T: np.ndarray, exponent: int) -> np.ndarray:
    """Step sizes [T] of the weights G_t^-exponent, scaled to a maximum of 1; the last is 0."""
    weights_T = (norms_T / np.max(norms_T)) ** -float(exponent)
    later_T = np.append(np.cumsum(weights_T[:0:-1])[::-1], 0.0)
    steps_T = weights_T * later_T
    return steps_T / np.max(steps_T)


def logged_norms(workdir: Path) -> tuple[np.ndarray, np.ndarray]:
    """(positions, norms): middles of a run's log windows as fractions of the run, and its gradient
    norms there.

    Several seeds count as their mean; windows without an accepted step are left out. Raises
    ValueError if `workdir` holds no finished run, or one that logged fewer than FEWEST_WINDOWS
    windows."""
    steps = run_record.read_config(workdir).steps
    rows = [row for row in read_rows(workdir) if "train/gradient_norm" in row]
    last = rows[-1]["step"] if rows else 0
    if last < steps:
        raise ValueError(
            f"{workdir / FILE} must hold the gradient norms of a finished run; it ends"
            f" at step {last} of {steps}: finish that run first"
        )
    begins = [0, *(row["step"] for row in rows[:-1])]
    points = [
        ((begin + row["step"]) / (2 * steps), float(np.mean(norms)))
        for begin, row in zip(begins, rows, strict=True)
        if None not in (norms := row["train/gradient_norm"]) and min(norms) > 0
    ]
    if len(points) < FEWEST_WINDOWS:
        raise ValueError(
            f"{workdir / FILE} must hold gradient norms of at least {FEWEST_WINDOWS}"
            f" windows to refine a schedule from; got {len(points)}: train the first"
            " run with a smaller config.log_every_steps"
        )
    positions, norms = zip(*points, strict=True)
    return np.array(positions), np.array(norms)


def norms_sha256(schedule: str) -> str | None:
    """The hash of the gradient norms that a refined `schedule` is made of; None for any other."""
    if not schedule.startswith(REFINED):
        return None
    numbers = np.stack(logged_norms(Path(schedule.removeprefix(REFINED)).expanduser()))
    return hashlib.sha256(numbers.tobytes()).hexdigest()


def refined_schedule(workdir: Path, *, lr: float, end_lr: float, steps: int) -> optax.Schedule:
    """Learning rate after n of `steps` updates, between end_lr and lr, refined from the run in
    `workdir`.

    That run may have had another number of steps: its norms are stretched. Raises ValueError as
    `logged_norms`."""
    positions, norms = logged_norms(workdir)
    middles_T = (np.arange(steps) + 0.5) / steps
    factors_T = refine(np.interp(middles_T, positions, smooth(norms)), NORMALISED)
    rates_T = jnp.asarray(end_lr + (lr - end_lr) * factors_T, jnp.float32)
    counts_T = jnp.arange(steps, dtype=jnp.float32)
    return lambda count: jnp.interp(count, counts_T, rates_T)
