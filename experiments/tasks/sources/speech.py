"""Speech that is synthesised on this machine, by espeak-ng: sentences of random words in several
voices, as WAV files, a folder for each voice."""

import os
import shutil
import subprocess
import tempfile
from math import gcd
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from experiments.tasks.sources.random_streams import integers, uniforms

PROGRAM = "espeak-ng"
# voice of espeak-ng -> its words a minute and its pitch, 0 to 99
VOICES = {
    "en-us+m1": (150, 35),
    "en-us+f2": (165, 60),
    "en-gb+m3": (140, 45),
    "en-gb+f4": (175, 70),
    "en-gb-scotland+m5": (160, 30),
    "en-us+f5": (150, 80),
}
SENTENCES = 40  # of each voice
WORDS = """
    a the this that every some no my your our old new small large red green quiet early late morning
    evening river mountain garden window table letter story number friend teacher doctor sailor
    farmer child horse bird train ship road city market season summer winter rain light carries
    finds follows hears keeps knows leaves likes meets needs opens paints reads sees sells sends
    shows takes tells wants watches writes because before behind between near over under with
    without again always never often slowly today tomorrow together
    """


def synthesised(parent: Path, rate: int) -> Path:
    """The folder in `parent` with speech at `rate` Hz, made if it is not there yet.

    Raises ValueError if it is to be made and espeak-ng is not installed or fails."""
    folder = parent / f"espeak_{rate}"
    if folder.is_dir():
        return folder
    if shutil.which(PROGRAM) is None:
        raise ValueError(
            f"task.dataset='espeak' needs the program {PROGRAM}, which is not installed; install it"
            " (the package espeak-ng of Debian and others), or name a folder of sound"
        )
    parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a folder that is there counts as complete.
    with tempfile.TemporaryDirectory(dir=parent) as unfinished:
        for voice, (speed, pitch) in VOICES.items():
            own = Path(unfinished, "speech", voice)
            own.mkdir(parents=True)
            for number in range(SENTENCES):
                text = sentence(voice, number)
                _speak(voice, speed, pitch, text, rate, own / f"{number:03d}.wav")
        os.replace(Path(unfinished, "speech"), folder)
    return folder


def sentence(voice: str, number: int) -> str:
    """8 to 12 random words, the same for the same voice and number."""
    uniform = uniforms(f"separation/speech/{voice}", np.array([number]), 13)[0]
    count = int(integers(uniform[0], 8, 12))
    words = WORDS.split()
    return " ".join(words[i] for i in integers(uniform[1 : 1 + count], 0, len(words) - 1)) + "."


def _speak(voice: str, speed: int, pitch: int, text: str, rate: int, path: Path) -> None:
    command = [PROGRAM, "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path), text]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not path.exists():
        raise ValueError(f"{PROGRAM} could not speak as {voice}: {done.stderr.strip()}")
    samples, own_rate = soundfile.read(path, dtype="float64")
    common = gcd(own_rate, rate)
    resampled = resample_poly(samples, rate // common, own_rate // common)
    soundfile.write(path, np.clip(resampled, -1, 1), rate, subtype="PCM_16")
