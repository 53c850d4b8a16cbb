"""Files of sound: reading, checking and writing them.

libsndfile does the work (soundfile): WAV of any depth, FLAC and others, and a part of a file
without the rest, which scipy.io.wavfile has not. Samples are float32, full scale is 1."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

SUFFIXES = (".wav", ".flac")


@dataclass(frozen=True)
class SoundFile:
    """A file that was checked: whose voice it has, and how many samples."""

    path: Path
    speaker: str
    samples: int


def read_sound(path: Path, rate: int) -> np.ndarray:
    """All samples of a file with one channel at `rate` Hz, float32 [T].

    Raises ValueError, with the file's name, for a file that is not there or no sound, and for
    another rate, several channels, no samples, and samples that are not finite."""
    try:
        return _decoded(path, path.read_bytes(), rate)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def read_part(file: SoundFile, first: int, count: int) -> np.ndarray:
    """`count` samples from `first` on, float32; what is beyond the end is zero."""
    samples, _ = soundfile.read(
        file.path, frames=count, start=first, dtype="float32", fill_value=0.0
    )
    return samples


def write_wav(path: Path, samples_T: np.ndarray, rate: int) -> None:
    """Writes a WAV file of one channel, 32 bit floats: nothing is rounded or clipped."""
    soundfile.write(path, np.asarray(samples_T, np.float32), rate, subtype="FLOAT")


def scan(folder: Path, rate: int) -> tuple[list[list[SoundFile]], str]:
    """The files of sound in a folder, in groups, and a SHA-256 of their names and bytes.

    A subfolder is a speaker, whose files are a group, in folders of any depth. In a folder without
    them every file is a speaker, and all are one group. Every file is read and checked once.

    Raises ValueError for a folder without files, with files beside subfolders, and as
    `read_sound`."""
    if not folder.is_dir():
        raise ValueError(f"task.dataset must be a folder of sound; {folder} is no directory")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder} must have files of sound ({', '.join(SUFFIXES)}); it has none")
    flat = [path for path in files if path.parent == folder]
    if flat and len(flat) < len(files):
        raise ValueError(
            f"{folder} must have either files of sound or a subfolder for each speaker; it has"
            f" subfolders and {flat[0].name}"
        )
    digest, groups = hashlib.sha256(), {}
    for path in files:
        relative, content = path.relative_to(folder), path.read_bytes()
        digest.update(f"{relative.as_posix()}\n{len(content)}\n".encode() + content)
        samples = len(_decoded(path, content, rate))
        speaker = relative.stem if flat else relative.parts[0]
        groups.setdefault("" if flat else speaker, []).append(SoundFile(path, speaker, samples))
    return list(groups.values()), digest.hexdigest()


def _decoded(path: Path, content: bytes, rate: int) -> np.ndarray:
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            _check(path, file, rate)
            samples = file.read(dtype="float32")
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is no sound that can be read: {error.error_string}") from error
    return check_samples(str(path), samples)


def check_samples(name: str, samples: np.ndarray) -> np.ndarray:
    """The samples. Raises ValueError, beginning with `name`, for none or one that is not finite."""
    if not len(samples):
        raise ValueError(f"{name} must have samples; it is empty")
    wrong = np.flatnonzero(~np.isfinite(samples))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(f"{name} must have finite samples; sample {first} is {samples[first]}")
    return samples


def _check(path: Path, file: soundfile.SoundFile, rate: int) -> None:
    if file.channels != 1:
        raise ValueError(f"{path} must have one channel; it has {file.channels}")
    if file.samplerate != rate:
        raise ValueError(f"{path} must have {rate} samples a second; it has {file.samplerate}")


def parts(
    groups: Sequence[Sequence[SoundFile]], shares: tuple[float, ...]
) -> list[list[SoundFile]]:
    """The files in parts of these shares and, last, what is left of each group; a file is in one
    part. Which one follows from its name, and every group has files in every part, if it has as
    many. Raises ValueError, with a file's name, for a group of fewer."""
    found: list[list[SoundFile]] = [[] for _ in range(len(shares) + 1)]
    for group in groups:
        if len(group) < len(found):
            raise ValueError(
                f"{group[0].path.parent} must have {len(found)} files or more, one for each of"
                f" training, validation and test; it has {len(group)}"
            )
        shuffled = sorted(group, key=_place)
        for part, share in zip(found, shares, strict=False):
            count = max(1, round(share * len(group)))
            part += shuffled[:count]
            shuffled = shuffled[count:]
        found[-1] += shuffled
    return found


def _place(file: SoundFile) -> str:
    return hashlib.sha256(file.path.name.encode()).hexdigest()
