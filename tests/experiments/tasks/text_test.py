"""Text: which files, which split, which windows; tokenizers that keep every byte; data written
once."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from experiments.tasks.sources.text_corpus import split_of, standard_library, text_files
from experiments.training.checkout import CHECKOUT
from experiments.training.task import Batch, Examples, find_task

LENGTH = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory of 200 texts in which no window occurs twice; 25 are empty."""
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    (root / ".hidden").write_text("not read")
    for number in range(200):
        name = f"deep/{number}.txt" if number % 2 else f"{number}.txt"
        lines = [
            f"{hashlib.sha256(f'{number} {line}'.encode()).hexdigest()} läuft…\n"
            for line in range(number % 8)
        ]
        (root / name).write_text("".join(lines), "utf-8")
    return root


def make(root: Path, tmp_path: Path, **options: Any) -> Any:
    given = {"path": str(root), "sequence_length": LENGTH, "data_dir": str(tmp_path / "data")}
    return find_task("text", given | options)


def everything(task: Any, split: str) -> Batch:
    examples = task.train(0) if split == "train" else task.evaluations[split]
    assert isinstance(examples, Examples) and examples.length is not None
    return examples.fetch(np.arange(examples.length))


def documents(root: Path, split: str) -> list[bytes]:
    """The contents of a split's files, in the order of their names, found by hand."""
    names = sorted(str(file.relative_to(root)) for file in root.rglob("*.txt"))
    return [
        content
        for name in names
        if split_of(name) == split and (content := (root / name).read_bytes())
    ]


def windows(batch: Batch) -> set[bytes]:
    rows = np.concatenate([batch["tokens"][:, :1], batch["targets"]], axis=1)
    return {row.astype(np.uint8).tobytes() for row in rows}


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


def test_provenance_says_which_text_it_was(folder: Path, tmp_path: Path) -> None:
    first = make(folder, tmp_path).provenance
    assert first["text_files"] == 175
    assert first["text_bytes"] == sum(file.stat().st_size for file in folder.rglob("*.txt"))
    moved = folder.rename(tmp_path / "elsewhere")
    assert make(moved, tmp_path).provenance["text_sha256"] == first["text_sha256"]
    (moved / "1.txt").write_text("x")
    assert make(moved, tmp_path).provenance["text_sha256"] != first["text_sha256"]


def test_a_bpe_token_stands_for_its_bytes(folder: Path, tmp_path: Path) -> None:
    task = make(folder, tmp_path, tokenizer="bpe", vocabulary_size=300, packing="stream")
    assert task.sizes["vocabulary"] <= 300
    (file,) = (tmp_path / "data").rglob("bpe-300.json")
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode, "data_dir may be shared"
    tokenizer = Tokenizer.from_file(str(file))
    batch = everything(task, "train")
    text = b"".join(documents(folder, "train")).decode()
    assert batch["tokens"].size < len(text.encode()) / 1.2, "tokens are longer than bytes"
    for targets, count in zip(batch["targets"], batch["bytes"], strict=True):
        decoded = tokenizer.decode(targets.tolist(), skip_special_tokens=False)
        # A token may hold part of a character, which the decoder shows as U+FFFD; whole texts
        # compare exactly.
        if "�" not in decoded:
            assert decoded in text
            assert len(decoded.encode()) == count
    assert (
        make(folder, tmp_path, tokenizer=str(file)).sizes["vocabulary"] == task.sizes["vocabulary"]
    )


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


def test_the_standard_library_is_text_without_tests_or_packages() -> None:
    corpus = standard_library()
    names = [document.name for chosen in corpus.splits.values() for document in chosen]
    assert {"argparse.py", "asyncio/tasks.py", "topics/yield.txt"} <= set(names)
    assert not any({"test", "site-packages", "encodings"} & set(name.split("/")) for name in names)
    assert not any(name.startswith(("_sysconfigdata", "config-")) for name in names)
    assert len(names) == len(set(names)) == corpus.files
    assert 5e6 < corpus.size < 2e7
    assert corpus.sha256 == standard_library().sha256


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


def test_a_split_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("0123456789\n" * 20)
    with pytest.raises(
        ValueError, match=r"the validation split of the file short.txt has 11 tokens, fewer than"
    ):
        make(tmp_path / "short.txt", tmp_path)
    windows = make(tmp_path / "short.txt", tmp_path, sequence_length=8).evaluations["validation"]
    assert windows.fetch(np.arange(1))["tokens"].shape == (1, 8)


def test_bytes_that_are_no_text_need_the_byte_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(ValueError, match=r"not UTF-8 .*use tokenizer='bytes'"):
        make(tmp_path / "binary", tmp_path, tokenizer="bpe")
    assert make(tmp_path / "binary", tmp_path).sizes["vocabulary"] == 256


def test_a_tokenizer_that_loses_bytes_is_refused(folder: Path, tmp_path: Path) -> None:
    words: Any = Tokenizer(models.WordLevel(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(["a b c"], trainers.WordLevelTrainer(special_tokens=["?"]))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"words.json must be byte-level"):
        make(folder, tmp_path, tokenizer=str(tmp_path / "words.json"))
    decomposing: Any = Tokenizer(models.BPE())
    decomposing.normalizer, decomposing.pre_tokenizer = (
        normalizers.NFD(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    decomposing.decoder = decoders.ByteLevel()
    decomposing.train_from_iterator(
        ["a"], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    decomposing.save(str(tmp_path / "decomposing.json"))
    with pytest.raises(
        ValueError, match=r"decomposing.json does not keep the text of .*txt: its tokens stand for"
    ):
        make(folder, tmp_path, tokenizer=str(tmp_path / "decomposing.json"))
    with pytest.raises(
        ValueError, match=r"must be 'bytes', 'bpe' or the path of a tokenizer.json; got 'bpee'"
    ):
        make(folder, tmp_path, tokenizer="bpee")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "files"}, "packing must be 'documents' or 'stream'; got 'files'"),
        ({"sequence_length": 0}, "sequence_length must be at least 1; got 0"),
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
