"""OLMo hybrids: gated delta rules with norms before mixer and MLP, and softmax attention with norms
behind them."""

from collections.abc import Mapping
from typing import Any

from models.weights import llama
from models.weights.fla_mixers import CONVOLUTIONS, QUERY_KEY_VALUE
from models.weights.keys import Keys
from models.weights.llama import BLOCK, EMBEDDING, HEAD, PROJECTIONS, ignored, network_entries
from models.weights.table import Entry

__all__ = ["EMBEDDING", "HEAD", "ignored", "network_entries"]

FAMILY = "olmo_hybrid"
CLASSES = {FAMILY: "OlmoHybridForCausalLM"}
MIXERS = {"gated_delta_net", "transformer"}
OPTIONS = {"branch_norm_mixers"}
TIED = {FAMILY: False}
# They enter exponentials, and are float32 whatever the other tensors are.
FLOAT32 = (".A_log", ".dt_bias")
RULE_EPS = 1e-5  # a constant of the class
KINDS = {"linear_attention": "gated_delta_net", "full_attention": "transformer"}
# How it starts.
STARTS = ("linear_a_log_max", "linear_a_log_min", "linear_dt_max", "linear_dt_min")


def layer_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer with this mixer."""
    mlp = llama.mlp_entries(model)
    if mixer == "transformer":
        return _attention(model["mixers"][mixer]) + mlp
    where = f"{BLOCK}.linear_attn"
    maps = {"dt": "a_proj", "beta": "b_proj", "output_gate": "g_proj", "output": "o_proj"}
    return [
        Entry(f"{BLOCK}.attention_layer_norm.weight", ("mixer_norm/scale",)),
        Entry(f"{BLOCK}.feedforward_layer_norm.weight", ("mlp_norm/scale",)),
        *(
            Entry(f"{where}.{theirs}.weight", (f"mixer/{ours}/kernel",), "linear")
            for ours, theirs in {**QUERY_KEY_VALUE, **maps}.items()
        ),
        *(
            Entry(f"{where}.{theirs}.weight", (f"mixer/{ours}/weight_WD",), "convolution")
            for ours, theirs in CONVOLUTIONS.items()
        ),
        Entry(f"{where}.A_log", ("mixer/a_log_H",)),
        Entry(f"{where}.dt_bias", ("mixer/dt_bias_H",)),
        Entry(f"{where}.o_norm.weight", ("mixer/norm/scale",)),
        *mlp,
    ]


def _attention(options: Mapping[str, Any]) -> list[Entry]:
    where = f"{BLOCK}.self_attn"
    found = [
        Entry(f"{BLOCK}.post_attention_layernorm.weight", ("mixer_norm/scale",)),
        Entry(f"{BLOCK}.post_feedforward_layernorm.weight", ("mlp_norm/scale",)),
        Entry(f"{where}.q_norm.weight", ("mixer/query_norm/scale",)),
        Entry(f"{where}.k_norm.weight", ("mixer/key_norm/scale",)),
    ]
    for ours, theirs in PROJECTIONS.items():
        found.append(Entry(f"{where}.{theirs}.weight", (f"mixer/{ours}/kernel",), "linear"))
        if options["qkv_bias"]:
            found.append(Entry(f"{where}.{theirs}.bias", (f"mixer/{ours}/bias",)))
    return found


def read(keys: Keys, context_length: int) -> dict[str, Any]:
    """The section `model` of a config; context_length 0 takes that of config.json.

    Raises ValueError for keys that are missing or ask for what the layers are not."""
    keys.get("model_type")
    width, depth = keys.integer("hidden_size"), keys.integer("num_hidden_layers")
    trained = keys.integer("max_position_embeddings", 65536)
    eps = keys.number("rms_norm_eps", 1e-6)
    keys.must("hidden_act", "silu", ("silu", "swish"))
    keys.ignore(*STARTS, "linear_dt_init_floor")
    heads = keys.integer("num_attention_heads", 30)
    bias = keys.flag("attention_bias", False)
    attention = {
        "context_length": context_length or trained,
        "heads": heads,
        "key_value_heads": keys.integer("num_key_value_heads", heads),
        **_rotation(keys, trained),
        "qk_norm": True,
        "whole_norm": True,
        "norm_eps": eps,
        "qkv_bias": bias,
        "output_bias": bias,
    }
    key_heads = keys.integer("linear_num_key_heads", heads)
    value_heads = keys.integer("linear_num_value_heads", heads)
    key_size = keys.integer("linear_key_head_dim", int(0.75 * width / key_heads))
    value_size = keys.integer("linear_value_head_dim", 2 * key_size)
    negative = keys.flag("linear_allow_neg_eigval", True)
    delta_rule = {
        "heads": key_heads,
        "value_heads": 0 if key_heads == value_heads else value_heads,
        "expand_k": key_heads * key_size / width,
        "expand_v": value_heads * value_size / width,
        "conv_width": keys.integer("linear_conv_kernel_dim", 4),
        "eigenvalue_range": (-1, 1) if negative else (0, 1),
        "norm_eps": RULE_EPS,
    }
    fourth = [("linear_attention", "full_attention")[i % 4 == 3] for i in range(depth)]
    kinds = keys.get("layer_types", fourth)
    if not isinstance(kinds, list) or len(kinds) != depth or set(kinds) != set(KINDS):
        raise ValueError(
            f"{keys.where}: layer_types must be {depth} of {' and '.join(KINDS)}; got {kinds!r}"
        )
    return {
        "width": width,
        "depth": depth,
        "pattern": tuple(KINDS[kind] for kind in kinds),
        "mixers": {"gated_delta_net": delta_rule, "transformer": attention},
        "mlp": "swiglu",
        "mlp_width": keys.integer("intermediate_size"),
        "branch_norm_mixers": ("transformer",),
        "norm_eps": eps,
    }


def _rotation(keys: Keys, trained: int) -> dict[str, Any]:
    """Without a base of angles nothing turns."""
    if (keys.values.get("rope_parameters") or keys.values).get("rope_theta") is None:
        keys.ignore("rope_parameters", "rope_theta", "rope_scaling")
        return {"rope": False}
    return llama.rotation(keys, trained)


def write(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for a model; raises ValueError for one that the family is not."""
    pattern, depth, width = model["pattern"], model["depth"], model["width"]
    if set(pattern) != MIXERS:
        raise ValueError(f"{family} has {' and '.join(sorted(MIXERS))}")
    if tuple(model["branch_norm_mixers"]) != ("transformer",) or model["mlp_bias"]:
        raise ValueError(f"{family} has branch_norm_mixers=('transformer',) and mlp_bias=False")
    attention, rule = (model["mixers"][name] for name in ("transformer", "gated_delta_net"))
    only = {"qk_norm": True, "whole_norm": True, "norm_eps": model["norm_eps"]}
    only |= {"output_bias": attention["qkv_bias"], "size_per_head": 0, "rotary_size": 0}
    only |= {"output_gate": False, "zero_centred_norm": False}
    for name, value in only.items():
        if attention[name] != value:
            raise ValueError(f"{family} has attention with {name}={value}; got {attention[name]}")
    if rule["norm_eps"] != RULE_EPS or not rule["conv_width"]:
        raise ValueError(f"{family} has delta rules with convolutions and norm_eps={RULE_EPS}")
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
    heads, value_heads = rule["heads"], rule["value_heads"] or rule["heads"]
    turning: dict[str, Any] = {"rope_parameters": None}
    if attention["rope"]:
        turning = {"rope_theta": attention["rope_base"]}
        turning["rope_scaling"] = llama.scaling_keys(attention["rope_scaling"])
    return {
        "hidden_size": width,
        "intermediate_size": model["mlp_width"],
        "num_hidden_layers": depth,
        "layer_types": [kinds[pattern[i % len(pattern)]] for i in range(depth)],
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention["key_value_heads"] or attention["heads"],
        "attention_bias": attention["qkv_bias"],
        "max_position_embeddings": attention["context_length"],
        **turning,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": round(rule["expand_k"] * width) // heads,
        "linear_value_head_dim": round(rule["expand_v"] * width) // value_heads,
        "linear_conv_kernel_dim": rule["conv_width"],
        "linear_allow_neg_eigval": tuple(rule["eigenvalue_range"]) == (-1, 1),
        "hidden_act": "silu",
        "rms_norm_eps": model["norm_eps"],
    }
