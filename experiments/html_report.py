"""Writes the page of a table, which opens in a browser from disk (experiments/reporting/html.py).

    python -m experiments.html_report --table=state_tracking --scale=cpu --out=report.html

It shows your rows of the table, those that are recorded, and the curves of your runs. For a sweep
it is `python -m launch.sweep --sweep=my_sweep.py --report=report.html`."""

from pathlib import Path

from absl import flags

from experiments.reporting import html, rows
from experiments.reporting.table import find_table
from experiments.training import command_line


def main() -> None:
    options = flags.FLAGS
    table = find_table(options.table)
    out = Path(options.out).expanduser()
    name, runs = options.table, Path(options.runs).expanduser()
    own, recorded = rows.read(name, runs / name), rows.read(name)
    html.write(out, table, name, options.scale, own, runs=runs, recorded=recorded)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    flags.DEFINE_string("table", None, "File of experiments/tables, without .py.", required=True)
    flags.DEFINE_string("scale", "cpu", "One of the table's scales.")
    flags.DEFINE_string("out", "report.html", "The file to write.")
    flags.DEFINE_string("runs", "runs", "Directory of the workdirs.")
    command_line.run(main)
