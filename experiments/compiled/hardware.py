"""TPU chips on paper, and the time that a collective takes on a slice of them: a model, not a
measurement.

Published per chip (bfloat16 peaks are in experiments/training/speed.py):

    v4    docs.cloud.google.com/tpu/docs/v4: 32 GiB at 1200 GB/s; Jouppi et al., ISCA 2023, arXiv
          2304.01433: 6 links of 50 GB/s each way
    v5e   docs.cloud.google.com/tpu/docs/v5e: 16 GB at 819 GB/s, 400 GB/s over 4 links both ways
    v5p   docs.cloud.google.com/tpu/docs/v5p: 95 GiB at 2765 GB/s, 1200 GB/s over 6 links both ways
    v6e   docs.cloud.google.com/tpu/docs/v6e: 32 GB at 1638 GB/s, 800 GB/s over 4 links both ways

The same pages' bisection bandwidths agree with these links: 1.6 TB/s of a v5e pod are 32 links of
50 GB/s.

A slice is a box of chips, one jax device each. Neighbours along each of its dimensions share a
link; the ends of a dimension are linked too (it is a ring) where the dimension is a multiple of 4
on v4 and v5p, whose cubes of 4 x 4 x 4 are switched together optically, and where it is the pod's
whole 16 on v5e and v6e.

The time of a collective over groups of chips, as in "How to Scale Your Model"
(jax-ml.github.io/scaling-book), chapter 3, and without contention between collectives:

- all-gather, reduce-scatter, all-reduce: bytes sent by a chip over the rate of its links that the
  group can use: along every dimension in which the group extends two where that is a whole ring,
  else one, as at the end of a line all must come in over one link. Where groups interleave along a
  dimension, they share its links.
- all-to-all: the middle link of a dimension of s chips must pass s/4 chips' arrays each way (half
  that on a ring).
- collective-permute: every pair's array along the first dimension, then the second and so on, the
  short way around a ring; the time is that of the link with the most to carry, since chips pass on
  what is not theirs while it comes in.
- And a microsecond for every hop to the farthest member.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.compiled.collectives import Collective

HOP_SECONDS = 1e-6
PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
BOXES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
LARGE_BOXES = ("8x8x16", "8x16x16", "16x16x16")


@dataclass(frozen=True)
class Chip:
    """One generation.

    hbm_bytes          of high-bandwidth memory
    hbm_bytes_per_s    its rate, reads and writes together
    link_bytes_per_s   rate of one link one way
    ring               what size of a dimension closes to a ring, and every multiple of it
    slices             published shapes of slices
    """

    name: str
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    ring: int
    slices: tuple[str, ...]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * 2**30, 1200e9, 50e9, 4, BOXES + LARGE_BOXES),
        Chip("v5e", 16 * 2**30, 819e9, 50e9, 16, PLANES),
        Chip("v5p", 95 * 2**30, 2765e9, 100e9, 4, (*BOXES, *LARGE_BOXES, "16x16x24")),
        Chip("v6e", 32 * 2**30, 1638e9, 100e9, 16, PLANES),
    )
}


@dataclass(frozen=True)
class Slice:
    """A box of chips, such as v5p:8x8x8."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def is_ring(self, dimension: int) -> bool:
        return self.shape[dimension] % self.chip.ring == 0


def parse_topology(name: str) -> Slice:
    """The slice that "v5p:8x8x8" names. Raises ValueError, with those that are known, for any other
    name."""
    generation, _, shape = name.partition(":")
    if generation not in CHIPS or shape not in CHIPS[generation].slices:
        known = (f"{x.name}:{{{','.join(x.slices)}}}" for x in CHIPS.values())
        raise ValueError(f"--topology must be one of {' '.join(known)}; got {name!r}")
    return Slice(CHIPS[generation], tuple(map(int, re.findall(r"\d+", shape))))


def collective_seconds(collective: Collective, places: np.ndarray, where: Slice) -> float:
    """Seconds of one run of a collective; `places` [N, 3]: coordinates of the mesh's devices, in
    order."""
    dimensions = range(len(where.shape))
    groups = places[collective.groups][..., : len(where.shape)]
    rate = where.chip.link_bytes_per_s
    if collective.kind == "collective-permute":
        ways = [_links(source, target, where) for source, target in groups.tolist()]
        arrays = Counter(link for way in ways for link in way)
        hops = max(map(len, ways))
        busiest = max(arrays.values(), default=0)
        return busiest * collective.operand_bytes / rate + hops * HOP_SECONDS

    # All groups are one group moved about, so the first stands for all.
    extents = [np.unique(groups[0, :, dimension]) for dimension in dimensions]
    is_box = math.prod(len(extent) for extent in extents) == collective.group_size
    links, hops, slowest = 0.0, 0, 0.0
    for dimension, extent in enumerate(extents):
        if len(extent) == 1:
            continue
        gap = int(np.diff(extent).max())
        whole = len(extent) == where.shape[dimension] and where.is_ring(dimension)
        own = (2 if whole else 1) / gap
        links += own
        hops += gap * (len(extent) // 2 if whole else len(extent) - 1)
        slowest = max(slowest, len(extent) / 4 / own)
    if collective.kind == "all-to-all":
        return collective.operand_bytes * slowest / rate + hops * HOP_SECONDS
    hops *= 2 if collective.kind == "all-reduce" else 1
    links = links if is_box else 1.0
    return collective.sent_bytes / (links * rate) + hops * HOP_SECONDS


def _links(
    source: Sequence[int], target: Sequence[int], where: Slice
) -> list[tuple[tuple[int, ...], int, int]]:
    """The links from chip to chip, one dimension after another: (place, dimension, direction)."""
    place, links = list(source), []
    for dimension, size in enumerate(where.shape):
        way = target[dimension] - place[dimension]
        if where.is_ring(dimension):
            way = (way + size // 2) % size - size // 2
        direction = 1 if way > 0 else -1
        for _ in range(abs(way)):
            links.append((tuple(place), dimension, direction))
            place[dimension] = (place[dimension] + direction) % size
    return links
