"""Tables in Markdown, from recorded rows."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from experiments.reporting import code_changes, orderings
from experiments.reporting.rows import commit, is_finite, machine, value_of
from experiments.reporting.table import Cell
from experiments.training.checkout import commit_here

SEEN = "Their code at commit"  # begins the line that is true of that commit alone


def format_cell(cell: Cell, row: Mapping[str, Any] | None) -> str:
    """ "mean ± sample deviation (n) [published]"; a gap says why."""
    ours = format_value(cell, row)
    return ours if cell.published is None else f"{ours} [{_number(cell.published)}]"


def format_value(cell: Cell, row: Mapping[str, Any] | None) -> str:
    """ "mean ± sample deviation (n)"."""
    if row is None:
        return cell.gap or "not run"
    values = value_of(cell, row)
    if not is_finite(cell, row):
        return f"{cell.missing} (n={len(values)})"
    spread = f" ± {_number(statistics.stdev(values))}" if values[1:] else ""
    return f"{_number(statistics.fmean(values))}{spread} (n={len(values)})"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def format_sizes(cell: Cell, row: Mapping[str, Any] | None) -> str:
    """ "parameters / bytes"; a model that does not decode has no state."""
    if row is None:
        return ""
    parameters, state_bytes = row["parameters"], row["state_bytes"]
    state = "none" if state_bytes is None else f"{state_bytes:,}"
    return f"{parameters:,} / {state}"


def grid(
    cells: Sequence[Cell], rows: Sequence[Any], format_one: Callable[[Cell, Any], str] = format_cell
) -> str:
    """The cells alone, as a table; `rows` as `matching` of reporting/rows.py returns them."""
    columns, names = (
        list(dict.fromkeys(getattr(cell, axis) for cell in cells)) for axis in ("column", "row")
    )
    text = {(c.row, c.column): format_one(c, r) for c, r in zip(cells, rows, strict=True)}
    lines = [
        "| | " + " | ".join(columns) + " |",
        "|---" * (1 + len(columns)) + "|",
        *(
            f"| {row} | " + " | ".join(text.get((row, column), "") for column in columns) + " |"
            for row in names
        ),
    ]
    return "\n".join(lines)


def comparison(cells: Sequence[Cell], recorded: Sequence[Any], own: Sequence[Any]) -> str:
    """A line for each cell: published, recorded, yours; in columns that a terminal shows as such.

    What no cell has (published numbers, a second column) is left out."""
    columns: dict[str, list[str]] = {"": [cell.row for cell in cells]}
    if len({cell.column for cell in cells}) > 1:
        columns["column"] = [cell.column for cell in cells]
    if any(cell.published is not None for cell in cells):
        published = (cell.published for cell in cells)
        columns["published"] = ["" if each is None else _number(each) for each in published]
    for name, rows in (("recorded", recorded), ("yours", own)):
        columns[name] = [format_value(cell, row) for cell, row in zip(cells, rows, strict=True)]
    texts = [[name, "---", *column] for name, column in columns.items()]
    widths = [max(map(len, column)) for column in texts]
    lines = []
    for line in zip(*texts, strict=True):
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    lines[1] = "|-" + "-|-".join("-" * width for width in widths) + "-|"
    return "\n".join(lines)


def section(
    table: ModuleType, name: str, scale: str, cells: Sequence[Cell], rows: Sequence[Any]
) -> str:
    """The section of a table: title, what was measured, the cells, and where they were measured."""
    lines = [*_heading(table, name, scale, cells, "in brackets"), grid(cells, rows), ""]
    lines += orderings.paragraph(table, cells, rows)
    lines += [*_choices(cells, rows), *_sizes(table, cells, rows)]
    return "\n".join([*lines, *_origin(cells, rows, "Measured")])


def printed(
    table: ModuleType,
    name: str,
    scale: str,
    cells: Sequence[Cell],
    *,
    recorded: Sequence[Any],
    own: Sequence[Any],
) -> str:
    """The section of a table for one who runs it: his own numbers beside those recorded."""
    lines = [*_heading(table, name, scale, cells, "published")]
    lines += [comparison(cells, recorded, own), ""]
    lines += orderings.paragraph(table, cells, own if any(own) else recorded)
    lines += _choices(cells, own if any(own) else recorded)
    lines += _sizes(table, cells, own if any(own) else recorded)
    lines += _origin(cells, recorded, "Recorded: measured")
    return "\n".join([*lines, *_origin(cells, own, "Yours: measured")])


def _heading(
    table: ModuleType, name: str, scale: str, cells: Sequence[Cell], published: str
) -> list[str]:
    source = getattr(table, "SOURCE", "nothing is published")
    if any(cell.published is not None for cell in cells):
        source = f"{published}: {source}"
    return [
        f"## {table.TITLE}: `{name}` at scale `{scale}`",
        "",
        f"{table.METRIC}. Mean ± sample standard deviation over n seeds; {source}",
        "",
        f"Scale `{scale}`: {table.SCALES[scale]}",
        "",
    ]


def _choices(cells: Sequence[Cell], rows: Sequence[Any]) -> list[str]:
    """What was chosen, and how much the choice mattered, as lines."""
    if not any(cell.choice and row for cell, row in zip(cells, rows, strict=True)):
        return []
    by = " and ".join(sorted({cell.choice.metric for cell in cells if cell.choice}))
    heading = f"Chosen by the mean over seeds of {by}, and the means of all that was tried:"
    return [heading, "", grid(cells, rows, format_choice), ""]


def format_choice(cell: Cell, row: Mapping[str, Any] | None) -> str:
    """ "lr 0.003 (0.512 to 0.981 of 4)"; what is not finite is left out of the span."""
    if row is None or not cell.choice:
        return ""
    tried = row["choices"]
    name = next(v for v, one in tried.items() if one["config_hash"] == row["config_hash"])
    finite = [one for one in tried.values() if is_finite(cell, one)]
    means = [statistics.fmean(value_of(cell, one)) for one in finite]
    span = f"{_number(min(means))} to {_number(max(means))} of " if means else ""
    return f"{name} ({span}{len(tried)})"


def _sizes(table: ModuleType, cells: Sequence[Cell], rows: Sequence[Any]) -> list[str]:
    if not getattr(table, "SIZES", False) or not any(rows):
        return []
    return ["Parameters / bytes of state per sequence:", "", grid(cells, rows, format_sizes), ""]


def _runs(
    pairs: Iterable[tuple[Cell, Mapping[str, Any]]],
) -> Iterator[tuple[Cell, Mapping[str, Any]]]:
    """The pairs of all runs: of a cell that chooses, of what it chose from."""
    for cell, row in pairs:
        yield from ((cell, one) for one in row.get("choices", {"": row}).values())


def _origin(cells: Sequence[Cell], rows: Sequence[Any], measured: str) -> list[str]:
    """Paragraphs, as lines: where rows were measured, and where their code has changed since."""
    pairs = [(cell, row) for cell, row in zip(cells, rows, strict=True) if row]
    if not pairs:
        return []
    # Cells may read different metrics of one run.
    done = list({row["config_hash"]: row for _, row in _runs(pairs)}.values())
    minutes = sum(row["seconds"] for row in done) / 60
    where = sorted({machine(row) for row in done})
    versions = sorted(
        {f"jax {row['versions']['jax']}, flax {row['versions']['flax']}" for row in done}
    )
    commits = sorted({commit(row) for row in done})
    seen = (commit_here()[0] or "no commit")[:10]
    return [
        f"{measured} on {', '.join(where)}; {'; '.join(versions)}; commit {', '.join(commits)};"
        f" {len(pairs)} of {len(cells)} cells in {minutes:.0f} minutes of training.",
        "",
        f"{SEEN} {seen}: {'; '.join(code_changes.describe(_runs(pairs)))}.",
        "",
    ]
