"""The files that the Long Range Arena released (Tay et al., ICLR 2021, arXiv 2011.04006): where
they are, and how its tables, in which a line is an example, are read line by line.

ListOps, Retrieval, Pathfinder and Path-X lie in one archive, 19 GB unpacked, each in a folder of
its own. Of a table only the places of its lines and their classes are held in memory; opening it
reads it through once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ARCHIVE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"


def released(data_dir: str, folder: str, entries: Sequence[str]) -> Path:
    """The directory of the option `data_dir`, which must have `entries`.

    Raises ValueError if they are missing; the message has `folder`, where they are in the release.
    """
    directory = Path(data_dir).expanduser()
    missing = [entry for entry in entries if not (directory / entry).exists()]
    if missing:
        what = f"has no {missing[0]}" if directory.is_dir() else "is no directory"
        raise ValueError(
            f"task.data_dir must be a directory with {', '.join(entries)}; {directory}"
            f" {what}. They are in the folder {folder} of the release of the Long Range"
            f" Arena: download {ARCHIVE} (or a copy of it), unpack it with tar -xf, and"
            " set task.data_dir to that folder"
        )
    return directory


@dataclass(frozen=True)
class Table:
    """A file of lines with columns between tabs. starts [lines + 1] is where each line begins and
    the last one ends; sha256 is of the whole file."""

    path: Path
    starts: np.ndarray
    labels: np.ndarray
    header: bool
    sha256: str

    def rows(self, numbers: np.ndarray) -> list[list[bytes]]:
        """The columns of the lines with these numbers, counted from 0 and without the header."""
        rows = []
        with self.path.open("rb") as file:
            for number in numbers.tolist():
                begin, end = self.starts[number : number + 2].tolist()
                file.seek(begin)
                rows.append(_columns(file.read(end - begin)))
        return rows

    def place(self, number: int) -> str:
        """Where the line with this number is, for a message."""
        return f"{self.path}, line {number + 1 + self.header}"


def open_table(
    path: Path, columns: Sequence[str], *, label: str, classes: int, header: bool
) -> Table:
    """The table at `path`; the column `label` holds a class, a number below `classes`.

    Raises ValueError, with the number of the line, for a line with another number of columns, a
    label that is no class or another header, and for a table without lines."""
    # AAN's labels are written as floats.
    known = {
        f"{number}{fraction}".encode(): number
        for number in range(classes)
        for fraction in ("", ".0")
    }
    place = list(columns).index(label)
    starts, labels, end, digest = [], [], 0, hashlib.sha256()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            begin, end = end, end + len(line)
            row = _columns(line)
            if len(row) != len(columns):
                raise ValueError(
                    f"{path}, line {number}: must have {len(columns)} columns with tabs"
                    f" between them, {', '.join(columns)}; it has {len(row)}"
                )
            if header and number == 1:
                if row != [name.encode() for name in columns]:
                    raise ValueError(
                        f"{path} must begin with the names of its columns,"
                        f" {', '.join(columns)}; it begins {line[:40]}"
                    )
                continue
            if row[place] not in known:
                raise ValueError(
                    f"{path}, line {number}: {label} must be a number below {classes};"
                    f" got {row[place][:40]}"
                )
            starts.append(begin)
            labels.append(known[row[place]])
    if not labels:
        raise ValueError(f"{path} must have lines of {', '.join(columns)}; it has none")
    return Table(
        path, np.array([*starts, end]), np.array(labels, np.int32), header, digest.hexdigest()
    )


def _columns(line: bytes) -> list[bytes]:
    return line.rstrip(b"\r\n").split(b"\t")
