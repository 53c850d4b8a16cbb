"""Folders of public checkpoints: config.json, and tensors in safetensors files.

A tensor is read when it is asked for, from the one file that has it. Nothing in a folder is
executed: pickles are refused."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
# Numbers of weights; what quantised checkpoints hold beside them needs rules of its own.
DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, in one sentence, for anything else."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must be a JSON object; got {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises ValueError for a folder that has none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one with config.json and {WHOLE}")
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json, which says what the tensors are")
    return read_object(file)


class Source(Protocol):
    """Tensors that are read when they are asked for."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str) -> np.ndarray: ...


class TensorFolder:
    """The tensors of a folder: `shapes` and `dtypes` by name, and `read`.

    Raises ValueError, and names file or tensor, for a folder without safetensors, for files that
    are cut short or lie about their size, for an index that does not fit them, and for tensors that
    are no floating-point numbers."""

    def __init__(self, folder: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        # The file of a tensor and the place of its first byte there.
        self._files: dict[str, tuple[Path, int]] = {}
        index = folder / INDEX
        expected = _weight_map(index) if index.is_file() else None
        if expected is None and not (folder / WHOLE).is_file():
            pickles = sorted(file.name for file in folder.glob("*.bin"))
            reason = (
                f"has {pickles[0]}, a pickle, which could execute anything when it is read; save it"
                " as safetensors where it comes from"
                if pickles
                else f"has neither {WHOLE} nor {INDEX}"
            )
            raise ValueError(f"{folder} {reason}")
        for name in [WHOLE] if expected is None else sorted(set(expected.values())):
            self._add(folder / name)
        for name, place in (expected or {}).items():
            if name not in self.shapes or self._files[name][0] != folder / place:
                raise ValueError(f"{index} says that {place} has the tensor {name}; it has not")

    def _add(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(f"{file}, which {INDEX} names, is missing")
        opened: Any = _open(file)
        begins = _first_bytes(file)
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            if name in self.shapes:
                raise ValueError(f"the tensor {name} is in {self._files[name][0]} and in {file}")
            entry = opened.get_slice(name)
            if entry.get_dtype() not in DTYPES:
                raise ValueError(
                    f"tensor {name} of {file} must have a type of {', '.join(DTYPES)}; got"
                    f" {entry.get_dtype()}: quantised checkpoints are not read"
                )
            self.shapes[name] = tuple(entry.get_shape())
            self.dtypes[name] = DTYPES[entry.get_dtype()]
            self._files[name] = file, begins[name]

    def read(self, name: str) -> np.ndarray:
        """The numbers of a tensor as they are stored."""
        # Not through the library, which maps whole files: what was read would stay in memory.
        file, begin = self._files[name]
        shape = self.shapes[name]
        numbers = np.fromfile(file, np.uint8, _bytes(shape, self.dtypes[name]), offset=begin)
        return numbers.view(self.dtypes[name]).reshape(shape)


def _open(file: Path) -> Any:
    # The library holds the header against the size of the file.
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or no safetensors file ({error}); fetch it again"
        ) from error


def _first_bytes(file: Path) -> dict[str, int]:
    """Where each tensor begins in a file that the library has opened, so that its header is
    sound."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return {
        name: 8 + size + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _weight_map(index: Path) -> dict[str, str]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} must have a weight_map from tensors to files")
    for name, file in names.items():
        plain = isinstance(file, str) and Path(file).name == file
        if not plain or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index} must name safetensors files beside it; got {file!r} for {name}"
            )
    return names


def write_tensors(
    folder: Path,
    sizes: Mapping[str, int],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    most_bytes: int,
) -> None:
    """Writes `tensors` in files of at most `most_bytes`, unless a single one is larger, with an
    index if there are several files.

    `sizes` are the bytes of each, in the same order; one file's tensors are in memory at a time."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count, iterator = len(shards), iter(tensors)
    places = {}
    for number, names in enumerate(shards, start=1):
        file = WHOLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        arrays = {name: array for name, (_, array) in zip(names, iterator, strict=False)}
        # Loaders of other libraries ask for this entry.
        save_file(arrays, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
