"""A compiled program, read from its text: how often each part runs, its matmul flops, the bytes it
moves.

XLA's own cost analysis counts the body of a loop once, so a scan over layers would be one layer.
Here every computation has the number of times that a call of the program runs it:

- a `while` runs its body as often as XLA noted ("known_trip_count") or, where it noted nothing
  (TPU), as follows from the condition `i < limit`, the start of `i`, and what the body adds to it,
  all three constants;
- of a `conditional` every branch counts: the guards of a train step have one branch that works and
  one that does not;
- a loop whose count cannot be read counts once, and its name is in `unknown_loops`.

Shapes in the text are those on one device, so all numbers are per device.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "f8": 8, "bf16": 16, "c64": 64, "c128": 128}
ARRAY = re.compile(r"([a-z]+\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"(calls|to_apply|body|condition)=%?([\w.\-]+)")


class Array(NamedTuple):
    """One array of an instruction's type; `space` is "" in HBM, "1" in VMEM, "5" in host memory."""

    dtype: str
    shape: tuple[int, ...]
    space: str

    @property
    def bytes(self) -> int:
        bits = BITS.get(self.dtype) or int(re.sub(r"\D", "", self.dtype) or 0)
        return -(-math.prod(self.shape) * bits // 8)

    @property
    def hbm_bytes(self) -> int:
        return 0 if self.space else self.bytes


@dataclass(frozen=True)
class Instruction:
    """One line: `arrays` of its type in order, names of its operands, and the rest of the line."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations that it calls, by role."""
        return dict(CALLED.findall(self.attributes))


class Computation(dict[str, Instruction]):
    """Instructions by name, in order."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    @property
    def root(self) -> Instruction:
        return next(x for x in self.values() if x.is_root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        found = [x for x in self.values() if x.opcode == "parameter"]
        return sorted(found, key=lambda x: int(x.arguments))


class CompiledProgram:
    """`text` as `compiled.as_text()` gives it, after optimisation.

    computations    all, by name
    runs            name -> how often a call of the program runs it; computations inside fusions are
                    not among these
    unknown_loops   names of the while instructions that were counted once for want of a trip count
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.runs: dict[str, int] = {}
        self.unknown_loops: list[str] = []
        entry = ""
        computation = Computation("")
        for line in text.splitlines():
            if line.startswith(" "):
                if instruction := _parse(line):
                    computation[instruction.name] = instruction
            elif header := COMPUTATION.match(line):
                computation = Computation(header[2])
                self.computations[header[2]] = computation
                entry = header[2] if header[1] else entry
        if not entry:
            raise ValueError(
                f"a compiled program's text must have an ENTRY computation; got {text[:80]!r}"
            )
        self._run(entry, 1)

    def _run(self, name: str, times: int) -> None:
        self.runs[name] = self.runs.get(name, 0) + times
        for instruction in self.computations[name].values():
            match instruction.opcode:
                case "while":
                    trips = self._trip_count(self.computations[name], instruction)
                    self._run(instruction.called["body"], times * trips)
                case "conditional":
                    for branch in _branches(instruction):
                        self._run(branch, times)
                case "call" | "async-start":
                    for callee in instruction.called.values():
                        self._run(callee, times)

    def steps(self) -> Iterator[tuple[int, Computation, Instruction]]:
        """(how often, where, instruction) for all that is executed as a step of its own; a fusion
        is one step."""
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                yield times, self.computations[name], instruction

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """What a fusion holds, through fusions in it."""
        if instruction.opcode == "fusion":
            computation = self.computations[instruction.called["calls"]]
            for inner in computation.values():
                yield computation, inner
                yield from self.inside(inner)

    # --- Loops

    def _trip_count(self, computation: Computation, loop: Instruction) -> int:
        if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(noted[1])
        counted = self._counted(computation, loop)
        if counted is None:
            self.unknown_loops.append(loop.name)
            return 1
        return counted

    def _counted(self, computation: Computation, loop: Instruction) -> int | None:
        """(limit - start) / step of a loop `while i < limit`, or None."""
        condition = self.computations[loop.called["condition"]]
        bound = self._comparison(condition)
        body = self.computations[loop.called["body"]].root
        start_tuple = computation[loop.operands[0]]
        if bound is None or {start_tuple.opcode, body.opcode} != {"tuple"}:
            return None
        place, limit = bound
        start = _constant(computation, start_tuple.operands[place])
        step = self._increment(self.computations[loop.called["body"]], body, place)
        if start is None or not step:
            return None
        return max(0, -(-(limit - start) // step))

    def _comparison(self, condition: Computation) -> tuple[int, int] | None:
        """(place of i in the carried tuple, limit) of a condition `i < limit`, possibly in a
        fusion."""
        root, given = condition.root, condition
        compared = root
        if root.opcode == "fusion":
            compared = self.computations[root.called["calls"]].root
        if compared.opcode != "compare" or "direction=LT" not in compared.attributes:
            return None
        sides = list(compared.operands)
        if root.opcode == "fusion":
            inner = self.computations[root.called["calls"]]
            sides = [
                root.operands[inner.parameters.index(inner[side])]
                if inner[side].opcode == "parameter"
                else side
                for side in sides
            ]
            given = Computation(condition.name)
            given.update(inner | condition)
        index = _tuple_place(given, sides[0])
        limit = _constant(given, sides[1])
        return None if index is None or limit is None else (index, limit)

    def _increment(self, body: Computation, root: Instruction, place: int) -> int | None:
        """What a body adds to the carried scalar at `place`."""
        added = _origin(body, root.operands[place])
        scope, operands = body, added.operands
        if added.opcode == "fusion":
            scope = self.computations[added.called["calls"]]
            added = scope.root
            operands = added.operands
        if added.opcode != "add":
            return None
        constants = [_constant(scope, operand) for operand in operands]
        return next((value for value in constants if value is not None), None)


def _parse(line: str) -> Instruction | None:
    """%name = type opcode(arguments), attributes"""
    head = INSTRUCTION.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(
        name=head[2],
        opcode=rest[:opening],
        arrays=tuple(_arrays(kind)),
        arguments=rest[opening + 1 : closing],
        attributes=rest[closing + 1 :],
        is_root=bool(head[1]),
    )


def _arrays(kind: str) -> Iterator[Array]:
    for dtype, sizes, layout in ARRAY.findall(kind):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(size) for size in sizes.split(",") if size)
        yield Array(dtype, shape, space[1] if space else "")


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    raise ValueError(f"unbalanced parentheses in {text[:120]!r}")


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    names = (
        listed[1]
        if listed
        else " ".join(
            re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", instruction.attributes)
        )
    )
    return re.findall(r"[\w.\-]+", names)


def _origin(computation: Computation, name: str) -> Instruction:
    """The instruction behind copies."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    instruction = _origin(computation, name)
    if instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.arguments):
        return None
    return int(instruction.arguments)


def _tuple_place(computation: Computation, name: str) -> int | None:
    instruction = _origin(computation, name)
    index = re.search(r"index=(\d+)", instruction.attributes)
    if instruction.opcode != "get-tuple-element" or index is None:
        return None
    return int(index[1])
