"""Time and memory of the ops, forward and forward+backward, over their named shapes.

    python -m experiments.benchmarks.ops --shapes=cpu                       all ops at the shapes named "cpu"
    python -m experiments.benchmarks.ops --shapes=cpu --ops=delta_rule --implementations=xla --json=bench.json
    python -m experiments.benchmarks.ops --tpu_aot                          TPU kernels, compiled ahead of time (extra `aot`)
    python -m experiments.benchmarks.ops --gpu                              on one NVIDIA GPU, checked and beside peers
    python -m experiments.benchmarks.ops --gpu_training                     there too: models, with kernels and without
    python -m experiments.benchmarks.ops --gpu_aot                          GPU kernels, likewise (extra `aot-gpu`)
    python -m experiments.benchmarks.ops --shapes=cpu --peers               beside jax-linear-attention, where it is installed
    python -m experiments.benchmarks.ops --processes=7                      the medians of seven processes

Every case is compiled first; then all implementations (and the peer) of one case take turns, so
that a machine that slows down slows all of them. A turn runs its program once unmeasured, which
brings code, data and memory back into caches that another program had, and then for about a tenth
of a second. Reported are the median over the turns and the minimum, per run, the ratio of medians
to ours, and the temporary memory of the compiled program. Hardware and versions are printed and
recorded. From process to process a ratio differs by a fifth or more: recorded are medians over
several, and of the ratio the least and the largest."""

import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

import ops
from experiments.benchmarks import gpu as gpu_bench
from experiments.benchmarks import gpu_aot, gpu_training, tpu_aot
from experiments.training import command_line, run_record
from ops.delta_rule import examples as delta_shapes
from ops.diagonal_scan import examples as diagonal_shapes
from ops.gated_linear_attention import examples as attention_shapes
from ops.long_convolution import examples as long_shapes
from ops.selective_scan import examples as scan_shapes
from ops.short_convolution import examples as convolution_shapes
from ops.window_attention import examples as window_shapes

IMPLEMENTATIONS = ("xla", "reference")
TURN_S = 0.1


@dataclass(frozen=True)
class Case:
    """One op at one shape: `call(implementation, *inputs)`, and the peer's form of it if it has
    one."""

    op: str
    shape: str
    variant: str
    inputs: tuple[jax.Array, ...]
    call: Callable[..., jax.Array]
    peer: Callable[..., jax.Array] | None = None


def attention_cases(shape: str, peers: Any) -> Iterator[Case]:
    sizes = attention_shapes.SHAPES[shape]
    for decay in attention_shapes.DECAYS:
        q, k, v, g, _ = _matrix_inputs(sizes, decay)
        decays = () if g is None else (g,)
        theirs = {"scalar": "simple_gla", "vector": "gla"}.get(decay)
        yield Case(
            "gated_linear_attention",
            shape,
            decay,
            (q, k, v, *decays),
            lambda implementation, *x: ops.gated_linear_attention(
                *x, implementation=implementation
            )[0],
            (functools.partial(_first, getattr(peers, theirs)) if peers and theirs else None),
        )


def delta_cases(shape: str, peers: Any) -> Iterator[Case]:
    sizes = delta_shapes.SHAPES[shape]
    for decay in delta_shapes.DECAYS:
        q, k, v, g, beta = _matrix_inputs(sizes, decay)
        decays = () if g is None else (g,)
        theirs = {"none": "delta_rule", "scalar": "gated_delta_rule", "vector": "kda"}[decay]

        def peer(q, k, v, beta, *decays, name=theirs):
            return getattr(peers, name)(q, k, v, *decays, beta)[0]

        yield Case(
            "delta_rule",
            shape,
            decay,
            (q, k, v, beta, *decays),
            lambda implementation, *x: ops.delta_rule(*x, implementation=implementation)[0],
            peer if peers else None,
        )


def scan_cases(shape: str, peers: Any) -> Iterator[Case]:
    del peers
    sizes = scan_shapes.SHAPES[shape]
    B, T, D, N = (sizes[name] for name in ("batch", "length", "width", "state"))
    keys = jax.random.split(jax.random.key(0), 4)
    x, B_in, C = (
        jax.random.normal(key, (B, T, size)) for key, size in zip(keys[:3], (D, N, N), strict=True)
    )
    delta = jax.nn.softplus(jax.random.normal(keys[3], (B, T, D)) - 3)
    A = -jnp.broadcast_to(jnp.arange(1.0, N + 1)[None], (D, N))
    yield Case(
        "selective_scan",
        shape,
        "",
        (x, delta, A, B_in, C),
        lambda implementation, *x: ops.selective_scan(*x, implementation=implementation)[0],
    )


def diagonal_cases(shape: str, peers: Any) -> Iterator[Case]:
    del peers
    sizes = diagonal_shapes.SHAPES[shape]
    keys = jax.random.split(jax.random.key(0), 4)
    radius, angle = (jax.random.uniform(key, (sizes["channels"],)) for key in keys[:2])
    b = [
        jax.random.normal(key, (sizes["batch"], sizes["length"], sizes["channels"]))
        for key in keys[2:]
    ]

    def call(implementation, a_real, a_imaginary, *b):
        (real, imaginary), _ = ops.diagonal_scan(
            (a_real, a_imaginary), b, implementation=implementation
        )
        return real + imaginary

    yield Case(
        "diagonal_scan",
        shape,
        "complex",
        (radius * jnp.cos(angle), radius * jnp.sin(angle), *b),
        call,
    )


def convolution_cases(shape: str, peers: Any) -> Iterator[Case]:
    del peers
    sizes = convolution_shapes.SHAPES[shape]
    x = jax.random.normal(jax.random.key(0), (sizes["batch"], sizes["length"], sizes["width"]))
    w = jax.random.normal(jax.random.key(1), (sizes["taps"], sizes["width"]))
    yield Case(
        "short_convolution",
        shape,
        "",
        (x, w),
        lambda implementation, *x: ops.short_convolution(*x, implementation=implementation)[0],
    )


def long_cases(shape: str, peers: Any) -> Iterator[Case]:
    del peers
    sizes = long_shapes.SHAPES[shape]
    B, T, D = (sizes[name] for name in ("batch", "length", "width"))
    yield Case(
        "long_convolution",
        shape,
        "",
        (
            jax.random.normal(jax.random.key(0), (B, T, D)),
            jax.random.normal(jax.random.key(1), (D, T)),
        ),
        lambda implementation, *x: ops.long_convolution(*x, implementation=implementation),
    )


def window_cases(shape: str, peers: Any) -> Iterator[Case]:
    del peers
    sizes = window_shapes.SHAPES[shape]
    q, k, v, _, _ = _matrix_inputs(sizes, "none")
    q = jax.random.normal(jax.random.key(1), (*v.shape[:3], q.shape[-1]))
    v = v[:, :, : sizes["key_heads"]]
    yield Case(
        "window_attention",
        shape,
        f"window {sizes['window']}",
        (q, k, v),
        lambda implementation, *x: ops.window_attention(
            *x, window=sizes["window"], implementation=implementation
        )[0],
    )


CASES = {
    "gated_linear_attention": attention_cases,
    "delta_rule": delta_cases,
    "selective_scan": scan_cases,
    "diagonal_scan": diagonal_cases,
    "short_convolution": convolution_cases,
    "long_convolution": long_cases,
    "window_attention": window_cases,
}
SHAPES = {
    "gated_linear_attention": attention_shapes.SHAPES,
    "delta_rule": delta_shapes.SHAPES,
    "selective_scan": scan_shapes.SHAPES,
    "diagonal_scan": diagonal_shapes.SHAPES,
    "short_convolution": convolution_shapes.SHAPES,
    "long_convolution": long_shapes.SHAPES,
    "window_attention": window_shapes.SHAPES,
}


def _first(function: Callable[..., Any], *inputs: jax.Array) -> jax.Array:
    return function(*inputs)[0]


def _matrix_inputs(sizes: Any, decay: str) -> tuple[jax.Array, ...]:
    B, T, HK, H, K, V = (
        sizes[name] for name in ("batch", "length", "key_heads", "heads", "key", "value")
    )
    keys = jax.random.split(jax.random.key(0), 5)
    q, k = (jax.random.normal(key, (B, T, HK, K)) for key in keys[:2])
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = jax.random.normal(keys[2], (B, T, H, V))
    shape = {"none": None, "constant": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}[decay]
    g = None if shape is None else -jnp.exp(jax.random.normal(keys[3], shape) - 3)
    return q, k, v, g, jax.random.uniform(keys[4], (B, T, H))  # pyright: ignore


def measure(case: Case, implementations: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    """Rows of one case: per implementation forward, and forward with the gradients of all
    inputs."""
    functions = {name: lambda *x, n=name: case.call(n, *x) for name in implementations}
    if case.peer:
        functions["jax-linear-attention"] = case.peer
    rows = []
    for mode in ("forward", "forward+backward"):
        programs = {}
        for name, function in functions.items():
            program = function if mode == "forward" else _gradients(function, len(case.inputs))
            began = time.perf_counter()
            compiled = jax.jit(program).lower(*case.inputs).compile()
            compile_s = time.perf_counter() - began
            jax.block_until_ready(compiled(*case.inputs))
            programs[name] = (compiled, compile_s, [])
        for _ in range(rounds):
            for compiled, _, times in programs.values():
                times.append(_turn(compiled, case.inputs))
        ours = statistics.median(next(iter(programs.values()))[2])
        for name, (compiled, compile_s, times) in programs.items():
            memory = compiled.memory_analysis()
            rows.append(
                {
                    "op": case.op,
                    "shape": case.shape,
                    "variant": case.variant,
                    "mode": mode,
                    "implementation": name,
                    "median_ms": statistics.median(times),
                    "min_ms": min(times),
                    "over_first": statistics.median(times) / ours,
                    "temporary_mb": memory.temp_size_in_bytes / 1e6 if memory else None,
                    "compile_s": compile_s,
                }
            )
    return rows


def _turn(program: Callable[..., Any], inputs: tuple[jax.Array, ...]) -> float:
    """Milliseconds of one run of `program`, after one that is not counted."""
    jax.block_until_ready(program(*inputs))
    began = time.perf_counter()
    runs = 0
    while runs == 0 or time.perf_counter() - began < TURN_S:
        jax.block_until_ready(program(*inputs))
        runs += 1
    return 1e3 * (time.perf_counter() - began) / runs


def _gradients(function: Callable[..., jax.Array], count: int) -> Callable[..., Any]:
    return jax.grad(lambda *x: jnp.sum(jnp.square(function(*x))), argnums=tuple(range(count)))


def find_peers() -> Any:
    """The chunked ops of jax-linear-attention. Raises ValueError if the package is not
    installed."""
    if importlib.util.find_spec("jla") is None:
        raise ValueError(
            "--peers needs jax-linear-attention (Python 3.12, jax 0.11): pip install"
            " jax-linear-attention"
        )
    return importlib.import_module("jla.ops.chunked")


def format_rows(rows: list[dict[str, Any]]) -> str:
    lines = [
        (
            "| op | shape | variant | mode | implementation | median ms | min ms | over"
            " first | temp MB |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = "?" if row["temporary_mb"] is None else f"{row['temporary_mb']:.0f}"
        ratio = f"{row['over_first']:.2f}"
        if "over_first_from_to" in row:
            least, most = row["over_first_from_to"]
            ratio += f" ({least:.2f}-{most:.2f})"
        lines.append(
            f"| {row['op']} | {row['shape']} | {row['variant']} | {row['mode']} |"
            f" {row['implementation']} | {row['median_ms']:.1f} | {row['min_ms']:.1f} |"
            f" {ratio} | {memory} |"
        )
    return "\n".join(lines)


def in_processes(count: int) -> list[dict[str, Any]]:
    """The rows of this command line, measured by as many processes, one after another."""
    runs = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "experiments.benchmarks.ops", *sys.argv[1:]]
            subprocess.run([*command, "--processes=1", f"--json={file}"], check=True)
            runs.append(json.loads(file.read_text())["rows"])
    return median_rows(runs)


def median_rows(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each row the medians over the runs, the least time, and the least and the largest
    ratio."""
    rows = []
    for same in zip(*runs, strict=True):
        ratios = [row["over_first"] for row in same]
        medians = {
            name: statistics.median(row[name] for row in same)
            for name in ("median_ms", "over_first", "compile_s")
        }
        least = min(row["min_ms"] for row in same)
        spread = {"over_first_from_to": [min(ratios), max(ratios)]}
        rows.append(same[0] | medians | {"min_ms": least} | spread)
    return rows


def main() -> None:
    options = flags.FLAGS
    if options.tpu_aot:
        tpu_aot.report(options.tpu_aot_ratchet, options.tpu_aot_only)
        return
    if options.gpu_aot:
        gpu_aot.report(options.gpu_aot_ratchet, options.gpu_aot_only)
        return
    if options.gpu:
        gpu_bench.run(options.gpu_minutes, options.gpu_only)
        return
    if options.gpu_training:
        gpu_training.report(options.gpu_minutes, options.gpu_only)
        return
    for op in options.ops:
        if op not in CASES:
            raise ValueError(f"--ops must be of {', '.join(CASES)}; got {op!r}")
    for shape in options.shapes:
        if not any(shape in SHAPES[op] for op in options.ops):
            known = sorted({name for op in options.ops for name in SHAPES[op]})
            raise ValueError(f"--shapes must be of {', '.join(known)}; got {shape!r}")
    peers = find_peers() if options.peers else None
    environment = run_record.environment()
    if options.processes > 1:
        environment["processes"] = options.processes
        rows = in_processes(options.processes)
        print(format_rows(rows))
    else:
        rows = []
        for op in options.ops:
            for shape in options.shapes:
                for case in CASES[op](shape, peers) if shape in SHAPES[op] else ():
                    implementations = tuple(options.implementations)
                    measured = measure(case, implementations, options.rounds)
                    rows += measured
                    print(format_rows(measured), flush=True)
    print(json.dumps(environment))
    if options.json:
        Path(options.json).write_text(
            json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    flags.DEFINE_list("ops", list(CASES), "Ops to measure.")
    flags.DEFINE_list("shapes", ["cpu"], "Names in the ops' shapes.py.")
    flags.DEFINE_list(
        "implementations", list(IMPLEMENTATIONS), "The first is what the others are compared with."
    )
    flags.DEFINE_integer("rounds", 7, "Turns of every program.", lower_bound=1)
    flags.DEFINE_integer("processes", 1, "Fresh processes that measure everything.", lower_bound=1)
    flags.DEFINE_bool("peers", False, "Measure jax-linear-attention beside ours.")
    flags.DEFINE_string("json", "", "File to write all rows to.")
    flags.DEFINE_bool(
        "tpu_aot",
        False,
        "Compile the TPU kernels ahead of time and report (experiments/benchmarks/tpu_aot.py).",
    )
    flags.DEFINE_bool(
        "tpu_aot_ratchet", False, "With --tpu_aot: record its cycles as those not to exceed."
    )
    flags.DEFINE_string(
        "tpu_aot_only", "", "With --tpu_aot: only programs with this in their name."
    )
    flags.DEFINE_bool(
        "gpu", False, "Check and time all ops on one GPU (experiments/benchmarks/gpu.py)."
    )
    flags.DEFINE_bool(
        "gpu_training", False, "Train models on one GPU (experiments/benchmarks/gpu_training.py)."
    )
    flags.DEFINE_float(
        "gpu_minutes", 20, "With --gpu or --gpu_training: for how long.", lower_bound=0
    )
    flags.DEFINE_string("gpu_only", "", "With these: only what has this in its name.")
    flags.DEFINE_bool(
        "gpu_aot",
        False,
        "Compile the GPU kernels ahead of time and report (experiments/benchmarks/gpu_aot.py).",
    )
    flags.DEFINE_bool(
        "gpu_aot_ratchet", False, "With --gpu_aot: record what kernels take as not to be exceeded."
    )
    flags.DEFINE_string(
        "gpu_aot_only", "", "With --gpu_aot: only programs with this in their name."
    )
    command_line.run(main)
