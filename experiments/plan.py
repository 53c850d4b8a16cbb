"""Would this run fit a TPU slice, and what would bound its step? Compiled for the slice and
modelled; no TPU needed.

    python -m experiments.plan --config=experiments/configs/gla.py:text --topology=v5p:4x4x4 \
        --config.mesh.fsdp=8
    python -m experiments.plan --config=experiments/configs/gla.py:text --topology=v5e:4x4 \
        --config.model.width=2048 --json=plan.json

Compiles the train step of a config, as `experiments.train` builds it, with the TPU's own compiler
for a named slice, and reads the result: bytes of memory per device against those of the chip,
collectives by kind and mesh axis, matmul flops, bytes moved, and from them the time of a step,
collectives modelled as experiments/compiled/collective_time.py says. Nothing of the model's size is
allocated. A batch that is too small for data x fsdp is raised to fill it. Ends with status 1 and
what would help if the step does not fit.

What the numbers are:

- memory: parameters, optimizer state and batch are exact sizes of the shards; padding is what the
  compiler's layouts add to them; temporaries (activations kept for the backward pass, buffers) and
  the program are the compiler's numbers;
- flops, bytes and collectives are read from the compiled program, as experiments/compiled/cost.py
  and experiments/compiled/collectives.py say, loops counted as often as they run;
- a kernel computes for its compiled schedule at least, where that is recorded
  (experiments/compiled/schedules.py), else for its matmuls; the plan names those without;
- the time of a step lies between that of the slowest of compute, memory and collectives (all three
  at once, the roofline) and their sum (one after the other). Neither counts waiting, a matrix unit
  that is not full, or transfers between a device and its host's memory.

Needs libtpu: pip install "scanax[aot]" (Linux x86-64).
"""

import importlib.metadata
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from experiments.compiled.collective_time import collective_seconds
from experiments.compiled.collectives import by_kind_and_axes, find_collectives
from experiments.compiled.cost import hbm_bytes, kernel_runs, matmul_flops
from experiments.compiled.hardware import Slice, parse_topology
from experiments.compiled.kernels import kernel_flops
from experiments.compiled.plan_report import advice, format_plan
from experiments.compiled.program import CompiledProgram
from experiments.compiled.schedules import kernel_seconds
from experiments.compiled.step_cost import add_compiled_memory, refused_bytes, step_time
from experiments.compiled.topology import tpu_devices
from experiments.training import command_line
from experiments.training import config as configs
from experiments.training.config import Config
from experiments.training.mesh import make_mesh, traced_on
from experiments.training.program import filling_batch_size, make_program, shard_bytes
from experiments.training.speed import count_weights, model_flops


def make_plan(config: Config, where: Slice, devices: list[Any]) -> dict[str, Any]:
    """All that is printed, as JSON types; "advice" is "" for a step that fits. `devices` as from
    `tpu_devices`.

    Raises ValueError for a config that cannot work there.
    """
    configs.validate(config)
    mesh = make_mesh(config.mesh, devices)
    recipe_batch_size = config.batch_size
    config.batch_size = filling_batch_size(config, mesh)
    run = make_program(config, mesh)
    state, batch, work = run.state, run.batch, run.work
    flops = model_flops(count_weights(run.blueprint.params), work)

    plan: dict[str, Any] = {
        "topology": where.name,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "recipe_batch_size": recipe_batch_size,
        "sequence_length": work.length,
        "unit": work.unit,
        "units": work.count,
        "replicas": len(config.seeds),
        "parameters": run.blueprint.parameter_count,
    }
    plan["memory"] = memory = {
        "hbm_bytes": where.chip.hbm_bytes,
        "parameters": shard_bytes(state.params),
        "optimizer_state": shard_bytes(state.opt_state),
        "optimizer_state_on_host": shard_bytes(state.opt_state, on_host=True),
        "batch_and_counters": shard_bytes((batch, state.variables, state.window)),
    }
    if memory["parameters"] + memory["optimizer_state"] > where.chip.hbm_bytes:
        return plan | {"advice": advice(plan, config)}

    # --- Compile
    began = time.perf_counter()
    with traced_on(mesh, config):
        number = jax.ShapeDtypeStruct((), np.int32)
        traced = run.step.trace(state, batch, number, run.hyperparameters)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            memory |= refused_bytes(str(error))
            return plan | {"advice": advice(plan, config, str(error))}
    plan["compile_s"] = time.perf_counter() - began
    plan["versions"] = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")
    }

    # --- Read it
    add_compiled_memory(memory, compiled.memory_analysis())
    fits = memory["total"] <= where.chip.hbm_bytes
    plan["advice"] = "" if fits else advice(plan, config)
    program = CompiledProgram(compiled.as_text() or "")
    inside = kernel_flops(traced.jaxpr)
    computed = matmul_flops(program, inside)
    schedules = kernel_seconds(traced.jaxpr, where.chip.name)
    places = np.array([device.coords for device in mesh.devices.flat])
    rows = by_kind_and_axes(
        (
            (one, collective_seconds(one, places, where))
            for one in find_collectives(program, len(devices))
        ),
        mesh.shape,
    )
    plan["collectives"] = [vars(row) for row in rows]
    plan["work"] = {
        "matmul_flops": computed.flops,
        "matmul_pass_flops": computed.passes,
        "hbm_bytes": hbm_bytes(program),
        "model_flops": None if flops is None else len(config.seeds) * flops,
        "loops_counted_once": program.unknown_loops,
        "kernels": [
            {"name": name, "runs": runs, "passes": inside[name].passes, "seconds": schedules[name]}
            for name, runs in kernel_runs(program).items()
            if name in schedules
        ],
    }
    plan["time"] = step_time(plan, where)
    return plan


def main() -> None:
    options = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise ValueError(f"--json must be in a directory that exists; got {options.json}")
    where = parse_topology(options.topology)
    plan = make_plan(command_line.given_config(), where, tpu_devices(where))
    if options.json:
        Path(options.json).write_text(json.dumps(plan, indent=1) + "\n")
    if plan["advice"]:
        raise ValueError(plan["advice"])
    print(format_plan(plan))


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "File of experiments/configs, as <file>:<task>[,smoke]."
    )
    flags.DEFINE_string("topology", None, "TPU slice, such as v5e:4x4 or v5p:8x8x8.", required=True)
    flags.DEFINE_string("json", "", "File to write the plan to.")
    flags.mark_flag_as_required("config")
    command_line.run(main, cache=False)
