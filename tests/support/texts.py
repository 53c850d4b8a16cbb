"""Shared by tests of text: a directory of files, and tasks made of it."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tasks.sources.text_corpus import split_of
from experiments.training.task import Batch, Examples, find_task

LENGTH = 16


def write_texts(root: Path) -> Path:
    """A directory of 200 texts in which no window occurs twice; 25 are empty."""
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
