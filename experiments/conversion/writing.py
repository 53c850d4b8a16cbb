"""Parameters of a run written as a public checkpoint."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.configs.recipes.defaults import mixer_options
from experiments.conversion.reading import DTYPES, check_dtype, tensors_of
from experiments.training.config import Config
from models.blocks.low_rank import merged
from models.weights import table
from models.weights.families import find_format, write_config
from models.weights.folder import write_tensors

FILE_BYTES = 2 * 10**9


def write_checkpoint(
    folder: Path,
    config: Config,
    ours: Mapping[str, Any],
    *,
    family: str | None = None,
    dtype: str = "keep",
    extra: Mapping[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
) -> str:
    """Writes parameters, by path, of the model of a config to `folder` as a public checkpoint, and
    returns its model_type.

    family        model_type; None: the first that has what the model has
    dtype         "keep", "float32" or "bfloat16"
    extra         more keys of config.json
    file_bytes    size of a file at most, unless a single tensor is larger

    Raises ValueError, before anything is written, for a model that the family is not."""
    check_dtype(dtype)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be new or empty")
    if config.model.name != "lm":
        raise ValueError(f"only language models are written; got {config.model.name}")
    ours = _merged(ours, config.model.to_dict())
    model = _complete(config.model.to_dict(), ours)
    narrow = dtype if dtype != "keep" else config.param_dtype
    rows = ours["embedding/embedding"].shape[0]
    public = write_config(family, model, rows, narrow) | dict(extra or {})
    format = find_format(public["model_type"])
    tensors = tensors_of(format, model, ours)
    dtypes = {
        tensor.name: np.dtype(ours[tensor.parts[0].path].dtype)
        if dtype == "keep" or tensor.name.endswith(format.FLOAT32)
        else DTYPES[dtype]
        for tensor in tensors
    }
    sizes = {t.name: math.prod(t.shape(ours)) * dtypes[t.name].itemsize for t in tensors}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, sizes, table.public(tensors, ours, dtypes), most_bytes=file_bytes)
    (folder / "config.json").write_text(json.dumps(public, indent=1) + "\n", encoding="utf-8")
    return public["model_type"]


def _merged(ours: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with what LoRA adds in the kernels that it adds to."""
    found = dict(ours)
    for path in ours:
        if path.endswith("/lora_a"):
            where = path.removesuffix("lora_a")
            parts = [found.pop(where + end, None) for end in ("lora_a", "lora_b", "lora_gain")]
            kernel = found[where + "kernel"]
            kind = model.get("lora_kind", "lora")
            whole = merged(kernel, *parts, kind=kind, alpha=model["lora_alpha"])
            found[where + "kernel"] = np.asarray(whole).astype(kernel.dtype)
    return found


def _complete(model: dict[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The section `model` with every option that a format asks for."""
    end = "mlp/up_EDM" if model.get("mlp") == "experts" else "mlp/up/kernel"
    widths = [leaf.shape[-1] for path, leaf in ours.items() if path.endswith(end)]
    mixers = {
        name: mixer_options(name, **model["mixers"].get(name, {}))
        for name in dict.fromkeys(model["pattern"])
    }
    defaults: dict[str, Any] = {
        "mlp": "swiglu",
        "norm": "rms",
        "norm_eps": 1e-5,
        "mlp_bias": False,
        "expert_weights": "normalised",
        "expert_scale": 1.0,
        "shared_width": 0,
        "shared_gate": True,
        "dense_layers": (),
        "dense_width": 0,
        "branch_norm_mixers": (),
        "normed_residual": False,
        "stream_factors": (),
        "balance_weight": 0.01,
    }
    return {
        **defaults,
        "tie_embeddings": False,
        **model,
        "mixers": mixers,
        "mlp_width": widths[0] if widths else 0,
    }
