"""Kernels take their compiled schedules: by the blocks that a step of the grid works on."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from experiments.compiled.kernels import kernel_calls
from experiments.compiled.schedules import (
    CYCLES_PER_S,
    blocks,
    grid_steps,
    kernel_seconds,
    per_step,
    recorded,
)
from experiments.compiled.step_cost import compute_seconds

BLOCKS = "scale float32[8x128] float32[1x*] float32[8x128]"


def program(rows, width=512, others=0):
    """The jaxpr of a kernel over [rows, width] in blocks, with so many inputs more."""

    def kernel(x, w, *rest):
        rest[-1][...] = x[...] * w[0, 0]

    block = pl.BlockSpec((8, 128), lambda i, j: (i, j))
    call = pl.pallas_call(
        kernel,
        grid=(rows // 8, width // 128),
        in_specs=[block, pl.BlockSpec((1, width), lambda i, j: (0, 0)), *[block] * others],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((rows, width), jnp.float32),
        name="scale",
    )
    x, w = (jax.ShapeDtypeStruct((n, width), jnp.float32) for n in (rows, 1))
    return jax.make_jaxpr(jax.jit(call))(x, w, *[x] * others)


def test_a_step_of_the_grid_is_known_by_its_blocks_and_costs_what_another_length_adds():
    short, long = (list(kernel_calls(program(rows))) for rows in (16, 48))
    assert blocks(short[0]) == blocks(long[0]) == BLOCKS
    assert (grid_steps(short[0]), grid_steps(long[0])) == (8, 24)
    assert per_step(short, long, [800]) == {BLOCKS: 50.0}


def test_a_kernel_takes_the_schedule_of_its_chip_or_the_shortest_of_the_others():
    known = {"v6e": {BLOCKS: 50.0}, "v5e": {BLOCKS: 80.0}}
    wide = program(16, width=1024)
    for chip, cycles in (("v6e", 50), ("v5e", 80), ("v5p", 50)):
        seconds = 2 * 8 * cycles / CYCLES_PER_S[chip]
        assert kernel_seconds(wide, chip, known) == {"scale": pytest.approx(seconds)}
    # One more input costs no less; of one less nothing is known.
    more = "scale float32[8x128] float32[1x*] float32[8x128] float32[8x128]"
    seconds = 8 * 50 / CYCLES_PER_S["v6e"]
    assert kernel_seconds(program(16, others=1), "v6e", known)["scale"] == pytest.approx(seconds)
    assert kernel_seconds(program(16), "v6e", {"v6e": {more: 50.0}}) == {"scale": None}


def test_compute_is_longer_by_what_schedules_take_beyond_their_matmuls():
    kernel = {"name": "scale", "runs": 3, "passes": 10.0}
    work = {"matmul_pass_flops": 100.0, "kernels": [kernel | {"seconds": 4.0}]}
    assert compute_seconds(work, peak=10.0) == 10 + 3 * (4 - 1)
    for seconds in (0.5, None):
        work["kernels"] = [kernel | {"seconds": seconds}]
        assert compute_seconds(work, peak=10.0) == 10


def test_the_recorded_schedules_have_the_kernels_of_the_ops():
    names = {key.split()[0] for cycles in recorded().values() for key in cycles}
    assert {"gla_forward", "gla_backward", "delta_forward", "selective_backward"} <= names
