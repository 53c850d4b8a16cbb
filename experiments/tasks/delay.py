"""The delay task: what was the signal `delay` tokens ago? The memory of a state-space layer,
measured.

Gu, Johnson, Timalsina, Rudra, Re, "How to Train Your HiPPO", ICLR 2023, arXiv 2206.12037, where the
signal is real and the model one linear layer. Here the signal is cut into levels, tokens like any
others, so that every model reads it:

    x_t = sum_k a_k cos(pi k t / T) + b_k sin(pi k t / T),    k = 1 .. K,    K = bandwidth T
    a_k, b_k ~ N(0, 1 / K)
    token_t = floor(levels Phi(x_t)),    target_t = token_{t - delay}  (t >= delay)

Phi, the normal distribution function, makes all levels equally frequent. The signal is band
limited, so a model must hold about 2 bandwidth delay numbers to answer."""

import math
from typing import Annotated

import numpy as np
from scipy.special import ndtr

from experiments.tasks.sources.random_streams import normals, uniforms
from experiments.training.memory import check_held
from experiments.training.task import Batch, Examples, Length, Task, Vocabulary
from models.parts.options import Count, Range


def make(
    sequence_length: Length = 256,
    delay: Count = 64,
    levels: Vocabulary = 8,
    bandwidth: Annotated[float, Range(0, 1, ("low",))] = 0.1,
) -> Task:
    """Fresh signals for training; one evaluation, "test".

    sequence_length     T
    delay               how many tokens back the answer lies
    levels              the vocabulary
    bandwidth           highest frequency, as a share of the Nyquist frequency

    Metrics: token_metrics over the tokens from `delay` on; guessing has accuracy 1 / levels.
    """
    if delay >= sequence_length:
        raise ValueError(
            f"need delay < sequence_length; got delay={delay}, sequence_length={sequence_length}"
        )
    frequencies = math.floor(bandwidth * sequence_length)
    if frequencies < 1:
        raise ValueError(
            "bandwidth must leave a frequency, 1 / sequence_length="
            f"{1 / sequence_length:.4g}; got {bandwidth}"
        )
    check_held("config.task.sequence_length", 3 * 2 * frequencies * 8 * sequence_length)
    k = np.arange(1, frequencies + 1)
    angle_KT = np.pi * np.outer(k, np.arange(sequence_length)) / sequence_length
    waves_RT = np.concatenate([np.cos(angle_KT), np.sin(angle_KT)]) / math.sqrt(frequencies)

    def stream(name: str) -> Examples:
        def fetch(indices: np.ndarray) -> Batch:
            uniform = uniforms(f"delay/{name}", indices, len(waves_RT))
            phi_BT = ndtr(normals(uniform) @ waves_RT)
            token_BT = np.minimum(levels * phi_BT, levels - 1).astype(np.int32)
            weights_BT = np.ones(token_BT.shape, np.float32)
            weights_BT[:, :delay] = 0
            return {
                "tokens": token_BT,
                "targets": np.roll(token_BT, delay, axis=1),
                "weights": weights_BT,
            }

        return Examples(fetch)

    return Task(
        sizes={"vocabulary": levels},
        train=lambda seed: stream(f"train/{seed}"),
        evaluations={"test": stream("test")},
    )
