"""Text as named documents in three splits: the running Python's own library, or the user's files.

A document belongs to a split by the hash of its name, so that adding a file moves no other. The sum
over all names and contents says which text a number was measured on: the standard library differs
from one Python release to the next."""

import functools
import hashlib
import json
import os
import platform
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from experiments.training.progress import warn

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

# Text of this size and more is not read again to learn its hash while no file of it changes.
LARGE = 2**26
SETTLED_SECONDS = 2  # since the last change: a file system's clock may be that coarse


@dataclass(frozen=True)
class Document:
    """A file, or what stands for one, and its bytes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents by split, in the order of their names, read when they are asked for. `sha256` is
    over all names and contents, `size` in bytes; `inside` says that files are cut into splits."""

    source: str
    files: int
    size: int
    sha256: str
    read: Callable[[], Mapping[str, tuple[Document, ...]]]
    inside: bool = False

    @functools.cached_property
    def splits(self) -> Mapping[str, tuple[Document, ...]]:
        return self.read()


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
    documents = sorted((d for d in documents if d.content), key=lambda document: document.name)
    size = sum(len(document.content) for document in documents)
    source = f"standard library of Python {platform.python_version()}"
    return Corpus(source, len(documents), size, _sha256(documents), lambda: _by_name(documents))


def text_files(
    path: str,
    validation_path: str = "",
    test_path: str = "",
    *,
    window: int = 0,
    hashes: Path | None = None,
) -> Corpus:
    """The text of the options path, validation_path and test_path, each a file or a directory with
    all files under it, but hidden ones.

    Without validation_path, a file is cut in three at line ends (the first 90 %, 5 %, 5 %), and the
    files of a directory are split by their names; if that leaves a split with no more than `window`
    bytes, each of them is cut like a single one. With it `path` is for training, but for files that
    are in the others too, and there is a split "test" if there is a test_path.

    `hashes` is a directory for the hashes of large texts, which are found again by the name, size,
    inode and times of every file. Raises ValueError where there is no text, and for a file that
    cannot be read.
    """
    root = _existing("path", path)
    chosen = {"": _files(root)}
    source = f"{'directory' if root.is_dir() else 'file'} {root.name}"
    if test_path and not validation_path:
        raise ValueError("test_path needs a validation_path beside it; got ''")
    if validation_path:
        given = {"validation": validation_path, "test": test_path}
        roots = {split: _existing(f"{split}_path", p) for split, p in given.items() if p}
        chosen = _apart(root, roots)
        source += "".join(f", {split} {other.name}" for split, other in roots.items())
    files = {
        "/".join((*([split] if split else []), name)): file
        for split, found in chosen.items()
        for name, file in found.items()
    }
    stats = {name: file.stat() for name, file in files.items()}
    names = sorted(name for name in files if stats[name].st_size)
    if not names:
        raise ValueError(
            f"the {source} holds no text, only empty files or none; set task.path to what has text"
        )
    read = functools.cache(lambda: [Document(name, _content(files[name])) for name in names])
    size = sum(stats[name].st_size for name in names)
    known = _known_hash(hashes, {name: stats[name] for name in names}) if size >= LARGE else None
    sha256 = known.read_text("utf-8") if known and known.exists() else _sha256(read())
    if known and not known.exists():
        known.parent.mkdir(parents=True, exist_ok=True)
        unfinished = known.with_name(f".{known.name}.{os.getpid()}")
        unfinished.write_text(sha256, "utf-8")
        unfinished.replace(known)

    if validation_path:
        return Corpus(source, len(names), size, sha256, lambda: _by_folder(read(), chosen))
    shares: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for name in names:
        shares[split_of(name)] += stats[name].st_size
    inside = root.is_dir() and min(shares.values()) <= window
    cut = inside or not root.is_dir()
    return Corpus(
        source,
        len(names),
        size,
        sha256,
        lambda: _cut(read()) if cut else _by_name(read()),
        inside=inside,
    )


def split_of(name: str) -> str:
    """The split of a document by its name."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return SPLITS[int.from_bytes(digest[:8]) % len(SPLITS)]


def _by_name(documents: Sequence[Document]) -> dict[str, tuple[Document, ...]]:
    return {
        split: tuple(document for document in documents if split_of(document.name) == split)
        for split in dict.fromkeys(SPLITS)
    }


def _by_folder(
    documents: Sequence[Document], splits: Mapping[str, object]
) -> dict[str, tuple[Document, ...]]:
    return {
        split: tuple(d for d in documents if d.name.startswith(f"{split}/")) for split in splits
    }


def _cut(documents: Sequence[Document]) -> dict[str, tuple[Document, ...]]:
    """The first 90 %, 5 % and 5 % of each document, cut at line ends."""
    splits: dict[str, list[Document]] = {split: [] for split in dict.fromkeys(SPLITS)}
    for document in documents:
        content = document.content
        ends = [_line_end(content, len(content) * part // 100) for part in (90, 95)]
        pieces = content[: ends[0]], content[ends[0] : ends[1]], content[ends[1] :]
        for split, piece in zip(splits, pieces, strict=True):
            splits[split].append(Document(document.name, piece))
    return {split: tuple(pieces) for split, pieces in splits.items()}


def _line_end(content: bytes, position: int) -> int:
    """The first place at or after `position` behind a line end; without one, `position`."""
    newline = content.find(b"\n", max(position - 1, 0))
    return position if newline < 0 else newline + 1


def _existing(option: str, path: str) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir() and not root.is_file():
        problem = "is neither" if os.path.lexists(root) else "does not exist"
        raise ValueError(
            f"{option} must be a text file or a directory of text files; {path!r} {problem}"
        )
    return root


def _files(root: Path) -> dict[str, Path]:
    """The file `root`, or all files under the directory, by their names in it, without hidden ones
    and with a warning for what is no file, such as a link to nothing."""
    if not root.is_dir():
        return {root.name: root}

    def fail(error: OSError) -> None:
        raise ValueError(f"cannot read {str(error.filename)!r} ({error.strerror})") from error

    found, others = {}, []
    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            path = Path(folder, name)
            if name.startswith(".") or (path.is_dir() and not path.is_symlink()):
                continue
            if path.is_file():
                found[path.relative_to(root).as_posix()] = path
            else:
                others.append(path)
    if others:
        names = ", ".join(repr(str(path)) for path in sorted(others)[:5])
        warn(f"{len(others)} entries are no files (or links to folders) and left out: {names}")
    return found


def _apart(root: Path, roots: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """The files of every split; what is in another split is not for training."""
    chosen = {split: _files(other) for split, other in roots.items()}
    owner: dict[Path, str] = {}
    for split, found in chosen.items():
        for file in found.values():
            if owner.setdefault(file.resolve(), split) != split:
                raise ValueError(
                    "validation_path and test_path must have no file in common; both have"
                    f" {str(file)!r}"
                )
    train = {name: file for name, file in _files(root).items() if file.resolve() not in owner}
    return {"train": train, **chosen}


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {str(file)!r} ({error.strerror})") from error


def _sha256(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        # Lengths keep the end of one part from being read as the beginning of the next. A name that
        # is not UTF-8 counts with the bytes that it has.
        for part in (os.fsencode(document.name), document.content):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
    return digest.hexdigest()


def _known_hash(hashes: Path | None, stats: Mapping[str, os.stat_result]) -> Path | None:
    """Where the hash of these files is kept; None for files that have just changed."""
    newest = max(max(stat.st_mtime, stat.st_ctime) for stat in stats.values())
    if hashes is None or time.time() - newest < SETTLED_SECONDS:
        return None
    listing = [
        (name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        for name, stat in stats.items()
    ]
    return hashes / hashlib.sha256(json.dumps(listing).encode()).hexdigest()
