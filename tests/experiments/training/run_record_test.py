"""Files that a run reads back, whole and damaged: nothing is lost, and each is named."""

import json
import shutil
from pathlib import Path

import pytest
from orbax.checkpoint import v1

from experiments import train
from experiments.training import checkpoints, metrics, run_record
from experiments.training.metrics import MetricsLog
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


@pytest.mark.parametrize("left", ["checkpoints", "summary.json", "metrics.jsonl"])
def test_what_is_left_without_a_record_is_not_continued(finished, left):
    for path in (finished / "run.json", finished / "summary.json", finished / "metrics.jsonl"):
        if path.name != left:
            path.unlink()
    if left != "checkpoints":
        shutil.rmtree(finished / "checkpoints")
    with pytest.raises(ValueError, match=rf"has {left} but no run\.json, which says of which run"):
        again(finished, **{"optimizer.lr": 0.5})
    assert (finished / left).exists()


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("save", "error"),
    [
        (2, FULL),
        (2, ValueError("RESOURCE_EXHAUSTED: write failed [OS error 28: No space left on device]")),
        (1, FULL),
    ],
)
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(
    source, tmp_path, monkeypatch, save, error
):
    real, calls = v1.training.Checkpointer.save_checkpointables_async, []

    def full(self, step, *args, **kwargs):
        calls.append(step)
        if len(calls) == save:
            raise error
        return real(self, step, *args, **kwargs)

    message = r"No space left on device: a checkpoint could not be saved, .* room.*/checkpoints'"
    with monkeypatch.context() as patch:
        patch.setattr(v1.training.Checkpointer, "save_checkpointables_async", full)
        with pytest.raises(OSError, match=message):
            again(tmp_path)
    assert checkpoints.steps(tmp_path / "checkpoints") == [3][: save - 1]
    assert again(tmp_path)["evaluations"] == train.run(tiny(), source, quiet=True)["evaluations"]


def test_a_storage_error_of_another_kind_passes_as_it_is(tmp_path, monkeypatch):
    def broken(self, *_, **__):
        raise KeyError("of the storage layer")

    monkeypatch.setattr(v1.training.Checkpointer, "save_checkpointables_async", broken)
    with pytest.raises(KeyError, match="of the storage layer"):
        again(tmp_path)


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise FULL

    log = MetricsLog(tmp_path, step=0, seeds=(0,))
    for owner, name, file in (
        (metrics.os, "fsync", "metrics.jsonl"),
        (metrics.EventsWriter, "write_event", "tensorboard"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match=rf"No space left on device: '/.*/{file}'"):
                log.write({"step": 1, "train/loss": [0.5]})
                log.flush()
            # What ended the run counts more.
            with pytest.raises(ZeroDivisionError), log:
                raise ZeroDivisionError
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"No space left on device: '/.*/run.json'"):
            run_record.write_json(tmp_path / "run.json", {})
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '/.*/nowhere"):
        run_record.write_json(tmp_path / "nowhere/run.json", {})


def test_a_workdir_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"--workdir must name a directory; got ''"):
        train.run(tiny(), "", quiet=True)


def test_a_file_in_the_place_of_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ValueError, match=r"checkpoints must be a directory; it is a file"):
        again(tmp_path)
