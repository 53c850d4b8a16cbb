"""Mamba and Mamba-2 as `transformers` stores them: one norm and one mixer per layer, no MLP.

W_in is one tensor there and several parameters here, and so are W_x and the convolutions of
Mamba-2."""

import math
from collections.abc import Mapping
from typing import Any

from models.weights.keys import Keys
from models.weights.table import Entry

CLASSES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}
MIXERS = {"mamba", "mamba2"}
MLPS = ("none",)
EMBEDDING = "backbone.embeddings.weight"
HEAD = "lm_head.weight"
# What the classes take for an absent key.
TIED = {"mamba": True, "mamba2": False}
# They enter exponentials, and are float32 whatever the other tensors are.
FLOAT32 = (".A_log", ".D", ".dt_bias", ".dt_proj.bias")
MIXER = "backbone.layers.{layer}.mixer"
# How time steps and weights start, and what names say twice.
STARTS = (
    *("time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min"),
    *("time_step_scale", "rescale_prenorm_residual", "residual_in_fp32", "chunk_size"),
    *("d_inner", "d_model", "n_layer", "ssm_cfg", "fused_add_norm", "pad_vocab_size_multiple"),
    *("use_mambapy", "use_associative_scan"),
)


def ignored(name: str) -> bool:
    """No tensor is a constant."""
    return False


def network_entries(model: Mapping[str, Any]) -> list[Entry]:
    head = [] if model["tie_embeddings"] else [Entry(HEAD, ("head_WD",))]
    norm = Entry("backbone.norm_f.weight", ("norm/scale",))
    return [Entry(EMBEDDING, ("embedding/embedding",)), norm, *head]


def layer_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer with this mixer."""
    norm = Entry("backbone.layers.{layer}.norm.weight", ("mixer_norm/scale",))
    return [norm, *mixer_entries(mixer, model["mixers"][mixer], MIXER)]


def mixer_entries(mixer: str, options: Mapping[str, Any], where: str) -> list[Entry]:
    """The tensors of the mixer itself, whose names begin with `where`."""

    def linear(theirs: str, *ours: str) -> Entry:
        return Entry(f"{where}.{theirs}.weight", tuple(f"mixer/{o}/kernel" for o in ours), "linear")

    convolutions = ("conv",) if mixer == "mamba" else ("conv_x", "conv_B", "conv_C")
    common = [
        Entry(
            f"{where}.conv1d.weight",
            tuple(f"mixer/{c}/weight_WD" for c in convolutions),
            "convolution",
        ),
        linear("out_proj", "output"),
    ]
    if options["conv_bias"]:
        common.append(
            Entry(f"{where}.conv1d.bias", tuple(f"mixer/{c}/bias_D" for c in convolutions))
        )
    inputs = ("input", "gate") if mixer == "mamba" else ("gate", "input", "write", "read", "dt")
    if options["bias"]:
        common += [
            Entry(f"{where}.{theirs}.bias", tuple(f"mixer/{name}/bias" for name in ours))
            for theirs, ours in (("in_proj", inputs), ("out_proj", ("output",)))
        ]
    if mixer == "mamba":
        return [
            *common,
            linear("in_proj", *inputs),
            linear("x_proj", "dt_in", "write", "read"),
            linear("dt_proj", "dt_out"),
            Entry(f"{where}.dt_proj.bias", ("mixer/dt_bias_E",)),
            Entry(f"{where}.A_log", ("mixer/a_log_EN",)),
            Entry(f"{where}.D", ("mixer/skip_E",)),
        ]
    return [
        *common,
        linear("in_proj", *inputs),
        Entry(f"{where}.dt_bias", ("mixer/dt_bias_H",)),
        Entry(f"{where}.A_log", ("mixer/a_log_H",)),
        Entry(f"{where}.D", ("mixer/skip_H",)),
        Entry(f"{where}.norm.weight", ("mixer/norm/scale",)),
    ]


def read(keys: Keys, context_length: int) -> dict[str, Any]:
    """The section `model` of a config; there is no context_length.

    Raises ValueError for keys that are missing or ask for what the layer is not."""
    family = keys.get("model_type")
    width, eps = keys.integer("hidden_size"), keys.number("layer_norm_epsilon", 1e-5)
    keys.must("hidden_act", "silu", ("silu", "swish"))
    keys.must("rms_norm", True, (True,))
    keys.ignore(*STARTS)
    options: dict[str, Any] = {
        "conv_width": keys.integer("conv_kernel", 4),
        "bias": keys.flag("use_bias", False),
        "conv_bias": keys.flag("use_conv_bias", True),
    }
    if family == "mamba":
        inner = keys.integer("intermediate_size", int(keys.number("expand", 2) * width))
        rank = keys.get("time_step_rank", "auto")
        options |= {
            "expand": inner / width,
            "state_size": keys.integer("state_size", 16),
            "dt_rank": math.ceil(width / 16) if rank == "auto" else keys.integer("time_step_rank"),
        }
    else:
        heads, size = keys.integer("num_heads", 128), keys.integer("head_dim", 64)
        inner = int(keys.number("expand", 2) * width)
        if heads * size != inner:
            raise ValueError(
                f"{keys.where}: num_heads * head_dim must be expand * hidden_size = {inner}; got"
                f" {heads} * {size}"
            )
        check_time_steps(keys)
        keys.ignore("time_step_rank")
        groups = keys.integer("n_groups", 8)
        options |= {
            "expand": inner / width,
            "heads": heads,
            "groups": groups,
            "norm_groups": groups,
            "state_size": keys.integer("state_size", 128),
            "norm_eps": eps,
        }
    return {
        "width": width,
        "depth": keys.integer("num_hidden_layers"),
        "pattern": (family,),
        "mixers": {family: options},
        "mlp": "none",
        "norm_eps": eps,
    }


def check_time_steps(keys: Keys) -> None:
    """Raises ValueError unless time steps are free; newer files write infinity as an object."""
    limit = keys.get("time_step_limit", (0.0, math.inf))
    low, high = limit if isinstance(limit, list | tuple) and len(limit) == 2 else (None, None)
    if low != 0 or high not in (math.inf, "Infinity", {"__float__": "Infinity"}):
        raise ValueError(f"{keys.where}: time_step_limit must be (0, infinity); got {limit}")


def write(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for a model; raises ValueError for one that the family is not."""
    if set(model["pattern"]) != {family}:
        raise ValueError("it has one mixer in all layers")
    options, width = model["mixers"][family], model["width"]
    inner = round(options["expand"] * width)
    keys: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": model["depth"],
        "state_size": options["state_size"],
        "expand": inner // width if inner % width == 0 else inner / width,
        "conv_kernel": options["conv_width"],
        "hidden_act": "silu",
        "layer_norm_epsilon": model["norm_eps"],
        "use_bias": options["bias"],
        "use_conv_bias": options["conv_bias"],
    }
    if options["conv_width"] == 0:
        raise ValueError("it has a convolution")
    if family == "mamba":
        if tuple(options["eigenvalue_range"]) != (0, 1):
            raise ValueError("it has eigenvalues in (0, 1)")
        rank = options["dt_rank"] or math.ceil(width / 16)
        return keys | {"intermediate_size": inner, "time_step_rank": rank}
    heads = options["heads"] or max(1, inner // 64)
    if options["norm"] != "after_gate" or options["norm_eps"] != model["norm_eps"]:
        raise ValueError("it has a norm after the gate, with the norm_eps of the blocks")
    if options["norm_groups"] != options["groups"]:
        raise ValueError("it has a norm over each group")
    return keys | {"num_heads": heads, "head_dim": inner // heads, "n_groups": options["groups"]}
