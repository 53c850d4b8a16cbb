"""Chains of runs for tables: what they share is trained once, and numbers are the last run's."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.tables.computations import linearisation
from experiments.tables.mm_mamba_stages import cells


def test_stages_follow_each_other_and_a_shared_one_is_trained_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[tuple[str, ...]] = []

    def fake(command: tuple[str, ...], workdir: str) -> str:
        if command not in commands:
            commands.append(command)
        Path(workdir).mkdir(parents=True, exist_ok=True)
        summary = {"evaluations": {"validation": {"loss": [float(len(commands)), 9.0]}}}
        (Path(workdir) / "summary.json").write_text(json.dumps(summary))
        return workdir

    monkeypatch.setattr(linearisation, "_run", fake)
    by_row: dict[str, Any] = {cell.row: cell for cell in cells("cpu")}
    one = linearisation.chain(seed=3, **by_row["mimic, stage 1"].overrides)
    assert one == {"validation": {"loss": 4.0}} and len(commands) == 4
    linearisation.chain(seed=3, **by_row["mimic, stages 1, 3"].overrides)
    assert len(commands) == 5, "the teacher and two stages are shared"
    teacher, first, second = (command[0] for command in commands[:3])
    assert teacher.endswith("transformer.py:text,smoke")
    assert first.startswith("--config=experiments/configs/mm_mamba.py:/") and first != second
    assert all("--config.seeds=(3,)" in command for command in commands)
    linearisation.chain(seed=4, stages=[])
    assert len(commands) == 6
