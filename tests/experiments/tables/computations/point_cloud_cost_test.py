"""Costs of point clouds: what the table asks for is there, and memory grows with the voxels."""

import pytest

from experiments.tables import point_cloud_cost as table
from experiments.tables.computations import point_cloud_cost


def test_the_table_times_every_operator():
    assert {operator for operator, _ in table.ROWS.values()} == set(point_cloud_cost.OPERATORS)


@pytest.mark.full
def test_memory_is_in_proportion_to_the_voxels():
    few, many = (
        point_cloud_cost.by_voxels(seed=0, operator="retnet", voxels=voxels, group=128)["cloud"]
        for voxels in (512, 4096)
    )
    assert 6 < many["mib"] / few["mib"] < 10 and few["ms"] > 0
