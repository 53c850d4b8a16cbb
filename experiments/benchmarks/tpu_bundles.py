"""The final instruction bundles of a TPU kernel, as libtpu dumps them: which units are busy, what
spills.

A bundle is what the core issues in one cycle: a few slots for each unit. The dump says how many of
them each bundle of a kernel uses; of a loop it has the bundles once. Works for every generation,
also where the cycle analysis aborts."""

import operator
import re
from pathlib import Path
from typing import Any

FILL, SPILL = "VLOAD:FILL", "VSTORE:SPILL"  # contained in VLOAD and VSTORE


def flags(folder: str) -> str:
    """Flags in LIBTPU_INIT_ARGS with which libtpu dumps the bundles into `folder`."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        " --xla_jf_dump_llo_pass_label_regex=static-per-bundle"
    )


def kernel_names(text: str) -> list[str]:
    """The kernels of a compiled program, by the names that their dumps have."""
    return re.findall(r"%?([\w.-]+) = [^\n]*tpu_custom_call", text)


def use(folder: str, kernels: list[str]) -> dict[str, Any]:
    """Counts over all kernels together.

    bundles    in the final code, each once
    full       share of bundles in which some unit has no slot left; in the others a result is
               waited for
    spills     moves of vector registers to memory and back
    occupancy  share of its slots that each unit uses
    """
    bundles, full, capacity, used = 0, 0, {}, {}
    for kernel in kernels:
        dumps = Path(folder).glob(f"*-{kernel}-*final*static-per-bundle*.txt")
        # Names begin with the time; the last dump is of the longest sequence.
        capacity, rows = _read(sorted(dumps)[-1].read_text())
        bundles += len(rows)
        slots = capacity.values()
        full += sum(any(map(operator.ge, row, slots)) for row in rows)
        for unit, column in zip(capacity, zip(*rows, strict=True), strict=True):
            used[unit] = used.get(unit, 0) + sum(column)
    return {
        "bundles": bundles,
        "full": round(full / bundles, 3),
        "spills": used[FILL] + used[SPILL],
        "occupancy": {
            unit: round(used[unit] / (slots * bundles), 3)
            for unit, slots in capacity.items()
            if unit not in (FILL, SPILL)
        },
    }


def _read(text: str) -> tuple[dict[str, int], list[list[int]]]:
    """Slots of a bundle by unit, and how many of them each bundle uses."""
    heading, table = text.split("== UTILIZATION:")
    _, units, slots = heading.strip().splitlines()
    names = [unit.strip() for unit in units.split(",")]
    capacity = dict(zip(names, map(int, slots.split()), strict=True))
    return capacity, [list(map(int, row.split())) for row in table.split("\n") if row]
