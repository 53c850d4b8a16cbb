"""Benchmarks measure every op that has examples, and every folder of an op has them."""

import inspect
from pathlib import Path

import jax
import pytest

import ops
from experiments.benchmarks import cases


def test_every_op_has_examples():
    folders = {file.parent.name for file in Path(ops.__path__[0]).glob("*/api.py")}
    assert set(cases.ops_with_examples()) == folders


def test_an_op_is_measured_in_all_its_variants_at_the_shapes_that_it_has():
    (test, gated) = cases.cases("selective_scan", "mamba_130m")
    assert (test.name, gated.name) == ("selective_scan", "selective_scan gated")
    assert cases.cases("delta_rule", "mamba_130m") == []


@pytest.mark.parametrize("op", cases.ops_with_examples())
def test_a_call_with_segments_differs_where_the_op_takes_segments(op):
    case = cases.cases(op, "cpu")[0]
    case = cases.Case(op, case.variant, "small", {**case.sizes, "batch": 1, "length": 96})
    inputs = case.inputs("float32")
    whole, packed = (case.call("xla", segments)(inputs) for segments in (False, True))
    assert jax.tree.map(lambda x: x.shape, whole) == jax.tree.map(lambda x: x.shape, packed)
    differ = any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (whole, packed)), strict=True)
    )
    assert differ == ("segment_ids" in inspect.signature(case.function).parameters)
