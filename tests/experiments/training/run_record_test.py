"""Files that a run reads back, whole and damaged: nothing is lost, and each is named."""

import json
import shutil
from pathlib import Path

import pytest

from experiments import train
from experiments.training import run_record
from experiments.training.metrics_file import read_rows
from tests.experiments.train_test import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("source") / "run"
    config = tiny(**{"checkpoint.every_steps": 3, "log_every_steps": 1})
    train.run(config, workdir, quiet=True)
    return workdir


@pytest.fixture
def finished(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "run"))


def again(workdir: Path, **overrides):
    config = tiny(**{"checkpoint.every_steps": 3, "log_every_steps": 1} | overrides)
    return train.run(config, workdir, quiet=True)


def test_a_damaged_line_is_set_aside_and_all_others_stay(finished, capsys):
    rows, file = read_rows(finished), finished / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    lines[1] = b"\x00" + lines[1][1:]
    lines[3] = b"[1, 2]"
    file.write_bytes(b"\n".join(lines) + b'\n{"step": 9, "tr')
    (finished / "summary.json").unlink()
    again(finished)
    assert read_rows(finished) == [row for row in rows if row["step"] not in (2, 4)]
    aside = (finished / "metrics.jsonl.damaged").read_bytes().splitlines()
    assert aside == [lines[1], lines[3], b'{"step": 9, "tr']
    assert "moved 3 lines that are no rows" in capsys.readouterr().err


def test_a_run_without_its_rows_goes_on_and_says_what_it_still_knows(finished):
    (finished / "metrics.jsonl").unlink()
    (finished / "summary.json").unlink()
    summary = again(finished)
    assert summary["evaluations"]["in_distribution"] and summary["train"] == {}


@pytest.mark.parametrize("text", ["{}", "[]", '{"workdir": ', "null"])
def test_a_summary_that_is_none_is_written_anew(finished, text, capsys):
    expected = json.loads((finished / "summary.json").read_text())
    (finished / "summary.json").write_text(text)
    summary = again(finished)
    for name in ("evaluations", "best", "train", "rejected_steps"):
        assert summary[name] == expected[name]
    assert json.loads((finished / "summary.json").read_text())["step"] == expected["step"]
    assert ("summary.json" in capsys.readouterr().err) == (text != "null")


@pytest.mark.parametrize("text", ["[]", "{}", '{"config": {}}', '{"config": 3, "continued": []}'])
def test_a_record_that_is_none_is_named(finished, text):
    (finished / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json must be the record of a run, with config"):
        again(finished)
    with pytest.raises(ValueError, match=r"run\.json must be the record of a run, with config"):
        run_record.read_config(finished)


def test_checkpoints_without_a_record_are_not_continued(finished):
    (finished / "run.json").unlink()
    (finished / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"has checkpoints but no run\.json"):
        again(finished, **{"optimizer.lr": 0.5})


def test_a_file_in_the_place_of_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ValueError, match=r"checkpoints must be a directory; it is a file"):
        again(tmp_path)
