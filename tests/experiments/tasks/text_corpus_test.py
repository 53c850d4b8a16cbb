"""Which files are text, under any names, and which split each belongs to."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.tasks.sources import text_corpus
from experiments.tasks.sources.text_corpus import standard_library, text_files
from tests.support.texts import LENGTH, everything, make, windows, write_texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


def test_splits_share_no_file_and_a_new_file_moves_no_other(folder: Path) -> None:
    before = text_files(str(folder)).splits
    names = {split: {document.name for document in chosen} for split, chosen in before.items()}
    assert sum(map(len, names.values())) == len(set.union(*names.values())) == 175
    (folder / "new.txt").write_text("new")
    after = text_files(str(folder)).splits
    for split, chosen in after.items():
        assert names[split] == {document.name for document in chosen} - {"new.txt"}


def test_a_single_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(b"".join(b"line %d\n" % number for number in range(1000)))
    pieces = [chosen[0].content for chosen in text_files(str(file)).splits.values()]
    assert b"".join(pieces) == file.read_bytes()
    assert all(piece.endswith(b"\n") and piece.startswith(b"line") for piece in pieces)
    np.testing.assert_allclose(
        [len(piece) / file.stat().st_size for piece in pieces], [0.9, 0.05, 0.05], atol=0.002
    )


def test_the_standard_library_is_text_without_tests_or_packages() -> None:
    corpus = standard_library()
    names = [document.name for chosen in corpus.splits.values() for document in chosen]
    assert {"argparse.py", "asyncio/tasks.py", "topics/yield.txt"} <= set(names)
    assert not any({"test", "site-packages", "encodings"} & set(name.split("/")) for name in names)
    assert not any(name.startswith(("_sysconfigdata", "config-")) for name in names)
    assert len(names) == len(set(names)) == corpus.files
    assert 5e6 < corpus.size < 2e7
    assert corpus.sha256 == standard_library().sha256


# Splits of the user's own


def test_the_files_of_a_few_are_each_cut_in_three(tmp_path: Path) -> None:
    root = tmp_path / "few"
    root.mkdir()
    for name in ("a", "b", "c"):
        (root / name).write_text("".join(f"{name} {line}\n" for line in range(200)))
    with pytest.raises(ValueError, match=r"the train split of the directory few has 2946 tokens"):
        make(root, tmp_path, sequence_length=4000)
    task = make(root, tmp_path)
    assert task.provenance["text_splits"] == "inside files"
    corpus = text_files(str(root), window=LENGTH)
    for number, name in enumerate(("a", "b", "c")):
        pieces = [split[number].content for split in corpus.splits.values()]
        assert b"".join(pieces) == (root / name).read_bytes()
        assert all(piece.endswith(b"\n") and piece.startswith(name.encode()) for piece in pieces)
    assert everything(task, "test")["tokens"].size > 3 * 8 * 5


def test_files_for_validation_are_given_and_are_not_for_training(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "1.txt").write_text("VALIDATION " * 40)
    own = {"validation_path": str(folder / "1.txt")}
    task = make(folder, tmp_path, **own)
    assert set(task.evaluations) == {"validation"}
    assert b"".join(sorted(windows(everything(task, "validation")))).startswith(b" VALIDATION")
    assert not any(b"VALID" in window for window in windows(everything(task, "train")))
    # All else is for training, in the order of its names.
    corpus = text_files(str(folder), **own)
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.txt"))
    kept = [name for name in names if name != "1.txt" and (folder / name).read_bytes()]
    assert [d.name for d in corpus.splits["train"]] == [f"train/{name}" for name in kept]

    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "one").write_text("TEST " * 40)
    both = make(folder, tmp_path, **own, test_path=str(tests))
    assert set(both.evaluations) == {"validation", "test"}
    assert both.provenance["text_sha256"] != task.provenance["text_sha256"]
    with pytest.raises(ValueError, match=r"must have no file in common; both have '/.*1.txt'"):
        make(folder, tmp_path, **own, test_path=str(folder))
    with pytest.raises(ValueError, match=r"validation_path must be a text file or a directory"):
        make(folder, tmp_path, validation_path="nowhere")


def test_large_text_is_read_again_only_if_a_file_has_changed(
    folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(text_corpus, "LARGE", 1)
    monkeypatch.setattr(text_corpus, "SETTLED_SECONDS", -3600)
    first = make(folder, tmp_path).provenance
    with monkeypatch.context() as patch:
        patch.setattr(text_corpus, "_content", lambda file: raise_(AssertionError(file)))
        assert make(folder, tmp_path).provenance == first
    file = folder / "deep/1.txt"
    content = file.read_bytes()
    file.write_bytes(b"X" + content[1:])  # as many bytes
    assert make(folder, tmp_path).provenance["text_sha256"] != first["text_sha256"]
    # What has changed a moment ago may change again without its times telling.
    monkeypatch.setattr(text_corpus, "SETTLED_SECONDS", 3600)
    known = sorted((tmp_path / "data/text/hashes").iterdir())
    file.write_bytes(b"Y" + content[1:])
    make(folder, tmp_path)
    assert sorted((tmp_path / "data/text/hashes").iterdir()) == known


# File names


ODD = [b"-rf.txt", b"new\nline.txt", b"not \xe9 utf8.txt", "größe.txt".encode(), b" .txt"]


def test_any_file_name_that_the_system_takes_is_read(folder: Path, tmp_path: Path) -> None:
    for name in ODD:
        (folder / os.fsdecode(name)).write_bytes(b"text of " + name + b"\n")
    task = make(folder, tmp_path)
    assert task.provenance["text_files"] == 175 + len(ODD)
    text = b"".join(d.content for split in text_files(str(folder)).splits.values() for d in split)
    assert all(b"text of " + name in text for name in ODD)
    (folder / os.fsdecode(ODD[2])).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"'not \\udce9 utf8.txt' is not UTF-8"):
        make(folder, tmp_path, tokenizer="bpe", vocabulary_size=300)


def test_what_is_no_file_is_left_out_and_named(folder: Path, tmp_path: Path, capsys: Any) -> None:
    before = text_files(str(folder)).sha256
    assert "left out" not in capsys.readouterr().err
    (folder / "broken.txt").symlink_to(folder / "nothing")
    (folder / "linked").symlink_to(folder / "deep")
    os.mkfifo(folder / "pipe\n.txt")
    (folder / ".hidden_too").symlink_to(folder / "nothing")
    assert text_files(str(folder)).sha256 == before
    [line] = capsys.readouterr().err.splitlines()
    assert "3 entries are no files" in line and "broken.txt'" in line and r"pipe\n.txt'" in line
    (folder / "folder.txt").mkdir()
    (folder / "folder.txt" / "inside").write_text("text")
    assert text_files(str(folder)).files == 176


def test_a_file_or_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: Any) -> None:
    denied = PermissionError(13, "Permission denied", str(folder / "deep"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda file: raise_(denied))
        with pytest.raises(ValueError, match=r"cannot read '/.*\.txt' \(Permission denied\)"):
            text_files(str(folder))
    scandir = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda path: raise_(denied) if "deep" in str(path) else scandir(path)
    )
    with pytest.raises(ValueError, match=r"cannot read '/.*/deep' \(Permission denied\)"):
        text_files(str(folder))


def raise_(error: Exception) -> Any:
    raise error


# Refusals


def test_files_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(
        ValueError,
        match=(r"the file empty.txt holds no text, only empty files or none; set task.path"),
    ):
        make(tmp_path / "empty.txt", tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="the directory none holds no text"):
        make(tmp_path / "none", tmp_path)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=(r"path must be a text file or a directory of text files; .*nowhere' does not"),
    ):
        make(tmp_path / "nowhere", tmp_path)
