"""A plan (experiments/plan.py) as text, and what would help one that does not fit."""

import re
from typing import Any

from experiments.training.config import Config

MEMORY_ROWS = (
    "parameters",
    "optimizer_state",
    "batch_and_counters",
    "padding",
    "temporaries",
    "program",
    "total",
)
# How the TPU compiler refuses a kernel whose blocks exceed the fast memory of a core.
FAST_MEMORY = re.compile(r"size ([\d.]+[KMG]) and limit ([\d.]+[KMG]) exceeded scoped vmem limit")
DECIMAL_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def si(value: float, unit: str) -> str:
    """The value with three digits and a decimal prefix: 1.23 GB."""
    step = 0
    while abs(value) >= 999.5 and step + 1 < len(DECIMAL_PREFIXES):
        value, step = value / 1000, step + 1
    digits = f"{value:.3g}" if value else "0"
    return f"{digits} {DECIMAL_PREFIXES[step]}{unit}".rstrip()


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as text: what was compiled, memory, collectives, work, modelled time of a step."""
    memory, work, modelled = plan["memory"], plan["work"], plan["time"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    batch = f"{plan['batch_size']:,}"
    if plan["sequence_length"] is not None:
        batch += f" x {plan['sequence_length']:,}"
    if plan["batch_size"] != plan["recipe_batch_size"]:
        batch += f" (raised from {plan['recipe_batch_size']:,} to fill data x fsdp)"
    if plan["replicas"] > 1:
        batch += f", for each of {plan['replicas']} replicas"
    versions = ", ".join(f"{name} {v}" for name, v in plan["versions"].items())
    unit = f"{plan['unit']}/s"
    lines = [
        f"{plan['topology']}, {plan['devices']} x {plan['device_kind']}: compiled ahead of"
        f" time ({versions}) and modelled, not timed",
        f"mesh        {mesh}",
        f"batch       {batch}",
        f"parameters  {plan['parameters']:,}",
        "",
        f"memory per device, of {si(memory['hbm_bytes'], 'B')}",
    ]
    for key in MEMORY_ROWS:
        share = memory[key] / memory["hbm_bytes"]
        name = key.replace("_", " ")
        lines.append(f"  {name:<20}{si(memory[key], 'B'):>10}{share:>9.1%}")
    if memory["optimizer_state_on_host"]:
        on_host = si(memory["optimizer_state_on_host"], "B")
        lines.append(f"  in the host's memory, per device: optimizer state, {on_host}")
    lines += ["", "collectives per step and device"]
    if not plan["collectives"]:
        lines.append("  none")
    for row in plan["collectives"]:
        axes = " x ".join(row["axes"])
        lines.append(
            f"  {row['kind']:<20}{axes:<18}{row['count']:>6} x"
            f"{si(row['sent_bytes'], 'B'):>10} sent{row['seconds'] * 1e3:>10.2f} ms"
        )
    lines += [
        "",
        "work per step and device",
        f"  matmul flops        {si(work['matmul_flops'], ''):>10}",
        f"  in bfloat16 passes  {si(work['matmul_pass_flops'], ''):>10}",
        f"  HBM traffic         {si(work['hbm_bytes'], 'B'):>10}",
    ]
    if work["loops_counted_once"]:
        lines.append(
            "  without the turns of loops whose number could not be read:"
            f" {', '.join(work['loops_counted_once'])}"
        )
    scheduled = [one for one in work["kernels"] if one["seconds"] is not None]
    if scheduled:
        total = sum(one["runs"] * one["seconds"] for one in scheduled)
        names = ", ".join(one["name"] for one in scheduled)
        lines.append(f"  kernels, by their compiled schedules{total * 1e3:>10.2f} ms: {names}")
    if unknown := [one["name"] for one in work["kernels"] if one["seconds"] is None]:
        lines.append(f"  kernels of which only matmuls are counted: {', '.join(unknown)}")
    lines += ["", "modelled time of a step"]
    for name, seconds in modelled["seconds"].items():
        mark = "  <- bound" if name == modelled["bound"] else ""
        lines.append(f"  {name:<20}{seconds * 1e3:>10.2f} ms{mark}")
    for axes, seconds in modelled["collective_seconds_by_axes"].items():
        lines.append(f"    over {axes:<13}{seconds * 1e3:>10.2f} ms")
    names = {"overlapped": "all at once", "serial": "one after the other"}
    for key, name in names.items():
        speed = modelled["speeds"][key]
        line = f"  {name:<20}{speed['step_s'] * 1e3:>10.2f} ms"
        if "units_per_s" in speed:
            line += (
                f"   {si(speed['units_per_s'], unit)}, model flops utilisation"
                f" {speed['model_flops_utilisation']:.1%}"
            )
        lines.append(line)
    return "\n".join(lines)


def advice(plan: dict[str, Any], config: Config, refusal: str = "") -> str:
    """One line: what does not fit, its largest part, and what would make that smaller."""
    if FAST_MEMORY.search(refusal):
        return _fast_memory_advice(plan, refusal)
    memory, sizes = plan["memory"], plan["mesh"]
    known = {key: memory[key] for key in ("parameters", "optimizer_state")}
    if "total" in memory:
        known["temporaries"] = memory["total"] - sum(known.values())
    known["temporaries"] = memory.get("temporaries", known.get("temporaries", 0))
    largest = max(known, key=lambda name: known[name])
    help_with = {
        "parameters": [
            f"more of config.mesh.fsdp (now {sizes['fsdp']})",
            f"more of config.mesh.tensor (now {sizes['tensor']})",
        ],
        "optimizer_state": [
            f"more of config.mesh.fsdp (now {sizes['fsdp']})",
            "config.optimizer.name=lion, which keeps one moment",
        ],
        "temporaries": [f"time over config.mesh.sequence (now {sizes['sequence']})"],
    }[largest]
    if largest == "parameters" and config.mesh.zero == 1:
        help_with.insert(0, "config.mesh.zero=3")
    if largest == "optimizer_state" and not config.optimizer.offload:
        help_with.append("config.optimizer.offload=True")
    if largest == "temporaries":
        if config.model.get("remat") in ("none", "dots"):
            help_with.insert(0, "config.model.remat=full")
        parts = config.accumulate * sizes["data"] * sizes["fsdp"]
        if plan["batch_size"] >= 2 * parts:
            help_with += [
                f"config.accumulate={2 * config.accumulate}",
                f"config.batch_size={plan['batch_size'] // 2}",
            ]
    said = re.search(r"[Rr]an out of memory[^\n]*", refusal)
    listed = ", ".join(f"{name.replace('_', ' ')} {si(size, 'B')}" for name, size in known.items())
    return (
        f"{plan['topology']} has {si(memory['hbm_bytes'], 'B')} per device, and the"
        f" step does not fit: {listed}{f' (compiler: {said[0]})' if said else ''}. Largest:"
        f" {largest.replace('_', ' ')}; smaller with {', or '.join(help_with)}"
    )


def _fast_memory_advice(plan: dict[str, Any], refusal: str) -> str:
    said = FAST_MEMORY.search(refusal)
    assert said is not None
    named = re.search(r'op_name="[^"]*?([^/"]+)/pallas_call', refusal)
    kernel = f"the kernel {named[1]}" if named else "a kernel"
    return (
        f"{plan['topology']}: {kernel} needs {said[1]}iB of fast memory (VMEM) and has {said[2]}iB."
        " Smaller heads need less, and config.kernels=False takes the plain JAX form"
    )
