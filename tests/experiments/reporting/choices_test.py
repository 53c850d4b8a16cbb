"""Cells that take the best of several runs: what runs, what is shown, and what it is chosen by."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import check, reproduce
from experiments.reporting import html, markdown, rows
from experiments.reporting.table import Cell, Choice, config_hash, find_table, find_workdir, runs_of
from launch.runs import plan, with_failures

CHOICE = Choice({"optimizer.lr": (1e-3, 1e-2)}, "validation/accuracy")
CELL = Cell("vit", "x", "vit:digits,smoke", "test/accuracy", {"steps": 3}, (0, 1), choice=CHOICE)
PLAIN = Cell("gla", "x", "gla:mqar,smoke", "length_64_pairs_4/accuracy")


def row(cell: Cell, validation: list[Any], test: list[float], **facts: Any) -> dict[str, Any]:
    scores = {"validation": {"accuracy": validation}, "test": {"accuracy": test}}
    return {
        "scale": "cpu",
        "config_hash": config_hash(cell.make_config()),
        "evaluations": scores,
        "seconds": 60.0,
        "parameters": 1,
        "state_bytes": None,
        **facts,
    }


def test_every_combination_is_a_run_and_a_plain_cell_is_its_own():
    both = Choice({"optimizer.lr": (1e-3, 1e-2), "optimizer.weight_decay": (0.0, 0.1)}, "v/a")
    found = replace(CELL, choice=both).variants()
    assert [cell.variant for cell in found] == [
        "lr 0.001, weight_decay 0.0",
        "lr 0.001, weight_decay 0.1",
        "lr 0.01, weight_decay 0.0",
        "lr 0.01, weight_decay 0.1",
    ]
    config: Any = found[2].make_config()
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.steps) == (1e-2, 0.0, 3)
    assert runs_of([PLAIN, CELL]) == [PLAIN, *CELL.variants()]
    assert CELL.variants()[0].label == "vit / x, lr 0.001"
    paths = {find_workdir(Path("runs"), cell).name for cell in CELL.variants()}
    assert len(paths) == 2 and all("lr_0_0" in path for path in paths)


def test_the_best_by_validation_is_shown_with_its_number_of_the_test():
    low, high = CELL.variants()
    recorded = [row(low, [0.9, 0.7], [0.1, 0.1]), row(high, [0.6, 0.8], [1.0, 1.0])]
    (found,) = rows.matching([CELL], recorded, "cpu")
    assert found and rows.value_of(CELL, found) == [0.1, 0.1]
    assert markdown.format_choice(CELL, found) == "lr 0.001 (0.100 to 1.000 of 2)"
    least = replace(CELL, choice=replace(CHOICE, mode="min"))
    (found,) = rows.matching([least], recorded, "cpu")
    assert found and rows.value_of(least, found) == [1.0, 1.0]
    # A seed that diverged is worse than any number.
    recorded[0] = row(low, [0.9, None], [0.1, 0.1])
    (found,) = rows.matching([CELL], recorded, "cpu")
    assert found and rows.value_of(CELL, found) == [1.0, 1.0]


def test_nothing_is_chosen_before_all_have_run():
    low, high = CELL.variants()
    recorded = [row(low, [0.9, 0.7], [0.1, 0.1])]
    assert rows.matching([CELL], recorded, "cpu") == [None]
    each = runs_of([CELL])
    assert rows.missing(each, rows.matching(each, recorded, "cpu")) == [high]


def test_a_number_is_not_chosen_by_itself():
    with pytest.raises(ValueError, match="of another evaluation than the one that chooses"):
        replace(CELL, metric="validation/loss")


SWEEP: Any = SimpleNamespace(
    TITLE="t", METRIC="m", SCALES={"cpu": "small"}, __file__="", cells=lambda scale: [CELL]
)


def test_a_sweep_runs_all_and_a_failed_one_is_the_failure_of_the_cell(tmp_path):
    planned = plan(SWEEP, "toy", "cpu", tmp_path)
    assert [cells for _, cells in planned] == [[cell] for cell in CELL.variants()]
    assert [cell.gap for cell in with_failures([CELL], [None], planned)] == [""]
    planned[1][0].log.parent.mkdir(parents=True)
    planned[1][0].log.write_text("error: it ended\n", encoding="utf-8")
    assert [cell.gap for cell in with_failures([CELL], [None], planned)] == ["failed"]


def test_a_metric_that_chooses_must_be_one_of_the_task():
    unknown = replace(CELL, choice=replace(CHOICE, metric="validaton/accuracy"))
    with pytest.raises(check.Misuse, match="metric must be one of"):
        list(check.check([unknown]))
    assert not list(check.check([CELL]))


def test_commands_and_minutes_are_those_of_all_runs(tmp_path):
    text = reproduce.plan("image_classification", "cpu", tmp_path)
    assert len(re.findall("--config.optimizer.lr=", text)) == len(
        runs_of(find_table("image_classification").cells("cpu"))
    )
    low, high = CELL.variants()
    facts = {"commit": None, "dirty": False, "device": "cpu", "platform": "cpu"}
    facts |= {"device_count": 1, "versions": {"jax": "1", "flax": "2"}}
    recorded = [row(low, [0.9], [0.1], **facts), row(high, [0.6], [1.0], **facts)]
    found = rows.matching([CELL], recorded, "cpu")
    section = markdown.section(SWEEP, "toy", "cpu", [CELL], found)
    assert "1 of 1 cells in 2 minutes" in section
    assert "Chosen by the mean over seeds of validation/accuracy" in section
    page = tmp_path / "page.html"
    html.write(page, SWEEP, "toy", "cpu", [], runs=tmp_path)
    assert '"status": "not run"' in page.read_text("utf-8")
