"""Mixtures of generated voices and of files, and what is wrong with a file."""

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from experiments.tasks.separation import make
from experiments.tasks.sources import speech
from experiments.training.task import Examples, Task

RATE = 1_000


def tone(hertz: float, samples: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / RATE)


def write_speakers(folder: Path, files: int = 10, samples: int = RATE) -> str:
    """Three speakers, tones of 40, 90 and 160 Hz and a little above, one for each file."""
    for speaker, hertz in (("low", 40), ("middle", 90), ("high", 160)):
        (folder / speaker).mkdir(parents=True)
        for number in range(files):
            path = folder / speaker / f"{number}.{'flac' if number % 2 else 'wav'}"
            soundfile.write(path, tone(hertz + number, samples), RATE)
    return f"{folder}/"


def stream(task: Task, seed: int = 0) -> Examples:
    examples = task.train(seed)
    assert isinstance(examples, Examples)
    return examples


def loudest(x: np.ndarray) -> np.ndarray:
    """Hz of the largest component."""
    return np.fft.rfftfreq(x.shape[-1], 1 / RATE)[np.abs(np.fft.rfft(x)).argmax(axis=-1)]


def test_a_generated_mixture_is_the_sum_of_voices_of_their_own_registers():
    task = make(seconds=0.5, test_examples=3)
    batch = stream(task).fetch(np.arange(40))
    assert batch["sources"].shape == (40, 2, 4_000) and task.sizes == {"sources": 2}
    np.testing.assert_allclose(batch["mixture"], batch["sources"].sum(axis=1), atol=1e-6)
    power = np.mean(np.square(batch["sources"].astype(np.float64)), axis=-1)
    decibels = 10 * np.log10(power[:, 1] / power[:, 0])
    np.testing.assert_allclose(np.sqrt(power[:, 0]), 0.05, rtol=1e-3)
    assert decibels.min() < -3 and decibels.max() > 3 and np.all(np.abs(decibels) < 5.01)
    # Voices are not each other.
    cosine = np.sum(batch["sources"][:, 0] * batch["sources"][:, 1], axis=-1)
    assert np.all(np.abs(cosine / 4_000 / np.sqrt(power[:, 0] * power[:, 1])) < 0.5)


@pytest.mark.parametrize("dataset", ["voices", "files"])
def test_a_mixture_is_a_function_of_its_number(dataset, tmp_path):
    """Whatever is fetched with it; training, test and other seeds have others."""
    found = write_speakers(tmp_path) if dataset == "files" else dataset
    task = make(dataset=found, sample_rate=RATE, seconds=0.25, test_examples=4)
    together = stream(task).fetch(np.array([0, 1, 29, 30, 10_000]))
    for row, number in enumerate((0, 1, 29, 30, 10_000)):
        alone = stream(task).fetch(np.array([number]))
        assert all(np.array_equal(alone[name][0], together[name][row]) for name in alone)
    test: Any = task.evaluations["test"]
    assert test.length == 4
    for other in (stream(task, 1), test):
        assert not np.array_equal(other.fetch(np.arange(1))["mixture"], together["mixture"][:1])


def test_an_epoch_takes_every_training_file_once_and_no_file_is_in_two_splits(tmp_path):
    task = make(dataset=write_speakers(tmp_path), sample_rate=RATE, seconds=1.0, test_examples=30)
    files = {"train": 24, "validation": 3, "test": 3}
    assert {name: task.provenance[f"{name}_files"] for name in files} == files
    epochs = stream(task).fetch(np.arange(48))["sources"][:, 0].reshape(2, 24, RATE)
    first, second = (loudest(epoch) for epoch in epochs)
    assert len(set(first)) == 24 and sorted(first) == sorted(second)
    assert not np.array_equal(first, second)
    heard = {}
    for name in ("validation", "test"):
        scored: Any = task.evaluations[name]
        sources = scored.fetch(np.arange(30))["sources"]
        heard[name] = set(loudest(sources).ravel())
        speakers = np.digitize(loudest(sources), [60, 120])
        assert np.all(speakers[:, 0] != speakers[:, 1])
    assert not heard["test"] & heard["validation"] and not heard["test"] & set(first)


def test_crops_begin_anywhere_and_short_files_are_silent_for_the_rest(tmp_path):
    folder = write_speakers(tmp_path / "long")
    crops = stream(make(dataset=folder, sample_rate=RATE, seconds=0.1)).fetch(np.arange(48))
    assert len({crop[:3].tobytes() for crop in crops["sources"][:, 0]}) > 40  # tones come round
    folder = write_speakers(tmp_path / "short", samples=50)
    short = stream(make(dataset=folder, sample_rate=RATE, seconds=0.1)).fetch(np.arange(9))
    assert np.all(np.count_nonzero(short["sources"], axis=-1) <= 50)
    np.testing.assert_allclose(np.sum(short["sources"][:, 0] ** 2, -1), 100 * 0.05**2, rtol=1e-3)


def test_a_flat_folder_has_a_speaker_for_each_file(tmp_path):
    for number in range(21):
        soundfile.write(tmp_path / f"{number}.wav", tone(40 + 5 * number), RATE)
    task = make(dataset=f"{tmp_path}/", sample_rate=RATE, seconds=1.0, speakers=2)
    assert task.provenance["validation_files"] == 2
    pitches = loudest(stream(task).fetch(np.arange(30))["sources"])
    assert np.all(pitches[:, 0] != pitches[:, 1])


def damage(path: Path, how: str) -> None:
    if how == "rate":
        soundfile.write(path, tone(40), 2 * RATE)
    elif how == "stereo":
        soundfile.write(path, np.zeros((10, 2)), RATE)
    elif how == "empty":
        soundfile.write(path, np.zeros(0), RATE)
    elif how == "nan":
        soundfile.write(path, np.array([0.0, np.nan]), RATE, subtype="FLOAT")
    else:
        path.write_text("no sound")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("rate", "must have 1000 samples a second; it has 2000"),
        ("stereo", "must have one channel; it has 2"),
        ("empty", "must have samples; it is empty"),
        ("nan", "must have finite samples; sample 1 is nan"),
        ("text", "is no sound that can be read: Format not recognised"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_line_that_names_it(how, message, tmp_path):
    folder = write_speakers(tmp_path, samples=20)
    damage(tmp_path / "middle" / "4.wav", how)
    with pytest.raises(ValueError, match=f"middle/4.wav {message}") as error:
        make(dataset=folder, sample_rate=RATE)
    assert "\n" not in str(error.value)


def test_folders_without_enough_in_them_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder of sound; \S+/none is no directory"):
        make(dataset=f"{tmp_path}/none")
    with pytest.raises(ValueError, match=r"must have files of sound .* it has none"):
        make(dataset=f"{tmp_path}/")
    with pytest.raises(ValueError, match=r"'voices', 'espeak' or a folder .* got 'whispers'"):
        make(dataset="whispers")
    folder = write_speakers(tmp_path / "few", files=2, samples=20)
    with pytest.raises(ValueError, match=r"few/high must have 3 files or more.* it has 2"):
        make(dataset=folder, sample_rate=RATE)
    folder = write_speakers(tmp_path / "three", files=3, samples=20)
    with pytest.raises(ValueError, match="speakers=4 speakers or more for train; it has 3"):
        make(dataset=folder, sample_rate=RATE, speakers=4)
    soundfile.write(tmp_path / "three" / "beside.wav", tone(40), RATE)
    with pytest.raises(ValueError, match=r"it has subfolders and beside\.wav"):
        make(dataset=folder, sample_rate=RATE)


STAND_IN = """#!/bin/sh
for last; do :; done
while [ "$1" != -w ]; do shift; done
cp {sound} "$2"
echo "$last" >> {log}
"""


def test_speech_is_synthesised_once_by_a_program_that_must_be_installed(tmp_path, monkeypatch):
    """The program is a stand-in that says a tone of 22,050 Hz."""
    monkeypatch.setattr(speech, "SENTENCES", 3)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    given: dict[str, Any] = {"data_dir": str(tmp_path / "made"), "seconds": 0.05}
    with pytest.raises(ValueError, match="needs the program espeak-ng, which is not installed"):
        make(dataset="espeak", **given)
    program = tmp_path / "bin" / "espeak-ng"
    program.parent.mkdir()
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(2_205) / 3), 22_050)
    program.write_text(STAND_IN.format(sound=tmp_path / "tone.wav", log=tmp_path / "log"))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    for _ in range(2):
        task = make(dataset="espeak", **given)
    said = (tmp_path / "log").read_text().splitlines()
    assert len(said) == 3 * len(speech.VOICES) == len(set(said))
    assert task.provenance["train_files"] == len(speech.VOICES)
    assert (tmp_path / "made" / "espeak_8000" / "en-us+f2" / "002.wav").exists()
    assert stream(task).fetch(np.arange(2))["mixture"].shape == (2, 400)
