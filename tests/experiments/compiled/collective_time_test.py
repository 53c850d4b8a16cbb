"""The modelled time of a collective is that computed by hand."""

import numpy as np
import pytest

from experiments.compiled.collective_time import collective_seconds
from experiments.compiled.collectives import Collective
from experiments.compiled.hardware import parse_topology


def seconds(kind, groups, topology, operand_bytes=10**9):
    where = parse_topology(topology)
    places = np.stack(np.unravel_index(np.arange(where.size), where.shape), axis=-1)
    one = Collective(kind, operand_bytes, np.array(groups), times=1)
    return collective_seconds(one, places, where)


def test_a_whole_dimension_of_a_pod_is_a_ring_and_twice_as_fast_as_a_line():
    row = [range(16)]
    # 15 times 1 GB over two links of 50 GB/s, and 8 hops.
    assert seconds("all-gather", row, "v5e:16x16") == pytest.approx(15 / 100 + 8e-6)
    half = [range(8)]
    assert seconds("all-gather", half, "v5e:16x16") == pytest.approx(7 / 50 + 7e-6)


def test_a_group_over_two_dimensions_uses_the_links_of_both():
    square = [range(16)]
    # 15 GB over a line of links in each of two dimensions.
    assert seconds("all-gather", square, "v6e:4x4") == pytest.approx(15 / 200 + 6e-6)
    assert seconds("all-reduce", square, "v6e:4x4") == pytest.approx(2 * 15 / 16 / 200 + 12e-6)


def test_groups_that_interleave_share_their_links():
    every_other = [[0, 2, 4, 6], [1, 3, 5, 7]]
    # Three quarters of 1 GB over half a link, and six hops.
    assert seconds("reduce-scatter", every_other, "v5e:8x16") == pytest.approx(0.75 / 25 + 6e-6)


def test_a_permute_takes_the_short_way_around_a_ring():
    shift = [(i, (i + 1) % 4) for i in range(4)]
    assert seconds("collective-permute", shift, "v5p:4x4x4") == pytest.approx(1 / 100 + 1e-6)
    # On a line of 4 the last array comes back over 3 hops, along links that carry nothing else that
    # way.
    assert seconds("collective-permute", shift, "v5e:4x4") == pytest.approx(1 / 50 + 3e-6)


def test_arrays_of_a_permute_that_take_one_link_wait_for_each_other():
    by_two = [(0, 2), (1, 3)]  # both from 1 to 2
    assert seconds("collective-permute", by_two, "v5e:4x4") == pytest.approx(2 / 50 + 2e-6)
    # From row to row and along both: the first dimension, then the second, two arrays on the last
    # link.
    corner = [(0, 5), (4, 5)]
    assert seconds("collective-permute", corner, "v5e:4x4") == pytest.approx(2 / 50 + 2e-6)
    assert seconds("collective-permute", [(3, 3)], "v5e:4x4") == 0


def test_an_all_to_all_is_bound_by_the_middle_link():
    assert seconds("all-to-all", [range(4)], "v5e:4x4") == pytest.approx(1 / 50 + 3e-6)
    assert seconds("all-to-all", [range(4)], "v5p:4x4x4") == pytest.approx(0.5 / 100 + 2e-6)
