"""Flops and bytes of a compiled program are those counted by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.compiled.cost import hbm_bytes, matmul_flops
from experiments.compiled.program import CompiledProgram
from tests.experiments.compiled.program_test import TPU_LOOP


def test_a_slice_of_a_stacked_weight_is_read_as_a_slice_and_vmem_is_free():
    x, w = 64 * 128 * 4, 128 * 128 * 4
    counters = 2 * 4 + 4  # i is read, added to, and written; it indexes the slice
    copied = 2 * 4
    # Per turn: the slice read (its copy is in VMEM), x read, the product written.
    assert hbm_bytes(CompiledProgram(TPU_LOOP)) == copied + 3 * (w + 2 * x + counters + 4)


def test_bytes_and_flops_of_a_program_without_loops_are_those_of_xla_itself():
    def loss(x, w, v):
        y = jnp.tanh(x @ w) * 2 + x
        return ((y @ v)[:, :3]).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 96), (96, 96), (96, 32))]
    step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    program = CompiledProgram(step.as_text() or "")
    theirs: Any = step.cost_analysis()
    # XLA counts a few words of its own more.
    assert hbm_bytes(program) == pytest.approx(theirs["bytes accessed"], rel=1e-3)
    # And what is done element by element.
    matmuls = matmul_flops(program, {}).flops
    assert 0.9 * theirs["flops"] < matmuls < theirs["flops"]


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 1), "padding": ((1, 2), (0, 3))},
        {"window_strides": (1, 3), "padding": ((0, 0), (2, 0)), "lhs_dilation": (1, 2)},
        {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1)},
    ],
)
def test_multiply_adds_of_convolutions_are_those_that_meet_no_padding(options):
    def function(x, w):
        return jax.lax.conv_general_dilated(x, w, **options)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 3, 9, 8), (4, 3, 3, 2))]
    lowered = jax.jit(function).lower(*shapes)
    x, w = (np.ones(s.shape, np.float32) for s in shapes)
    # Of ones and ones, every product that meets is one.
    products = float(function(x, w).sum())
    program = CompiledProgram(lowered.compile().as_text() or "")
    assert matmul_flops(program, {}).flops == 2 * products
