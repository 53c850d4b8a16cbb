"""Numbers of compiled programs that must not be exceeded: a JSON file, by compiler and program."""

import json
from pathlib import Path
from typing import Any

GROWTH = 1.02  # beyond which a number counts as exceeded: compilers are not quite repeatable


def recorded(path: Path, compiler: str) -> dict[str, Any] | None:
    """Numbers by program, or None for a compiler of which nothing is recorded."""
    return json.loads(path.read_text()).get(compiler) if path.exists() else None


def record(path: Path, compiler: str, program: str, numbers: dict[str, Any]) -> None:
    """Writes the numbers of a program in the place of those that were there."""
    ratchet = json.loads(path.read_text()) if path.exists() else {}
    ratchet.setdefault(compiler, {})[program] = numbers
    path.write_text(json.dumps(ratchet, indent=1, sort_keys=True) + "\n")
