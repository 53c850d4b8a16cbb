"""How long a TPU's kernels take at least: their schedules as libtpu compiled them.

A kernel does more than its matmuls: loads, exponentials, moves between lanes, all in bundles that
the compiler puts in order. Its static estimate of the cycles (experiments/benchmarks/tpu_aot.py) is
recorded for the kernels of the page and their blocks. What a step of the grid takes does not depend
on how many there are, so a kernel of a model with the same blocks takes as much per step, and one
with blocks besides, such as those of documents, takes no less.

libtpu estimates for v6e, and for v5e where its analysis does not give up. A chip takes its own
schedules where there are some, else the shortest of the others', at its own clock, and as if its
cores shared every grid evenly: it may take longer, and will hardly take less."""

import functools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.compiled.kernels import kernel_calls
from experiments.training.checkout import RESULTS

# Cycles per second of all cores of a jax device: v4 and v5p have two. The clocks are the peaks over
# what the matrix units, four of 128 x 128 in a core of these, do in a cycle, as in hardware.py.
CYCLES_PER_S = {"v4": 2 * 1.05e9, "v5e": 1.5e9, "v5p": 2 * 1.75e9, "v6e": 1.75e9}


def blocks(call: Any) -> str:
    """A kernel and its blocks in words: what the compiled code of a step of the grid depends on.

    A last axis longer than the first block's is one that stays whole in fast memory, of which a
    step reads a part: *."""
    mappings = call.params["grid_mapping"].block_mappings
    shapes = [
        [x if isinstance(x, int) else getattr(x, "block_size", 1) for x in mapping.block_shape]
        for mapping in mappings
    ]
    sizes = [
        "x".join([*map(str, shape[:-1]), "*" if shape[-1] > shapes[0][-1] else str(shape[-1])])
        for shape in shapes
    ]
    dtypes = [str(mapping.array_aval.dtype) for mapping in mappings]
    named = call.params["name"] or str(call.params["name_and_src_info"])
    return " ".join([named, *(f"{d}[{s}]" for d, s in zip(dtypes, sizes, strict=True))])


def grid_steps(call: Any) -> int:
    """How many steps a run of a kernel takes."""
    return math.prod(call.params["grid_mapping"].grid)


def per_step(
    short: Sequence[Any], long: Sequence[Any], cycles: Sequence[float]
) -> dict[str, float]:
    """{blocks: cycles of a step of the grid} of the kernel calls of a program at two lengths, and
    the cycles that each takes more at the longer one."""
    return {
        blocks(after): round(more / (grid_steps(after) - grid_steps(before)), 1)
        for before, after, more in zip(short, long, cycles, strict=True)
    }


@functools.cache
def recorded() -> Mapping[str, Mapping[str, float]]:
    """{generation: {blocks: cycles of a step of the grid}}, the least of what compilers made."""
    found: dict[str, dict[str, float]] = {}
    for row in json.loads((RESULTS / "tpu_aot.json").read_text("utf-8"))["rows"]:
        of_chip = found.setdefault(row["generation"], {})
        for key, cycles in row.get("cycles_per_step", {}).items():
            of_chip[key] = min(cycles, of_chip.get(key, cycles))
    return found


def kernel_seconds(
    jaxpr: Any, chip: str, known: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, float | None]:
    """Seconds that one run of every kernel in a jaxpr takes on a TPU chip at least, by name; of
    runs that differ, those of the longest. None where the schedule of one is not known.

    known: cycles as `recorded` returns them, and by default does."""
    known = recorded() if known is None else known
    seconds: dict[str, float | None] = {}
    for call in kernel_calls(jaxpr):
        name, *_ = key = blocks(call).split()
        least = {of: _at_least(key, cycles) for of, cycles in known.items()}
        others = [cycles for cycles in least.values() if cycles is not None]
        cycles = least.get(chip) or min(others, default=None)
        before = seconds.get(name, 0.0)
        if cycles is None or before is None:
            seconds[name] = None
        else:
            seconds[name] = max(before, cycles * grid_steps(call) / CYCLES_PER_S[chip])
    return seconds


def _at_least(key: Sequence[str], known: Mapping[str, float]) -> float | None:
    """The most cycles of a step that are known of a kernel of this name with these blocks, or some
    of them."""
    (name, *own), found = key, []
    for recorded_key, cycles in known.items():
        recorded_name, *others = recorded_key.split()
        if recorded_name == name and Counter(others) <= Counter(own):
            found.append(cycles)
    return max(found, default=None)
