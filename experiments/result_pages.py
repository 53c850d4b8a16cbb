"""The pages that show recorded rows: RESULTS.md beside them, and the tables inside documents."""

import re
from pathlib import Path

from experiments import results
from experiments.table import available_tables, find_cells, find_table

CHECKOUT = Path(__file__).parent.parent
DOCUMENTS = tuple(CHECKOUT / path for path in results.DOCUMENTS)


def renew(directory: Path = results.DIRECTORY) -> None:
    """Makes RESULTS.md of all tables and scales that have rows; for our own rows also the tables in documents."""
    sections = [
        "# Results\n\nMade from the rows in this folder by `python -m"
        " experiments.reproduce`; not to be edited.\n"
    ]
    for name in available_tables():
        table, recorded = find_table(name), results.read(name, directory)
        for scale in table.SCALES:
            cells = find_cells(table, scale)
            rows = results.matching(cells, recorded, scale)
            if any(rows):
                sections.append(results.markdown(table, name, scale, cells, rows))
                if hasattr(table, "draw"):
                    sections.append(f"![{table.TITLE}]({name}_{scale}.png)\n")
    (directory / "RESULTS.md").write_text("\n".join(sections), encoding="utf-8")
    if directory == results.DIRECTORY:
        for document in DOCUMENTS:
            insert_tables(document)


def insert_tables(document: Path, directory: Path = results.DIRECTORY) -> None:
    """Renews every table between `<!-- results: <table> <scale> -->` and `<!-- end of results -->` in a document."""

    def table_of(block: re.Match[str]) -> str:
        opening, name, scale, closing = block.groups()
        table = find_table(name)
        cells = find_cells(table, scale)
        rows = results.matching(cells, results.read(name, directory), scale)
        return f"{opening}\n{results.grid(cells, rows)}\n{closing}"

    text = document.read_text(encoding="utf-8")
    pattern = r"(<!-- results: (\w+) (\w+) -->).*?(<!-- end of results -->)"
    document.write_text(
        re.sub(pattern, table_of, text, flags=re.DOTALL), encoding="utf-8"
    )
