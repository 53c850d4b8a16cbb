"""Shared by tests of the Long Range Arena: small files and data sets, laid out as the released
ones."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

# An expression as released: every application of an operator to an argument has parentheses.
EXPRESSIONS = {
    "basic_train.tsv": [
        ("( ( ( [MAX 2 ) 9 ) ] )", 9),
        ("( ( ( ( [SM 7 ) ( ( ( [MIN 8 ) 3 ) ] ) ) 6 ) ] )", 6),
        ("( ( ( [MED 4 ) 5 ) ] )", 4),
    ],
    "basic_val.tsv": [("( ( ( [MIN 1 ) 0 ) ] )", 0)],
    "basic_test.tsv": [("( ( ( [SM 5 ) 5 ) ] )", 0), ("7", 7)],
}
PAIRS = {
    "new_aan_pairs.train.tsv": [
        (b"0.0", b"one", "größer".encode()),
        (b"1.0", b"", b"longer than the others"),
        (b"1", b"ab", b"c"),
    ],
    "new_aan_pairs.eval.tsv": [(b"1.0", b"e", b"f")],
    "new_aan_pairs.test.tsv": [(b"0.0", b"t", b'"u')],
}


def write_listops(directory: Path) -> Path:
    for name, rows in EXPRESSIONS.items():
        lines = ["Source\tTarget", *(f"{source}\t{value}" for source, value in rows)]
        (directory / name).write_bytes("".join(f"{x}\r\n" for x in lines).encode())
    return directory


def write_pairs(directory: Path) -> Path:
    for name, rows in PAIRS.items():
        lines = [b"\t".join((label, b"P07-1001", b"W99-0101", *texts)) for label, *texts in rows]
        (directory / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return directory


def write_pathfinder(directory: Path, size: int, images: int = 25) -> Path:
    """Images that begin with their number and their label, the number being theirs in all folders
    together."""
    folder = directory / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for start in range(0, images, 10):
        part = start // 10
        lines = []
        (folder / f"imgs/{part}").mkdir(parents=True)
        for number in range(start, min(start + 10, images)):
            label, name = number // 2 % 2, f"sample_{number - start}.png"
            pixels = np.full((size, size), 255, np.uint8)
            pixels[0, :2] = number, label
            Image.fromarray(pixels).save(folder / f"imgs/{part}" / name)
            lines.append(f"imgs/{part} {name} {number - start} {label} 1 2 14 3.5 6\n")
        (folder / f"metadata/{part}.npy").write_text("".join(lines))
    return directory


class TinyReviews(tfds.core.GeneratorBasedBuilder):
    """As imdb_reviews; a text says its split and number."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["neg", "pos"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {
            split: self._generate_examples(split, count)
            for split, count in (("train", 30), ("test", 5), ("unsupervised", 3))
        }

    def _generate_examples(self, split: str, count: int) -> Any:
        for number in range(count):
            yield number, {"text": f"{split} é {number}", "label": number % 2}


def prepare_reviews(directory: Path) -> Path:
    builder: Any = TinyReviews(data_dir=str(directory), file_format="array_record")
    builder.download_and_prepare()
    return directory
