"""Voices that are generated: harmonics of a pitch that glides and trembles, loud and soft like
syllables.

    s(t) = a(t) sum_n c_n(f) sin(n phi(t)),   phi(t) = 2 pi sum of f / rate           AM and FM
    f(t) = f_0 (1 + 0.02 sin(vibrato)) 2^(glide)
    c_n(f) = exp(-(log2(n f / F_1) / 0.5)^2 / 2) + 0.5 exp(-(log2(n f / F_2) / 0.5)^2 / 2)

Each voice has its own f_0, vibrato, glide, syllables and formants F_1, F_2. f_0 of several voices
lie in as many registers of 80 to 400 Hz, equally wide in octaves, whose order is random."""

import numpy as np

from experiments.tasks.sources.random_streams import uniforms

LOWEST, HIGHEST = 80.0, 400.0  # Hz, of f_0
HARMONICS = 16
NUMBERS = 16  # random ones for each voice


def voices(stream: str, indices: np.ndarray, count: int, samples: int, rate: int) -> np.ndarray:
    """`count` voices for each of the examples `indices` [n] of the named stream, [n, count,
    samples] float64, of about the same loudness."""
    n = len(indices)
    uniform = uniforms(stream, indices, count * (NUMBERS + 1))
    register = np.argsort(uniform[:, :count], axis=1)
    u = np.moveaxis(uniform[:, count:].reshape(n, count, NUMBERS), -1, 0)[..., None]
    seconds = np.arange(samples) / rate

    # A gap of a sixth on both sides of a register.
    place = (register[..., None] + 1 / 6 + 2 / 3 * u[0]) / count
    base = LOWEST * (HIGHEST / LOWEST) ** place
    vibrato = np.sin(2 * np.pi * ((4 + 3 * u[1]) * seconds + u[2]))
    glide = 0.15 * np.sin(2 * np.pi * ((0.3 + 0.7 * u[3]) * seconds + u[4]))
    pitch = base * (1 + 0.02 * vibrato) * 2**glide
    phase = 2 * np.pi * (np.cumsum(pitch, axis=-1) / rate + u[5])

    syllables = 0.5 + 0.5 * np.sin(2 * np.pi * ((2 + 3 * u[6]) * seconds + u[7]))
    phrases = 0.5 + 0.5 * np.sin(2 * np.pi * ((0.4 + 0.4 * u[8]) * seconds + u[9]))
    loudness = syllables**2 * (0.2 + 0.8 * phrases)

    first, second = 300 * (8 / 3) ** u[10], 900 * (8 / 3) ** u[11]
    sound = np.zeros(phase.shape)
    for number in range(1, HARMONICS + 1):
        frequency = number * pitch
        formants = _bump(frequency / first) + 0.5 * _bump(frequency / second)
        heard = frequency < 0.45 * rate
        sound += np.where(heard, formants, 0.0) * np.sin(number * phase)
    return loudness * sound


def _bump(ratio: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * (np.log2(ratio) / 0.5) ** 2)
