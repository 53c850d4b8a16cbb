"""Sweep files and tables that cannot work: a line that says where, before anything runs."""

import re

import pytest

from experiments import check
from experiments.reporting.table import Cell
from experiments.training.command_line import Misuse
from launch import sweep as sweeps
from launch.runs import plan
from tests.launch.sweep_test import SWEEP, launch

FILES = {
    "empty": ("", "empty.py does not define TITLE, METRIC, SCALES, cells"),
    "cut": ("\nTITLE = (", "cut.py, line 2: SyntaxError: '(' was never closed"),
    "imports": (
        "import nothing_like_it",
        "line 3: ModuleNotFoundError: No module named 'nothing_l",
    ),
    "scales": (
        "cells = SCALES = {}",
        "SCALES must be {scale: what it is}, with at least one; got {}",
    ),
    "raises": ("def cells(scale):\n    return {}[scale]", "line 4: KeyError: 'tiny'"),
    "numbers": ("def cells(scale): return [1]", "must be a list of Cell; got [1]"),
    "model": ("def cells(scale): return cell('glaa:mqar')", "of based, clear, delta_net, "),
    "task": ("def cells(scale): return cell('gla:mqarr')", "mqar, parity, "),
    "key": ("def cells(scale): return cell('gla:mqar', lr=1)", "has no entry 'lr'"),
    "type": ("def cells(scale): return cell('gla:mqar', steps=())", "steps cannot be ()"),
}


START = """from experiments.reporting.table import Cell; TITLE = METRIC = ""; SCALES = {"tiny": ""}
def cell(config, **overrides): return [Cell("row", "column", config, "a/b", overrides)]
"""


@pytest.mark.parametrize("name", FILES)
def test_what_is_wrong_in_a_sweep_file_is_one_line_that_says_where(tmp_path, monkeypatch, name):
    code, message = FILES[name]
    (tmp_path / f"{name}.py").write_text((START if name not in ("empty", "cut") else "") + code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Misuse, match=re.escape(message)):
        plan(sweeps.find_sweep(f"{name}.py")[1], name, "tiny", tmp_path)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("nothing", "--table must be one of .*got 'nothing', or a sweep file, as <path>.py"),
        ("mqr", "did you mean 'mqar'?"),
        ("nothing.py", "there is no file nothing.py"),
        ("folder.py", "there is no file folder.py"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path, monkeypatch, sweep, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(Misuse, match=message):
        sweeps.find_sweep(sweep)


def test_a_sweep_that_cannot_work_ends_with_a_line_and_status_2_before_anything_runs(tmp_path):
    file, runs = tmp_path / "rates.py", tmp_path / "runs"
    wrong = "metric must be one of in_distribution/loss, in_distribution/normalised_loss; got 'in"
    for text, message in (
        (SWEEP.replace("_distribution/loss", "_distribution/los"), wrong),
        (SWEEP.replace("TITLE, METRIC", "TITLE; METRIC"), "NameError: name 'TITLE' is not defined"),
    ):
        file.write_text(text)
        status, output, errors = launch(f"--sweep={file}", f"--runs={runs}")
        assert (status, output) == (2, "") and errors.count("\n") == 1 and message in errors, errors
        assert not runs.exists()


@pytest.mark.slow
def test_what_layers_report_is_a_metric_and_data_that_are_elsewhere_are_said():
    def one(config, metric, **overrides):
        return list(check.check([Cell("row", "column", config, metric, overrides)]))

    assert one("mom:mqar,smoke", "length_32_pairs_8/routing_entropy") == []
    with pytest.raises(
        Misuse, match=r"must be one of .*routing_entropy; got 'length_32_pairs_8/x'"
    ):
        one("mom:mqar,smoke", "length_32_pairs_8/x")
    with pytest.raises(Misuse, match="got 'length_33/loss'"):
        one("gla:mqar,smoke", "length_33/loss")
    with pytest.raises(Misuse, match=r"row / column: config.steps must be greater than 0; got 0"):
        one("gla:mqar,smoke", "length_33/loss", steps=0)
    there = "not checked: row / column: path must be a text file or a directory of text files; '/no"
    (line,) = one("gla:text,smoke", "validation/loss", **{"task.path": "/nowhere"})
    assert line.startswith(there)
