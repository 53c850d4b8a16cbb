"""Matmul flops and HBM traffic of a compiled program on one device, loops counted as often as they
run.

**Flops** are those of `dot` and `convolution` (a matmul, on TPU), 2 per multiply-add, and of Pallas
kernels: how often a kernel runs is read from the compiled program, what one run does from the jaxpr
(experiments/compiled/kernels.py). Beside them `passes` counts every float32 product as often as its
precision sends it through the bfloat16 matrix unit: once at DEFAULT, three times at HIGH, six times
at HIGHEST. Element-wise work is left out: it is bound by memory.

**Bytes** are those of every array in HBM that a step of the program reads or writes; arrays that
the compiler placed in VMEM cost nothing here but the copies that bring them there. Of an array that
a step only slices or updates in place, the slice counts. A kernel reads its operands and writes its
results once; what it fetches again is not counted."""

import math
import re
from typing import NamedTuple

from experiments.compiled.program import CompiledProgram, Computation, Instruction

# What these name costs nothing by itself, or is counted where it begins.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async-start",
    "async-update",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
}
# Passes of the bfloat16 matrix unit per float32 product, by requested precision.
PASSES = {"default": 1, "high": 3, "highest": 6}
SLICES = ("dynamic-slice", "slice", "gather")


class Flops(NamedTuple):
    """Floating point operations, and the same weighted by passes of the bfloat16 matrix unit."""

    flops: float
    passes: float

    def times(self, count: float) -> "Flops":
        return Flops(self.flops * count, self.passes * count)


def matmul_flops(program: CompiledProgram, kernels: dict[str, Flops]) -> Flops:
    """Flops of the matmuls of one call of the program; `kernels`: those of one run of a kernel by
    name, as from `kernel_flops`."""
    found = []
    for times, computation, instruction in program.steps():
        if kernel := kernel_name(instruction):
            found.append(kernels.get(kernel, Flops(0, 0)).times(times))
        for scope, inner in ((computation, instruction), *program.inside(instruction)):
            if inner.opcode in ("dot", "convolution"):
                found.append(_product(scope, inner).times(times))
    return Flops(sum(x.flops for x in found), sum(x.passes for x in found))


def kernel_runs(program: CompiledProgram) -> dict[str, int]:
    """How often one call of the program runs each Pallas kernel, by name."""
    runs: dict[str, int] = {}
    for times, _, instruction in program.steps():
        if name := kernel_name(instruction):
            runs[name] = runs.get(name, 0) + times
    return runs


def kernel_name(instruction: Instruction) -> str | None:
    """The name of the Pallas kernel that an instruction runs."""
    if 'custom_call_target="tpu_custom_call"' not in instruction.attributes:
        return None
    named = re.search(r'op_name="[^"]*?([^/"]+)/pallas_call', instruction.attributes)
    return named[1] if named else instruction.name.rstrip(".0123456789")


def _product(computation: Computation, instruction: Instruction) -> Flops:
    left, right = (computation[name].arrays[0] for name in instruction.operands[:2])
    (output,) = instruction.arrays
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        sizes = [left.shape[int(x)] for x in axes[1].split(",") if x] if axes else []
        products = math.prod(output.shape) * math.prod(sizes)
    else:
        products = _convolution_products(
            left.shape, right.shape, output.shape, instruction.attributes
        )
    asked = re.search(r"operand_precision=\{(\w+),(\w+)\}", instruction.attributes)
    exact = max(PASSES[name] for name in asked.groups()) if asked else 1
    passes = exact if "f32" in (left.dtype, right.dtype) else 1
    return Flops(2.0 * products, 2.0 * products * passes)


def _convolution_products(
    left: tuple[int, ...], right: tuple[int, ...], output: tuple[int, ...], text: str
) -> int:
    """Multiply-adds of a convolution: pairs of kernel element and input element that meet, not
    those in the padding.

    The TPU compiler writes batched matmuls as convolutions whose windows, dilated, meet one element
    of each batch."""
    named = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    if named is None:
        raise ValueError(f"a convolution must have dim_labels; got {text[:120]!r}")
    lhs, rhs, out = named.groups()
    groups = re.search(r"batch_group_count=(\d+)", text)
    total = left[lhs.index("b")] * right[rhs.index("i")] * right[rhs.index("o")]
    total //= int(groups[1]) if groups else 1
    window = {
        key: [tuple(map(int, re.findall(r"-?\d+", one))) for one in value.split("x")]
        for key, value in re.findall(r"(\w+)=([-\dx_]+)", _braces(text, "window="))
    }
    for place in range(len(lhs) - 2):
        axis = str(place)
        size, count, taps = (left[lhs.index(axis)], output[out.index(axis)], right[rhs.index(axis)])

        def of(key: str, default: int, place: int = place) -> int:
            return window[key][place][0] if key in window else default

        stride, base = of("stride", 1), of("lhs_dilate", 1)
        dilate, before = of("rhs_dilate", 1), of("pad", 0)
        reach = (size - 1) * base
        total *= sum(
            0 <= at <= reach and not at % base
            for step in range(count)
            for at in range(step * stride - before, step * stride - before + taps * dilate, dilate)
        )
    return total


def _braces(text: str, key: str) -> str:
    found = re.search(re.escape(key) + r"\{([^}]*)\}", text)
    return found[1] if found else ""


# --- Bytes


def hbm_bytes(program: CompiledProgram) -> int:
    """Bytes that one call of the program reads from HBM and writes to it, on one device."""
    return sum(
        times * _moved(program, computation, instruction)
        for times, computation, instruction in program.steps()
    )


def _moved(program: CompiledProgram, computation: Computation, step: Instruction) -> int:
    opcode = step.opcode
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    if opcode in ("copy-start", "slice-start"):
        # The type is (destination, source, context) of a copy and ((source), destination, context)
        # of a slice.
        target = step.arrays[0 if opcode == "copy-start" else 1]
        source = computation[step.operands[0]].arrays[0]
        return target.hbm_bytes + (0 if source.space else target.bytes)
    if opcode == "dynamic-update-slice":
        return 2 * computation[step.operands[1]].arrays[0].hbm_bytes
    written = sum(array.hbm_bytes for array in step.arrays)
    if opcode in SLICES:
        source = computation[step.operands[0]].arrays[0]
        return written + (0 if source.space else sum(x.bytes for x in step.arrays))
    if opcode.endswith("-start"):
        # An asynchronous collective's type holds its operands too.
        written -= sum(_hbm(computation, name) for name in step.operands)
    if opcode != "fusion":
        return max(0, written) + sum(_hbm(computation, name) for name in step.operands)
    inner = program.computations[step.called["calls"]]
    read = sum(
        _read(program, inner, parameter.name, _hbm(computation, name))
        for name, parameter in zip(step.operands, inner.parameters, strict=True)
    )
    return read + _written(inner, step)


def _hbm(computation: Computation, name: str) -> int:
    return sum(array.hbm_bytes for array in computation[name].arrays)


def _read(program: CompiledProgram, inner: Computation, name: str, whole: int) -> int:
    """Bytes that a fusion reads of a parameter of `whole` bytes in HBM."""
    if not whole:
        return 0
    read = 0
    for user in inner.values():
        if name not in user.operands:
            continue
        if user.opcode == "bitcast":
            read += _read(program, inner, user.name, whole)
        elif user.opcode in SLICES and user.operands[0] == name:
            read += sum(array.bytes for array in user.arrays)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.opcode == "fusion":
            deeper = program.computations[user.called["calls"]]
            for operand, parameter in zip(user.operands, deeper.parameters, strict=True):
                if operand == name:
                    read += _read(program, deeper, parameter.name, whole)
        else:
            return whole
    return min(read, whole)


def _written(inner: Computation, step: Instruction) -> int:
    """Bytes that a fusion writes to HBM; where a result is an updated operand, those of the
    update."""
    root = inner.root
    results = root.operands if root.opcode == "tuple" else (root.name,)
    if len(results) != len(step.arrays):
        return sum(array.hbm_bytes for array in step.arrays)
    total = 0
    for name, array in zip(results, step.arrays, strict=True):
        result = inner[name]
        while result.opcode == "bitcast":
            result = inner[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            update = inner[result.operands[1]].arrays[0]
            total += 0 if array.space else update.bytes
        else:
            total += array.hbm_bytes
    return total
