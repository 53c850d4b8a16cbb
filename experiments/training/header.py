"""What a run says of itself before anything is compiled: model, data, devices, where results go."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from experiments.training.config import Config
from experiments.training.program import Program


def beginning(config: Config, mesh: Mesh, workdir: Path) -> str:
    """Two lines, known before data are prepared and the model is traced."""
    devices = mesh.devices.flat
    kinds = Counter(device.device_kind for device in devices)
    where = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    seeds = ", ".join(map(str, config.seeds))
    return (
        f"task: {config.task.name}, {config.steps:,} steps of {config.batch_size:,} examples, seed"
        f"{'s' if len(config.seeds) > 1 else ''} {seeds}; results in {workdir}\n"
        f"devices: {where} ({devices[0].platform}); mesh {axes}"
    )


def contents(program: Program) -> str:
    """Two lines: the model and its size, the data."""
    model, blueprint = program.config.model, program.blueprint
    pattern = "/".join(model.get("pattern", ())) or "no mixers"
    sizes = [f"{name} {model[name]}" for name in ("depth", "width") if name in model]
    sizes.append(f"{blueprint.parameter_count:,} parameters")
    if blueprint.state_bytes is not None:
        sizes.append(f"{blueprint.state_bytes:,} bytes of state per sequence")
    unit, count = program.work.unit, program.work.count
    return (
        f"model: {model.name} of {pattern}; {', '.join(sizes)}\n"
        f"data: {facts(program.task.provenance)}; {count:,} {unit} a step"
    )


def facts(provenance: Mapping[str, Any]) -> str:
    """A task without files makes its data itself."""
    if not provenance:
        return "made by the task"
    texts = {
        name: f"{value:,}" if isinstance(value, int) else str(value)
        for name, value in provenance.items()
    }
    # Of a sum, what tells two files apart; run.json has all of it.
    short = (
        f"{name} {text[:12] if name.endswith('sha256') else text}" for name, text in texts.items()
    )
    return ", ".join(short)
