"""Images as pixel sequences: the bundled digits and a data set that TFDS has prepared."""

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from experiments.training.task import Examples, find_task


def make(**options: Any) -> Any:
    return find_task("images", options)


def splits(task: Any) -> dict[str, Examples]:
    train = task.train(0)
    assert isinstance(train, Examples)
    return {"train": train, **task.evaluations}


def everything(examples: Examples) -> dict[str, np.ndarray]:
    assert examples.length is not None
    return examples.fetch(np.arange(examples.length))


def test_digits_are_pixels_followed_by_their_label() -> None:
    task = make()
    assert task.sizes["vocabulary"] == 17 + 10
    test = everything(task.evaluations["test"])
    digits: Any = load_digits()
    np.testing.assert_array_equal(test["tokens"][:2], digits.images[:2].reshape(2, 64))
    np.testing.assert_array_equal(test["targets"][:2, 0], 17 + digits.target[:2])
    assert {name: (array.shape, array.dtype) for name, array in test.items()} == {
        "tokens": ((360, 64), np.int32),
        "targets": ((360, 1), np.int32),
        "weights": ((360, 1), np.float32),
        "readout_positions": ((360, 1), np.int32),
    }
    assert np.all(test["readout_positions"] == 63)


def test_splits_are_disjoint_and_complete() -> None:
    parts = {name: everything(examples)["tokens"] for name, examples in splits(make()).items()}
    assert {name: len(tokens) for name, tokens in parts.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    digits: Any = load_digits()  # its fields are attributes that no type checker knows
    images = sorted(map(tuple, digits.images.reshape(-1, 64).tolist()))
    assert sorted(map(tuple, np.concatenate(list(parts.values())).tolist())) == images


def test_fewer_levels_round_down() -> None:
    fine, coarse = (everything(make(levels=levels).evaluations["test"]) for levels in (0, 4))
    np.testing.assert_array_equal(coarse["tokens"], fine["tokens"] * 4 // 17)
    assert coarse["tokens"].max() == 3 and coarse["targets"].min() == 4


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Images whose pixels are all their number."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Tensor(shape=(3, 2, 2), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=4),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {
            "train": self._generate_examples(range(30)),
            "test": self._generate_examples(range(200, 205)),
        }

    def _generate_examples(self, numbers: range) -> Any:
        for number in numbers:
            yield (number, {"image": np.full((3, 2, 2), number, np.uint8), "label": number % 4})


def test_a_prepared_data_set_is_read_without_tensorflow(tmp_path: Path) -> None:
    builder: Any = TinyImages(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    task = make(dataset="tiny_images", data_dir=str(tmp_path))
    assert task.sizes["vocabulary"] == 256 + 4
    assert task.provenance["images"] == "tiny_images/1.0.0"
    numbers = {}
    for name, examples in splits(task).items():
        batch = everything(examples)
        numbers[name] = batch["tokens"][:, 0]
        assert batch["tokens"].shape[1] == 3 * 2 * 2
        assert np.all(batch["tokens"] == numbers[name][:, None])
        np.testing.assert_array_equal(batch["targets"][:, 0], 256 + numbers[name] % 4)
    assert sorted(numbers["test"]) == list(range(200, 205))
    assert len(numbers["validation"]) == 3
    assert sorted([*numbers["train"], *numbers["validation"]]) == list(range(30))
    assert "tensorflow" not in sys.modules


@pytest.fixture
def mnist_files(tmp_path: Path) -> Path:
    """Twenty training images and five test images of 3 x 2 pixels that are all their number, with
    labels 0 .. 3."""

    def write(name: str, array: np.ndarray) -> None:
        header = bytes([0, 0, 8, array.ndim]) + b"".join(
            size.to_bytes(4, "big") for size in array.shape
        )
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))

    for name, numbers in (("train", range(20)), ("t10k", range(200, 205))):
        labels = np.array(numbers, np.uint8)
        images = np.broadcast_to(labels[:, None, None], (len(labels), 3, 2))
        write(f"{name}-images-idx3-ubyte", images)
        write(f"{name}-labels-idx1-ubyte", labels % 4)
    return tmp_path


def test_files_of_mnist_are_read(mnist_files: Path) -> None:
    task = make(dataset=str(mnist_files))
    assert task.sizes["vocabulary"] == 256 + 4
    for name, numbers in {
        "train": [*range(9), *range(10, 19)],
        "validation": [9, 19],
        "test": range(200, 205),
    }.items():
        batch = everything(splits(task)[name])
        np.testing.assert_array_equal(batch["tokens"], np.repeat([[n] for n in numbers], 6, axis=1))
        np.testing.assert_array_equal(batch["targets"][:, 0], [256 + n % 4 for n in numbers])


def test_files_of_mnist_may_be_unpacked(mnist_files: Path) -> None:
    packed = everything(make(dataset=str(mnist_files)).evaluations["test"])
    for path in mnist_files.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    unpacked = everything(make(dataset=str(mnist_files)).evaluations["test"])
    np.testing.assert_array_equal(unpacked["tokens"], packed["tokens"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "must be a directory with t10k-images-idx3-ubyte"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "is damaged"),
        (
            lambda path: path.write_bytes(gzip.compress(b"\0\0\x0d\x01" + bytes(9))),
            "must be an IDX file of bytes",
        ),
        (
            lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1])),
            "must hold 5 x 3 x 2 bytes after its header; it has 29",
        ),
        (
            lambda path: path.write_bytes(gzip.compress(bytes([0, 0, 8, 3, *[0, 0, 0, 1] * 3, 7]))),
            r"\[n, H, W\] and \[n\]; got \(1, 1, 1\) and \(5,\)",
        ),
    ],
)
def test_spoilt_files_of_mnist_are_named(spoil: Any, message: str, mnist_files: Path) -> None:
    spoil(mnist_files / "t10k-images-idx3-ubyte.gz")
    with pytest.raises(ValueError, match=message):
        make(dataset=str(mnist_files))


def test_the_subset_of_mnist_has_500_images_of_each_digit() -> None:
    task = make(dataset="mnist_subset")
    assert task.sizes["vocabulary"] == 256 + 10
    parts = {name: everything(part) for name, part in splits(task).items()}
    for name, share in {"train": 350, "validation": 50, "test": 100}.items():
        counts = np.bincount(parts[name]["targets"][:, 0] - 256, minlength=10)
        np.testing.assert_array_equal(counts, share)
    assert set(parts["test"]["targets"][:10, 0]) == set(range(256, 266))
    test = parts["test"]["tokens"]
    assert test.shape == (1000, 784) and test.min() == 0 and test.max() == 255


def test_a_data_set_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"mnist is not prepared under .*task.download=True, or run python -c"
    ):
        make(dataset="mnist", data_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_data_set_that_tfds_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"dataset must be 'digits', .* data set of TFDS; got 'mnst'"
    ):
        make(dataset="mnst", data_dir=str(tmp_path))


class TinyColours(tfds.core.GeneratorBasedBuilder):
    """Images [40, 50, 3] of random colours."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Tensor(shape=(40, 50, 3), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples() for split in ("train", "test")}

    def _generate_examples(self) -> Any:
        image = np.random.default_rng(0).integers(0, 256, (10, 40, 50, 3), np.uint8)
        image[0], image[1] = 0, 255
        for number in range(10):
            yield number, {"image": image[number], "label": 1}


def test_grey_is_the_luma_of_pillow(tmp_path: Path) -> None:
    builder: Any = TinyColours(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    options: dict[str, Any] = {"dataset": "tiny_colours", "data_dir": str(tmp_path)}
    colour, grey = make(**options), make(**options, grey=True)
    assert grey.sizes["vocabulary"] == 256 + 2
    whole, batch = (everything(task.evaluations["test"]) for task in (colour, grey))
    images = whole["tokens"].astype(np.uint8).reshape(-1, 40, 50, 3)
    luma = [np.asarray(Image.fromarray(image).convert("L")) for image in images]
    np.testing.assert_array_equal(batch["tokens"], np.reshape(luma, (10, 2000)))
    assert batch["tokens"].min() == 0 and batch["tokens"].max() == 255
    assert np.all(batch["readout_positions"] == 1999) and np.all(batch["targets"] == 257)


def test_the_hash_of_images_follows_every_pixel_and_every_label(mnist_files: Path) -> None:
    hashes = [make(dataset=str(mnist_files)).provenance["images_sha256"]]
    for name in ("t10k-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        content = gzip.decompress((mnist_files / name).read_bytes())
        (mnist_files / name).write_bytes(gzip.compress(content))
        assert make(dataset=str(mnist_files)).provenance["images_sha256"] == hashes[-1]
        (mnist_files / name).write_bytes(gzip.compress(content[:-1] + bytes([content[-1] ^ 1])))
        hashes.append(make(dataset=str(mnist_files)).provenance["images_sha256"])
    assert len(set(hashes)) == 3
    assert make().provenance["images_sha256"] == make(levels=3).provenance["images_sha256"]


def test_the_hash_of_a_prepared_data_set_follows_its_examples(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def prepared(name: str) -> str:
        options: dict[str, Any] = {"data_dir": str(tmp_path / name)}
        builder: Any = TinyImages(**options, file_format="array_record")
        builder.download_and_prepare()
        return make(dataset="tiny_images", **options).provenance["images_sha256"]

    assert prepared("one") == prepared("two")
    generate = TinyImages._generate_examples
    monkeypatch.setattr(
        TinyImages, "_generate_examples", lambda self, numbers: generate(self, numbers[1:])
    )
    assert prepared("three") != prepared("one")


def test_grey_needs_colours() -> None:
    with pytest.raises(ValueError, match=r"grey must be False .* digits of scikit-learn are 8 x 8"):
        make(grey=True)


def test_negative_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"levels must be an integer in \[0, 256\]; got -1"):
        make(levels=-1)
