"""The grid of the kernels that go token by token: walking backwards, they leave tokens where they
are."""

import re

import jax
import jax.numpy as jnp
import pytest

from tests.ops import (
    diagonal_scan_test,
    gated_linear_attention_test,
    selective_scan_test,
    short_convolution_test,
)

LENGTH = 200  # no other size of these contracts
CONTRACTS = {
    "selective_scan": (selective_scan_test.TestSelectiveScan, "gated"),
    "diagonal_scan": (diagonal_scan_test.TestDiagonalScan, "real, per token"),
    "short_convolution": (short_convolution_test.TestShortConvolution, "4 taps"),
}


def turned_shapes(contract, case, implementation) -> list[list[int]]:
    """Shapes of the arrays that forward and backward turn around, in a program for a TPU."""
    inputs, state, ids = case

    def loss(inputs, state):
        outputs = contract.call(inputs, state, ids, implementation, reverse=True)
        return sum(jnp.sum(jnp.sin(x)) for x in outputs)

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(inputs, state)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == (implementation == "pallas_tpu")
    shapes = re.findall(r"stablehlo\.reverse .*tensor<([\dx]+)x\w+>", text)
    return [[int(size) for size in shape.split("x")] for shape in shapes]


@pytest.mark.parametrize("op", CONTRACTS)
def test_kernels_that_walk_backwards_turn_no_tokens_around(op):
    contract, variant = CONTRACTS[op][0](), CONTRACTS[op][1]
    case = contract.data(variant, LENGTH)
    assert not [x for x in turned_shapes(contract, case, "pallas_tpu") if LENGTH in x]


def test_tokens_that_are_turned_around_are_seen():
    """By the plain form of an op that gets its arrays flipped."""
    contract = gated_linear_attention_test.TestGatedLinearAttention()
    case = contract.data("vector", LENGTH)
    assert [x for x in turned_shapes(contract, case, "xla") if LENGTH in x]
