"""Separation of voices: a mixture of several speakers, and each of them.

Voices are generated (sources/voices.py), synthesised (sources/speech.py), or parts of files in any
folder, mixed when they are asked for: training is a stream without end in which example n is a
function of n, so that no mixture comes twice and an interruption changes none. Of files, every
epoch takes each once as the first voice of a mixture, in an order of its own, beside random files
of other speakers, at random places. Levels are -5 to 5 dB apart from that of the first voice.

    mixture [T]         the sum of the sources
    sources [Q, T]
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from experiments.objectives.separation import Separation
from experiments.tasks.sources.random_streams import integers, uniforms
from experiments.tasks.sources.sound_files import SoundFile, parts, read_part, scan
from experiments.tasks.sources.speech import synthesised
from experiments.tasks.sources.voices import voices
from experiments.training.task import Batch, Examples, Length, Task
from models.parts.options import Range

LEVEL_DB = 5.0  # of a voice, at most, above or below that of the first
LOUDNESS = 0.05  # root of the mean square of the first voice; full scale is 1
HELD_OUT = (0.1, 0.1)  # shares of files for validation and test
Rate = Annotated[int, Range(1_000, 192_000)]
# All assignments of estimates to sources are tried: 720 of six.
Speakers = Annotated[int, Range(2, 6)]
Seconds = Annotated[float, Range(0.01, 600)]


def make(
    dataset: str = "voices",
    data_dir: str = "~/separation",
    speakers: Speakers = 2,
    sample_rate: Rate = 8_000,
    seconds: Seconds = 1.0,
    test_examples: Length = 200,
) -> Task:
    """Mixtures of `seconds`; evaluations "validation" and "test", each of `test_examples` mixtures
    that are always the same.

    dataset        "voices", generated; "espeak", English sentences that espeak-ng, which must be
                   installed, speaks with several voices, once, into `data_dir`; or a folder (with a
                   / in its name) of WAV or FLAC files with one channel at sample_rate: a subfolder
                   for each speaker, or files of a speaker each
    data_dir       where synthesised speech is kept
    speakers       voices of a mixture
    sample_rate    samples of a second
    seconds        length of a mixture; a shorter file is silent for the rest
    test_examples  mixtures of validation and of test

    Of ten files of a speaker one is for validation and one for test. Metrics: those of
    `Separation`. Raises ValueError for data that are not there or not as they should be, with the
    file's name."""
    samples = round(seconds * sample_rate)
    found: Any
    if dataset == "voices":
        found, provenance = _Generated(speakers, samples, sample_rate), {}
    else:
        found, provenance = _files(dataset, data_dir, speakers, samples, sample_rate)

    def examples(split: str, length: int | None) -> Examples:
        return Examples(functools.partial(_mixtures, found, split), length)

    return Task(
        sizes={"sources": speakers},
        train=lambda seed: examples(f"train/{seed}", None),
        evaluations={split: examples(split, test_examples) for split in ("validation", "test")},
        objective=Separation(sample_rate),
        provenance=provenance,
    )


def _files(
    dataset: str, data_dir: str, speakers: int, samples: int, rate: int
) -> tuple["_Files", dict[str, Any]]:
    if dataset == "espeak":
        folder = synthesised(Path(data_dir).expanduser(), rate)
    elif "/" in dataset:
        folder = Path(dataset).expanduser()
    else:
        raise ValueError(
            "task.dataset must be 'voices', 'espeak' or a folder with a / in its name; got"
            f" {dataset!r}"
        )
    groups, digest = scan(folder, rate)
    validation, test, training = parts(groups, HELD_OUT)
    found = {"train": training, "validation": validation, "test": test}
    for split, files in found.items():
        names = {file.speaker for file in files}
        if len(names) < speakers:
            raise ValueError(
                f"{folder} must have task.speakers={speakers} speakers or more for {split}; it has"
                f" {len(names)}"
            )
    facts: dict[str, Any] = {"sound": str(folder), "sound_sha256": digest}
    facts |= {f"{split}_files": len(files) for split, files in found.items()}
    return _Files({split: tuple(files) for split, files in found.items()}, speakers, samples), facts


@dataclass(frozen=True)
class _Generated:
    speakers: int
    samples: int
    rate: int

    def clean(self, split: str, indices: np.ndarray) -> np.ndarray:
        stream = f"separation/voices/{split}"
        return voices(stream, indices, self.speakers, self.samples, self.rate)


@dataclass(frozen=True)
class _Files:
    """Files by split."""

    files: dict[str, tuple[SoundFile, ...]]
    speakers: int
    samples: int

    def clean(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Voices of different speakers [n, Q, T], each from a random place of a file."""
        files = self.files[split.partition("/")[0]]
        uniform = uniforms(f"separation/files/{split}", indices, 3 * self.speakers)
        found = np.zeros((len(indices), self.speakers, self.samples))
        for row, index in enumerate(indices.tolist()):
            epoch, place = divmod(index, len(files))
            first = files[_order(split, epoch, len(files))[place]]
            draws = uniform[row].reshape(self.speakers, 3)
            for q, file in enumerate(self._chosen(files, first, draws)):
                found[row, q] = self._crop(file, draws[q, 2])
        return found

    def _chosen(
        self, files: Sequence[SoundFile], first: SoundFile, draws: np.ndarray
    ) -> list[SoundFile]:
        """`first` and random files of random other speakers."""
        chosen, by_speaker = [first], _by_speaker(tuple(files))
        for u_speaker, u_file, _ in draws[1:]:
            others = sorted(set(by_speaker) - {file.speaker for file in chosen})
            speaker = others[int(u_speaker * len(others))]
            chosen.append(by_speaker[speaker][int(u_file * len(by_speaker[speaker]))])
        return chosen

    def _crop(self, file: SoundFile, u: float) -> np.ndarray:
        spare = file.samples - self.samples
        place = int(integers(np.asarray(u), 0, abs(spare)))
        if spare >= 0:
            return read_part(file, place, self.samples)
        return np.pad(read_part(file, 0, file.samples), (place, -spare - place))


def _mixtures(found: Any, split: str, indices: np.ndarray) -> Batch:
    clean_nQT = found.clean(split, indices)
    n, speakers, _ = clean_nQT.shape
    level_nQ = LEVEL_DB * (2 * uniforms(f"separation/levels/{split}", indices, speakers) - 1)
    level_nQ[:, 0] = 0.0
    power_nQ = np.mean(clean_nQT**2, axis=-1)
    gain_nQ = LOUDNESS * 10 ** (level_nQ / 20) / np.sqrt(np.where(power_nQ == 0, 1.0, power_nQ))
    sources_nQT = (gain_nQ[..., None] * clean_nQT).astype(np.float32)
    return {
        "mixture": sources_nQT.sum(axis=1),
        "sources": sources_nQT,
        "weights": np.ones(n, np.float32),
    }


@functools.lru_cache(maxsize=64)
def _order(split: str, epoch: int, count: int) -> np.ndarray:
    """The order of `count` files in an epoch."""
    seed = hashlib.sha256(f"separation/order/{split}/{epoch}".encode()).digest()[:16]
    return np.random.default_rng(int.from_bytes(seed, "little")).permutation(count)


@functools.lru_cache(maxsize=8)
def _by_speaker(files: tuple[SoundFile, ...]) -> dict[str, list[SoundFile]]:
    found: dict[str, list[SoundFile]] = {}
    for file in files:
        found.setdefault(file.speaker, []).append(file)
    return found
