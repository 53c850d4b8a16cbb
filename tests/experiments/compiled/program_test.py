"""The text of a compiled program is read: its loops count as often as they run."""

import jax
import jax.numpy as jnp
import pytest

from experiments.compiled.cost import Flops, matmul_flops
from experiments.compiled.program import CompiledProgram


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return CompiledProgram(jax.jit(function).lower(*arguments).compile().as_text() or "")


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


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="must have an ENTRY computation; got 'HloModule empty"):
        CompiledProgram("HloModule empty")
