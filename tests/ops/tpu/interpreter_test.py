"""The TPU kernels in JAX's simulation of a TPU's memory: what `interpret=True` lets pass is an
error here.

Memory that nobody wrote is NaN, copies happen when they are waited for, an index map that leaves
its array raises, and grid dimensions marked parallel run in a random order. A grid step costs 10 ms
and more, so sequences are short."""

import dataclasses
from collections.abc import Iterator

import pytest
from jax.experimental.pallas import tpu as pltpu

from ops.delta_rule import pallas_tpu as delta_kernels
from ops.diagonal_scan import pallas_tpu as diagonal_kernels
from ops.framework import platforms
from ops.gated_linear_attention import pallas_tpu as attention_kernels
from ops.selective_scan import gating
from ops.selective_scan import pallas_tpu as selective_kernels
from ops.short_convolution import pallas_tpu as convolution_kernels
from tests.contracts.ops import assert_close
from tests.ops import (
    delta_rule_test,
    diagonal_scan_test,
    gated_linear_attention_test,
    selective_scan_test,
    short_convolution_test,
)

LENGTH = 19  # a chunk of 16 tokens and a ragged one
SWAPPED = 4  # the seed with which two steps along any parallel dimension swap places
OPS = {
    "gated_linear_attention": (
        attention_kernels,
        {"chunk": 16},
        gated_linear_attention_test.TestGatedLinearAttention,
    ),
    "delta_rule": (delta_kernels, {"chunk": 16}, delta_rule_test.TestDeltaRule),
    "selective_scan": (selective_kernels, {"chunk": 16}, selective_scan_test.TestSelectiveScan),
    "diagonal_scan": (diagonal_kernels, {"values": 16}, diagonal_scan_test.TestDiagonalScan),
    "short_convolution": (
        convolution_kernels,
        {"chunk": 16, "rows": 8},
        short_convolution_test.TestShortConvolution,
    ),
}
IN_MAKE_TEST = {("gated_linear_attention", "scalar"), ("short_convolution", "4 taps")}


def cases() -> Iterator[object]:
    for op, (kernels, _, contract) in OPS.items():
        for variant in contract.variants:
            variant = getattr(variant, "values", (variant,))[0]
            short = (op, variant) in IN_MAKE_TEST
            marks = pytest.mark.slow if short else pytest.mark.full
            yield pytest.param(op, variant, False, marks=marks)
            if hasattr(kernels, "WALKS_BACKWARDS"):
                yield pytest.param(op, variant, True, marks=pytest.mark.full)


@pytest.fixture
def simulated_tpu(monkeypatch):
    # The simulation has side effects in an order, which a choice by platform does not pass on to
    # jax.
    def on_cpu(forms, *arrays, **others):
        del others  # what other platforms run, and what is differentiated
        return forms["cpu"](*arrays)

    monkeypatch.setattr(platforms, "by_platform", on_cpu)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(random_seed=SWAPPED)):
        yield
    # An exception inside a kernel leaves it unusable.
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.usefixtures("simulated_tpu")
@pytest.mark.parametrize(("op", "variant", "reverse"), list(cases()))
def test_kernels_use_the_memory_of_a_tpu_as_it_is(op, variant, reverse, monkeypatch):
    kernels, tuning, contract = OPS[op]
    tuning = dataclasses.replace(kernels.TUNING, **tuning)
    monkeypatch.setattr(gating, "CHUNK", 16)
    monkeypatch.setattr(kernels, "TUNING", tuning)
    case = contract().data(variant, LENGTH)
    expected = contract().values_and_gradients("reference", *case, reverse=reverse)
    got = contract().values_and_gradients("pallas_tpu", *case, reverse=reverse)
    for name in expected:
        assert_close(name, got[name], expected[name])
