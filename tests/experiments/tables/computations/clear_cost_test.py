"""The cost of discs: what the op weighs is what the formula counts."""

from experiments.tables import clear_radius
from experiments.tables.computations.clear_cost import of_layer


def test_the_pairs_that_the_op_weighs_are_those_of_the_formula():
    cost = of_layer(seed=0, side=10, radius=3.5, width=64, text=7)["layer"]
    assert cost["formula"] == cost["counted"] > 0


def test_the_table_names_what_is_computed():
    columns = {cell.metric for cell in clear_radius.cells("cpu") if "layer" in cell.metric}
    assert columns == {"layer/formula", "layer/counted"}
