"""Collectives of a compiled program: kinds, axes, counts and bytes as counted by hand."""

import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.compiled.collectives import (
    by_kind_and_axes,
    find_collectives,
    parse_replica_groups,
)
from experiments.compiled.program import CompiledProgram

MESH = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}

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
