"""Models of flash-linear-attention: GLA, DeltaNet and Gated DeltaNet, and hybrids of them with
softmax attention in some layers (the key `attn`)."""

import math
from collections.abc import Mapping
from typing import Any

from models.weights.keys import Keys
from models.weights.table import Entry

CLASSES = {
    "gla": "GLAForCausalLM",
    "delta_net": "DeltaNetForCausalLM",
    "gated_deltanet": "GatedDeltaNetForCausalLM",
}
MIXER_OF = {"gla": "gla", "delta_net": "delta_net", "gated_deltanet": "gated_delta_net"}
ATTENTION = ("transformer", "window_attention")
MIXERS = {*MIXER_OF.values(), *ATTENTION}
EMBEDDING = "model.embeddings.weight"
HEAD = "lm_head.weight"
# What the classes take for absent keys.
TIED = dict.fromkeys(CLASSES, False)
HEADS = {"gla": 4, "delta_net": 16, "gated_deltanet": 6}
# They enter exponentials, and are float32 whatever the other tensors are.
FLOAT32 = (".A_log", ".dt_bias")
# How it is computed, and losses and starts of training.
COMPUTATION = (
    *("attn_mode", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy"),
    *("use_l2warp", "max_position_embeddings", "hidden_ratio"),
)
LAYER = "model.layers.{layer}"
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
CONVOLUTIONS = {"conv_q": "q_conv1d", "conv_k": "k_conv1d", "conv_v": "v_conv1d"}
# Beyond the projections: (name there, name here, layout).
OWN = {
    "gla": (
        ("gk_proj.0.weight", "gate_in/kernel", "linear"),
        ("gk_proj.1.weight", "gate_out/kernel", "linear"),
        ("gk_proj.1.bias", "gate_out/bias", "same"),
        ("g_proj.weight", "output_gate/kernel", "linear"),
        ("g_norm_swish_gate.weight", "norm/scale", "same"),
    ),
    "delta_net": (
        ("b_proj.weight", "beta/kernel", "linear"),
        ("o_norm.weight", "norm/scale", "same"),
    ),
    "gated_delta_net": (
        ("a_proj.weight", "dt/kernel", "linear"),
        ("b_proj.weight", "beta/kernel", "linear"),
        ("A_log", "a_log_H", "same"),
        ("dt_bias", "dt_bias_H", "same"),
        ("g_proj.weight", "output_gate/kernel", "linear"),
        ("o_norm.weight", "norm/scale", "same"),
    ),
}
# Constants of the classes.
GATE_RANK, GATE_TEMPERATURE, ATTENTION_EPS = 16, 16.0, 1e-5


def ignored(name: str) -> bool:
    """Whether a tensor is a constant that older files hold."""
    return name.endswith("rotary.inv_freq")


def network_entries(model: Mapping[str, Any]) -> list[Entry]:
    head = [] if model["tie_embeddings"] else [Entry(HEAD, ("head_WD",))]
    norm = Entry("model.norm.weight", ("norm/scale",))
    return [Entry(EMBEDDING, ("embedding/embedding",)), norm, *head]


def layer_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer with this mixer."""
    options = model["mixers"][mixer]

    def inside(theirs: str, ours: str, layout: str = "same") -> Entry:
        return Entry(f"{LAYER}.attn.{theirs}", (f"mixer/{ours}",), layout)

    found = [
        Entry(f"{LAYER}.attn_norm.weight", ("mixer_norm/scale",)),
        Entry(f"{LAYER}.mlp_norm.weight", ("mlp_norm/scale",)),
    ]
    found += [
        Entry(f"{LAYER}.mlp.{name}_proj.weight", (f"mlp/{name}/kernel",), "linear")
        for name in ("gate", "up", "down")
    ]
    found += [
        inside(f"{theirs}.weight", f"{ours}/kernel", "linear")
        for ours, theirs in PROJECTIONS.items()
    ]
    if mixer in ATTENTION:
        if options["qkv_bias"]:
            found += [
                inside(f"{PROJECTIONS[name]}.bias", f"{name}/bias")
                for name in ("query", "key", "value")
            ]
        if options["qk_norm"]:
            found += [inside(f"{n[0]}_norm.weight", f"{n}_norm/scale") for n in ("query", "key")]
        return found
    if options["conv_width"]:
        found += [
            inside(f"{theirs}.weight", f"{ours}/weight_WD", "convolution")
            for ours, theirs in CONVOLUTIONS.items()
        ]
    return found + [inside(*entry) for entry in OWN[mixer]]


def read(keys: Keys, context_length: int) -> dict[str, Any]:
    """The section `model` of a config; context_length is that of softmax attention, 0 for what
    config.json says.

    Raises ValueError for keys that are missing or ask for what the layers are not."""
    family = keys.get("model_type")
    width, depth = keys.integer("hidden_size"), keys.integer("num_hidden_layers")
    eps = keys.number("norm_eps", 1e-6)
    keys.must("hidden_act", "swish", ("swish", "silu"))
    for name, only in (("elementwise_affine", True), ("fuse_norm", True), ("conv_bias", False)):
        keys.must(name, only, (only,))
    keys.must("attnres_block_size", None, (None,))
    ratio = keys.number("hidden_ratio", 4)
    heads = keys.integer("num_heads", HEADS[family])
    short = keys.flag("use_short_conv", family != "gla")
    width_of_convolution = keys.integer("conv_size", 4)
    options = {
        "heads": heads,
        "norm_eps": eps,
        "conv_width": width_of_convolution if short else 0,
        **_sizes(keys, family, width, heads),
    }
    mixer = MIXER_OF[family]
    names, attention = _hybrid(keys, mixer, depth, context_length)
    keys.ignore(*COMPUTATION)
    return {
        "width": width,
        "depth": depth,
        "pattern": names,
        "mixers": {mixer: options, **attention},
        "mlp": "swiglu",
        "mlp_width": keys.integer(
            "intermediate_size", 256 * math.ceil(int(width * ratio * 2 / 3) / 256)
        ),
        "norm_eps": eps,
    }


def _sizes(keys: Keys, family: str, width: int, heads: int) -> dict[str, Any]:
    """The options of one mixer alone."""
    if family == "gla":
        keys.must("num_kv_heads", heads, (heads,))
        for name, only in (("clamp_min", None), ("feature_map", None), ("use_gv", False)):
            keys.must(name, only, (only,))
        for name in ("use_output_gate", "use_gk"):
            keys.must(name, True, (True,))
        return {
            "expand_k": float(keys.number("expand_k", 0.5)),
            "expand_v": float(keys.number("expand_v", 1.0)),
            "gate_rank": GATE_RANK,
            "gate_temperature": GATE_TEMPERATURE,
        }
    span = (-1, 1) if keys.flag("allow_neg_eigval", False) else (0, 1)
    if family == "delta_net":
        keys.must("use_gate", False, (False,))
        for name in ("use_beta", "use_output_norm"):
            keys.must(name, True, (True,))
        keys.must("qk_norm", "l2", ("l2",))
        keys.must("qk_activation", "silu", ("silu",))
        return {
            "expand_k": float(keys.number("expand_k", 1.0)),
            "expand_v": float(keys.number("expand_v", 1.0)),
            "eigenvalue_range": span,
        }
    keys.must("num_v_heads", heads, (heads,))
    keys.must("use_gate", True, (True,))
    keys.must("output_gate_activation", "swish", ("swish", "silu"))
    size = keys.integer("head_dim", 256)
    return {
        "expand_k": heads * size / width,
        "expand_v": heads * size * keys.number("expand_v", 2.0) / width,
        "eigenvalue_range": span,
    }


def _hybrid(
    keys: Keys, mixer: str, depth: int, context_length: int
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The mixer of each layer, or one for all; and the options of softmax attention, if some layers
    have it."""
    given = keys.get("attn", None)
    trained = keys.integer("max_position_embeddings", 2048)
    if given is None:
        return (mixer,), {}
    if not isinstance(given, dict):
        raise ValueError(f"{keys.where}: attn must be null or one object; got {given!r}")
    attn = Keys(given, f"{keys.where}: attn")
    layers = attn.get("layers")
    known = isinstance(layers, list) and all(layer in range(depth) for layer in layers)
    if not known:
        raise ValueError(f"{attn.where}: layers must be indices below {depth}; got {layers!r}")
    heads = attn.integer("num_heads")
    window = attn.get("window_size", None)
    options = {
        "heads": heads,
        "key_value_heads": attn.integer("num_kv_heads", heads),
        "rope_base": float(attn.number("rope_theta", 10000.0)),
        "qkv_bias": attn.flag("qkv_bias", False),
        "qk_norm": attn.flag("qk_norm", False),
        "norm_eps": ATTENTION_EPS,
    }
    reach = {"context_length": context_length or trained}
    if window is not None:
        reach = {"window": attn.integer("window_size")}
    if attn.left:
        raise ValueError(f"{attn.where} has keys that are not known: {', '.join(attn.left)}")
    name = ATTENTION[window is not None]
    names = tuple(name if layer in layers else mixer for layer in range(depth))
    return names, {name: reach | options}


def write(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for a model; raises ValueError for one that the family is not."""
    mixer, width = MIXER_OF[family], model["width"]
    pattern = model["pattern"]
    names = [pattern[layer % len(pattern)] for layer in range(model["depth"])]
    softmax = sorted(set(names) - {mixer})
    if mixer not in names or len(softmax) > 1 or not set(softmax) <= set(ATTENTION):
        raise ValueError(f"it has {mixer} and at most one kind of softmax attention")
    if model["mlp_bias"]:
        raise ValueError("it has no biases in its MLP")
    options = model["mixers"][mixer]
    if options["norm_eps"] != model["norm_eps"]:
        raise ValueError("it has one norm_eps for blocks and mixers")
    heads, conv_width = options["heads"], options["conv_width"]
    keys: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": model["depth"],
        "intermediate_size": model["mlp_width"],
        "hidden_act": "swish",
        "norm_eps": model["norm_eps"],
        "num_heads": heads,
        "use_short_conv": conv_width > 0,
        "fuse_norm": True,
        "attn": None,
    }
    if conv_width:
        keys["conv_size"] = conv_width
    if softmax:
        places = [layer for layer, name in enumerate(names) if name == softmax[0]]
        keys["attn"] = {"layers": places, **_attention(model["mixers"][softmax[0]])}
        keys["max_position_embeddings"] = model["mixers"][softmax[0]].get("context_length", 2048)
    if family == "gla":
        if (options["gate_rank"], options["gate_temperature"]) != (GATE_RANK, GATE_TEMPERATURE):
            raise ValueError(f"it has gate_rank {GATE_RANK}, gate_temperature {GATE_TEMPERATURE}")
        return keys | {name: options[name] for name in ("expand_k", "expand_v")}
    keys["allow_neg_eigval"] = tuple(options["eigenvalue_range"]) == (-1, 1)
    if family == "delta_net":
        return keys | {name: options[name] for name in ("expand_k", "expand_v")}
    size = round(options["expand_k"] * width) // heads
    return keys | {"head_dim": size, "expand_v": round(options["expand_v"] * width) / heads / size}


def _attention(options: Mapping[str, Any]) -> dict[str, Any]:
    """The key `attn` without its layers."""
    unknown = {"size_per_head": 0, "rope": True, "rope_scaling": (), "output_bias": False}
    for name, only in unknown.items():
        if options[name] != only:
            raise ValueError(f"its softmax attention has {name}={only}; got {options[name]}")
    if options["qk_norm"] and options["norm_eps"] != ATTENTION_EPS:
        raise ValueError(f"its softmax attention has norm_eps={ATTENTION_EPS}")
    found = {
        "num_heads": options["heads"],
        "num_kv_heads": options["key_value_heads"] or options["heads"],
        "window_size": options.get("window"),
        "rope_theta": options["rope_base"],
        "qkv_bias": options["qkv_bias"],
    }
    return found | ({"qk_norm": True} if options["qk_norm"] else {})
