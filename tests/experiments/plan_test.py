"""What a plan says of a program is what the program does: flops, bytes, collectives counted by
hand; time by hand."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh

from experiments.compiled.collectives import (
    Collective,
    by_kind_and_axes,
    find_collectives,
    parse_replica_groups,
)
from experiments.compiled.cost import Flops, hbm_bytes, matmul_flops
from experiments.compiled.hardware import collective_seconds, parse_topology
from experiments.compiled.kernels import kernel_flops
from experiments.compiled.plan_report import advice, format_plan, si
from experiments.compiled.program import CompiledProgram
from experiments.configs import gla
from experiments.plan import make_plan
from experiments.tables.computations import compiled_step
from experiments.training.checkout import CHECKOUT
from experiments.training.program import LIBTPU_ENVIRONMENT, tpu_devices
from ops import gated_linear_attention

MESH = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return CompiledProgram(jax.jit(function).lower(*arguments).compile().as_text())


# --- Flops and loops


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


def test_a_kernel_counts_its_grid_times_its_matmuls_and_its_precision():
    def kernel(x, w, o):
        o[...] = jax.lax.dot(x[...], w[...], precision=jax.lax.Precision.HIGHEST)

    def function(x, w):
        return pl.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[
                pl.BlockSpec((8, 128), lambda i: (i, 0)),
                pl.BlockSpec((128, 128), lambda i: (0, 0)),
            ],
            out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32),
            name="product",
        )(x, w)

    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((32, 128), (128, 128)))
    flops = 2 * 32 * 128 * 128
    assert kernel_flops(jax.make_jaxpr(jax.jit(function))(x, w)) == {
        "product": Flops(flops, 6 * flops)
    }


# --- Collectives

KNOWN_PROGRAM = """
import jax, jax.numpy as jnp
from jax import P
from jax.sharding import AxisType
axes = ("data", "fsdp", "sequence", "tensor")
mesh = jax.make_mesh((2, 2, 2, 1), axes, axis_types=(AxisType.Auto,) * 4)
def local(x, y):
    def layer(x, _):
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        return jax.lax.psum_scatter(jnp.sin(whole), "fsdp", tiled=True), None
    x, _ = jax.lax.scan(layer, x, None, length=5)
    x = jax.lax.ppermute(x, "sequence", [(0, 1), (1, 0)])
    y = jax.lax.all_to_all(y, "sequence", 0, 1, tiled=True)
    return jax.lax.psum(x, ("data", "fsdp")), y
specs = (P(), P())
function = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 16), (8, 16))]
with jax.set_mesh(mesh):
    print(jax.jit(function).lower(*shapes).compile().as_text())
"""


@pytest.fixture(scope="module")
def known_program():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", KNOWN_PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return CompiledProgram(done.stdout)


def test_collectives_of_a_known_program_are_found_with_axes_counts_and_bytes(known_program):
    found = find_collectives(known_program, devices=8)
    rows = by_kind_and_axes(((one, 0.0) for one in found), MESH)
    x, y = 64 * 16 * 4, 8 * 16 * 4
    assert [(row.kind, row.axes, row.count, row.sent_bytes) for row in rows] == [
        ("all-gather", ("fsdp",), 5, 5 * x),
        ("all-reduce", ("data", "fsdp"), 1, 2 * 3 / 4 * x),
        ("reduce-scatter", ("fsdp",), 5, 5 * x),
        ("collective-permute", ("sequence",), 1, x),
        ("all-to-all", ("sequence",), 1, y / 2),
    ]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}, use", [[0, 2], [1, 3]]),
        ("{}, use", [[0, 1, 2, 3]]),
        ("[2,2]<=[4], use", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0), use", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}, use", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}, use", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(1)2}, use", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}, use", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([0,2,1,3]) {'b'}, use", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, use", [[0, 2], [1, 3]]),
    ],
)
def test_replica_groups_are_read_in_every_form(text, groups):
    np.testing.assert_array_equal(parse_replica_groups(text, 4), groups)


def test_an_unknown_form_of_replica_groups_is_refused():
    with pytest.raises(ValueError, match="replica_groups: 'novel"):
        parse_replica_groups("novel", 4)


TPU_COLLECTIVES = """\
HloModule jit_step

%piece.1 (param_0.1: f32[8,128]) -> f32[32,128] {
  %param_0.1 = f32[8,128]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[32,128]{1,0} all-gather(%param_0.1), channel_id=3, \
replica_groups={{0,1,2,3}}, dimensions={0}
}

%piece.2 (param_0.2: f32[8,128]) -> f32[32,128] {
  %param_0.2 = f32[8,128]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[32,128]{1,0} all-gather(%param_0.2), channel_id=3, \
replica_groups={{0,1,2,3}}, dimensions={0}
}

%all-reduce-scatter.1 (param_0.3: f32[32,128]) -> f32[8,128] {
  %param_0.3 = f32[32,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.1 = f32[32,128]{1,0} all-reduce(%param_0.3), channel_id=4, \
replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[8,128]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), \
dynamic_slice_sizes={8,128}
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %fusion.1 = f32[32,128]{1,0} fusion(%x), kind=kCustom, calls=%piece.1
  %fusion.2 = f32[32,128]{1,0} fusion(%x), kind=kCustom, calls=%piece.2
  ROOT %fusion.3 = f32[8,128]{1,0} fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_pieces_of_one_collective_count_once_and_a_sliced_all_reduce_is_a_scatter():
    gather, scatter = find_collectives(CompiledProgram(TPU_COLLECTIVES), devices=4)
    assert (gather.kind, gather.sent_bytes) == ("all-gather", 3 * 8 * 128 * 4)
    assert (scatter.kind, scatter.sent_bytes) == ("reduce-scatter", 3 * 8 * 128 * 4)


# --- Chips


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


@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v9:2x2", "v5p:8x8"])
def test_an_unknown_topology_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"v5e:\{1x1,2x2,.*v6e.*got '" + name):
        parse_topology(name)


# --- Plans


def test_a_state_that_cannot_fit_is_refused_before_compilation_with_advice():
    config: Any = gla.get_config("text,smoke")
    config.model.width, config.model.depth = 2**16, 32
    plan = make_plan(config, parse_topology("v5e:1x1"), jax.devices()[:1])
    assert plan["advice"].startswith("v5e:1x1 has 17.2 GB per device")
    assert "Largest: optimizer state; smaller with more of config.mesh.fsdp" in plan["advice"]
    assert plan["memory"]["optimizer_state"] == pytest.approx(
        2 * plan["memory"]["parameters"], rel=1e-3
    )


def test_advice_against_large_activations_follows_what_the_config_can_still_change():
    config: Any = gla.get_config("text,smoke")
    memory = {"hbm_bytes": 16e9, "parameters": 1e9, "optimizer_state": 2e9}
    plan = {"topology": "v5e:2x2", "batch_size": 8, "mesh": MESH, "memory": memory}
    refusal = "RESOURCE_EXHAUSTED: Ran out of memory on HBM: 20G."
    memory["total"] = 20e9
    said = advice(plan, config, refusal)
    assert "temporaries 17 GB (compiler: Ran out of memory on HBM: 20G.)" in said
    assert said.endswith(
        "Largest: temporaries; smaller with config.model.remat=full, or time over"
        " config.mesh.sequence (now 2), or config.accumulate=2, or config.batch_size=4"
    )
    config.model.remat, plan["batch_size"] = "full", 4
    assert advice(plan, config, refusal).endswith(
        "Largest: temporaries; smaller with time over config.mesh.sequence (now 2)"
    )


def test_a_mesh_that_does_not_fill_the_slice_is_refused():
    config: Any = gla.get_config("text,smoke")
    config.mesh.data, config.mesh.fsdp = 1, 3
    with pytest.raises(ValueError, match=r"number of devices, 1; .*fsdp=3"):
        make_plan(config, parse_topology("v5e:1x1"), jax.devices()[:1])


def test_quantities_are_written_with_three_digits_and_a_prefix():
    assert [si(x, "B") for x in (0, 999, 1_234_567, 9.996e11)] == [
        "0 B",
        "999 B",
        "1.23 MB",
        "1 TB",
    ]


def test_numbers_of_a_step_that_the_compiler_refused_are_missing():
    refused = compiled_step.numbers({"memory": {"total": 2e11}, "advice": "less"})
    assert refused.pop("gigabytes") == 200
    assert set(refused.values()) == {None}


def test_a_step_that_was_compiled_but_does_not_fit_has_no_speed():
    rows = [{"sent_bytes": 3e9, "count": 2}]
    seconds = {"compute": 0.1, "memory": 0.2, "collectives": 0.3}
    time = {"seconds": seconds, "speeds": {"overlapped": {"step_s": 0.3}}}
    plan = {"memory": {"total": 3e10}, "time": time, "collectives": rows}
    plan |= {"batch_size": 2, "sequence_length": 30, "advice": ""}
    fits = compiled_step.numbers(plan)
    assert (fits["gigabytes"], fits["sent_gigabytes"], fits["collectives"]) == (30, 3, 2)
    assert fits["memory_ms"] == 200 and fits["tokens_per_second"] == 200
    large = compiled_step.numbers(plan | {"advice": "less"})
    assert large.pop("gigabytes") == 30 and set(large.values()) == {None}


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "scanax[aot]"',
)


@pytest.mark.full
@needs_libtpu
def test_a_recurrence_over_time_sends_the_same_at_any_length():
    """Compiled for a TPU: one gather of states forward, one backward, and what does not depend on
    time."""
    settings = ("mesh.sequence=4", "mesh.data=1", "batch_size=1", "model.depth=1")
    short, long = (
        compiled_step.measure(
            seed=0,
            config="gla:text,smoke",
            topology="v5e:2x2",
            sequence_length=length,
            settings=(*settings, "task.packing=stream"),
        )["step"]
        for length in (512, 4096)
    )
    assert short["collectives"] and short["sent_gigabytes"]
    for name in ("collectives", "sent_gigabytes"):
        assert short[name] == long[name], name
    assert short["compute_ms"] and long["compute_ms"]
    assert long["compute_ms"] > 6 * short["compute_ms"]


@pytest.mark.full
@needs_libtpu
def test_states_travel_while_a_kernel_runs():
    """In the order in which a TPU runs the program: sent, then a kernel over the tokens, then
    awaited; backward too."""
    devices = np.array(tpu_devices(parse_topology("v5e:2x4"))).reshape(1, 1, 8, 1)
    axes = ("data", "fsdp", "sequence", "tensor")
    mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * 4)
    cut = jax.NamedSharding(mesh, jax.P(None, "sequence"))
    shape = (1, 8 * 8192, 16, 128)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=cut)
    decay_log = jax.ShapeDtypeStruct(shape[:3], jnp.float32, sharding=cut)

    def loss(*given):
        return jnp.sum(jnp.sin(gated_linear_attention(*given)[0].astype(jnp.float32)))

    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
        program = gradients.lower(x, x, x, decay_log).compile().as_text()
    assert program and "is_scheduled=true" in program
    main = program[program.index("\nENTRY ") :]
    # A matrix and a decay of each head, of eight devices.
    states = f"f32[8,1,{16 * (128 * 128 + 1)}]"
    steps = {
        "sent": rf"%async-collective-start\S* = \(.*{re.escape(states)}",
        "awaited": rf"%async-collective-done\S* = {re.escape(states)}",
        "forward": r"%gla_forward\S* = .*custom-call\(",
        "states again": r"%gla_states\S* = .*custom-call\(",
        "backward": r"%gla_backward\S* = .*custom-call\(",
    }
    found = [
        (match.start(), step)
        for step, line in steps.items()
        for match in re.finditer(rf"^ *{line}", main, re.MULTILINE)
    ]
    assert [step for _, step in sorted(found)] == [
        *("sent", "forward", "awaited"),
        *("sent", "states again", "awaited", "backward"),
    ]


@pytest.mark.full
@needs_libtpu
def test_a_mixture_of_memories_gathers_before_its_loop_over_devices():
    """On a CPU the compiler moves a gather out of a loop, on a TPU it does not."""
    step = compiled_step.measure(
        seed=0,
        config="mom:text,smoke",
        topology="v5e:2x2",
        sequence_length=512,
        settings=(
            *("mesh.sequence=4", "mesh.data=1", "batch_size=1", "model.depth=1"),
            "task.packing=stream",
        ),
    )["step"]
    # Forward and backward of the memories and of three convolutions' inputs, which inputs are
    # there, what goes on from device to device, and the sum of the gradients.
    assert step["collectives"] is not None and step["collectives"] <= 16


@pytest.mark.slow
@needs_libtpu
def test_a_recipe_is_planned_for_a_slice_that_is_not_there(tmp_path):
    file = tmp_path / "plan.json"
    command = [
        *(sys.executable, "-m", "experiments.plan"),
        "--config=experiments/configs/gla.py:text,smoke",
        *("--topology=v5e:2x2", "--config.mesh.fsdp=4", "--config.batch_size=2"),
        *("--config.model.depth=2", f"--json={file}"),
    ]
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=os.environ | LIBTPU_ENVIRONMENT | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(file.read_text())
    assert done.stdout.strip() == format_plan(plan)
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 1}
    assert (plan["recipe_batch_size"], plan["batch_size"]) == (2, 4)
    # Parameters lie over fsdp, a quarter on each device but for the few that are not cut.
    assert plan["memory"]["parameters"] < 0.3 * 4 * plan["parameters"]
    kinds = {row["kind"] for row in plan["collectives"]}
    assert "all-gather" in kinds and kinds & {"reduce-scatter", "all-reduce"}
    assert all(row["axes"] == ["fsdp"] for row in plan["collectives"])
    work = plan["work"]
    assert not work["loops_counted_once"]
    # Each device's share of the model's products, those of the recurrence on top.
    assert work["model_flops"] / 4 < work["matmul_flops"] < work["model_flops"]
    step = plan["time"]["speeds"]["overlapped"]["step_s"]
    assert step == max(plan["time"]["seconds"].values()) > 0
