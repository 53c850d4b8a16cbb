"""The pages that show recorded rows: RESULTS.md beside them, and the tables inside documents."""

import re
from pathlib import Path

from experiments.reporting import markdown, orderings, rows
from experiments.reporting.table import available_tables, find_cells, find_table
from experiments.training.checkout import DOCUMENTS, RESULTS

ORDERINGS = (
    "Sizes here are smaller than the published ones, so numbers compare by their order: of two"
    " systems, a paper has a larger number for one. Such an ordering is reproduced, or"
    " contradicted, where the seeds show it (one-sided Welch's t test of the means at 95 %), and"
    " undecided otherwise. Those of a table are said under it."
)


def renew(directory: Path = RESULTS) -> None:
    """Makes RESULTS.md of all tables and scales that have rows in `directory`; of the recorded ones
    also the tables in documents."""
    made = "Made from the rows in this folder by `python -m experiments.reproduce --record`"
    beginning = f"# Results\n\n{made}; not to be edited.\n\n{ORDERINGS}\n\n{overview(directory)}\n"
    sections = [beginning]
    for name in available_tables():
        table, recorded = find_table(name), rows.read(name, directory)
        for scale in table.SCALES:
            cells = find_cells(table, scale)
            found = rows.matching(cells, recorded, scale)
            if any(found):
                sections.append(markdown.section(table, name, scale, cells, found))
                if hasattr(table, "draw"):
                    sections.append(f"![{table.TITLE}]({name}_{scale}.png)\n")
    (directory / "RESULTS.md").write_text("\n".join(sections), encoding="utf-8")
    if directory == RESULTS:
        for document in DOCUMENTS:
            insert_tables(document)


def overview(directory: Path = RESULTS) -> str:
    """A line for each table and scale with rows in `directory`: how much of it is there, how long
    it took, and which orderings it shows."""
    lines = ["| table | scale | cells | minutes | orderings |", "|---|---|---|---|---|"]
    for name in available_tables():
        table, recorded = find_table(name), rows.read(name, directory)
        for scale in table.SCALES:
            cells = find_cells(table, scale)
            found = rows.matching(cells, recorded, scale)
            if not any(found):
                continue
            runs = {
                run["config_hash"]: run["seconds"]
                for row in found
                if row
                for run in row.get("choices", {"": row}).values()
            }
            run, all_cells = sum(map(bool, found)), sum(not cell.gap for cell in cells)
            of = len(orderings.claimed(table, cells))
            shown = orderings.summary(orderings.judged(table, cells, found), of) if of else "-"
            title = f"{table.TITLE}: `{name}`"
            minutes = f"{sum(runs.values()) / 60:.0f}"
            lines.append(f"| {title} | `{scale}` | {run} of {all_cells} | {minutes} | {shown} |")
    return "\n".join(lines)


def insert_tables(document: Path, directory: Path = RESULTS) -> None:
    """Renews every table between `<!-- results: <table> <scale> -->` and `<!-- end of results -->`
    in a document; "all tables" is the overview."""

    def table_of(block: re.Match[str]) -> str:
        opening, name, scale, closing = block.groups()
        if (name, scale) == ("all", "tables"):
            return f"{opening}\n{overview(directory)}\n{closing}"
        table = find_table(name)
        cells = find_cells(table, scale)
        found = rows.matching(cells, rows.read(name, directory), scale)
        return f"{opening}\n{markdown.grid(cells, found)}\n{closing}"

    text = document.read_text(encoding="utf-8")
    pattern = r"(<!-- results: (\w+) (\w+) -->).*?(<!-- end of results -->)"
    document.write_text(re.sub(pattern, table_of, text, flags=re.DOTALL), encoding="utf-8")
