"""The command that separates files, with a run of two steps."""

from typing import Any

import numpy as np
import pytest
import soundfile

from experiments import separate, train
from experiments.configs.mossformer2 import get_config
from experiments.tasks.sources.sound_files import read_sound
from experiments.training.command_line import parse
from experiments.training.run_loading import load_run

RATE = 1_000


@pytest.mark.full
def test_a_run_separates_a_file_of_any_length(tmp_path):
    config: Any = get_config("separation,smoke")
    config.task.update({"sample_rate": RATE, "seconds": 0.2, "test_examples": 2})
    config.update({"steps": 2, "batch_size": 2})
    config.model.update({"width": 8, "depth": 1})
    config.model.mixers.mossformer2.update({"recurrent_width": 4, "order": 2, "conv_width": 3})
    config.optimizer.warmup_steps = 0
    summary = train.run(config, tmp_path / "run", quiet=True)
    assert (summary["unit"], summary["tokens"]) == ("audio_seconds", 0.8)
    assert np.isfinite(summary["evaluations"]["test"]["si_sdri"][0])

    sound = 0.1 * np.random.default_rng(0).standard_normal(730)
    soundfile.write(tmp_path / "mixture.flac", sound, RATE)
    mixture = read_sound(tmp_path / "mixture.flac", RATE)
    call = separate.compiled(load_run(tmp_path / "run", reads_data=False), 0, batch=2, chunk=200)
    chunks = {"chunk": 200, "overlap": 50, "batch": 2}
    line = separate.separate_file(
        call, tmp_path / "mixture.flac", mixture, tmp_path, RATE, **chunks
    )
    assert "mixture_1.wav to _2.wav: 0.73 s of sound in" in line
    for number in (1, 2):
        source, rate = soundfile.read(tmp_path / f"mixture_{number}.wav")
        assert (rate, source.shape) == (RATE, (730,)) and 0 < np.abs(source).max() < 1


def test_seconds_of_flags_are_checked_and_files_stand_beside_flags():
    assert separate.samples(None, 0.5, RATE, "chunk") == 500
    with pytest.raises(ValueError, match=r"--overlap must be in \[0, 3600\] seconds; got -1"):
        separate.samples(-1.0, 0.5, RATE, "overlap")
    assert parse(["separate", "a.wav", "b.wav"], files=True) == ["separate", "a.wav", "b.wav"]
