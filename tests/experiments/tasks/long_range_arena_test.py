"""The Long Range Arena: released files become tokens and labels exactly, and damage has a name."""

import functools
import hashlib
import itertools
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.tasks.sources import path_drawings
from experiments.tasks.sources.byte_documents import ANSWER, MARK, PADDING, ask
from experiments.tasks.sources.path_drawings import GAP, draw, layout
from experiments.training.batches import train_batches
from experiments.training.task import Examples, find_task
from tests.support.lra_files import (
    EXPRESSIONS,
    PAIRS,
    prepare_reviews,
    write_listops,
    write_pairs,
    write_pathfinder,
)

WORDS = [*map(str, range(10)), "[MAX", "[MIN", "[MED", "[SM", "]"]


def make(name: str, directory: Path, **options: Any) -> Any:
    return find_task(name, {"data_dir": str(directory), **options})


def splits(task: Any) -> dict[str, Examples]:
    train = task.train(0)
    assert isinstance(train, Examples)
    return {"train": train, **task.evaluations}


def everything(task: Any) -> dict[str, dict[str, np.ndarray]]:
    return {
        name: examples.fetch(np.arange(examples.length)) for name, examples in splits(task).items()
    }


def check_form(batch: dict[str, np.ndarray], n: int, length: int) -> None:
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "tokens": ((n, length), np.int32),
        "targets": ((n, 1), np.int32),
        "weights": ((n, 1), np.float32),
        "readout_positions": ((n, 1), np.int32),
    }
    assert np.all(batch["weights"] == 1)


def read(batch: dict[str, np.ndarray], row: int) -> tuple[list[bytes], int]:
    """The documents before the readout position and the label; behind it is padding alone."""
    end = batch["readout_positions"][row, 0]
    tokens = batch["tokens"][row]
    assert tokens[end] == MARK and np.all(tokens[end + 1 :] == PADDING)
    ends = np.flatnonzero(tokens == MARK)
    parts = np.split(tokens[: end + 1], ends[:-1] + 1)
    return [bytes(part[:-1].tolist()) for part in parts], int(batch["targets"][row, 0]) - ANSWER


# Documents


def test_documents_are_cut_marked_and_padded() -> None:
    batch = ask([[b"abcdef", b""], [b"x", b"abcd"]], [1, 0], length=4)
    pad = [PADDING] * 3
    np.testing.assert_array_equal(
        batch["tokens"],
        [[97, 98, 99, MARK, MARK, *pad], [120, MARK, 97, 98, 99, MARK, PADDING, PADDING]],
    )
    np.testing.assert_array_equal(batch["readout_positions"], [[4], [5]])
    np.testing.assert_array_equal(batch["targets"], [[ANSWER + 1], [ANSWER]])
    check_form(batch, 2, 8)


# Text


def test_reviews_are_bytes_and_every_tenth_is_validation(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": "tiny_reviews", "length": 20}
    task = make("text_classification", prepare_reviews(tmp_path), **options)
    assert task.sizes["vocabulary"] == 256 + 2 + 2
    assert task.provenance["texts"] == "tiny_reviews/1.0.0"
    assert task.provenance["train_texts"] == 27
    batches = everything(task)
    texts = {
        name: [read(batch, row) for row in range(len(batch["tokens"]))]
        for name, batch in batches.items()
    }
    check_form(batches["validation"], 3, 20)

    def written(split: str, count: int) -> list[tuple[list[bytes], int]]:
        return [([f"{split} é {n}".encode()], n % 2) for n in range(count)]

    assert sorted(texts["test"]) == sorted(written("test", 5))
    assert len(texts["validation"]) == 3
    assert sorted(texts["train"] + texts["validation"]) == sorted(written("train", 30))
    assert "tensorflow" not in sys.modules

    whole = make("text_classification", tmp_path, dataset="tiny_reviews", validation=False)
    assert set(whole.evaluations) == {"test"}
    assert splits(whole)["train"].length == 30


def test_long_reviews_are_cut(tmp_path: Path) -> None:
    prepare_reviews(tmp_path)
    task = make("text_classification", tmp_path, dataset="tiny_reviews", length=6)
    assert read(task.evaluations["test"].fetch(np.arange(1)), 0)[0] == [b"test "]
    with pytest.raises(ValueError, match=r"length must be at least 2, .*; got 1"):
        make("text_classification", tmp_path, dataset="tiny_reviews", length=1)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("imdb_reviews", "imdb_reviews is not prepared under .*task.download=True, or"),
        ("imbd", "dataset must be a data set of TFDS; got 'imbd'"),
    ],
)
def test_reviews_that_are_not_there_say_how_to_get_them(
    dataset: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make("text_classification", tmp_path, dataset=dataset)
    assert not list(tmp_path.iterdir())


class NeedsAPackage(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'gold'", name="gold")

    def _generate_examples(self) -> Any:
        raise NotImplementedError


def test_a_package_that_only_preparing_needs_is_named(tmp_path: Path) -> None:
    message = "needs_a_package cannot be prepared without the package gold. Only prep"
    with pytest.raises(ValueError, match=message):
        make("text_classification", tmp_path, dataset="needs_a_package", download=True)


class OnlyLabels(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    splits = ("train", "test")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples() for split in self.splits}

    def _generate_examples(self) -> Any:
        yield 0, {"label": 1}


class OnlyTraining(OnlyLabels):
    splits = ("train",)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("only_labels", "must have a 'text' and a class 'label'; its features"),
        ("only_training", "must have the splits train and test; it has train"),
    ],
)
def test_a_data_set_without_texts_or_splits_is_refused(
    dataset: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make("text_classification", tmp_path, dataset=dataset, download=True)


# Tables: ListOps and Retrieval


def test_released_expressions_have_no_parentheses(tmp_path: Path) -> None:
    task = make("listops", write_listops(tmp_path), longest=12)
    assert task.sizes["vocabulary"] == 16 + 10
    splits = ("train", "validation", "test")
    for name, rows in zip(splits, EXPRESSIONS.values(), strict=True):
        batch = everything(task)[name]
        check_form(batch, len(rows), 12)
        for row, (source, value) in enumerate(rows):
            end = batch["readout_positions"][row, 0]
            words = [WORDS[token] for token in batch["tokens"][row, : end + 1]]
            assert words == source.replace("(", "").replace(")", "").split()
            assert np.all(batch["tokens"][row, end + 1 :] == 15)
            assert batch["targets"][row, 0] == 16 + value


def test_pairs_are_two_documents_in_one_sequence(tmp_path: Path) -> None:
    task = make("retrieval", write_pairs(tmp_path), length=9)
    assert task.sizes["vocabulary"] == 256 + 2 + 2
    assert task.provenance["train_pairs"] == 3
    for name, rows in zip(("train", "validation", "test"), PAIRS.values(), strict=True):
        batch = everything(task)[name]
        check_form(batch, len(rows), 18)
        assert [read(batch, row) for row in range(len(rows))] == [
            ([first[:8], second[:8]], int(float(label))) for label, first, second in rows
        ]


def test_lines_are_read_in_any_order(tmp_path: Path) -> None:
    train = splits(make("retrieval", write_pairs(tmp_path)))["train"]
    chosen = np.array([2, 0, 2])
    batch, whole = train.fetch(chosen), train.fetch(np.arange(3))
    for name, array in batch.items():
        np.testing.assert_array_equal(array, whole[name][chosen])


def change(name: str, old: bytes, new: bytes) -> Callable[[Path], object]:
    def spoil(directory: Path) -> object:
        content = (directory / name).read_bytes()
        assert old in content
        return (directory / name).write_bytes(content.replace(old, new, 1))

    return spoil


@pytest.mark.parametrize(
    ("task", "spoil", "message"),
    [
        (
            "retrieval",
            lambda path: (path / "new_aan_pairs.test.tsv").unlink(),
            "task.data_dir must be .* has no new_aan_pairs.test.tsv.*folder tsv_data .*https",
        ),
        (
            "retrieval",
            change("new_aan_pairs.train.tsv", b"\tab\t", b"\tab "),
            "train.tsv, line 3: must have 5 columns .*label, id1, id2, text1, text2; it has 4",
        ),
        (
            "retrieval",
            change("new_aan_pairs.eval.tsv", b"1.0\t", b"2.0\t"),
            r"eval.tsv, line 1: label must be a number below 2; got b'2.0'",
        ),
        (
            "retrieval",
            lambda path: (path / "new_aan_pairs.eval.tsv").write_bytes(b""),
            "eval.tsv must have lines of label, .*; it has none",
        ),
        (
            "listops",
            lambda path: (path / "basic_val.tsv").unlink(),
            "has no basic_val.tsv. They are in the folder listops-1000",
        ),
        (
            "listops",
            change("basic_val.tsv", b"Source\tTarget", b"Target\tSource"),
            "basic_val.tsv must begin with the names of its columns, Source, Target; .* b'Target",
        ),
        (
            "listops",
            change("basic_test.tsv", b"\t7", b"\t10"),
            "basic_test.tsv, line 3: Target must be a number below 10; got b'10'",
        ),
        (
            "listops",
            change("basic_train.tsv", b"[SM", b"[SUM"),
            r"basic_train.tsv, line 3: Source must be .*\[MED \[SM \]; got b'\[SUM'",
        ),
        (
            "listops",
            change("basic_test.tsv", b"7\t", b"\t"),
            "basic_test.tsv, line 3: Source must be an expression .*; got b''",
        ),
    ],
)
def test_spoilt_tables_are_named(task: str, spoil: Any, message: str, tmp_path: Path) -> None:
    {"retrieval": write_pairs, "listops": write_listops}[task](tmp_path)
    everything(make(task, tmp_path))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        everything(make(task, tmp_path))


def test_expressions_that_are_too_long_are_named(tmp_path: Path) -> None:
    task = make("listops", write_listops(tmp_path), longest=7)
    message = "longest must be at least 8, .*train.tsv, line 3; got 7"
    with pytest.raises(ValueError, match=message):
        everything(task)


@pytest.mark.parametrize("task", ["listops", "retrieval", "pathfinder"])
def test_a_directory_that_is_not_there_says_where_the_release_is(task: str, tmp_path: Path) -> None:
    message = "task.data_dir must be a directory with .*nowhere is no directory. .*https://.*tar"
    with pytest.raises(ValueError, match=message):
        make(task, tmp_path / "nowhere")


def test_a_mistake_in_a_file_reaches_training(tmp_path: Path) -> None:
    """Batches are made on threads of grain's."""
    write_listops(tmp_path)
    change("basic_train.tsv", b"[SM", b"[SUM")(tmp_path)
    batches = train_batches(make("listops", tmp_path), seeds=(0,), batch_size=3)
    with pytest.raises(ValueError, match="line 3: Source must be an expression"):
        next(batches)


# Answers as classes


@pytest.mark.parametrize("name", ["listops", "pathfinder", "text_classification"])
def test_a_class_is_the_answer_and_the_mask_ends_where_it_was_asked(name, tmp_path):
    options: dict[str, Any] = {}
    if name == "listops":
        write_listops(tmp_path)
        options = {"longest": 12}
    elif name == "pathfinder":
        write_pathfinder(tmp_path, 5)
        options = {"size": 5}
    else:
        prepare_reviews(tmp_path)
        options = {"dataset": "tiny_reviews", "length": 20}
    asked, classes = (make(name, tmp_path, answer=a, **options) for a in ("token", "class"))
    number = classes.sizes["classes"]
    assert classes.sizes["vocabulary"] == asked.sizes["vocabulary"] - number
    assert classes.provenance == asked.provenance
    for split, batch in everything(classes).items():
        want = everything(asked)[split]
        np.testing.assert_array_equal(batch["tokens"], want["tokens"])
        labels = want["targets"][:, 0] - classes.sizes["vocabulary"]
        np.testing.assert_array_equal(batch["labels"], labels)
        np.testing.assert_array_equal(batch["mask"].sum(1) - 1, want["readout_positions"][:, 0])
        assert batch["weights"].shape == batch["labels"].shape and batch["labels"].min() >= 0
    with pytest.raises(ValueError, match="answer must be one of 'token', 'class'; got 'number'"):
        make(name, tmp_path, answer="number", **options)


def test_two_documents_are_the_halves_of_a_row(tmp_path: Path) -> None:
    task = make("retrieval", write_pairs(tmp_path), length=9, answer="class")
    assert task.sizes == {"vocabulary": 258, "classes": 2, "documents": 2}
    for name, rows in zip(("train", "validation", "test"), PAIRS.values(), strict=True):
        batch = everything(task)[name]
        for row, (label, *documents) in enumerate(rows):
            assert batch["labels"][row] == int(float(label))
            tokens = batch["tokens"][row].reshape(2, 9)
            mask = batch["mask"][row].reshape(2, 9)
            for half, there, document in zip(tokens, mask, documents, strict=True):
                assert bytes(half[there][:-1].tolist()) == document[:8]
                assert half[there][-1] == MARK and np.all(half[~there] == PADDING)


# Pathfinder


@pytest.mark.parametrize("size", [5, 32])
def test_images_are_pixels_and_their_label_in_three_splits(size: int, tmp_path: Path) -> None:
    task = make("pathfinder", write_pathfinder(tmp_path, size), size=size)
    assert task.sizes["vocabulary"] == 256 + 2
    numbers: dict[str, list[int]] = {}
    for name, batch in everything(task).items():
        check_form(batch, len(batch["tokens"]), size * size)
        numbers[name] = batch["tokens"][:, 0].tolist()
        labels = [number // 2 % 2 for number in numbers[name]]
        assert batch["tokens"][:, 1].tolist() == labels
        assert np.all(batch["tokens"][:, 2:] == 255)
        assert batch["targets"][:, 0].tolist() == [256 + label for label in labels]
        assert np.all(batch["readout_positions"] == size * size - 1)
    assert {name: len(part) for name, part in numbers.items()} == {
        "train": 21,
        "validation": 2,
        "test": 2,
    }
    assert sorted(n for part in numbers.values() for n in part) == list(range(25))
    # Not the first or last ones of the files, and always the same.
    held_out = numbers["validation"] + numbers["test"]
    assert held_out not in ([0, 1, 2, 3], [21, 22, 23, 24])
    again = everything(make("pathfinder", tmp_path, size=size))["test"]
    assert again["tokens"][:, 0].tolist() == numbers["test"]


def image(path: Path, number: int = 3) -> Path:
    return path / f"curv_contour_length_14/imgs/0/sample_{number}.png"


def metadata(path: Path) -> Path:
    return path / "curv_contour_length_14/metadata/0.npy"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: image(path).unlink(), "sample_3.png must be a PNG image: .*No such file"),
        (
            lambda path: image(path).write_bytes(b""),
            "sample_3.png must be a PNG image: cannot identify",
        ),
        (
            lambda path: image(path).write_bytes(image(path).read_bytes()[:60]),
            "sample_3.png must be a PNG image",
        ),
        (
            lambda path: Image.new("L", (4, 5)).save(image(path)),
            "task.size must be that of the images, .*; got 5, and .*sample_3.png is 5 x 4",
        ),
        (
            lambda path: metadata(path).write_text("imgs/0 sample_0.png 0 2 1\n"),
            "line 1: must begin with a folder, a file, a number and the label 0 or 1; got b'imgs",
        ),
        (
            lambda path: metadata(path).write_text("imgs/0 sample_0.png\n"),
            "0.npy, line 1: must begin with",
        ),
        (
            lambda path: [file.unlink() for file in metadata(path).parent.iterdir()],
            "metadata must hold .npy files that name at least 10 images, .*; got 0 files with 0",
        ),
        (
            lambda path: shutil.rmtree(metadata(path).parent),
            "has no curv_contour_length_14/metadata.*folder pathfinder32",
        ),
    ],
)
def test_spoilt_images_are_named(spoil: Any, message: str, tmp_path: Path) -> None:
    write_pathfinder(tmp_path, 5)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        everything(make("pathfinder", tmp_path, size=5))


def test_images_of_another_size_are_refused_before_the_first_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 128, and .* is 32 x 32"):
        make("pathfinder", write_pathfinder(tmp_path, 32), size=128)


def test_an_image_in_colour_is_read_as_grey(tmp_path: Path) -> None:
    write_pathfinder(tmp_path, 5)
    Image.open(image(tmp_path)).convert("RGB").save(image(tmp_path))
    parts = everything(make("pathfinder", tmp_path, size=5)).values()
    assert 3 in np.concatenate([part["tokens"][:, 0] for part in parts])


def test_drawings_have_discs_at_ends_of_paths_that_do_not_touch(monkeypatch: Any) -> None:
    joined = []
    for seed in range(20):
        paths, discs, answer = layout(random.Random(seed), 16, 6, 1)
        assert [len(path) for path in paths] == [6, 6, 3]
        ends = [{path[0], path[-1]} for path in paths[:2]]
        assert any(set(discs) == pair for pair in ends) == answer and len(set(discs)) == 2
        assert set(discs) <= ends[0] | ends[1]
        # How far they are from each other tells nothing.
        far = math.dist(paths[0][0], paths[0][-1])
        assert math.dist(*discs) == pytest.approx(far, abs=0.5 + 1e-9)
        for one, other in itertools.combinations(paths, 2):
            assert min(math.dist(a, b) for a in one for b in other) >= GAP
        drawing, label = draw(random.Random(seed), 16, 6, 1)
        assert label == answer and drawing.shape == (16, 16)
        for y, x in np.ndindex(16, 16):
            inked = [point for path in paths for point in path] + list(discs)
            near = min(math.dist((y, x), point) for point in inked)
            assert drawing[y, x] == 0 if near > 2.5 else drawing[y, x] >= 0
        for y, x in discs:
            assert drawing[round(y), round(x)] == 255
        joined.append(answer)
    assert 5 < sum(joined) < 15
    monkeypatch.setattr(path_drawings, "TRIES", 10)
    with pytest.raises(ValueError, match="no drawing of size=8 had room for paths of points=40"):
        draw(random.Random(0), 8, 40, 0)


def test_drawings_are_a_task_without_files() -> None:
    task = find_task("pathfinder", {"data_dir": "", "size": 16, "points": 6, "answer": "class"})
    assert task.sizes == {"vocabulary": 256, "classes": 2}
    batch, again = (splits(task)["train"].fetch(np.array([5, 3])) for _ in range(2))
    assert batch["tokens"].shape == (2, 256) and batch["mask"].all()
    for name, array in batch.items():
        np.testing.assert_array_equal(array, again[name])
    other = splits(task)["test"].fetch(np.array([5, 3]))
    assert (other["tokens"] != batch["tokens"]).any()


# Provenance


@pytest.mark.parametrize(
    ("task", "write", "file"),
    [
        ("listops", write_listops, "basic_val.tsv"),
        ("retrieval", write_pairs, "new_aan_pairs.train.tsv"),
        (
            "pathfinder",
            functools.partial(write_pathfinder, size=32),
            "curv_contour_length_14/metadata/1.npy",
        ),
        (
            "pathfinder",
            functools.partial(write_pathfinder, size=32),
            "curv_contour_length_14/imgs/2/sample_4.png",
        ),
    ],
)
def test_provenance_has_a_hash_that_a_changed_file_changes(
    tmp_path: Path, task: str, write: Any, file: str
) -> None:
    def hashes() -> dict[str, str]:
        provenance = make(task, tmp_path).provenance
        return {name: value for name, value in provenance.items() if name.endswith("_sha256")}

    write(tmp_path)
    before = hashes()
    content = (tmp_path / file).read_bytes()
    changed = content.replace(b"0", b"1", 1) if not file.endswith("png") else content + b" "
    (tmp_path / file).write_bytes(changed)
    after = hashes()
    assert before.keys() == after.keys()
    name = Path(file).name
    differs = [key for key in before if before[key] != after[key]]
    assert differs == [f"{name}_sha256" if f"{name}_sha256" in before else "images_sha256"]
    if task != "pathfinder":
        assert after[f"{name}_sha256"] == hashlib.sha256(changed).hexdigest()
