"""The collectives of a compiled program: what kind, over which mesh axes, how many bytes, how
often.

A device's ids in the program are places in the mesh's device array, in order, so the axes of a
collective are those along which the coordinates of its groups vary. What counts as one collective:

- an asynchronous one at its start, not at its end;
- one that the TPU compiler spread over several fusions (pieces with one channel in one computation)
  once;
- an all-reduce that a fusion slices at once (the compiler's form of it on TPU) as the
  reduce-scatter that it is.

`sent_bytes` are what one device sends, each byte once, in a ring: of n devices, (n-1) times its
part for an all-gather, (n-1)/n of its array for a reduce-scatter and an all-to-all, twice that for
an all-reduce, its array for a permute."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.compiled.program import CompiledProgram, Computation, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
SENT = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "all-to-all": lambda n: (n - 1) / n,
}


@dataclass(frozen=True, eq=False)
class Collective:
    """kind           one of KINDS
    operand_bytes  bytes that a device puts in, per run
    groups         [G, n] places in the mesh; of a permute, the (source, target) pairs [G, 2]
    times          how often a step of the program runs it
    """

    kind: str
    operand_bytes: int
    groups: np.ndarray
    times: int

    @property
    def group_size(self) -> int:
        return self.groups.shape[1]

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends in one run."""
        return self.operand_bytes * SENT[self.kind](self.group_size)

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """Mesh axes that it runs over."""
        places = np.unravel_index(self.groups, tuple(mesh_shape.values()))
        return tuple(
            axis
            for axis, place in zip(mesh_shape, places, strict=True)
            if (place != place[:, :1]).any()
        )


def find_collectives(program: CompiledProgram, devices: int) -> list[Collective]:
    """All collectives of a program for `devices` devices that involve more than one of them."""
    found: list[Collective] = []
    pieces: set[tuple[str, str, str]] = set()
    for times, computation, step in program.steps():
        for scope, instruction in ((computation, step), *program.inside(step)):
            kind = _kind(instruction)
            if kind is None:
                continue
            if scope is not computation:
                if kind == "all-reduce" and "all-reduce-scatter" in scope.name:
                    kind = "reduce-scatter"
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                piece = (computation.name, kind, channel[1] if channel else instruction.name)
                if piece in pieces:
                    continue
                pieces.add(piece)
            groups = _groups(kind, instruction.attributes, devices)
            if groups.shape[1] > 1:
                size = _operand_bytes(scope, instruction)
                found.append(Collective(kind, size, groups, times))
    return found


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _operand_bytes(computation: Computation, instruction: Instruction) -> int:
    return sum(array.bytes for name in instruction.operands for array in computation[name].arrays)


def _groups(kind: str, attributes: str, devices: int) -> np.ndarray:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
        if pairs is None:
            raise ValueError(
                f"a collective-permute must have source_target_pairs; got {attributes[:200]!r}"
            )
        return np.array(_lists(pairs[1]) or [[0]])
    text = re.search(r"replica_groups=(.*)", attributes)
    if text is None:
        raise ValueError(f"a {kind} must have replica_groups; got {attributes[:200]!r}")
    return parse_replica_groups(text[1], devices)


def parse_replica_groups(text: str, devices: int) -> np.ndarray:
    """Groups [G, n] from the beginning of `text`, in any of the forms in which XLA prints them.

    {{0,1},{2,3}}                          listed; {} is one group of all
    [2,4]<=[4,2]T(1,0)                     an iota of shape [4,2], transposed and reshaped
    mesh['a'=2,'b'=4] {'a','b':(1)2}       axes of a mesh, or parts (elements before)(size) of them;
                                           after the mesh, if its devices are not in order,
                                           device_ids=(...): all of them, or [4,2]T(1,0), a
                                           transposed iota
    """
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, sizes = _numbers(iota[1]), _numbers(iota[2])
        order = _numbers(iota[3]) if iota[3] else range(len(sizes))
        places = _iota(sizes, order)
        return places.reshape(shape[0], -1) if len(shape) > 1 else places.reshape(1, -1)
    if text.startswith("{}"):
        return np.arange(devices)[None]
    if listed := re.match(r"\{((?:\{[\d,]*\},?)+)\}", text):
        return np.array(_lists(listed[1]))
    raise ValueError(f"unknown form of replica_groups: {text[:200]!r}")


def _iota(sizes: Sequence[int], order: Sequence[int]) -> np.ndarray:
    """Places counted up in an array of these sizes, then transposed."""
    return np.arange(np.prod(sizes)).reshape(sizes).transpose(order)


def _mesh_groups(text: str) -> np.ndarray:
    parsed = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((\S*)\))? \{([^}]*)\}", text)
    if parsed is None:
        raise ValueError(f"unknown form of replica_groups: {text[:200]!r}")
    sizes = {name: int(size) for name, size in re.findall(r"([^,=]+)=(\d+)", parsed[1])}
    count = int(np.prod(list(sizes.values())))
    places = np.arange(count)
    if parsed[2] and "T" in parsed[2]:
        places = _iota(*map(_numbers, parsed[2].split("T")))
    elif parsed[2]:
        places = np.array(_numbers(parsed[2]))
    # Every axis as (before, part, after), so that a part of an axis is an axis of its own.
    chosen: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in re.findall(r"([^,:]+)(?::\((\d+)\)(\d+))?,?", parsed[3]):
        part = (int(before), int(size)) if size else (1, sizes[name])
        chosen.setdefault(name, []).append(part)
    shape: list[int] = []
    grouped: list[int] = []
    for name, size in sizes.items():
        done = 1
        for before, part in sorted(chosen.get(name, [])):
            shape += [before // done, part]
            grouped.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    others = [axis for axis in range(len(shape)) if axis not in grouped]
    members = int(np.prod([shape[axis] for axis in grouped]))
    return places.reshape(shape).transpose(*others, *grouped).reshape(-1, members)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _lists(text: str) -> list[list[int]]:
    return [_numbers(one) for one in re.findall(r"\{([\d,]*)\}", text)]


@dataclass
class Row:
    """Collectives of one kind over the same axes, added up over a step: bytes are those that one
    device sends."""

    kind: str
    axes: tuple[str, ...]
    count: int = 0
    sent_bytes: float = 0.0
    seconds: float = 0.0


def by_kind_and_axes(
    timed: Iterable[tuple[Collective, float]], mesh_shape: Mapping[str, int]
) -> list[Row]:
    """Rows of (collective, seconds of one run), in the order of KINDS, then of axes."""
    rows: dict[tuple[str, tuple[str, ...]], Row] = {}
    for collective, seconds in timed:
        key = (collective.kind, collective.axes(mesh_shape))
        row = rows.setdefault(key, Row(*key))
        row.count += collective.times
        row.sent_bytes += collective.times * collective.sent_bytes
        row.seconds += collective.times * seconds
    return sorted(rows.values(), key=lambda row: (KINDS.index(row.kind), row.axes))
