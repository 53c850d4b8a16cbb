"""Text as named documents in three splits: the running Python's own library, or the user's files.

A document belongs to a split by the hash of its name, so that adding a file moves no other. The sum
over all names and contents says which text a number was measured on: the standard library differs
from one Python release to the next."""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

# Shares of the 20 hash classes: 90 % train, 5 % validation, 5 % test.
SPLITS = ("train",) * 18 + ("validation", "test")

# Installed or vendored packages, tests, what the build wrote, what a distribution adds, and the
# code pages in encodings/: generated tables so alike that those in one split give away those in
# another.
PACKAGES, TESTS = ({"site-packages", "dist-packages", "_bundled"}, {"test", "tests", "idle_test"})
EXCLUDED_FOLDERS = PACKAGES | TESTS | {"__pycache__", "encodings"}
EXCLUDED_FILES = {"sitecustomize.py", "usercustomize.py"}
BUILT = ("config-", "_sysconfig")
TOPICS_FILE = "pydoc_data/topics.py"  # read as the texts in it


@dataclass(frozen=True)
class Document:
    """A file, or what stands for one, and its bytes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents by split, in the order of their names. `sha256` is over all names and contents,
    `size` in bytes."""

    source: str
    splits: dict[str, tuple[Document, ...]]
    files: int
    size: int
    sha256: str


def standard_library() -> Corpus:
    """Sources of the running Python's standard library and the texts of its documentation topics.

    Tests, vendored and installed packages are left out, and so is what the build wrote.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = [Document(f"topics/{name}.txt", text.encode()) for name, text in topics.items()]
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name for name in folders if name not in EXCLUDED_FOLDERS and not name.startswith(BUILT)
        ]
        kept = [
            name
            for name in files
            if name.endswith(".py") and name not in EXCLUDED_FILES and not name.startswith(BUILT)
        ]
        names = [Path(folder, name).relative_to(root).as_posix() for name in kept]
        documents += [
            Document(name, (root / name).read_bytes()) for name in names if name != TOPICS_FILE
        ]
    return _corpus(f"standard library of Python {platform.python_version()}", documents)


def text_files(path: str) -> Corpus:
    """The file `path`, cut in three at line ends (the first 90 %, 5 %, 5 %), or the files under the
    directory `path`.

    Hidden files are not read. Raises ValueError where there is no text.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        names = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
        visible = [
            name for name in names if not any(part.startswith(".") for part in name.split("/"))
        ]
        return _corpus(
            f"directory {root.name}",
            [Document(name, (root / name).read_bytes()) for name in visible],
        )
    if not root.is_file():
        raise ValueError(
            f"path must be a text file or a directory of text files; {path!r} does not exist"
        )
    content = root.read_bytes()
    ends = [_line_end(content, len(content) * part // 100) for part in (90, 95)]
    pieces = content[: ends[0]], content[ends[0] : ends[1]], content[ends[1] :]
    splits = {
        name: (Document(name, piece),)
        for name, piece in zip(dict.fromkeys(SPLITS), pieces, strict=True)
    }
    return _corpus(f"file {root.name}", [Document(root.name, content)], splits)


def split_of(name: str) -> str:
    """The split of a document by its name."""
    return SPLITS[int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % len(SPLITS)]


def _corpus(
    source: str,
    documents: Iterable[Document],
    splits: dict[str, tuple[Document, ...]] | None = None,
) -> Corpus:
    documents = sorted(
        (document for document in documents if document.content), key=lambda document: document.name
    )
    if not documents:
        raise ValueError(
            f"the {source} holds no text, only empty files or none; set task.path to what has text"
        )
    digest = hashlib.sha256()
    for document in documents:
        # Lengths keep the end of one part from being read as the beginning of the next.
        for part in (document.name.encode(), document.content):
            digest.update(len(part).to_bytes(8) + part)
    if splits is None:
        splits = {
            split: tuple(d for d in documents if split_of(d.name) == split)
            for split in dict.fromkeys(SPLITS)
        }
    size = sum(len(document.content) for document in documents)
    return Corpus(source, splits, len(documents), size, digest.hexdigest())


def _line_end(content: bytes, position: int) -> int:
    """The first place at or after `position` behind a line end; without one, `position`."""
    newline = content.find(b"\n", max(position - 1, 0))
    return position if newline < 0 else newline + 1
