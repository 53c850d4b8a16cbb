"""What a compiled train step costs: memory as the compiler says, time as modelled."""

import re
from typing import Any

from experiments.compiled.hardware import Slice, peak_flops


def step_time(plan: dict[str, Any], where: Slice) -> dict[str, Any]:
    """Seconds of a step by resource and the speeds that follow, from a plan's work and
    collectives."""
    work, peak = plan["work"], peak_flops(plan["device_kind"])
    if peak is None:
        raise ValueError(f"no peak is known for devices of kind {plan['device_kind']!r}")
    by_axis: dict[str, float] = {}
    for row in plan["collectives"]:
        axes = " x ".join(row["axes"])
        by_axis[axes] = by_axis.get(axes, 0.0) + row["seconds"]
    parts = {
        "compute": compute_seconds(work, peak),
        "memory": work["hbm_bytes"] / where.chip.hbm_bytes_per_s,
        "collectives": sum(by_axis.values()),
    }
    speeds = {}
    for name, seconds in (("overlapped", max(parts.values())), ("serial", sum(parts.values()))):
        speeds[name] = {"step_s": seconds}
        if work["model_flops"] is not None:
            units = plan["units"] * plan["replicas"]
            speeds[name] |= {
                "units_per_s": units / seconds,
                "model_flops_utilisation": work["model_flops"] / (seconds * plan["devices"] * peak),
            }
    return {
        "seconds": parts,
        "collective_seconds_by_axes": by_axis,
        "bound": max(parts, key=lambda name: parts[name]),
        "speeds": speeds,
    }


def compute_seconds(work: dict[str, Any], peak: float) -> float:
    """Of matmuls at the peak; a kernel takes its compiled schedule where that is longer."""
    slower = sum(
        one["runs"] * max(0.0, one["seconds"] - one["passes"] / peak)
        for one in work["kernels"]
        if one["seconds"] is not None
    )
    return work["matmul_pass_flops"] / peak + slower


def add_compiled_memory(memory: dict[str, Any], analysis: Any) -> None:
    exact = sum(memory[key] for key in ("parameters", "optimizer_state", "batch_and_counters"))
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory["padding"] = analysis.argument_size_in_bytes - exact
    memory["temporaries"] = analysis.temp_size_in_bytes + outputs
    memory["program"] = analysis.generated_code_size_in_bytes
    memory["total"] = exact + memory["padding"]
    memory["total"] += memory["temporaries"] + memory["program"]


def refused_bytes(refusal: str) -> dict[str, int]:
    """What a program wanted that the compiler refused for want of memory, as far as it says so."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    forms = {"total": r"Used ([\d.]+)([KMGT])", "temporaries": r"temporaries \(([\d.]+)([KMGT])"}
    found = {name: re.search(form, refusal) for name, form in forms.items()}
    return {name: int(float(said[1]) * units[said[2]]) for name, said in found.items() if said}
