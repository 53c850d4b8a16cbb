"""The GPU benchmark: every op on one NVIDIA GPU, first right, then timed, beside what others run.

    python -m experiments.benchmarks.ops --gpu                   checks and timings, at most 20 minutes
    python -m experiments.benchmarks.ops --gpu --gpu_minutes=5 --gpu_only=gla

Writes experiments/results/bench_gpu.json and bench_gpu.md after every case, so that an interrupted
run keeps what it has. A row that was not reached, or cannot run, is a gap in the table, with the
reason where there is one.

**Checks.** The kernels against the float32 reference on the device, outputs and all gradients,
relative L2 error, at ragged lengths with segments. A case that fails is reported with its error and
not timed.

**Timings.** bfloat16 inputs. Implementations of one case take turns; a turn runs a program several
times and waits once. Beside ours: `xla`; the Triton kernels of flash-linear-attention (torch) and
of mamba-ssm; the Mosaic kernels of jax-linear-attention; each where it can be imported. Floors:
bytes of inputs and outputs (and, backward, of cotangents and gradients) over the published memory
rate, matmul flops of the recurrence over the published peak."""

import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ops
from experiments.benchmarks.peers import gpu as gpu_peers
from experiments.compiled.hardware import gpu_memory_bytes_per_s, peak_flops
from experiments.training import run_record
from experiments.training.checkout import RESULTS

MODES = ("forward", "forward+backward")
# B, T, H, D of matrix-state ops; from 1K to 256K tokens at B T = 64K.
SIZES = (
    (4, 2048, 16, 128),
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 4096, 64, 128),
    (8, 1024, 8, 64),
    (8, 2048, 32, 256),
    (64, 1024, 8, 128),
    (16, 4096, 8, 128),
    (4, 16384, 8, 128),
    (1, 65536, 8, 128),
)
LONG = (1, 262144, 8, 128)
# B, T, D, N of scans.
SCAN_SIZES = (
    (8, 2048, 2048, 16),
    (2, 16384, 2048, 16),
    (1, 65536, 2048, 16),
    (1, 1048576, 256, 16),
)
LIMITS = {
    "float32": {"output": 1e-5, "gradient": 5e-5},
    "bfloat16": {"output": 1e-2, "gradient": 3e-2},
}


@dataclass(frozen=True)
class Case:
    """One op at one size.

    inputs(size, dtype): the differentiable inputs by name, in the order of `call(segments,
    implementation, *inputs)`; flops: of matmuls, forward; peers: name -> what makes a program of
    inputs and mode (experiments/benchmarks/peers/gpu.py); small: the size of the check;
    implementations: the first is checked, and "ours"."""

    op: str
    variant: str
    size: tuple[int, ...]
    inputs: Callable[[tuple[int, ...], str], dict[str, jax.Array]]
    call: Callable[..., jax.Array]
    flops: float
    peers: dict[str, Callable[..., Callable[[], Any]]]
    small: tuple[int, ...]
    implementations: tuple[str, ...] = ("pallas_gpu", "xla")

    @property
    def name(self) -> str:
        return " ".join(x for x in (self.op, self.variant) if x)


# --- Cases
# ------------------------------------------------------------------------------------------------------------


def matrix_inputs(op: str, variant: str, size: tuple[int, ...], dtype: str) -> dict[str, jax.Array]:
    """q, k (of norm one), v, and where the op has them decay_log and beta, as models make them."""
    B, T, H, D = size
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (B, T, H, D)) for key in keys[:3])
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    inputs = {name: x.astype(dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    shape = {"none": None, "constant": (H,), "scalar": (B, T, H)}.get(variant, (B, T, H, D))
    if shape is not None:
        decay = -jnp.exp(jax.random.normal(keys[3], shape) - 3)
        inputs["decay_log"] = decay.astype(dtype if len(shape) == 4 else "float32")
    if op == "delta_rule":
        inputs["beta"] = jax.random.uniform(keys[4], (B, T, H)).astype(dtype)
    return inputs


def matrix_call(
    op: str, names: Sequence[str], segments: bool, implementation: str, *x: jax.Array
) -> jax.Array:
    inputs = dict(zip(names, x, strict=True))
    ids = _segments(x[0].shape[:2]) if segments else None
    function = getattr(ops, op)
    return function(**inputs, segment_ids=ids, implementation=implementation)[0]


def _segments(shape: tuple[int, ...]) -> jax.Array:
    starts = jax.random.uniform(jax.random.key(9), shape) < 0.02
    return jnp.cumsum(starts, 1, dtype=jnp.int32)


def matrix_cases() -> Iterator[Case]:
    # Multiply-adds per token and head: scores and their use within a chunk of 64, writes and reads
    # of the state; the delta rule also reads before it writes and solves a triangular system.
    variants = [("gated_linear_attention", x) for x in ("none", "constant", "scalar")]
    variants += [("gated_linear_attention", "vector")]
    variants += [("delta_rule", x) for x in ("none", "scalar", "vector")]
    for op, variant in variants:
        for size in (*SIZES, LONG):
            B, T, H, D = size
            per_token = 2 * 64 * D + 2 * D * D
            if op == "delta_rule":
                per_token += 2 * 64 * D + 64 * 64 + D * D
            names = ["q", "k", "v"]
            names += [] if variant == "none" else ["decay_log"]
            names += ["beta"] if op == "delta_rule" else []
            yield Case(
                op,
                variant,
                size,
                functools.partial(matrix_inputs, op, variant),
                functools.partial(matrix_call, op, names),
                2.0 * B * T * H * per_token,
                {
                    "flash-linear-attention": functools.partial(
                        gpu_peers.flash_linear_attention, op, variant
                    ),
                    "jax-linear-attention": functools.partial(
                        gpu_peers.jax_linear_attention, op, variant
                    ),
                },
                (2, 333, 4, D),
            )


def scan_inputs(variant: str, size: tuple[int, ...], dtype: str) -> dict[str, jax.Array]:
    """With the variant "gated" all that Mamba has: D, the gate z, and step sizes of which a bias is
    part."""
    B, T, D, N = size
    keys = jax.random.split(jax.random.key(0), 6)
    x, b, c, z = (
        jax.random.normal(key, (B, T, width)).astype(dtype)
        for key, width in zip(keys[:4], (D, N, N, D), strict=True)
    )
    delta, bias = jax.random.normal(keys[4], (B, T, D)), jnp.full((D,), -3.0)
    A = -jnp.broadcast_to(jnp.arange(1.0, N + 1)[None], (D, N))
    if variant == "gated":
        inputs = {"x": x, "delta": delta.astype(dtype), "A": A, "B": b, "C": c}
        skip = jax.random.normal(keys[5], (D,))
        return inputs | {"D": skip, "z": z, "delta_bias": bias}
    delta = jax.nn.softplus(delta + bias[None, None]).astype(dtype)
    return {"x": x, "delta": delta, "A": A, "B": b, "C": c}


def scan_call(
    segments: bool, implementation: str, *x: jax.Array, outside: bool = False
) -> jax.Array:
    """outside: the gate as an operation of its own."""
    inputs = dict(zip(("D", "z", "delta_bias"), x[5:], strict=False))
    z = inputs.pop("z") if outside else None
    y, _ = ops.selective_scan(
        *x[:5],
        **inputs,
        delta_softplus="delta_bias" in inputs,
        segment_ids=_segments(x[0].shape[:2]) if segments else None,
        implementation=implementation,
    )
    return y if z is None else y * jax.nn.silu(z)


def gate_outside(inputs: dict[str, jax.Array], mode: str) -> Callable[[], Any]:
    call = functools.partial(scan_call, False, "pallas_gpu", outside=True)
    return gpu_peers.jax_program(call, inputs, mode)


def scan_cases() -> Iterator[Case]:
    others = {
        "jax-linear-attention": gpu_peers.jax_linear_attention_mamba,
        "jax.lax.associative_scan": gpu_peers.associative_scan_mamba,
    }
    for variant, sizes, peers in (
        ("", SCAN_SIZES, others),
        ("gated", SCAN_SIZES[:2], {"ours, gated by XLA": gate_outside}),
    ):
        for size in sizes:
            yield Case(
                "selective_scan",
                variant,
                size,
                functools.partial(scan_inputs, variant),
                scan_call,
                0.0,
                {"mamba-ssm": gpu_peers.mamba_ssm, **peers},
                (2, 333, 96, 16),
            )


def diagonal_inputs(size: tuple[int, ...], dtype: str) -> dict[str, jax.Array]:
    B, T, D = size
    keys = jax.random.split(jax.random.key(0), 4)
    radius, angle = (jax.random.uniform(key, (D,)) for key in keys[:2])
    real, imaginary = (jax.random.normal(key, (B, T, D)).astype(dtype) for key in keys[2:])
    a = {"a_real": radius * jnp.cos(angle), "a_imaginary": radius * jnp.sin(angle)}
    return a | {"b_real": real, "b_imaginary": imaginary}


def diagonal_call(
    segments: bool, implementation: str, a_real: Any, a_imaginary: Any, *b: Any
) -> jax.Array:
    (real, imaginary), _ = ops.diagonal_scan(
        (a_real, a_imaginary),
        (b[0], b[1]),
        segment_ids=_segments(b[0].shape[:2]) if segments else None,
        implementation=implementation,
    )
    return real + imaginary


def diagonal_cases() -> Iterator[Case]:
    for size in ((8, 2048, 2048), (1, 65536, 2048)):
        yield Case(
            "diagonal_scan",
            "complex",
            size,
            diagonal_inputs,
            diagonal_call,
            0.0,
            {"jax.lax.associative_scan": gpu_peers.associative_scan},
            (2, 333, 96),
        )


def convolution_inputs(size: tuple[int, ...], dtype: str) -> dict[str, jax.Array]:
    B, T, D, taps = size
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (taps, D))
    return {"x": x.astype(dtype), "w": w.astype(dtype)}


def long_inputs(size: tuple[int, ...], dtype: str) -> dict[str, jax.Array]:
    B, T, D = size
    keys = jax.random.split(jax.random.key(0), 2)
    kernel = jax.random.normal(keys[1], (D, T)) * jnp.exp(-jnp.arange(T) / 64)[None]
    u = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    return {"u": u, "kernel": kernel}


def xla_cases() -> Iterator[Case]:
    """Ops without a GPU kernel of ours."""
    yield Case(
        "short_convolution",
        "",
        (8, 2048, 2048, 4),
        convolution_inputs,
        lambda segments, implementation, *x: ops.short_convolution(
            *x,
            segment_ids=_segments(x[0].shape[:2]) if segments else None,
            implementation=implementation,
        )[0],
        0.0,
        {},
        (2, 333, 96, 4),
        ("xla",),
    )
    yield Case(
        "long_convolution",
        "",
        (16, 16384, 256),
        long_inputs,
        lambda segments, implementation, *x: ops.long_convolution(
            *x, implementation=implementation
        ),
        0.0,
        {},
        (2, 333, 96),
        ("xla",),
    )
    window, size = 128, (4, 2048, 16, 128)
    yield Case(
        "window_attention",
        f"window {window}",
        size,
        functools.partial(matrix_inputs, "window_attention", "none"),
        lambda segments, implementation, *x: ops.window_attention(
            *x,
            window=window,
            segment_ids=_segments(x[0].shape[:2]) if segments else None,
            implementation=implementation,
        )[0],
        4.0 * window * math.prod(size),
        {},
        (2, 333, 4, 128),
        ("xla",),
    )


def cases() -> list[Case]:
    """All cases, the first size of every op and variant before the second of any."""
    by_size: dict[int, list[Case]] = {}
    counts: dict[str, int] = {}
    for case in [*matrix_cases(), *scan_cases(), *diagonal_cases(), *xla_cases()]:
        counts[case.name] = place = counts.get(case.name, -1) + 1
        by_size.setdefault(place, []).append(case)
    return [case for place in sorted(by_size) for case in by_size[place]]


# --- Measuring
# --------------------------------------------------------------------------------------------------------


def check(case: Case, dtype: str) -> dict[str, Any]:
    """Relative L2 errors of the kernels on the device against the reference fed the same rounded
    inputs."""
    inputs = case.inputs(case.small, dtype)
    wide = {name: x.astype("float32") for name, x in inputs.items()}

    def results(implementation: str, inputs: dict[str, jax.Array]) -> list[jax.Array]:
        def loss(*x: jax.Array) -> Any:
            o = case.call(True, implementation, *x).astype(jnp.float32)
            return jnp.sum(jnp.sin(o)), o

        places = tuple(range(len(inputs)))
        gradient = jax.jit(jax.grad(loss, places, has_aux=True))
        with jax.default_matmul_precision("highest"):
            gradients, o = gradient(*inputs.values())
        return [o, *gradients]

    names = ["output", *(f"gradient of {name}" for name in inputs)]
    errors = {
        name: relative_l2(got, wanted)
        for name, got, wanted in zip(
            names, results(case.implementations[0], inputs), results("reference", wide), strict=True
        )
    }
    limits = LIMITS[dtype]
    passed = all(
        error <= limits["output" if name == "output" else "gradient"]
        for name, error in errors.items()
    )
    return {
        "check": case.name,
        "size": list(case.small),
        "dtype": dtype,
        "errors": errors,
        "passed": passed,
    }


def relative_l2(got: jax.Array, wanted: jax.Array) -> float:
    a, b = (np.asarray(x.astype(jnp.float32), np.float64) for x in (got, wanted))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def floors(case: Case, inputs: dict[str, jax.Array], mode: str, kind: str) -> Any:
    """Milliseconds that memory and matmuls take at least; None where the device's rates are not
    known."""
    rate, peak = gpu_memory_bytes_per_s(kind), peak_flops(kind)
    call = functools.partial(case.call, False, case.implementations[-1])
    o = jax.eval_shape(call, *inputs.values())
    moved = sum(x.nbytes for x in inputs.values())
    written = math.prod(o.shape) * o.dtype.itemsize
    # Backward reads the inputs and the output's cotangent and writes a gradient of every input.
    moved = moved + written if mode == "forward" else 3 * moved + 2 * written
    flops = case.flops * (1 if mode == "forward" else 3.5)
    return {
        "memory_floor_ms": 1e3 * moved / rate if rate else None,
        "matmul_floor_ms": 1e3 * flops / peak if peak else None,
    }


def time_case(case: Case, mode: str, kind: str) -> list[dict[str, Any]]:
    """Rows of all implementations, taking turns."""
    inputs = case.inputs(case.size, "bfloat16")
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        name: functools.partial(
            gpu_peers.jax_program, functools.partial(case.call, False, name), inputs, mode
        )
        for name in case.implementations
    }
    for name, peer in case.peers.items():
        makers[name] = functools.partial(peer, dict(inputs), mode)
    rows, programs = [], {}
    for name, make in makers.items():
        row = {
            "op": case.op,
            "variant": case.variant,
            "size": list(case.size),
            "mode": mode,
            "implementation": name,
        }
        rows.append(row | floors(case, inputs, mode, kind))
        try:
            program = make()
            _turn(program, 1)
            programs[name] = (program, _repeats(program), [])
        except Exception as error:  # a peer may fail in any way: a gap in the table
            if name == case.implementations[0]:
                raise
            rows[-1]["gap"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    for _ in range(5):
        for program, repeats, times in programs.values():
            times.append(_turn(program, repeats) / repeats)
    for row in rows:
        if row["implementation"] in programs:
            times = programs[row["implementation"]][2]
            row["median_ms"], row["min_ms"] = statistics.median(times), min(times)
    return rows


def _turn(program: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of `repeats` runs and one wait."""
    began = time.perf_counter()
    results = [program() for _ in range(repeats)]
    if isinstance(program, gpu_peers.TorchProgram):
        program.wait()
    else:
        jax.block_until_ready(results[-1])
    return 1e3 * (time.perf_counter() - began)


def _repeats(program: Callable[[], Any]) -> int:
    """As many runs as take about 50 ms, 20 at most: their results are all in memory."""
    return max(1, min(20, int(50 / max(_turn(program, 1), 1e-3))))


def run(minutes: float, only: str) -> None:
    """Checks, then times, all cases whose name contains `only`, until the time is used up.

    Raises ValueError without an NVIDIA GPU.
    """
    # Torch and jax share the device's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(f"--gpu needs an NVIDIA GPU; this machine has {device}")
    until = time.monotonic() + 60 * minutes
    chosen = [case for case in cases() if only in case.name]
    record = {"environment": run_record.environment(), "checks": [], "rows": []}
    passed: dict[str, bool] = {}
    for case in chosen:
        if case.name in passed:
            continue
        passed[case.name] = True
        for dtype in ("float32", "bfloat16"):
            result = check(case, dtype)
            passed[case.name] &= result["passed"]
            record["checks"].append(result)
            print(json.dumps(result), flush=True)
    save(record)
    for case in chosen:
        for mode in MODES:
            if not passed[case.name] or time.monotonic() > until:
                continue
            rows = time_case(case, mode, device.device_kind)
            record["rows"] += rows
            print(json.dumps(rows), flush=True)
            save(record)


# --- The page
# ---------------------------------------------------------------------------------------------------------


def save(record: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bench_gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "bench_gpu.md").write_text(page(record))


HEADING = """\
# GPU kernels, measured

{environment}

Made by `python -m experiments.benchmarks.ops --gpu`. Milliseconds, median of five turns, bfloat16 inputs; in brackets how many
times ours. Floors: bytes of inputs and outputs over the memory's rate, matmul flops over the peak.

"""


def page(record: dict[str, Any]) -> str:
    """The benchmark as Markdown; what was not measured says so."""
    environment = record.get("environment")
    where = json.dumps(environment) if environment else "Not measured yet on any GPU."
    lines = [HEADING.format(environment=where)]
    if record.get("checks"):
        lines.append("| check | dtype | largest error | passed |\n|---|---|---|---|\n")
        for row in record["checks"]:
            worst = max(row["errors"], key=lambda name: row["errors"][name])
            lines.append(
                f"| {row['check']} | {row['dtype']} | {row['errors'][worst]:.1e}"
                f" ({worst}) | {'yes' if row['passed'] else '**no**'} |\n"
            )
        lines.append("\n")
    measured = {
        (row["op"], row["variant"], tuple(row["size"]), row["mode"]): []
        for row in record.get("rows", ())
    }
    for row in record.get("rows", ()):
        measured[row["op"], row["variant"], tuple(row["size"]), row["mode"]].append(row)
    lines.append("| op | size | pass | ours | others | floors: memory, matmul |\n")
    lines.append("|---|---|---|---|---|---|\n")
    for case in cases():
        for mode in MODES:
            rows = measured.get((case.op, case.variant, case.size, mode))
            size = ", ".join(map(str, case.size))
            lines.append(f"| {case.name} | {size} | {mode} | {_cells(rows)} |\n")
    return "".join(lines)


def _cells(rows: list[dict[str, Any]] | None) -> str:
    if not rows:
        return "not measured | | "
    ours, *others = rows
    cells = []
    for row in others:
        time = row.get("median_ms")
        text = row["gap"] if time is None else f"{time:.2f}"
        if time is not None and "median_ms" in ours:
            text += f" ({time / ours['median_ms']:.2f}x)"
        cells.append(f"{row['implementation']} {text}")
    memory, matmul = (
        "?" if ours[name] is None else f"{ours[name]:.2f}"
        for name in ("memory_floor_ms", "matmul_floor_ms")
    )
    return f"{ours['median_ms']:.2f} | {'; '.join(cells)} | {memory}, {matmul}"
