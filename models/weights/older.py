"""Checkpoints with older names, seen as those of today: of flash-linear-attention in 2024, and of
mamba_ssm, the library of Mamba's authors. They come in; what goes out has today's names."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.weights.folder import Source
from models.weights.keys import Keys

# In 2024 the norms stood in the modules behind them, and the two maps of an MLP's first layer in
# one tensor, the gate first.
TODAY = {
    "attn.norm.weight": "attn_norm.weight",
    "mlp.norm.weight": "mlp_norm.weight",
    "backbone.embedding.weight": "backbone.embeddings.weight",
}
GATE, UP, DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
LAYER = re.compile(r"(model\.layers\.\d+\.)(.*)")


def config_of_today(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the keys of `transformers`, for one of mamba_ssm; others as they are.

    Raises ValueError for options of mamba_ssm that those classes have not."""
    if "model_type" in config or not {"d_model", "n_layer"} <= config.keys():
        return dict(config)
    keys = Keys(config)
    ssm = Keys(keys.get("ssm_cfg", {}), "config.json: ssm_cfg")
    family = {"Mamba1": "mamba", "Mamba2": "mamba2"}[
        ssm.must("layer", "Mamba1", ("Mamba1", "Mamba2"))
    ]
    for name, only in (("attn_layer_idx", []), ("d_intermediate", 0), ("rms_norm", True)):
        keys.must(name, only, (only,))
    keys.ignore("attn_cfg")
    width, expand = keys.integer("d_model"), ssm.number("expand", 2)
    found: dict[str, Any] = {
        "model_type": family,
        "hidden_size": width,
        "num_hidden_layers": keys.integer("n_layer"),
        "expand": expand,
        "conv_kernel": ssm.integer("d_conv", 4),
        "state_size": ssm.integer("d_state", 16 if family == "mamba" else 128),
        "use_bias": ssm.flag("bias", False),
        "use_conv_bias": ssm.flag("conv_bias", True),
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": keys.flag("tie_embeddings", True),
    }
    if family == "mamba":
        found["time_step_rank"] = ssm.get("dt_rank", "auto")
    else:
        inner, size = int(expand * width), ssm.integer("headdim", 64)
        ssm.must("D_has_hdim", False, (False,))
        ssm.must("rmsnorm", True, (True,))
        ssm.must("norm_before_gate", False, (False,))
        found |= {"num_heads": inner // size, "head_dim": size}
        found["n_groups"] = ssm.integer("ngroups", 1)
        found["time_step_limit"] = ssm.get("dt_limit", (0.0, "Infinity"))
    # How it is computed and how it starts.
    ssm.ignore("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path")
    ssm.ignore("chunk_size", "use_mem_eff_path", "A_init_range", "conv_init")
    if ssm.left:
        raise ValueError(f"{ssm.where} has keys that are not known: {', '.join(ssm.left)}")
    return {name: config[name] for name in keys.left} | found


class Renamed:
    """A `Source` whose tensors are those of another, some by other names and some a half of one:
    `halves` says which, by the new name."""

    def __init__(self, source: Source, names: Mapping[str, str], halves: Mapping[str, int]):
        self._source, self._names, self._halves = source, names, halves
        self.shapes: dict[str, tuple[int, ...]] = {}
        for new, old in names.items():
            rows, *others = source.shapes[old]
            self.shapes[new] = (rows // 2 if new in halves else rows, *others)
        self.dtypes = {new: source.dtypes[old] for new, old in names.items()}

    def read(self, name: str) -> np.ndarray:
        """The numbers of a tensor as they are stored."""
        numbers = self._source.read(self._names[name])
        if name not in self._halves:
            return numbers
        return np.split(numbers, 2)[self._halves[name]]


def tensors_of_today(source: Source) -> Source:
    """The tensors by today's names; `source` itself if it has those."""
    names: dict[str, str] = {}
    halves: dict[str, int] = {}
    for old in source.shapes:
        found = LAYER.fullmatch(old)
        layer, rest = found.groups() if found else ("", old)
        if rest == GATE and _has_both(source, layer):
            for place, half in enumerate((GATE, UP)):
                names[layer + half], halves[layer + half] = old, place
        else:
            names[layer + TODAY.get(rest, rest)] = old
    return source if names.keys() == source.shapes.keys() else Renamed(source, names, halves)


def _has_both(source: Source, layer: str) -> bool:
    """Whether a gate has the rows of both maps: the other is not there, and what follows reads half
    as many."""
    down = source.shapes.get(layer + DOWN, (0,))
    return layer + UP not in source.shapes and source.shapes[layer + GATE][0] == 2 * down[-1]
