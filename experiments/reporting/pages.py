"""The pages that show recorded rows: RESULTS.md beside them, and the tables inside documents."""

import re
from pathlib import Path

from experiments.reporting import markdown, rows
from experiments.reporting.table import available_tables, find_cells, find_table
from experiments.training.checkout import DOCUMENTS, RESULTS


def renew(directory: Path = RESULTS) -> None:
    """Makes RESULTS.md of all tables and scales that have rows in `directory`; of the recorded ones
    also the tables in documents."""
    made = "Made from the rows in this folder by `python -m experiments.reproduce --record`"
    sections = [f"# Results\n\n{made}; not to be edited.\n"]
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


def insert_tables(document: Path, directory: Path = RESULTS) -> None:
    """Renews every table between `<!-- results: <table> <scale> -->` and `<!-- end of results -->`
    in a document."""

    def table_of(block: re.Match[str]) -> str:
        opening, name, scale, closing = block.groups()
        table = find_table(name)
        cells = find_cells(table, scale)
        found = rows.matching(cells, rows.read(name, directory), scale)
        return f"{opening}\n{markdown.grid(cells, found)}\n{closing}"

    text = document.read_text(encoding="utf-8")
    pattern = r"(<!-- results: (\w+) (\w+) -->).*?(<!-- end of results -->)"
    document.write_text(re.sub(pattern, table_of, text, flags=re.DOTALL), encoding="utf-8")
