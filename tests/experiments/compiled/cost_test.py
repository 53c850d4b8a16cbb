"""Flops and bytes of a compiled program are those counted by hand, loops as often as they run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.compiled.cost import Flops, hbm_bytes, matmul_flops
from experiments.compiled.program import CompiledProgram


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return CompiledProgram(jax.jit(function).lower(*arguments).compile().as_text())


def test_matmuls_in_nested_loops_count_as_often_as_they_run():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0]

    def outer(x, ws):
        return jax.lax.scan(lambda x, w: (inner(x, w), None), x, ws)[0]

    program = compiled(outer, (8, 16), (7, 16, 16))
    assert matmul_flops(program, {}).flops == 7 * 3 * 2 * 8 * 16 * 16
    assert not program.unknown_loops


def test_a_loop_that_ends_when_its_data_say_so_counts_once_and_is_named():
    def function(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    program = compiled(function, (8, 16), (16, 16))
    assert matmul_flops(program, {}).flops == 2 * 8 * 16 * 16
    assert len(program.unknown_loops) == 1


TPU_LOOP = """\
HloModule jit_step, is_scheduled=true

%fused_slice (param_0.1: f32[6,128,128], param_1.1: s32[]) -> f32[128,128] {
  %param_0.1 = f32[6,128,128]{2,1,0:T(8,128)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %dynamic-slice.1 = f32[1,128,128]{2,1,0:T(8,128)} dynamic-slice(%param_0.1, %param_1.1, %zero, \
%zero)
  ROOT %bitcast.1 = f32[128,128]{1,0:T(8,128)S(1)} bitcast(%dynamic-slice.1)
}

%body (carried: (s32[], f32[64,128], f32[6,128,128])) -> (s32[], f32[64,128], f32[6,128,128]) {
  %carried = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, \
/*index=2*/f32[6,128,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carried), index=0
  %x = f32[64,128]{1,0:T(8,128)} get-tuple-element(%carried), index=1
  %w = f32[6,128,128]{2,1,0:T(8,128)} get-tuple-element(%carried), index=2
  %two = s32[]{:T(128)} constant(2)
  %fusion.1 = f32[128,128]{1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%fused_slice
  %convolution.1 = f32[64,128]{1,0:T(8,128)} convolution(%x, %fusion.1), dim_labels=bf_io->bf, \
operand_precision={highest,highest}
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %out = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[6,128,128]{2,1,0:T(8,128)}) \
tuple(%next, %convolution.1, %w)
}

%condition (carried.1: (s32[], f32[64,128], f32[6,128,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %carried.1 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[6,128,128]{2,1,0:T(8,128)}) \
parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carried.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[64,128], w.1: f32[6,128,128]) -> f32[64,128] {
  %x.1 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %w.1 = f32[6,128,128]{2,1,0:T(8,128)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)} copy(%start)
  %tuple.1 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[6,128,128]{2,1,0:T(8,128)}) \
tuple(%copy.1, %x.1, %w.1)
  %while.1 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[6,128,128]{2,1,0:T(8,128)}) \
while(%tuple.1), condition=%condition, body=%body
  ROOT %result = f32[64,128]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
"""


def test_the_turns_of_a_tpu_loop_follow_from_its_condition_start_and_increment():
    program = CompiledProgram(TPU_LOOP)
    assert program.runs["body"] == 3 and not program.unknown_loops
    once = 2 * 64 * 128 * 128
    # Float32 at HIGHEST takes six passes of the bfloat16 unit.
    assert matmul_flops(program, {}) == Flops(3 * once, 3 * 6 * once)


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
    program = CompiledProgram(step.as_text())
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
    program = CompiledProgram(lowered.compile().as_text())
    assert matmul_flops(program, {}).flops == 2 * products
