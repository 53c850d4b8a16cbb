"""Tables: every cell is a config that exists; numbers come from rows; what is missing is shown as
missing."""

import json
import re
import shutil
import subprocess
from collections import defaultdict
from importlib import import_module
from inspect import signature

import pytest

from experiments import reproduce
from experiments.reporting import code_changes, figures, markdown, pages, rows
from experiments.reporting.table import Cell, Computation, available_tables, find_cells, find_table
from experiments.tables import lasp2_timed
from experiments.tables.computations import sequence_timing
from experiments.training import checkout
from experiments.training import config as configs

EVERY_SCALE = [(name, scale) for name in available_tables() for scale in find_table(name).SCALES]


@pytest.mark.parametrize(("name", "scale"), EVERY_SCALE)
def test_every_cell_is_a_valid_config(name, scale):
    cells = find_cells(find_table(name), scale)
    assert cells
    for cell in cells:
        if isinstance(cell, Computation):
            module, _, function = cell.config.partition(":")
            function = getattr(import_module(f"experiments.tables.computations.{module}"), function)
            signature(function).bind(seed=0, **cell.overrides)
        else:
            configs.validate(cell.make_config())
        assert cell.gap or "/" in cell.metric


def test_a_table_names_the_ways_that_are_timed():
    assert tuple(sequence_timing.WAYS) == lasp2_timed.WAYS


@pytest.mark.parametrize("name", available_tables())
def test_the_figure_is_drawn_from_rows_as_runs_leave_them(name, tmp_path):
    """Rows with any evaluation and metric: what a figure reads, the cells and their runs have."""
    table = find_table(name)
    scale = next(iter(table.SCALES))
    cells = [cell for cell in find_cells(table, scale) if not cell.gap]
    metrics = defaultdict(lambda: defaultdict(lambda: [0.5, 0.75]))
    # The evaluations of the table's cells, and those that only a figure reads.
    for evaluation in ("tone_0.5", *(cell.metric.split("/")[0] for cell in cells)):
        metrics[evaluation]["error_log10"] = [0.5, 0.75]
    row = {"evaluations": metrics, "parameters": 100, "state_bytes": 64}
    figure = tmp_path / "figure.png"
    figures.draw_table(table, cells, [row] * len(cells), figure)
    assert figure.exists() == (hasattr(table, "draw") and bool(cells))


def test_icl_cells_hold_the_published_risks():
    published = {
        (c.row, c.column): c.published for c in find_cells(find_table("icl_regression"), "cpu")
    }
    assert published["isotropic", "20 examples"] == pytest.approx(1.1538, abs=1e-4)
    assert published["eigenvalues 1/4, 1/2, 1, 2, 4", "80 examples"] == pytest.approx(
        0.5121, abs=1e-4
    )


def test_an_override_that_does_not_exist_is_named():
    cell = Cell("a", "b", "gla:mqar,smoke", "x/y", overrides={"optimizer.rate": 1.0})
    with pytest.raises(ValueError, match=r"a / b: the config has no entry 'optimizer.rate'"):
        cell.make_config()


def test_unknown_tables_and_scales_list_the_known_ones():
    with pytest.raises(
        ValueError, match=r"--table must be one of .*icl_regression, .*state_tracking"
    ):
        find_table("nothing")
    with pytest.raises(ValueError, match="--scale must be one of cpu, gpu"):
        find_cells(find_table("icl_regression"), "huge")


def fake_summary(value, commit=None):
    facts = dict.fromkeys(rows.FACTS)
    evaluations = {"long": {"scaled_accuracy": [value, value + 0.2]}}
    evaluations |= {
        f"length_{n}": {"scaled_accuracy": [value]} for n in find_table("state_tracking").GRID
    }
    versions = {"jax": "1", "flax": "2"}
    return facts | {
        "evaluations": evaluations,
        "seconds": 60.0,
        "versions": versions,
        "device_count": 1,
        "commit": commit,
    }


@pytest.fixture
def trained(monkeypatch):
    """Workdirs of the runs that were trained, none of them for real."""
    workdirs = []

    def run(config, workdir, *, brief):
        workdirs.append(workdir)
        return fake_summary(0.5, checkout.git("rev-parse", "HEAD"))

    monkeypatch.setattr(reproduce.train, "run", run)
    return workdirs


def reproduced(folder, **more):
    arguments = {"runs": folder / "runs", "results": folder / "results"}
    return reproduce.reproduce("state_tracking", "demo", **arguments, **more)


def line_of(row, text):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} ")]
    return [part.strip() for part in line.strip("|").split("|")]


def test_a_recorded_row_does_not_stand_for_ones_own(tmp_path, trained):
    """Everything is trained that one has not trained oneself, once, and shown beside the rest."""
    for cell in find_cells(find_table("state_tracking"), "demo"):
        recorded = rows.make_row("state_tracking", "demo", cell, fake_summary(0.0))
        rows.append(recorded, tmp_path / "results")
    before = {path: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    shown = reproduced(tmp_path, collect=True)
    assert not trained
    deltanet = ["DeltaNet [-1, 1]", "1.000", "0.100 ± 0.141 (n=2)"]
    assert line_of("", shown) == ["", "published", "recorded", "yours"]
    assert line_of("DeltaNet [-1, 1]", shown) == [*deltanet, "not run"]
    first = reproduced(tmp_path, only="DeltaNet")
    assert len(trained) == 2
    assert line_of("DeltaNet [-1, 1]", first) == [*deltanet, "0.600 ± 0.141 (n=2)"]
    assert line_of("Mamba [-1, 1]", first)[-1] == "not run"
    assert "not run" not in reproduced(tmp_path)
    assert len(trained) == len(set(trained)) == 4
    own = tmp_path / "runs" / "state_tracking"
    assert (own / "state_tracking_demo.png").stat().st_size > 1000
    assert {path: path.read_bytes() for path in (tmp_path / "results").iterdir()} == before


def test_recording_renews_what_is_missing_or_older_than_its_code(tmp_path, trained, monkeypatch):
    cells = find_cells(find_table("state_tracking"), "demo")
    here = checkout.git("rev-parse", "HEAD") or ""
    monkeypatch.setattr(rows, "commit_here", lambda: (here, True))
    with pytest.raises(ValueError, match=rf"{here[:10]} with uncommitted changes"):
        reproduced(tmp_path, record=True)
    monkeypatch.setattr(rows, "commit_here", lambda: (here, False))
    # The first row is as new as the code, the second is not.
    changed = {rows.make_row("", "", cells[1], fake_summary(0.0))["config_hash"]: {"a": {"ops"}}}
    monkeypatch.setattr(rows, "changes", lambda cell, row: changed.get(row["config_hash"], {}))
    for cell in cells[:2]:
        row = rows.make_row("state_tracking", "demo", cell, fake_summary(0.0, here))
        rows.append(row, tmp_path / "results")
    reproduced(tmp_path, record=True)
    assert len(trained) == 3 and not (tmp_path / "runs").exists()
    assert {path.parts[-4] for path in trained} == {f"recorded-{here[:10]}"}
    page = (tmp_path / "results" / "RESULTS.md").read_text()
    assert "| Mamba [0, 1] | 0.100 ± 0.141 (n=2) [0.000] |" in page
    assert "| Mamba [-1, 1] | 0.600 ± 0.141 (n=2) [1.000] |" in page


def test_the_code_of_a_row_is_what_its_run_imports():
    cells = {cell.row: cell for cell in find_cells(find_table("state_tracking"), "demo")}
    code = code_changes.code_of(cells["DeltaNet [-1, 1]"], "cpu")
    assert {"models/delta_net.py", "ops/delta_rule/xla.py", "ops/chunks/chunking.py"} <= code
    assert {"experiments/tasks/state_tracking.py", "experiments/training/step.py"} <= code
    assert not {f for f in code if "mamba" in f or "selective_scan" in f or "pallas" in f}
    kernel = "ops/delta_rule/pallas_tpu.py"
    assert kernel in code_changes.code_of(cells["DeltaNet [-1, 1]"], "tpu")
    mamba = code_changes.code_of(cells["Mamba [0, 1]"], "cpu")
    assert "ops/selective_scan/xla.py" in mamba and "models/delta_net.py" not in mamba
    (planned,) = {
        code_changes.code_of(cell, None)
        for cell in find_cells(find_table("lasp2_scaling"), "cpu")[:1]
    }
    assert {"experiments/plan.py", "experiments/training/step.py"} <= planned


def test_changes_since_a_row_are_commits_to_its_code(tmp_path, monkeypatch):
    """In a history of four commits: two after the row's touch its code, one of them is seen."""
    (cell, *_) = find_cells(find_table("ptd_robustness"), "cpu")
    for file in code_changes.code_of(cell, "cpu"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]

    def commit():
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "--message=m"], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        return head.stdout.strip()

    def described(commit, dirty=False):
        code_changes._history.cache_clear()
        row = {"commit": commit, "dirty": dirty, "platform": "cpu"}
        (line,) = code_changes.describe([(cell, row)])
        return line

    subprocess.run([*git, "init", "--quiet"], check=True)
    monkeypatch.setattr(checkout, "CHECKOUT", tmp_path)
    first = commit()
    (tmp_path / "models/gla.py").write_text("not of this row")
    second = commit()
    assert described(first) == f"since {first[:10]} the same"
    assert "files that differed from their commit" in described(first, dirty=True)
    (tmp_path / "models/parts/hippo.py").write_text("2\n")
    assert described(second).endswith(" changed in 0 commits: models/parts (1)")
    commit()
    assert described(first).endswith(" changed in 1 commits: models/parts (1)")
    unknown = "unknown, no history with it here"
    assert described("0" * 40) == f"since {'0' * 10} {unknown}"
    assert described(None) == f"since no commit {unknown}"
    shutil.rmtree(tmp_path / ".git")
    assert described(first) == f"since {first[:10]} {unknown}"
    code_changes._history.cache_clear()


def test_a_computed_cell_is_computed_once_and_kept_like_a_run(tmp_path):
    arguments = {"runs": tmp_path / "runs", "results": tmp_path / "results"}
    only = "S4D.*N = 16"
    text = reproduce.reproduce("ptd_robustness", "cpu", only=only, **arguments)
    assert re.search(r"\| S4D, normal part +\| N = 16: .* \| not run +\| 0\.000 \(n=1\) ", text)
    own = tmp_path / "runs" / "ptd_robustness"
    found = rows.read("ptd_robustness", own)
    reproduce.reproduce("ptd_robustness", "cpu", only=only, **arguments)
    assert found == rows.read("ptd_robustness", own)
    assert len(found) == 1 and found[0]["versions"]["jax"] and found[0]["examples"] is None
    assert {path.name for path in own.iterdir()} == {
        "ptd_robustness.jsonl",
        "ptd_robustness_cpu.png",
    }
    plan = reproduce.plan("ptd_robustness", "cpu")
    assert "computed by experiments.tables.computations.ptd_numerics:measure" in plan
    assert "experiments.train" not in plan


def test_a_table_that_asks_for_it_shows_parameters_and_state(tmp_path):
    table = find_table("mqar")
    cells = find_cells(table, "cpu")
    accuracy = {"length_32_pairs_8": {"accuracy": [0.5, 0.7]}}
    sizes = {"parameters": 12345, "state_bytes": 6789}
    summary = fake_summary(0.0) | sizes | {"evaluations": accuracy}
    rows.append(rows.make_row("mqar", "cpu", cells[0], summary), tmp_path)
    found = rows.matching(cells, rows.read("mqar", tmp_path), "cpu")
    text = markdown.section(table, "mqar", "cpu", cells, found)
    assert "| Attention | 0.600 ± 0.141 (n=2) | not run | not run |" in text
    assert "| Attention | 12,345 / 6,789 |  |  |" in text
    stateless = {"parameters": 5, "state_bytes": None}
    assert markdown.format_sizes(cells[0], stateless) == "5 / none"
    assert "in brackets" not in text
    figures.draw_table(table, cells, found, tmp_path / "mqar.png")
    assert (tmp_path / "mqar.png").stat().st_size > 1000


def test_a_run_whose_metric_is_not_finite_is_shown_as_that(tmp_path):
    table = find_table("mqar")
    cells = find_cells(table, "cpu")
    accuracy = {"length_32_pairs_8": {"accuracy": [None, 0.7]}}
    sizes = {"parameters": 1, "state_bytes": 1}
    summary = fake_summary(0.0) | sizes | {"evaluations": accuracy}
    rows.append(rows.make_row("mqar", "cpu", cells[0], summary), tmp_path)
    found = rows.matching(cells, rows.read("mqar", tmp_path), "cpu")
    text = markdown.section(table, "mqar", "cpu", cells, found)
    assert "| Attention | not finite (n=2) | not run | not run |" in text
    figures.draw_table(table, cells, found, tmp_path / "mqar.png")
    assert not (tmp_path / "mqar.png").exists()


def test_a_broken_row_is_reported_with_its_line(tmp_path):
    whole = dict.fromkeys(rows.NEEDED, "cpu")
    without_hash = {name: value for name, value in whole.items() if name != "config_hash"}
    for spoilt in ("not json", "[]", "3", json.dumps(without_hash)):
        (tmp_path / "state_tracking.jsonl").write_text(f"{json.dumps(whole)}\n{spoilt}\n")
        with pytest.raises(
            ValueError, match=r"state_tracking\.jsonl, line 2 is not a result row .*; remove"
        ):
            rows.read("state_tracking", tmp_path)
    cell = find_cells(find_table("mqar"), "cpu")[0]
    for evaluations in ({}, {"length_32_pairs_8": {"loss": [1.0]}}, None):
        with pytest.raises(ValueError, match=r"the row 'Attention', .* has no metric 'length_32_"):
            rows.value_of(cell, {"config_hash": "0", "evaluations": evaluations})


@pytest.mark.parametrize("ending", ["\n", "", " "])
def test_a_row_is_appended_as_a_line_of_its_own(tmp_path, ending):
    row = dict.fromkeys(rows.NEEDED, "größe") | {"table": "mine"}
    rows.append(row, tmp_path)
    file = tmp_path / "mine.jsonl"
    file.write_text(file.read_text().rstrip("\n") + ending)
    rows.append(row | {"scale": "cpu"}, tmp_path)
    assert rows.read("mine", tmp_path) == [row, row | {"scale": "cpu"}]


def test_tables_in_a_document_are_renewed_and_the_rest_of_it_stays(tmp_path):
    summary = fake_summary(0.25)
    for cell in find_cells(find_table("state_tracking"), "demo")[:1]:
        rows.append(rows.make_row("state_tracking", "demo", cell, summary), tmp_path)
    document = tmp_path / "README.md"
    document.write_text(
        "a\n<!-- results: state_tracking demo -->\nold\n<!-- end of results -->\nb\n"
    )
    pages.insert_tables(document, tmp_path)
    text = document.read_text()
    assert text.startswith("a\n<!-- results: state_tracking demo -->\n| | parity |\n")
    assert text.endswith("\n<!-- end of results -->\nb\n")
    assert "| Mamba [0, 1] | 0.350 ± 0.141 (n=2) [0.000] |" in text
    assert "old" not in text


@pytest.mark.parametrize("document", pages.DOCUMENTS, ids=lambda document: document.stem)
def test_documents_show_the_recorded_tables(document, tmp_path):
    copy = tmp_path / document.name
    copy.write_text(document.read_text())
    pages.insert_tables(copy)
    assert copy.read_text() == document.read_text()
    assert "<!-- results: " in document.read_text()
