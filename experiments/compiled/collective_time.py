"""The time that a collective takes on a slice of TPUs: a model, not a measurement.

Over groups of chips, as in "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapter 3,
and without contention between collectives:

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
from collections import Counter
from collections.abc import Sequence

import numpy as np

from experiments.compiled.collectives import Collective
from experiments.compiled.hardware import Slice

HOP_SECONDS = 1e-6


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
