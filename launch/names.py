"""Names that an engine shares with other sweeps and other people: unique to the sweep, the scale,
the user and the folder of the runs, and of letters that every engine takes."""

import getpass
import hashlib
import os
import re
from pathlib import Path

from launch.runs import Run


def kubernetes_name(text: str, longest: int = 39) -> str:
    """A DNS label of at most 39 characters (what xpk takes): the end of `text`, where names of runs
    have a hash."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    label = label[-longest:].strip("-")
    return label if label[:1].isalpha() else f"r-{label}"[:longest].strip("-")


def workload_name(run: Run) -> str:
    """The name of a run among everybody's: of this user, and of this workdir."""
    return f"{kubernetes_name(run.name, 30)}-{_digest(run.workdir)}"


def sweep_name(name: str, run: Run) -> str:
    """The name of the sweep `name` that `run` is of: of this user, and of this folder of runs."""
    return f"{kubernetes_name(name, 40)}-{_digest(run.workdir.parent)}"


def _digest(path: Path) -> str:
    """Eight hexadecimal digits of who runs what where."""
    return hashlib.sha256(f"{_user()}\0{path.absolute()}".encode()).hexdigest()[:8]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())
