"""From noise to images: the samplers, each one scan over its steps.

ddpm    of the step before, N(mean, variance) as the model says (Ho, Jain, Abbeel, NeurIPS 2020,
        arXiv 2006.11239, Algorithm 2); without a learned variance, that of the posterior
ddim    x_s = sqrt(a_s) x^ + sqrt(1 - a_s - d^2) e^ + d z, with d = eta times the deviation of the
        posterior (Song, Meng, Ermon, ICLR 2021, arXiv 2010.02502, Eq. 12 and 16)
euler   along dx/dt = v; of a model of noise, along d(x / signal) / d(noise / signal) = e^ (Karras
        et al., NeurIPS 2022, arXiv 2206.00364): ddim with eta = 0
heun    the same with the mean of the slopes at both ends of a step, but for the last of a model of
        noise, which ends where it was never asked (their Algorithm 1)

A picture is a function of the seed and of its own number: its noise follows from them alone, and no
operation mixes pictures."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.objectives.flow_matching import FlowMatching
from experiments.objectives.noise_prediction import NoisePrediction, log_variance_of
from experiments.objectives.noise_schedules import Chain
from experiments.objectives.noise_schedules import chain as chain_of
from models.parts.options import check_choice

OF_NOISE = ("ddpm", "ddim", "euler", "heun")
OF_VELOCITY = ("euler", "heun")
MOST_STEPS = 100_000  # of a velocity, which has no number of its own
# (noisy images, times [B] in 0..1000) -> what the model says, guided.
Predict = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Sampler:
    """How images are drawn.

    name       ddpm, ddim, euler or heun
    steps      evaluations of the model; heun has two a step
    guidance   w of: what is said without a class, plus w times what the class changes (Ho and
               Salimans, 2022, arXiv 2207.12598); 1: what is said with the class
    eta        of ddim: how much of ddpm's noise is drawn anew
    clip       whether the guess of the image is kept in [-1, 1], where pixels are; of ddpm and ddim
    """

    name: str
    steps: int
    guidance: float = 1.0
    eta: float = 0.0
    clip: bool = False

    def check(self, objective: NoisePrediction | FlowMatching) -> None:
        """Raises ValueError for what a model of this objective cannot be sampled with."""
        velocity = isinstance(objective, FlowMatching)
        check_choice("sampler", self.name, OF_VELOCITY if velocity else OF_NOISE)
        most = MOST_STEPS if velocity else objective.steps
        if not 1 <= self.steps <= most:
            raise ValueError(f"steps must be in 1..{most}; got {self.steps}")
        if not (np.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be a finite number >= 0; got {self.guidance}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1]; got {self.eta}")
        if self.eta and self.name != "ddim":
            raise ValueError(f"eta must be 0 for the sampler {self.name!r}; got {self.eta}")
        if self.clip and self.name not in ("ddpm", "ddim"):
            raise ValueError(f"clip must be False for the sampler {self.name!r}; got True")


class Drawn(NamedTuple):
    """images [B, Y, X, C] float32, and int [B] the first step, from 0, after which a picture was
    not finite; the number of steps where none was."""

    images: jax.Array
    broken: jax.Array


def draw(
    predict: Predict,
    objective: NoisePrediction | FlowMatching,
    sampler: Sampler,
    keys: jax.Array,
    shape: tuple[int, ...],
) -> Drawn:
    """Images of `shape`, one for each of the keys [B]."""
    sampler.check(objective)
    first = _normal(keys, 0, shape)
    if isinstance(objective, FlowMatching):
        return _along_lines(predict, sampler, first, _of_velocity(sampler.steps), last_slope=True)
    kept = chain_of(objective.schedule, objective.steps, sampler.steps)
    if sampler.name in ("ddpm", "ddim"):
        return _down_the_chain(predict, objective, sampler, first, keys, kept)

    def slope(image: jax.Array, time_B: jax.Array) -> jax.Array:
        return objective.halves(predict(image, time_B))[0]

    return _along_lines(slope, sampler, first, _of_noise(kept), last_slope=False)


def guided(model: Any, class_B: jax.Array, none: int, guidance: float) -> Predict:
    """What a model says of classes, guided. Of a learned variance what it says with the class is
    taken as it is: guidance is of all channels that the images have."""

    def predict(image: jax.Array, time_B: jax.Array) -> jax.Array:
        with_class = functools.partial(model, image, time_B)
        if guidance == 1:
            return with_class(class_B).astype(jnp.float32)
        both = jnp.concatenate((class_B, jnp.full_like(class_B, none)))
        twice = (jnp.concatenate((a, a)) for a in (image, time_B))
        said, unconditional = jnp.split(model(*twice, both).astype(jnp.float32), 2)
        channels = image.shape[-1]
        change = (said - unconditional)[..., :channels]
        moved = unconditional[..., :channels] + guidance * change
        return jnp.concatenate((moved, said[..., channels:]), axis=-1)

    return predict


def picture_keys(seed: int, numbers: Any) -> jax.Array:
    """The keys [B] of pictures by number."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
        jnp.asarray(numbers, jnp.uint32)
    )


def _normal(keys: jax.Array, number: Any, shape: tuple[int, ...]) -> jax.Array:
    """Noise [B, *shape] of each picture's own stream."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys)


def _first_broken(broken_B: jax.Array, image: jax.Array, step: jax.Array) -> jax.Array:
    finite_B = jnp.all(jnp.isfinite(image), axis=tuple(range(1, image.ndim)))
    return jnp.where(finite_B, broken_B, jnp.minimum(broken_B, step))


def _down_the_chain(
    predict: Predict,
    objective: NoisePrediction,
    sampler: Sampler,
    first: jax.Array,
    keys: jax.Array,
    kept: Chain,
) -> Drawn:
    """ddpm and ddim."""
    steps = len(kept.time)
    before = Chain(*(np.concatenate((a[:1], a[:-1])) for a in kept))  # the first has none: no noise
    order = np.arange(steps)[::-1]

    def step(carry: tuple[jax.Array, jax.Array], at: Any) -> tuple[Any, None]:
        (x, broken_B), (number, place, now, earlier) = carry, at
        said, v = objective.halves(predict(x, jnp.full(len(x), now.time)))
        image = (x - now.noise * said) / now.signal
        if sampler.clip:
            image = jnp.clip(image, -1.0, 1.0)
            said = (x - now.signal * image) / now.noise
        fresh = _normal(keys, number + 1, x.shape[1:])
        last = place == 0
        if sampler.name == "ddpm":
            log_variance = now.log_posterior if v is None else log_variance_of(now, v)
            mean = now.of_image * image + now.of_noisy * x
            x = mean + jnp.where(last, 0.0, jnp.exp(0.5 * log_variance) * fresh)
        else:
            deviation = sampler.eta * jnp.exp(0.5 * now.log_posterior)
            rest = jnp.sqrt(jnp.maximum(jnp.square(earlier.noise) - jnp.square(deviation), 0.0))
            moved = earlier.signal * image + rest * said + deviation * fresh
            x = jnp.where(last, image, moved)
        return (x, _first_broken(broken_B, x, number)), None

    numbers = (np.arange(steps), order, *(Chain(*(a[order] for a in c)) for c in (kept, before)))
    carry = (first, jnp.full(len(first), steps))
    return Drawn(*jax.lax.scan(step, carry, numbers)[0])


class Line(NamedTuple):
    """Where the ends of steps are, float32 [steps + 1], from noise to the image: places on the
    line, what x is divided by there, and the times that the model is told."""

    place: np.ndarray
    scale: np.ndarray
    time: np.ndarray


def _of_velocity(steps: int) -> Line:
    place = np.linspace(1, 0, steps + 1)
    return Line(*(a.astype(np.float32) for a in (place, np.ones_like(place), 1000 * place)))


def _of_noise(kept: Chain) -> Line:
    """From the most noise to none; the model is not asked there, and any time will do."""
    signal, noise = (a.astype(np.float64)[::-1] for a in (kept.signal, kept.noise))
    ends = (np.append(noise / signal, 0), np.append(signal, 1), np.append(kept.time[::-1], 0))
    return Line(*(a.astype(np.float32) for a in ends))


def _along_lines(
    slope_of: Predict, sampler: Sampler, first: jax.Array, line: Line, *, last_slope: bool
) -> Drawn:
    """euler and heun. last_slope: whether the model is asked at the end of the last step."""
    steps = len(line.place) - 1

    def slope(y: jax.Array, at: Line) -> jax.Array:
        return slope_of(y * at.scale, jnp.full(len(y), at.time))

    def step(carry: tuple[jax.Array, jax.Array], at: Any, heun: bool) -> tuple[Any, None]:
        (y, broken_B), (number, now, after) = carry, at
        length, begin = after.place - now.place, slope(y, now)
        end = slope(y + length * begin, after) if heun else begin
        y = y + length * 0.5 * (begin + end)
        return (y, _first_broken(broken_B, y, number)), None

    heun = sampler.name == "heun"
    whole = steps if last_slope or not heun else steps - 1
    ends = [Line(*(a[part] for a in line)) for part in (slice(None, -1), slice(1, None))]
    carry = (first / line.scale[0], jnp.full(len(first), steps))
    numbers = (np.arange(steps), *ends)
    body = functools.partial(step, heun=heun)
    carry, _ = jax.lax.scan(body, carry, jax.tree.map(lambda a: a[:whole], numbers))
    if whole < steps:
        carry, _ = step(carry, jax.tree.map(lambda a: a[-1], numbers), heun=False)
    return Drawn(*carry)
