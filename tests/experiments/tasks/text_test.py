"""Text: which windows, with which segments; what a number says of its text; data written once."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.training.checkout import CHECKOUT
from tests.support.texts import LENGTH, documents, everything, make, windows, write_texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_windows_cover_the_files_of_their_split_in_order(
    folder: Path, tmp_path: Path, split: str
) -> None:
    batch = everything(make(folder, tmp_path), split)
    text = b"".join(documents(folder, split))
    count = (len(text) - 1) // LENGTH
    assert windows(batch) == {text[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)}
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "tokens": ((count, LENGTH), np.int32),
        "targets": ((count, LENGTH), np.int32),
        "segment_ids": ((count, LENGTH), np.int32),
        "weights": ((count, LENGTH), np.float32),
        "bytes": ((count,), np.float32),
    }


def test_packed_documents_have_segments_and_are_not_predicted_from_each_other(
    folder: Path, tmp_path: Path
) -> None:
    batch = everything(make(folder, tmp_path), "train")
    contents = documents(folder, "train")
    text, owner = (
        b"".join(contents),
        np.repeat(np.arange(len(contents)), [len(content) for content in contents]),
    )
    starts = {
        text[start : start + LENGTH + 1]: start for start in range(0, len(text) - LENGTH, LENGTH)
    }
    crossed = 0
    for row in range(len(batch["tokens"])):
        window = (
            np.append(batch["tokens"][row], batch["targets"][row, -1]).astype(np.uint8).tobytes()
        )
        owners = owner[starts[window] : starts[window] + LENGTH + 1]
        np.testing.assert_array_equal(
            np.diff(batch["segment_ids"][row]) != 0, np.diff(owners[:-1]) != 0
        )
        np.testing.assert_array_equal(batch["weights"][row], np.diff(owners) == 0)
        assert batch["bytes"][row] == batch["weights"][row].sum()
        crossed += np.sum(np.diff(owners) != 0)
    assert crossed > 10


def test_a_stream_has_no_segments_and_predicts_every_byte(folder: Path, tmp_path: Path) -> None:
    batch = everything(make(folder, tmp_path, packing="stream"), "train")
    assert "segment_ids" not in batch
    assert np.all(batch["weights"] == 1) and np.all(batch["bytes"] == LENGTH)


def test_provenance_says_which_text_it_was(folder: Path, tmp_path: Path) -> None:
    first = make(folder, tmp_path).provenance
    assert first["text_files"] == 175
    assert first["text_bytes"] == sum(file.stat().st_size for file in folder.rglob("*.txt"))
    moved = folder.rename(tmp_path / "elsewhere")
    assert make(moved, tmp_path).provenance["text_sha256"] == first["text_sha256"]
    (moved / "1.txt").write_text("x")
    assert make(moved, tmp_path).provenance["text_sha256"] != first["text_sha256"]


def test_bits_per_byte_of_a_uniform_model_are_the_bits_of_its_vocabulary(
    folder: Path, tmp_path: Path
) -> None:
    task = make(folder, tmp_path)
    sums = {
        "loss_sum": 50 * math.log(256),
        "weight_sum": 50,
        "bytes_sum": 50,
        "correct_sum": 0,
        "sequence_correct_sum": 0,
        "sequence_sum": 1,
    }
    assert task.objective.metrics(sums)["bits_per_byte"] == pytest.approx(8)


def test_data_is_written_once(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*")}
    assert not any(file.name.startswith(".unfinished") for file in files)
    make(folder, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*")} == files


@pytest.mark.slow
def test_processes_may_prepare_at_the_same_time_without_tensorflow(
    folder: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from experiments.training.task import find_task; task = find_task('text',"
        f" dict(path={str(folder)!r}, sequence_length={LENGTH}, tokenizer='bpe',"
        f" vocabulary_size=300, data_dir={str(tmp_path / 'data')!r})); assert"
        " 'tensorflow' not in sys.modules; print(task.train(0).length)"
    )
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    lengths = [process.communicate(timeout=120)[0].splitlines()[-1:] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert lengths[0] == lengths[1]
    assert not list((tmp_path / "data").rglob(".unfinished*"))


# Refusals


def test_a_split_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("0123456789\n" * 20)
    with pytest.raises(
        ValueError, match=r"the validation split of the file short.txt has 11 tokens, fewer than"
    ):
        make(tmp_path / "short.txt", tmp_path)
    windows = make(tmp_path / "short.txt", tmp_path, sequence_length=8).evaluations["validation"]
    assert windows.fetch(np.arange(1))["tokens"].shape == (1, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_path": "x"}, "test_path needs a validation_path beside it"),
        ({"validation_path": "x", "path": ""}, "validation_path needs a path of text for training"),
        ({"packing": "files"}, "packing must be 'documents' or 'stream'; got 'files'"),
        ({"sequence_length": 0}, r"sequence_length must be an integer in \[1, 16777216\]; got 0"),
        (
            {"tokenizer": "bpe", "vocabulary_size": 100},
            "vocabulary_size must be at least 256, the bytes; got 100",
        ),
    ],
)
def test_impossible_options_are_refused(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(folder, tmp_path, **options)
