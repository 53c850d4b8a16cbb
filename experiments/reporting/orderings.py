"""Whether a table shows what a paper says of its systems: which of two numbers is the larger.

Of numbers that a scale makes smaller or larger than the published ones, their order is what can be
compared. An ordering is decided by the seeds: Welch's t test of the difference of the means,
one-sided, at CONFIDENCE. With one seed nothing is decided."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from types import ModuleType
from typing import Any, NamedTuple

from scipy import stats

from experiments.reporting.rows import is_finite, value_of
from experiments.reporting.table import Cell

CONFIDENCE = 0.95
REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "contradicted", "undecided"
SHOWN = 6  # orderings that are named one by one


class Ordering(NamedTuple):
    """A paper has a larger number for the one cell than for the other."""

    larger: Cell
    smaller: Cell

    def __str__(self) -> str:
        one, other = self
        if one.column == other.column:
            return f"{one.column}: {one.row} > {other.row}"
        if one.row == other.row:
            return f"{one.row}: {one.column} > {other.column}"
        return f"{one.row}, {one.column} > {other.row}, {other.column}"


def claimed(table: ModuleType, cells: Sequence[Cell]) -> list[Ordering]:
    """The orderings of a table: what its `orderings(cells)` says; without it, those of published
    numbers that differ, of the cells of one column. table.RIVALS = "column" takes those of one
    row."""
    if hasattr(table, "orderings"):
        return [Ordering(*pair) for pair in table.orderings(cells)]
    same = "row" if getattr(table, "RIVALS", "row") == "column" else "column"
    found = []
    for one, other in combinations(cells, 2):
        if one.published is None or other.published is None or one.gap or other.gap:
            continue
        if getattr(one, same) == getattr(other, same) and one.published != other.published:
            larger_first = one.published > other.published
            found.append(Ordering(one, other) if larger_first else Ordering(other, one))
    return found


def verdict(larger: Sequence[float], smaller: Sequence[float]) -> str:
    """Whether values per seed show that the first have the larger mean: REPRODUCED, CONTRADICTED or
    UNDECIDED."""
    if min(len(larger), len(smaller)) < 2:
        return UNDECIDED
    moments = [
        (statistics.fmean(values), statistics.stdev(values), len(values))
        for values in (larger, smaller)
    ]
    if not any(deviation for _, deviation, _ in moments):
        difference = moments[0][0] - moments[1][0]
        return UNDECIDED if not difference else REPRODUCED if difference > 0 else CONTRADICTED
    test: Any = stats.ttest_ind_from_stats(
        *moments[0], *moments[1], equal_var=False, alternative="greater"
    )
    if test.pvalue <= 1 - CONFIDENCE:
        return REPRODUCED
    return CONTRADICTED if test.pvalue >= CONFIDENCE else UNDECIDED


def judged(
    table: ModuleType, cells: Sequence[Cell], rows: Sequence[Mapping[str, Any] | None]
) -> list[tuple[Ordering, str]]:
    """The orderings whose cells both have a row with numbers, and the verdict on each."""
    # A cell is known by itself: those of one row and column may read different metrics.
    found = {
        id(cell): value_of(cell, row)
        for cell, row in zip(cells, rows, strict=True)
        if row is not None and is_finite(cell, row)
    }
    return [
        (ordering, verdict(found[id(ordering.larger)], found[id(ordering.smaller)]))
        for ordering in claimed(table, cells)
        if id(ordering.larger) in found and id(ordering.smaller) in found
    ]


def summary(verdicts: Sequence[tuple[Ordering, str]], of: int) -> str:
    """ "9 of 14 orderings reproduced, 1 contradicted, 3 undecided, 1 not run"."""
    count = Counter(verdict for _, verdict in verdicts)
    parts = [f"{count[REPRODUCED]} of {of} orderings reproduced"]
    parts += [f"{count[name]} {name}" for name in (CONTRADICTED, UNDECIDED) if count[name]]
    if len(verdicts) < of:
        parts.append(f"{of - len(verdicts)} not run")
    return ", ".join(parts)


def paragraph(
    table: ModuleType, cells: Sequence[Cell], rows: Sequence[Mapping[str, Any] | None]
) -> list[str]:
    """The summary as lines of Markdown, with the orderings that are contradicted; none for a table
    without orderings or without rows."""
    orderings = claimed(table, cells)
    if not orderings or not any(rows):
        return []
    verdicts = judged(table, cells, rows)
    against = [str(ordering) for ordering, verdict in verdicts if verdict == CONTRADICTED]
    named = "; ".join(against[:SHOWN])
    more = f"; and {len(against) - SHOWN} more" if len(against) > SHOWN else ""
    which = f" Contradicted: {named}{more}." if against else ""
    return [f"{summary(verdicts, len(orderings))}.{which}", ""]
