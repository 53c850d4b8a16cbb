"""Public checkpoints read: a folder in the format of Hugging Face, or a GGUF file, becomes a
config, the sizes of a task and parameters."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_dtypes
import numpy as np

from experiments.configs.recipes.base import base, language_model
from experiments.configs.recipes.defaults import mixer_options, task_options
from experiments.training.config import Config, validate
from experiments.training.state import Blueprint, by_path, initial_model, make_blueprint, seed_array
from experiments.training.task import Examples, Task
from models.weights import table
from models.weights.families import find_format, read_model
from models.weights.folder import Source, TensorFolder, read_config
from models.weights.gguf_file import SUFFIX, GgufFile
from models.weights.older import config_of_today, tensors_of_today

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Checkpoint:
    """A public checkpoint as a run would have it.

    public      config.json, or what it would be
    config      of the run
    task        sizes and origin of its tokens, without examples
    params      arrays by path, float32 or bfloat16
    warnings    what was not understood or is not as it was
    """

    public: Mapping[str, Any]
    config: Config
    task: Task
    blueprint: Blueprint
    params: dict[str, np.ndarray]
    warnings: tuple[str, ...]


def read_checkpoint(
    folder: Path, *, dtype: str = "keep", context_length: int = 0, tokenizer: Path | None = None
) -> Checkpoint:
    """The checkpoint in `folder`, or in a file *.gguf.

    dtype             of the parameters: "keep" (bfloat16 if that is all there is in the file, else
                      float32), "float32" or "bfloat16"
    context_length    tokens that full attention sees at most; 0: as config.json says
    tokenizer         where the run will have its tokenizer.json; None: where the checkpoint has it

    Raises ValueError for one that cannot be read, with the key or tensor."""
    check_dtype(dtype)
    if context_length < 0:
        raise ValueError(f"--context_length must be 0 or positive; got {context_length}")
    gguf_file = GgufFile(folder) if folder.suffix == SUFFIX else None
    public = gguf_file.config if gguf_file else config_of_today(read_config(folder))
    model, keys = read_model(public, context_length)
    format = find_format(public["model_type"])
    source = gguf_file or tensors_of_today(TensorFolder(folder))
    if format.EMBEDDING not in source.shapes:
        raise ValueError(f"the checkpoint lacks the tensors {format.EMBEDDING}")
    rows = source.shapes[format.EMBEDDING][0]
    file = (folder.parent if gguf_file else folder) / TOKENIZER
    content = file.read_bytes() if file.is_file() else None
    if content is None and gguf_file and gguf_file.tokenizer is not None:
        content = gguf_file.tokenizer.encode("utf-8")
    config = _config(model, rows, (tokenizer or file) if content else None)
    config.param_dtype = _dtype(source, format) if dtype == "keep" else dtype
    validate(config)
    task = _task(config, content)
    blueprint = make_blueprint(config, task)
    ours = by_path(parameter_shapes(blueprint, config))
    tensors = tensors_of(format, config.model.to_dict(), ours)
    tied = config.model.tie_embeddings
    constants = {name for name in source.shapes if format.ignored(name)}
    table.check_fits(source, tensors, ours, constants | ({format.HEAD} if tied else set()))
    if tied and format.HEAD in source.shapes:
        same = np.array_equal(source.read(format.HEAD), source.read(format.EMBEDDING))
        if not same:
            raise ValueError(f"tie_word_embeddings is true, but {format.HEAD} differs")
    warnings = []
    if keys.left:
        names = ", ".join(keys.left)
        warnings.append(f"keys of config.json taken to change no logits: {names}")
    if gguf_file and gguf_file.quantised:
        warnings.append(f"weights of fewer bits as float32: {', '.join(gguf_file.quantised)}")
    if gguf_file and content is None:
        warnings.append(f"the tokenizer is not read, put {TOKENIZER} beside the file to have it")
    params = table.load(source, tensors, ours)
    return Checkpoint(public, config, task, blueprint, params, tuple(warnings))


def check_dtype(dtype: str) -> None:
    """Raises ValueError unless it is "keep" or a type of parameters."""
    if dtype not in ("keep", *DTYPES):
        raise ValueError(f"--dtype must be keep, {' or '.join(DTYPES)}; got {dtype!r}")


def _dtype(source: Source, format: ModuleType) -> str:
    """The narrowest type of parameters that holds every number of the file."""
    free = {t for name, t in source.dtypes.items() if not name.endswith(format.FLOAT32)}
    return "bfloat16" if free == {DTYPES["bfloat16"]} else "float32"


def _config(model: Mapping[str, Any], rows: int, tokenizer: Path | None) -> Config:
    """The config of a run that has the model.

    With a tokenizer its task is text. Without one tokens are numbers, and the task one of
    numbers."""
    contexts = (options.get("context_length", 0) for options in model["mixers"].values())
    length = min([1024, *(context for context in contexts if context)])
    best: dict[str, Any] = {}
    if tokenizer is not None:
        task = task_options("text", tokenizer=str(tokenizer), sequence_length=length)
        best = {"best_metric": "validation/bits_per_byte", "best_mode": "min"}
    else:
        task = task_options("induction_heads", length=min(length, 64), vocabulary_size=rows)
    mixers = {name: mixer_options(name, **options) for name, options in model["mixers"].items()}
    return base(
        task=task,
        model=language_model(**model, vocabulary_rows=rows) | {"mixers": mixers},
        steps=1000,
        batch_size=8,
        optimizer={"lr": 1e-5, "warmup_steps": 50, "b2": 0.95},
        evaluation={"examples": 64, **best},
    )


def _task(config: Config, tokenizer: bytes | None) -> Task:
    """Sizes and origin of the tokens, of which tokenizer.json has this content; the task itself
    would read its data."""
    nothing = Examples(lambda indices: {})
    provenance, kept = {}, {}
    if tokenizer is not None:
        sha256 = hashlib.sha256(tokenizer).hexdigest()
        provenance = {"tokenizer": f"tokenizer-{sha256[:16]}", "tokenizer_sha256": sha256}
        kept = {"tokenizer": tokenizer}
    sizes = {"vocabulary": config.model.vocabulary_rows}
    return Task(sizes, lambda seed: nothing, {}, provenance=provenance, kept=kept)


def parameter_shapes(blueprint: Blueprint, config: Config) -> Any:
    """The parameters as a run holds them, abstract."""
    initial = functools.partial(initial_model, blueprint)
    return jax.eval_shape(initial, seed_array(config.seeds))[0]


def tensors_of(
    format: ModuleType, model: Mapping[str, Any], ours: Mapping[str, Any]
) -> list[table.Tensor]:
    """The public tensors of a model, whose parameters by path are `ours`."""
    names = [model["pattern"][i % len(model["pattern"])] for i in range(model["depth"])]
    dense = {**model, "mlp": "swiglu"}
    layers = [
        format.layer_entries(name, dense if i in model.get("dense_layers", ()) else model)
        for i, name in enumerate(names)
    ]
    return table.placed(format.network_entries(model), layers, ours)
