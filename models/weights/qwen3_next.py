"""Qwen3-Next: gated delta rules and gated softmax attention, dense or with experts.

What a key head of a delta rule has stands together in its public tensors: its query, its key, the
values and gates of its value heads. Scales of norms are 1 + w, but for those of the heads of the
delta rule."""

from collections.abc import Mapping
from typing import Any

from models.weights import llama
from models.weights.keys import Keys
from models.weights.llama import BLOCK, EMBEDDING, HEAD, ignored, network_entries
from models.weights.table import Entry, Part, head_columns

__all__ = ["EMBEDDING", "HEAD", "ignored", "network_entries"]

FAMILY = "qwen3_next"
CLASSES = {FAMILY: "Qwen3NextForCausalLM"}
MIXERS = {"gated_delta_net", "transformer"}
MLPS = ("swiglu", "experts")
OPTIONS = {"dense_layers"}
NORMS = ("rms_zero",)
TIED = {FAMILY: False}
# They enter exponentials, and are float32 whatever the other tensors are.
FLOAT32 = (".A_log", ".dt_bias")
KINDS = {"linear_attention": "gated_delta_net", "full_attention": "transformer"}
LINEAR = f"{BLOCK}.linear_attn"


def layer_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer with this mixer."""
    norms = [
        Entry(f"{BLOCK}.input_layernorm.weight", ("mixer_norm/scale",)),
        Entry(f"{BLOCK}.post_attention_layernorm.weight", ("mlp_norm/scale",)),
    ]
    options, width = model["mixers"][mixer], model["width"]
    own = _attention(options, width) if mixer == "transformer" else _delta_rule(options, width)
    mlp = llama.mlp_entries(model)
    if model["mlp"] == "experts" and model["shared_width"]:
        mlp += [
            Entry(f"{BLOCK}.mlp.shared_expert.{name}_proj.weight", (path,), "linear")
            for name in ("gate", "up", "down")
            for path in (f"mlp/shared/{name}/kernel",)
        ]
        gate = Entry(
            f"{BLOCK}.mlp.shared_expert_gate.weight", ("mlp/shared_gate/kernel",), "linear"
        )
        mlp.append(gate)
    return [*norms, *own, *mlp]


def _attention(options: Mapping[str, Any], width: int) -> list[Entry]:
    size = options["size_per_head"] or width // options["heads"]
    queries = tuple(
        head_columns(f"mixer/{name}/kernel", head, size)
        for head in range(options["heads"])
        for name in ("query", "output_gate")
    )
    where = f"{BLOCK}.self_attn"
    return [
        Entry(f"{where}.q_proj.weight", queries, "linear"),
        Entry(f"{where}.k_proj.weight", ("mixer/key/kernel",), "linear"),
        Entry(f"{where}.v_proj.weight", ("mixer/value/kernel",), "linear"),
        Entry(f"{where}.o_proj.weight", ("mixer/output/kernel",), "linear"),
        Entry(f"{where}.q_norm.weight", ("mixer/query_norm/scale",)),
        Entry(f"{where}.k_norm.weight", ("mixer/key_norm/scale",)),
    ]


def _delta_rule(options: Mapping[str, Any], width: int) -> list[Entry]:
    heads, value_heads, key_size, value_size = _sizes(options, width)
    ratio = value_heads // heads
    sizes = {
        "query": key_size,
        "key": key_size,
        "value": ratio * value_size,
        "output_gate": ratio * value_size,
    }

    def by_head(sizes: Mapping[str, int]) -> tuple[Part, ...]:
        return tuple(
            head_columns(f"mixer/{name}/kernel", head, size)
            for head in range(heads)
            for name, size in sizes.items()
        )

    convolutions = tuple(f"mixer/conv_{letter}/weight_WD" for letter in "qkv")
    return [
        Entry(f"{LINEAR}.in_proj_qkvz.weight", by_head(sizes), "linear"),
        Entry(f"{LINEAR}.in_proj_ba.weight", by_head({"beta": ratio, "dt": ratio}), "linear"),
        Entry(f"{LINEAR}.conv1d.weight", convolutions, "convolution"),
        Entry(f"{LINEAR}.A_log", ("mixer/a_log_H",)),
        Entry(f"{LINEAR}.dt_bias", ("mixer/dt_bias_H",)),
        Entry(f"{LINEAR}.norm.weight", ("mixer/norm/scale",)),
        Entry(f"{LINEAR}.out_proj.weight", ("mixer/output/kernel",), "linear"),
    ]


def _sizes(options: Mapping[str, Any], width: int) -> tuple[int, int, int, int]:
    """Key heads, value heads, and the channels of each."""
    heads = options["heads"]
    value_heads = options["value_heads"] or heads
    key_size = round(options["expand_k"] * width) // heads
    return heads, value_heads, key_size, round(options["expand_v"] * width) // value_heads


def read(keys: Keys, context_length: int) -> dict[str, Any]:
    """The section `model` of a config; context_length 0 takes that of config.json.

    Raises ValueError for keys that are missing or ask for what the layers are not."""
    keys.get("model_type")
    width, depth = keys.integer("hidden_size"), keys.integer("num_hidden_layers")
    trained = keys.integer("max_position_embeddings", 32768)
    eps = keys.number("rms_norm_eps", 1e-6)
    keys.must("hidden_act", "silu", ("silu", "swish"))
    keys.must("attention_bias", False, (False,))
    size = keys.integer("head_dim", 256)
    attention = {
        "context_length": context_length or trained,
        "heads": keys.integer("num_attention_heads", 16),
        "key_value_heads": keys.integer("num_key_value_heads", 2),
        "size_per_head": size,
        **llama.rotation(keys, trained, size, absent_share=0.25),
        "qk_norm": True,
        "zero_centred_norm": True,
        "output_gate": True,
        "norm_eps": eps,
    }
    heads = keys.integer("linear_num_key_heads", 16)
    value_heads = keys.integer("linear_num_value_heads", 32)
    delta_rule = {
        "heads": heads,
        "value_heads": 0 if heads == value_heads else value_heads,
        "expand_k": heads * keys.integer("linear_key_head_dim", 128) / width,
        "expand_v": value_heads * keys.integer("linear_value_head_dim", 128) / width,
        "conv_width": keys.integer("linear_conv_kernel_dim", 4),
        "norm_eps": eps,
    }
    mlp = llama.read_experts(keys, depth, absent=512, per_token=10, inner=512, normalised=True)
    if mlp["mlp"] == "experts":
        mlp["shared_width"] = keys.integer("shared_expert_intermediate_size", 512)
    names = _names(keys, depth)
    options = {"gated_delta_net": delta_rule, "transformer": attention}
    return {
        "width": width,
        "depth": depth,
        "pattern": names,
        "mixers": {name: options[name] for name in sorted(set(names))},
        **mlp,
        "norm": "rms_zero",
        "norm_eps": eps,
    }


def _names(keys: Keys, depth: int) -> tuple[str, ...]:
    every = keys.integer("full_attention_interval", 4)
    last = [
        ("full_attention" if (i + 1) % every == 0 else "linear_attention") for i in range(depth)
    ]
    kinds = keys.get("layer_types", last)
    if not isinstance(kinds, list) or len(kinds) != depth or not set(kinds) <= set(KINDS):
        raise ValueError(
            f"{keys.where}: layer_types must be {depth} of {' and '.join(KINDS)}; got {kinds!r}"
        )
    return tuple(KINDS[kind] for kind in kinds)


def write(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for a model; raises ValueError for one that the family is not."""
    if set(model["pattern"]) != MIXERS:
        raise ValueError(f"{family} has {' and '.join(sorted(MIXERS))}")
    attention, delta_rule = (model["mixers"][name] for name in ("transformer", "gated_delta_net"))
    _must_be(family, attention, model)
    if delta_rule["norm_eps"] != model["norm_eps"] or not delta_rule["conv_width"]:
        raise ValueError(f"{family} has convolutions, and one norm_eps for blocks and heads")
    if tuple(delta_rule["eigenvalue_range"]) != (0, 1):
        raise ValueError(f"{family} has eigenvalue_range (0, 1)")
    width, depth = model["width"], model["depth"]
    heads, value_heads, key_size, value_size = _sizes(delta_rule, width)
    size = attention["size_per_head"] or width // attention["heads"]
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
    pattern = model["pattern"]
    mlp = {"intermediate_size": model["mlp_width"], "num_experts": 0, "decoder_sparse_step": 1}
    mlp["mlp_only_layers"] = list(range(depth))
    if model["mlp"] == "experts":
        if not model["shared_width"]:
            raise ValueError(f"{family} has an expert that all tokens pass")
        mlp = llama.expert_keys(model) | {"shared_expert_intermediate_size": model["shared_width"]}
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "layer_types": [kinds[pattern[i % len(pattern)]] for i in range(depth)],
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention["key_value_heads"] or attention["heads"],
        "head_dim": size,
        "rope_theta": attention["rope_base"],
        "rope_scaling": llama.scaling_keys(attention["rope_scaling"]),
        "partial_rotary_factor": (attention["rotary_size"] or size) / size,
        "max_position_embeddings": attention["context_length"],
        "linear_num_key_heads": heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": key_size,
        "linear_value_head_dim": value_size,
        "linear_conv_kernel_dim": delta_rule["conv_width"],
        "hidden_act": "silu",
        "rms_norm_eps": model["norm_eps"],
        **mlp,
    }


def _must_be(family: str, attention: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    only = dict.fromkeys(("rope", "qk_norm", "zero_centred_norm", "output_gate"), True)
    only |= {"qkv_bias": False, "output_bias": False, "norm_eps": model["norm_eps"]}
    for name, value in only.items():
        if attention[name] != value:
            raise ValueError(f"{family} has attention with {name}={value}; got {attention[name]}")
    if model["mlp_bias"]:
        raise ValueError(f"{family} has no biases in its MLP")
