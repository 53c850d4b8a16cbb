"""The page of a table: complete, self-contained, and safe whatever its texts say.

In a real browser (Debian: apt-get install chromium) only when asked for:

    python -m pytest tests/experiments/reporting/html_test.py -m browser
"""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.reporting import html, rows
from experiments.reporting.table import Cell, config_hash, workdir_name

CONFIG = "linear_self_attention:icl_regression,smoke"
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"> <!-- & {{title}}"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def make_cell(row: str, lr: float, **more: Any) -> Cell:
    overrides = {"optimizer.lr": lr}
    return Cell(row, f"lr {lr}", CONFIG, "length_20/loss", overrides, (0, 1), **more)


CELLS = [
    make_cell("GLA", 0.1, published=0.5),
    make_cell("GLA", 0.2, gap="a day long"),
    make_cell(HOSTILE, 0.3),
    make_cell(HOSTILE, 0.4, published=0.25),
    make_cell("Slow", 0.5),
]
TABLE = SimpleNamespace(
    TITLE=f"Rates {HOSTILE}",
    SOURCE="a paper",
    METRIC="Risk",
    SCALES={"cpu": "tiny"},
    cells=lambda scale: CELLS,
)


def make_row(cell: Cell, losses: dict[int, list[float | None]]) -> dict[str, Any]:
    evaluations = {
        f"length_{n}": {"accuracy": [0.5, 0.5], "loss": each} for n, each in losses.items()
    }
    facts: dict[str, Any] = dict.fromkeys(rows.FACTS)
    facts |= {"parameters": 1234567, "state_bytes": 89, "seconds": 9.0}
    facts |= {"versions": {"jax": "1.2"}, "commit": "abcdef0123456", "dirty": True}
    facts |= {"device_count": 1, "device": "abacus", "evaluations": evaluations}
    return {"scale": "cpu", "examples": 10, **facts} | {
        "config_hash": config_hash(cell.make_config())
    }


def test_a_number_that_is_not_finite_is_a_dash_on_the_page(tmp_path):
    recorded = [make_row(CELLS[0], {20: [None, 0.7], 5: [0.1, None], 40: [None, 0.9]})]
    html.write(tmp_path / "report.html", TABLE, "rates", "cpu", recorded, runs=tmp_path / "runs")
    assert '"per seed": [null, ' in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Of five cells: one done, a gap, one never run, one failed, one under way. Two have curves."""
    folder = tmp_path_factory.mktemp("report")
    done, _, _, failed, slow = (folder / "runs/rates/cpu" / workdir_name(cell) for cell in CELLS)
    for workdir in (done, failed, slow):
        workdir.mkdir(parents=True)
    lines = [
        {"step": step, "train/loss": [1 / step, None], "speed/tokens": 5.0}
        for step in range(1, 1001)
    ]
    text = "\n".join(map(json.dumps, lines))
    (done / "metrics.jsonl").write_text(text + '\n{"step": 1001, "train/lo')
    (failed / "log.txt").write_text("Traceback\nerror: the run diverged\n\n")
    (slow / "run.json").write_text("{}")
    (slow / "metrics.jsonl").write_text('{"step": 7, "train/loss": [1.0]}\n')
    recorded = [make_row(CELLS[0], {20: [0.5, 0.7], 5: [0.1, 0.3], 40: [None, 0.9]})]
    path = folder / "pages" / "report.html"
    html.write(path, TABLE, "rates", "cpu", recorded, runs=folder / "runs")
    return path


class Outline(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def embedded(page: Path) -> dict[str, Any]:
    return json.loads("".join(Outline(page.read_text("utf-8")).scripts[:1]))


def test_the_page_needs_nothing_but_itself(page):
    outline = Outline(page.read_text("utf-8"))
    for tag, attributes in outline.tags:
        assert tag not in ("link", "img", "iframe") and "src" not in attributes, tag
    (policy,) = (a["content"] for t, a in outline.tags if "http-equiv" in a)
    assert str(policy).startswith("default-src 'none';")
    assert not re.search(r"url\(|@import|fetch\(|import\(", page.read_text("utf-8"))


def test_texts_of_a_table_never_become_markup(page):
    outline = Outline(page.read_text("utf-8"))
    assert [t for t, _ in outline.tags].count("script") == 2
    assert embedded(page)["cells"][2]["row"] == HOSTILE


def test_every_cell_says_how_it_stands(page):
    cells = embedded(page)["cells"]
    assert [(cell["status"], cell["text"], cell["note"]) for cell in cells] == [
        ("done", "0.600 ± 0.141 (n=2) [0.500]", ""),
        ("gap", "gap", "a day long"),
        ("not run", "not run", ""),
        ("failed", "failed [0.250]", "error: the run diverged"),
        ("unfinished", "unfinished", "last logged at step 7"),
    ]
    facts = cells[0]["facts"]
    assert facts["parameters"] == 1234567 and facts["state bytes"] == 89
    assert facts["commit"] == "abcdef0123+changes"
    assert facts["hardware"] == "1 x abacus (None)" and facts["versions"] == "jax 1.2"
    assert all(cell["facts"] == {} for cell in cells[1:])


def test_a_run_that_a_sweep_gave_up_is_failed_whatever_it_left(page, tmp_path):
    name, path = workdir_name(CELLS[4]), tmp_path / "again.html"
    runs = page.parent.parent / "runs"
    html.write(path, TABLE, "rates", "cpu", [], runs=runs, failed=[name])
    assert [cell["status"] for cell in embedded(path)["cells"]][-2:] == ["failed"] * 2


def test_curves_are_thinned_and_lengths_are_in_order(page):
    cell = embedded(page)["cells"][0]
    (curve,) = cell["curves"]
    assert curve["metric"] == "train/loss" and 200 <= len(curve["points"]) <= 300
    assert curve["points"][0] == [1, 1.0, 1.0, 1.0]
    loss, accuracy = cell["lengths"]
    assert (loss["metric"], accuracy["metric"]) == ("loss", "accuracy")
    assert loss["points"] == [[5, 0.1, 0.2, 0.3], [20, 0.5, 0.6, 0.7], [40] + [0.9] * 3]


def test_recorded_numbers_stand_beside_ones_own_and_in_their_place(tmp_path):
    own = [make_row(CELLS[0], {20: [0.5, 0.7]})]
    recorded = [make_row(cell, {20: [0.1, 0.3]}) for cell in (CELLS[0], CELLS[2])]
    path = tmp_path / "report.html"
    html.write(path, TABLE, "rates", "cpu", own, runs=tmp_path, recorded=recorded)
    first, _, third, *_ = embedded(path)["cells"]
    assert (first["status"], first["text"]) == ("done", "0.600 ± 0.141 (n=2) [0.500]")
    assert (third["status"], third["text"]) == ("recorded", "0.200 ± 0.141 (n=2)")
    assert third["note"] == "at commit abcdef0123+changes, not by you" and third["facts"]
    assert first["recorded"] == third["recorded"] == "0.200 ± 0.141 (n=2)"


def dumped(page: Path, fragment: str = "") -> str:
    """The document after its script has run in a browser."""
    assert BROWSER
    command = [BROWSER, "--headless", "--disable-gpu", "--dump-dom"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += [f"--user-data-dir={page.parent / 'profile'}", page.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def drawn(text: str) -> list[str]:
    """The dashes of all curves in the charts."""
    return re.findall(r'<path class="line" stroke="[^"]*" stroke-dasharray="([^"]*)"', text)


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="needs chromium, as of Debian's package")
def test_a_browser_shows_the_page_and_filters_it(page):
    text = dumped(page)
    assert "<title>broken" not in text and "5 of 5 cells" in text
    assert '<td class="done" title="">0.600 ± 0.141 (n=2) [0.500]</td>' in text
    assert '<td class="failed" title="error: the run diverged">' in text
    assert (
        '<td class="" title="1,234,567">1,234,567</td>' in text
        and "<img" not in text.split("<script")[0]
    )
    assert drawn(text) == [""] * 2  # a learning curve, losses by length
    # Curves of another column join them, in dashes.
    both = dumped(page, "#column=lr+0.1&column=lr+0.5")
    assert drawn(both) == ["", "1 6", ""] and "<title>Slow, lr 0.5</title>" in both
    filtered = dumped(page, "#q=diverged+LR%200.4")
    assert "0 of 5 cells" in filtered and not drawn(filtered)
    filtered = dumped(page, "#q=failed+LR%200.4&without=GLA")
    assert "1 of 5 cells" in filtered and "0.600" not in filtered.split("<script")[0]
    assert not drawn(filtered)


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="needs chromium, as of Debian's package")
def test_runs_are_one_line_each_in_a_browser(page):
    measured = page.with_name("measured.html")
    rows = "[...document.querySelectorAll('#runs tr')].map(row => row.offsetHeight)"
    script = f"<script>document.title = `tallest ${{Math.max(...{rows})}}`</script></body>"
    measured.write_text(page.read_text("utf-8").replace("</body>", script), "utf-8")
    (tallest,) = re.findall(r"<title>tallest (\d+)", dumped(measured))
    assert 10 < int(tallest) < 50
