"""How much noise there is at each step of a diffusion: the one home of its numbers.

    x_t = sqrt(a_t) x + sqrt(1 - a_t) e      e ~ N(0, 1),  a_t = prod_{s <= t} (1 - beta_s)

(DDPM: Ho, Jain, Abbeel, NeurIPS 2020, arXiv 2006.11239, Eq. 4.) Of the step before, given x_t and
x, we know N(mean, posterior) with (Eq. 6 and 7)

    mean = sqrt(a_{t-1}) beta_t / (1 - a_t) x + (1 - a_{t-1}) sqrt(1 - beta_t) / (1 - a_t) x_t
    posterior = (1 - a_{t-1}) / (1 - a_t) beta_t

All is computed in float64 and handed over as float32."""

import functools
from typing import Annotated, Any, NamedTuple

import numpy as np

from models.parts.options import Range, check_choice

SCHEDULES = ("linear", "cosine")
# Of fewer, the linear schedule's last beta is 1 or nearly.
Steps = Annotated[int, Range(25, 10_000)]


class Chain(NamedTuple):
    """Numbers of steps, float32 [S], from the least noise to the most.

    time                its time in a diffusion of 1000 steps: what a network is told
    signal, noise       sqrt(a), sqrt(1 - a)
    of_image, of_noisy  the factors of x and x_t in the mean of the step before
    log_beta            log(beta), the largest log variance of the step before
    log_posterior       the least: log(posterior); of the first step, where it is 0, that of the
                        second (Nichol and Dhariwal, 2021)
    """

    time: Any  # np.ndarray, or jax.Array of chosen steps
    signal: Any
    noise: Any
    of_image: Any
    of_noisy: Any
    log_beta: Any
    log_posterior: Any


def cumulative(schedule: str, steps: int) -> np.ndarray:
    """a_t, float64 [steps].

    linear      beta from 1e-4 to 0.02 (DDPM), times 1000 / steps
    cosine      a_t = cos^2((t / steps + 0.008) / 1.008 pi / 2), beta at most 0.999 (Nichol and
                Dhariwal, ICML 2021, arXiv 2102.09672, Eq. 17)

    Raises ValueError for another name."""
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "linear":
        beta = np.linspace(1e-4, 0.02, steps) * 1000 / steps
    else:
        share = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - share[1:] / share[:-1], 0.999)
    return np.cumprod(1 - beta)


@functools.cache
def chain(schedule: str, steps: int, kept: int | None = None) -> Chain:
    """The chain of a schedule; with `kept` that of as many of its steps, evenly spread from the
    last one to the first (Nichol and Dhariwal, section 4).

    Raises ValueError for more than there are, or none."""
    kept = steps if kept is None else kept
    if not 1 <= kept <= steps:
        raise ValueError(f"steps must be in 1..{steps}, those of training; got {kept}")
    numbers = np.round(np.linspace(steps - 1, 0, kept)).astype(int)[::-1]
    a = cumulative(schedule, steps)[numbers]
    before = np.append(1.0, a[:-1])
    beta = 1 - a / before
    posterior = beta * (1 - before) / (1 - a)
    posterior[0] = posterior[1] if kept > 1 else beta[0]
    values = Chain(
        time=numbers * 1000 / steps,
        signal=np.sqrt(a),
        noise=np.sqrt(1 - a),
        of_image=np.sqrt(before) * beta / (1 - a),
        of_noisy=(1 - before) * np.sqrt(1 - beta) / (1 - a),
        log_beta=np.log(beta),
        log_posterior=np.log(posterior),
    )
    return Chain(*(value.astype(np.float32) for value in values))
