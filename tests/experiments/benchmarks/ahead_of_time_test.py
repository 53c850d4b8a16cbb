"""Programs that are compiled ahead of time: every op with kernels has some, found by folder."""

import importlib

import jax
import pytest

from experiments.benchmarks import ahead_of_time
from experiments.benchmarks.cases import has_implementation, ops_with_examples

# The TPU kernel of window attention is jax's own; a test of tpu_aot_test.py compiles it.
NOT_OURS = {("window_attention", "pallas_tpu")}


@pytest.mark.parametrize("op", ops_with_examples())
def test_an_op_has_programs_for_the_devices_that_it_has_kernels_for(op):
    for kind, found in (("pallas_tpu", "tpu_programs"), ("pallas_gpu", "gpu_programs")):
        if has_implementation(op, kind) and (op, kind) not in NOT_OURS:
            programs = importlib.import_module(f"experiments.benchmarks.programs.{op}")
            names = {one.name for one in getattr(programs, found)()}
            assert names and names <= {one.name for one in getattr(ahead_of_time, found)()}


def test_a_program_flattens_heads_as_projections_make_them():
    def double(x, absent):
        assert absent is None and x.shape == (1, 8, 2, 3)
        return 2 * x

    one = ahead_of_time.TpuProgram(
        name="double",
        generation="v6e",
        direction="forward",
        rule=double,
        arguments=lambda T: [ahead_of_time.array(1, T, 2, 3), None],
        kernels=0,
        units=2,
    )
    function, (x, absent) = one.function_and_shapes(8)
    assert x.shape == (1, 8, 6) and absent is None
    (y,) = jax.eval_shape(function, x, None)
    assert y.shape == (1, 8, 6)
