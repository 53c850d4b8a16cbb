"""Tables: every cell is a config that exists; numbers come from rows; what is missing is shown as
missing."""

from collections import defaultdict
from importlib import import_module
from inspect import signature

import pytest

from experiments import reproduce
from experiments.reporting import figures, markdown, pages, rows
from experiments.reporting.table import Cell, Computation, available_tables, find_cells, find_table
from experiments.tables import lasp2_timed
from experiments.tables.computations import sequence_timing
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
        ValueError, match=r"--table must be one of icl_regression, .*state_tracking"
    ):
        find_table("nothing")
    with pytest.raises(ValueError, match="--scale must be one of cpu, gpu"):
        find_cells(find_table("icl_regression"), "huge")


def fake_summary(value):
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
        "commit": "c",
    }


def test_a_finished_cell_is_not_run_again_and_gaps_are_shown(tmp_path, monkeypatch):
    ran = []

    def run(config, workdir):
        ran.append(workdir.name)
        return fake_summary(0.5)

    monkeypatch.setattr(reproduce.train, "run", run)
    arguments = {"runs": tmp_path / "runs", "directory": tmp_path / "results"}
    first = reproduce.reproduce("state_tracking", "demo", only="DeltaNet", **arguments)
    assert len(ran) == 2
    assert "| DeltaNet [-1, 1] | 0.600 ± 0.141 (n=2) [1.000] |" in first
    assert "| Mamba [-1, 1] | not run [1.000] |" in first
    second = reproduce.reproduce("state_tracking", "demo", **arguments)
    assert len(ran) == 4
    assert "not run" not in second
    assert (tmp_path / "results" / "state_tracking_demo.png").stat().st_size > 1000
    assert second.splitlines()[0] in (tmp_path / "results" / "RESULTS.md").read_text()


def test_a_computed_cell_is_computed_once_and_recorded_like_a_run(tmp_path):
    arguments = {"runs": tmp_path / "runs", "directory": tmp_path / "results"}
    only = "S4D.*N = 16"
    text = reproduce.reproduce("ptd_robustness", "cpu", only=only, **arguments)
    assert "| S4D, normal part | 0.000 (n=1) | 78.5" in text
    found = rows.read("ptd_robustness", tmp_path / "results")
    reproduce.reproduce("ptd_robustness", "cpu", only=only, **arguments)
    assert found == rows.read("ptd_robustness", tmp_path / "results")
    assert len(found) == 1 and found[0]["versions"]["jax"] and found[0]["examples"] is None
    assert not (tmp_path / "runs").exists()
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
    (tmp_path / "state_tracking.jsonl").write_text('{"scale": "cpu"}\nnot json\n')
    with pytest.raises(ValueError, match=r"state_tracking\.jsonl, line 2 is not a result row"):
        rows.read("state_tracking", tmp_path)


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
