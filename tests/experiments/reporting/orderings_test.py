"""What seeds say of an order, and which orders a table claims."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.reporting import orderings
from experiments.reporting.orderings import CONTRADICTED, REPRODUCED, UNDECIDED, verdict
from experiments.reporting.table import Cell


@pytest.mark.parametrize(
    ("larger", "smaller", "expected"),
    [
        ((1.0, 1.1, 0.9), (0.1, 0.2, 0.0), REPRODUCED),
        ((0.1, 0.2, 0.0), (1.0, 1.1, 0.9), CONTRADICTED),
        ((0.0, 1.0, 0.5), (0.4, 0.1, 0.9), UNDECIDED),
        ((1.0, 1.0), (0.0, 0.0), REPRODUCED),
        ((0.0, 0.0), (1.0, 1.0), CONTRADICTED),
        ((1.0, 1.0), (1.0, 1.0), UNDECIDED),
        ((1.0,), (0.0,), UNDECIDED),
        # Two seeds that are far from each other decide nothing, however large the difference.
        ((0.0, 1.0), (-1.0, -2.0), UNDECIDED),
    ],
)
def test_the_seeds_decide(larger, smaller, expected):
    assert verdict(larger, smaller) == expected


def test_equal_systems_are_decided_as_rarely_as_the_confidence_says():
    rng = np.random.default_rng(0)
    verdicts = [verdict(*rng.standard_normal((2, 3)).tolist()) for _ in range(2000)]
    wrong = [sum(v == kind for v in verdicts) / 2000 for kind in (REPRODUCED, CONTRADICTED)]
    assert max(wrong) < 0.06 and min(wrong) > 0.02


def cell(row: str, column: str, published: float | None = None, gap: str = "") -> Cell:
    return Cell(row, column, "gla:mqar", "test/accuracy", published=published, gap=gap)


def row(*values: float | None) -> dict[str, Any]:
    return {"evaluations": {"test": {"accuracy": list(values)}}}


CELLS = [
    cell("a", "x", 0.9),
    cell("b", "x", 0.5),
    cell("c", "x"),
    cell("a", "y", 0.3),
    cell("b", "y", 0.3),
    cell("c", "y", 0.4, gap="too large"),
]
TABLE: Any = SimpleNamespace()


def test_published_numbers_that_differ_order_the_cells_of_a_column():
    assert [str(o) for o in orderings.claimed(TABLE, CELLS)] == ["x: a > b"]
    columns: Any = SimpleNamespace(RIVALS="column")
    assert [str(o) for o in orderings.claimed(columns, CELLS)] == ["a: x > y", "b: x > y"]
    own: Any = SimpleNamespace(orderings=lambda cells: [(cells[2], cells[0])])
    assert [str(o) for o in orderings.claimed(own, CELLS)] == ["x: c > a"]


def test_a_paragraph_counts_and_names_what_is_contradicted():
    table: Any = SimpleNamespace(
        orderings=lambda cells: [
            (cells[0], cells[1]),
            (cells[1], cells[0]),
            (cells[0], cells[2]),
            (cells[3], cells[4]),
        ]
    )
    rows = [row(1.0, 0.9), row(0.1, 0.2), row(0.9, None), row(0.5, 0.5), None, None]
    assert orderings.paragraph(table, CELLS, rows)[0] == (
        "1 of 4 orderings reproduced, 1 contradicted, 2 not run. Contradicted: x: b > a."
    )
    assert orderings.paragraph(table, CELLS, [None] * 6) == []
    assert orderings.paragraph(TABLE, CELLS[3:5], rows[3:5]) == []
