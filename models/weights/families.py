"""The formats of public checkpoints, by the model_type of their config.json."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from models.weights import (
    bamba,
    fla,
    kimi_linear,
    llama,
    mamba,
    minimax,
    mixtral,
    olmo_hybrid,
    qwen3_next,
)
from models.weights.keys import Keys

# A format has CLASSES {model_type: class}, MIXERS, if they differ from SwiGLU and RMSNorm MLPS and
# NORMS, OPTIONS of blocks that it has of PLAIN, the names EMBEDDING and HEAD, TIED {model_type:
# whether an absent tie_word_embeddings is true}, FLOAT32 (ends of names of tensors that are float32
# whatever the others are), `ignored`, `network_entries`, `layer_entries`,
# `read` and `write`.
FORMATS: tuple[ModuleType, ...] = (
    *(llama, mixtral, qwen3_next, mamba, bamba, fla),
    *(kimi_linear, minimax, olmo_hybrid),
)
# Options of blocks that few formats have, and what they are in the others.
PLAIN = {
    "pre_norm": True,
    "branch_norm": False,
    "branch_norm_mixers": (),
    "normed_residual": False,
    "stream_factors": (),
    "mlp_scale": 0.0,
    "expert_scale": 1.0,
    "shared_gate": True,
    "dense_layers": (),
}
FAMILIES: dict[str, ModuleType] = {
    family: format for format in FORMATS for family in format.CLASSES
}


def find_format(family: Any) -> ModuleType:
    """The format of a model_type; raises ValueError with those that are known."""
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}; got {family!r}")
    return FAMILIES[family]


def read_model(config: Mapping[str, Any], context_length: int = 0) -> tuple[dict[str, Any], Keys]:
    """(section `model` of a config without the number of tokens, the keys of config.json).

    Raises ValueError for a family, a key or a value that cannot be read."""
    keys = Keys(config)
    family = config.get("model_type")
    format = find_format(family)
    if "quantization_config" in config:
        raise ValueError("config.json has a quantization_config: quantised weights are not read")
    tied = keys.flag("tie_word_embeddings", format.TIED[family])
    return format.read(keys, context_length) | {"tie_embeddings": tied}, keys


def write_config(
    family: str | None, model: Mapping[str, Any], vocabulary: int, dtype: str
) -> dict[str, Any]:
    """config.json of a model, complete, in the form that old and new versions of the libraries
    read; family None takes the first that the model is.

    Raises ValueError for a model that no family, or not this one, can be."""
    refused = []
    for name in FAMILIES if family is None else (family,):
        format = find_format(name)
        try:
            _check_backbone(model, format)
            keys = format.write(name, model)
        except ValueError as error:
            refused.append(f"{name}: {error}")
            continue
        return {
            "architectures": [format.CLASSES[name]],
            "model_type": name,
            **keys,
            "tie_word_embeddings": model["tie_embeddings"],
            "vocab_size": vocabulary,
            "torch_dtype": dtype,
        }
    raise ValueError(f"the model cannot be written as a public checkpoint ({'; '.join(refused)})")


def _check_backbone(model: Mapping[str, Any], format: ModuleType) -> None:
    others = sorted(set(model["pattern"]) - format.MIXERS)
    if others:
        raise ValueError(f"it has no {' and no '.join(others)}")
    mlps, norms = getattr(format, "MLPS", ("swiglu",)), getattr(format, "NORMS", ("rms",))
    for name, possible in (("norm", norms), ("mlp", mlps)):
        if model[name] not in possible:
            raise ValueError(f"it has {name} {' or '.join(possible)}; got {model[name]!r}")
    for name in PLAIN.keys() - getattr(format, "OPTIONS", ()):
        if model.get(name, PLAIN[name]) != PLAIN[name]:
            raise ValueError(f"it has {name}={PLAIN[name]}; got {model[name]!r}")
