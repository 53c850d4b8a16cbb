"""One table per format, read in both directions: which public tensor is made of which parameters.

A public tensor holds the numbers of one parameter of a layer, or of several, whose public forms
then stand one after another along its first axis. Parameters of the layers lie in stacks
(models/blocks/stack.py), where layer i is one entry of an array."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.weights.folder import Source

Array = Any  # numpy's or jax's
ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Layout:
    """How a parameter looks in public: `shape` of its public form, `to_public` and `to_ours`, which
    is given the shape it must have here."""

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    to_public: Callable[[Array], Array]
    to_ours: Callable[[Array, tuple[int, ...]], Array]


LAYOUTS = {
    "same": Layout(lambda shape: shape, lambda x: x, lambda x, _: x),
    # y = x W here, y = W x there.
    "linear": Layout(lambda shape: shape[::-1], lambda x: x.T, lambda x, _: x.T),
    # Heads and their channels in one axis there.
    "flat": Layout(
        lambda shape: (math.prod(shape),),
        lambda x: x.reshape(-1),
        lambda x, shape: x.reshape(shape),
    ),
    # A number per head here, in a tensor that broadcasts over [B, T, H, K] there.
    "heads": Layout(
        lambda shape: (1, 1, *shape, 1),
        lambda x: x[None, None, :, None],
        lambda x, shape: x.reshape(shape),
    ),
    # [W, D] here, [D, 1, W] there; the last tap is the current token in both.
    "convolution": Layout(
        lambda shape: (shape[1], 1, shape[0]), lambda x: x.T[:, None, :], lambda x, _: x[:, 0, :].T
    ),
}


@dataclass(frozen=True)
class Part:
    """A parameter, below a block ("mixer/query/kernel") or, without a layer, below the network; and
    what of it, as an index of integers and slices."""

    path: str
    index: tuple[int | slice, ...] = ()


def head_columns(path: str, head: int, size: int) -> Part:
    """The columns of a head of `size` channels in a kernel of x W."""
    return Part(path, (slice(None), slice(head * size, (head + 1) * size)))


@dataclass(frozen=True)
class Entry:
    """A public tensor: its name, "{layer}" in those of layers; the parameters it is made of, or
    their parts; their layout."""

    name: str
    parameters: tuple[str | Part, ...]
    layout: str = "same"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parameters, whole ones too, as parts."""
        return tuple(Part(p) if isinstance(p, str) else p for p in self.parameters)


@dataclass(frozen=True)
class Tensor:
    """An `Entry` of one layer, whose parts have whole paths and begin with the place in a stack."""

    name: str
    parts: tuple[Part, ...]
    layout: Layout = field(repr=False)

    def shapes(self, ours: Mapping[str, Any]) -> list[tuple[int, ...]]:
        """Shapes of the parts here."""
        nothing = np.empty(())
        return [np.broadcast_to(nothing, ours[p.path].shape)[p.index].shape for p in self.parts]

    def shape(self, ours: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of the public tensor."""
        public = [self.layout.shape(shape) for shape in self.shapes(ours)]
        return (sum(shape[0] for shape in public), *public[0][1:])


def placed(
    network: Sequence[Entry], layers: Sequence[Sequence[Entry]], ours: Mapping[str, Any]
) -> list[Tensor]:
    """The tensors of a network with these entries, and with these in each layer, whose parameters
    are `ours` by path."""
    paths = [path.split("/") for path in ours]
    period = len({path[2] for path in paths if path[:2] == ["stack", "period"]})
    scanned = len(layers) // period * period
    found = [Tensor(e.name, e.parts, LAYOUTS[e.layout]) for e in network]
    for layer, entries in enumerate(layers):
        looped = layer < scanned
        block = f"period/{layer % period}" if looped else f"remainder/{layer - scanned}"
        place = (layer // period,) if looped else ()
        found += [
            Tensor(
                e.name.format(layer=layer),
                tuple(Part(f"stack/{block}/{p.path}", (*place, *p.index)) for p in e.parts),
                LAYOUTS[e.layout],
            )
            for e in entries
        ]
    return found


def check_fits(
    source: Source, tensors: Sequence[Tensor], ours: Mapping[str, Any], ignored: Collection[str]
) -> None:
    """Raises ValueError, and names tensors, unless `source` has exactly these, in their shapes;
    those in `ignored` may be there."""
    names = {tensor.name for tensor in tensors}
    surplus = {name for name in source.shapes.keys() - names if name not in ignored}
    for what, those in (("lacks", names - source.shapes.keys()), ("has besides", surplus)):
        if those:
            first = ", ".join(sorted(those)[:5])
            more = f" and {len(those) - 5} more" if len(those) > 5 else ""
            raise ValueError(f"the checkpoint {what} the tensors {first}{more}")
    for tensor in tensors:
        expected, found = tensor.shape(ours), source.shapes[tensor.name]
        if expected != found:
            raise ValueError(
                f"tensor {tensor.name} must have shape {expected} as config.json says; got {found}"
            )
    covered = Counter[str]()
    for tensor in tensors:
        for part, shape in zip(tensor.parts, tensor.shapes(ours), strict=True):
            covered[part.path] += math.prod(shape)
    wrong = [path for path, leaf in ours.items() if covered[path] != math.prod(leaf.shape)]
    assert not wrong, f"the table does not have every number of {sorted(wrong)} once"


def load(
    source: Source, tensors: Sequence[Tensor], ours: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The parameters by path, in the shapes and types of `ours`; one tensor at a time is in memory
    beside them."""
    arrays = {path: _empty(leaf.shape, leaf.dtype) for path, leaf in ours.items()}
    for tensor in tensors:
        public, start = source.read(tensor.name), 0
        for part, shape in zip(tensor.parts, tensor.shapes(ours), strict=True):
            rows = tensor.layout.shape(shape)[0]
            numbers = tensor.layout.to_ours(public[start : start + rows], shape)
            arrays[part.path][part.index or ...] = numbers
            start += rows
    return arrays


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A new array that begins where JAX takes one without a copy."""
    size, dtype = math.prod(shape), np.dtype(dtype)
    space = np.empty(size * dtype.itemsize + ALIGNMENT, np.uint8)
    first = -space.ctypes.data % ALIGNMENT
    return space[first : first + size * dtype.itemsize].view(dtype).reshape(shape)


def public(
    tensors: Sequence[Tensor], ours: Mapping[str, Array], dtypes: Mapping[str, np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and numbers of the public tensors, one after another, in their types by name."""
    for tensor in tensors:
        parts = [
            tensor.layout.to_public(np.asarray(ours[part.path][part.index or ...]))
            for part in tensor.parts
        ]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        yield tensor.name, np.ascontiguousarray(whole, dtype=dtypes[tensor.name])
