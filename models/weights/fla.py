"""Models of flash-linear-attention, one of the mixers of fla_mixers.py in all layers, and hybrids
of it with softmax attention in some (the key `attn`)."""

import math
from collections.abc import Mapping
from typing import Any

from models.weights.fla_mixers import MIXERS as OWN
from models.weights.fla_mixers import QUERY_KEY_VALUE, linear, same
from models.weights.keys import Keys
from models.weights.table import Entry

CLASSES = {
    "gla": "GLAForCausalLM",
    "delta_net": "DeltaNetForCausalLM",
    "gated_deltanet": "GatedDeltaNetForCausalLM",
    "kda": "KDAForCausalLM",
    "retnet": "RetNetForCausalLM",
    "hgrn2": "HGRN2ForCausalLM",
    "lightnet": "LightNetForCausalLM",
    "mom": "MomForCausalLM",
}
BY_NAME = {mixer.name: mixer for mixer in OWN.values()}
ATTENTION = ("transformer", "window_attention")
MIXERS = {*BY_NAME, *ATTENTION}
EMBEDDING = "model.embeddings.weight"
HEAD = "lm_head.weight"
# What the classes take for absent keys.
TIED = dict.fromkeys(CLASSES, False)
RATIO = {"retnet": 2}  # others: 4
# They enter exponentials, and are float32 whatever the other tensors are.
FLOAT32 = (".A_log", ".dt_bias", "lower_bounds")
# How it is computed, losses and starts of training, and in 2024 the names of the norms.
COMPUTATION = (
    *("attn_mode", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy"),
    *("use_l2warp", "max_position_embeddings", "hidden_ratio", "norm_first"),
)
LAYER = "model.layers.{layer}"
# A constant of the classes.
ATTENTION_EPS = 1e-5


def ignored(name: str) -> bool:
    """Whether a tensor is a constant that older files hold."""
    return name.endswith("rotary.inv_freq")


def network_entries(model: Mapping[str, Any]) -> list[Entry]:
    head = [] if model["tie_embeddings"] else [Entry(HEAD, ("head_WD",))]
    norm = Entry("model.norm.weight", ("norm/scale",))
    own = [e for name in BY_NAME if name in model["pattern"] for e in BY_NAME[name].network]
    return [Entry(EMBEDDING, ("embedding/embedding",)), norm, *own, *head]


def layer_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer with this mixer."""
    options = model["mixers"][mixer]
    found = [
        Entry(f"{LAYER}.attn_norm.weight", ("mixer_norm/scale",)),
        Entry(f"{LAYER}.mlp_norm.weight", ("mlp_norm/scale",)),
    ]
    found += [
        Entry(f"{LAYER}.mlp.{name}_proj.weight", (f"mlp/{name}/kernel",), "linear")
        for name in ("gate", "up", "down")
    ]
    if mixer not in ATTENTION:
        return found + BY_NAME[mixer].tensors(options)
    found += [linear(theirs, ours) for ours, theirs in QUERY_KEY_VALUE.items()]
    found.append(linear("o_proj", "output"))
    if options["qkv_bias"]:
        found += [same(f"{QUERY_KEY_VALUE[name]}.bias", f"{name}/bias") for name in QUERY_KEY_VALUE]
    if options["qk_norm"]:
        found += [same(f"{n[0]}_norm.weight", f"{n}_norm/scale") for n in ("query", "key")]
    return found


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
    ratio = keys.number("hidden_ratio", RATIO.get(family, 4))
    own = OWN[family]
    mixer, options = own.name, own.read(keys, width, eps)
    short = keys.flag("use_short_conv", bool(own.short))
    taps = keys.integer("conv_size", 4)
    if own.short is not None:
        options["conv_width"] = taps if short else 0
    elif short:
        raise ValueError(f"{keys.where}: use_short_conv must be false for {family}; got true")
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


def _hybrid(
    keys: Keys, mixer: str, depth: int, context_length: int
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The mixer of each layer, or one for all; and the options of softmax attention, if some layers
    have it."""
    given = keys.get("attn", None)
    trained = keys.integer("max_position_embeddings", 2048)
    if given is None:
        return (mixer,), {}
    if mixer == "hgrn2":
        raise ValueError(f"{keys.where}: attn must be null: its bounds count all layers there")
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
    own, width = OWN[family], model["width"]
    mixer = own.name
    pattern = model["pattern"]
    names = [pattern[layer % len(pattern)] for layer in range(model["depth"])]
    softmax = sorted(set(names) - {mixer})
    if mixer not in names or len(softmax) > 1 or not set(softmax) <= set(ATTENTION):
        raise ValueError(f"it has {mixer} and at most one kind of softmax attention")
    if model["mlp_bias"]:
        raise ValueError("it has no biases in its MLP")
    if softmax and mixer == "hgrn2":
        raise ValueError("its bounds count all layers there, so that all have one mixer")
    options = model["mixers"][mixer]
    keys: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": model["depth"],
        "intermediate_size": model["mlp_width"],
        "hidden_act": "swish",
        "norm_eps": model["norm_eps"],
        "use_short_conv": bool(options.get("conv_width")),
        "fuse_norm": True,
        "attn": None,
        **own.write(options, width, model["norm_eps"]),
    }
    if options.get("conv_width"):
        keys["conv_size"] = options["conv_width"]
    if softmax:
        places = [layer for layer, name in enumerate(names) if name == softmax[0]]
        keys["attn"] = {"layers": places, **_attention(model["mixers"][softmax[0]])}
        keys["max_position_embeddings"] = model["mixers"][softmax[0]].get("context_length", 2048)
    return keys


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
