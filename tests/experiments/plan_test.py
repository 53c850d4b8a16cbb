"""A plan says what fits, what would help, and the numbers of a step that is compiled, not run."""

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
from jax.sharding import AxisType, Mesh

from experiments.compiled.hardware import parse_topology
from experiments.compiled.plan_report import format_plan
from experiments.compiled.topology import LIBTPU_ENVIRONMENT, tpu_devices
from experiments.configs import gla
from experiments.plan import make_plan
from experiments.tables.computations import compiled_step
from experiments.training.checkout import CHECKOUT
from ops import gated_linear_attention

MESH = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}


def test_a_state_that_cannot_fit_is_refused_before_compilation_with_advice():
    config: Any = gla.get_config("text,smoke")
    config.model.width, config.model.depth = 2**16, 32
    plan = make_plan(config, parse_topology("v5e:1x1"), jax.devices()[:1])
    assert plan["advice"].startswith("v5e:1x1 has 17.2 GB per device")
    assert "Largest: optimizer state; smaller with more of config.mesh.fsdp" in plan["advice"]
    assert plan["memory"]["optimizer_state"] == pytest.approx(
        2 * plan["memory"]["parameters"], rel=1e-3
    )


def test_a_mesh_that_does_not_fill_the_slice_is_refused():
    config: Any = gla.get_config("text,smoke")
    config.mesh.data, config.mesh.fsdp = 1, 3
    with pytest.raises(ValueError, match=r"number of devices, 1; .*fsdp=3"):
        make_plan(config, parse_topology("v5e:1x1"), jax.devices()[:1])


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
