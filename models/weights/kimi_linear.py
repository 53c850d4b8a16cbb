"""Kimi Linear: KDA, latent attention without rotation in some layers, and experts from some layer
on."""

from collections.abc import Mapping
from typing import Any

from models.weights import llama
from models.weights.fla_mixers import CONVOLUTIONS, QUERY_KEY_VALUE
from models.weights.keys import Keys
from models.weights.llama import BLOCK, EMBEDDING, HEAD, MLP, ignored, network_entries
from models.weights.table import Entry, Part

__all__ = ["EMBEDDING", "HEAD", "ignored", "network_entries"]

FAMILY = "kimi_linear"
CLASSES = {FAMILY: "KimiLinearForCausalLM"}
MIXERS = {"kda", "latent_attention"}
MLPS = ("swiglu", "experts")
OPTIONS = {"expert_scale", "shared_gate", "dense_layers"}
TIED = {FAMILY: False}
# They enter exponentials, or decide between experts.
FLOAT32 = (".A_log", ".dt_bias", ".e_score_correction_bias")
LATENT_EPS = 1e-6  # a constant of the class
ATTN = f"{BLOCK}.self_attn"
EXPERTS = f"{BLOCK}.block_sparse_moe"
EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}
LOW_RANK = {
    "dt_in": "f_a_proj",
    "dt_out": "f_b_proj",
    "beta": "b_proj",
    "output_gate_in": "g_a_proj",
    "output_gate_out": "g_b_proj",
}


def _linear(theirs: str, *ours: str) -> Entry:
    return Entry(f"{ATTN}.{theirs}.weight", tuple(f"mixer/{o}/kernel" for o in ours), "linear")


def layer_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer with this mixer."""
    found = [
        Entry(f"{BLOCK}.input_layernorm.weight", ("mixer_norm/scale",)),
        Entry(f"{BLOCK}.post_attention_layernorm.weight", ("mlp_norm/scale",)),
        _linear("o_proj", "output"),
    ]
    found += _kda() if mixer == "kda" else _latent(model["mixers"][mixer])
    if model["mlp"] == "swiglu":
        return found + llama.mlp_entries(model)
    found += llama.expert_entries(model, EXPERTS, EXPERT)
    bias = Entry(f"{EXPERTS}.gate.e_score_correction_bias", ("mlp/router/bias_M",))
    if not model["shared_width"]:
        return [*found, bias]
    shared = (
        Entry(f"{EXPERTS}.shared_experts.{theirs}.weight", (f"mlp/shared/{o}/kernel",), "linear")
        for o, theirs in MLP.items()
    )
    return [*found, bias, *shared]


def _kda() -> list[Entry]:
    found = [_linear(theirs, ours) for ours, theirs in {**QUERY_KEY_VALUE, **LOW_RANK}.items()]
    found += [
        Entry(f"{ATTN}.{theirs}.weight", (f"mixer/{ours}/weight_WD",), "convolution")
        for ours, theirs in CONVOLUTIONS.items()
    ]
    return [
        *found,
        Entry(f"{ATTN}.A_log", ("mixer/a_log_H",), "heads"),
        Entry(f"{ATTN}.dt_bias", ("mixer/dt_bias_HK",), "flat"),
        Entry(f"{ATTN}.o_norm.weight", ("mixer/norm/scale",)),
    ]


def _latent(options: Mapping[str, Any]) -> list[Entry]:
    ups = tuple(
        Part(f"mixer/{name}", (slice(None), head))
        for head in range(options["heads"])
        for name in ("key_up_LHK", "value_up_LHV")
    )
    found = [
        _linear("kv_a_proj_with_mqa", "latent", "shared_key"),
        Entry(f"{ATTN}.kv_a_layernorm.weight", ("mixer/latent_norm/scale",)),
        Entry(f"{ATTN}.kv_b_proj.weight", ups, "linear"),
    ]
    if not options["query_latent_size"]:
        return [*found, _linear("q_proj", "query")]
    norm = Entry(f"{ATTN}.q_a_layernorm.weight", ("mixer/query_norm/scale",))
    return [*found, norm, _linear("q_a_proj", "query_in"), _linear("q_b_proj", "query")]


def read(keys: Keys, context_length: int) -> dict[str, Any]:
    """The section `model` of a config; context_length 0 takes that of config.json.

    Raises ValueError for keys that are missing or ask for what the layers are not."""
    keys.get("model_type")
    width, depth = keys.integer("hidden_size"), keys.integer("num_hidden_layers")
    eps = keys.number("rms_norm_eps", 1e-5)
    trained = keys.integer("max_position_embeddings", keys.integer("model_max_length", 1048576))
    keys.must("hidden_act", "silu", ("silu", "swish"))
    keys.must("attention_bias", False, (False,))
    # What follows from other keys; there is no rotation.
    keys.ignore("head_dim", "qk_head_dim", "rope_theta", "rope_scaling", "rope_parameters")
    keys.must("mla_use_nope", True, (True,))
    heads = keys.integer("num_attention_heads", 32)
    keys.must("num_key_value_heads", heads, (heads,))
    query_latent = keys.get("q_lora_rank", 0)
    attention = {
        "context_length": context_length or trained,
        "heads": heads,
        "latent_size": keys.integer("kv_lora_rank", 512),
        "key_size": keys.integer("qk_nope_head_dim", 128),
        "shared_key_size": keys.integer("qk_rope_head_dim", 64),
        "value_size": keys.integer("v_head_dim", 128),
        "query_latent_size": query_latent,
        "rope": False,
        "norm_eps": LATENT_EPS,
    }
    linear = Keys(keys.get("linear_attn_config"), f"{keys.where}: linear_attn_config")
    names = _names(linear, depth)
    kda_heads = linear.integer("num_heads", 32)
    expand = kda_heads * linear.integer("head_dim", 128) / width
    kda = {
        "heads": kda_heads,
        "expand_k": expand,
        "expand_v": expand,
        "conv_width": linear.integer("short_conv_kernel_size", 4),
        "norm_eps": eps,
        "gate_bias": False,
    }
    if linear.left:
        raise ValueError(f"{linear.where} has keys that are not known: {', '.join(linear.left)}")
    options = {"kda": kda, "latent_attention": attention}
    return {
        "width": width,
        "depth": depth,
        "pattern": names,
        "mixers": {name: options[name] for name in sorted(set(names))},
        **_read_mlp(keys, depth),
        "norm_eps": eps,
    }


def _names(linear: Keys, depth: int) -> tuple[str, ...]:
    """The mixer of each layer; the file counts layers from 1."""
    full, kda = linear.get("full_attn_layers"), linear.get("kda_layers")
    lists = isinstance(full, list) and isinstance(kda, list)
    if not lists or sorted([*full, *kda]) != list(range(1, depth + 1)):
        raise ValueError(
            f"{linear.where}: full_attn_layers and kda_layers must be the layers 1 to {depth}, each"
            f" once; got {full!r} and {kda!r}"
        )
    return tuple("latent_attention" if i + 1 in full else "kda" for i in range(depth))


def _read_mlp(keys: Keys, depth: int) -> dict[str, Any]:
    inner = keys.integer("intermediate_size", 9216)
    count, dense = int(keys.get("num_experts", 0)), keys.get("first_k_dense_replace", 0)
    keys.must("moe_layer_freq", 1, (1,))
    for name in ("num_expert_group", "topk_group"):
        keys.must(name, 1, (1,))
    keys.must("moe_router_activation_func", "sigmoid", ("sigmoid",))
    keys.ignore("output_router_logits", "use_grouped_topk", "num_nextn_predict_layers")
    shared = int(keys.get("num_shared_experts", 0))
    per_token = keys.integer("num_experts_per_token", 8)
    width = keys.integer("moe_intermediate_size", 1024)
    renormalised = keys.flag("moe_renormalize", True)
    scale = float(keys.number("routed_scaling_factor", 1.0))
    if not count or dense >= depth:
        return {"mlp": "swiglu", "mlp_width": inner}
    return {
        "mlp": "experts",
        "mlp_width": width,
        "experts": count,
        "experts_per_token": per_token,
        "expert_weights": "sigmoid_normalised" if renormalised else "sigmoid",
        "expert_scale": scale,
        "shared_width": shared * width,
        "shared_gate": False,
        "dense_layers": tuple(range(dense)),
        "dense_width": inner if dense else 0,
    }


def write(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for a model; raises ValueError for one that the family is not."""
    if set(model["pattern"]) != MIXERS:
        raise ValueError(f"{family} has {' and '.join(sorted(MIXERS))}")
    attention, kda = (model["mixers"][name] for name in ("latent_attention", "kda"))
    width, depth, pattern = model["width"], model["depth"], model["pattern"]
    if attention["rope"] or attention["norm_eps"] != LATENT_EPS:
        raise ValueError(f"{family} has latent attention with rope=False and norm_eps={LATENT_EPS}")
    only = {"norm_eps": model["norm_eps"], "gate_bias": False, "expand_v": kda["expand_k"]}
    for name, value in only.items():
        if kda[name] != value:
            raise ValueError(f"{family} has kda with {name}={value}; got {kda[name]}")
    if not kda["conv_width"]:
        raise ValueError(f"{family} has convolutions")
    names = [pattern[i % len(pattern)] for i in range(depth)]
    layers = {
        key: [i + 1 for i, name in enumerate(names) if name == mixer]
        for key, mixer in {"full_attn_layers": "latent_attention", "kda_layers": "kda"}.items()
    }
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention["heads"],
        "q_lora_rank": attention["query_latent_size"] or None,
        "kv_lora_rank": attention["latent_size"],
        "qk_nope_head_dim": attention["key_size"],
        "qk_rope_head_dim": attention["shared_key_size"],
        "v_head_dim": attention["value_size"],
        "mla_use_nope": True,
        "model_max_length": attention["context_length"],
        "linear_attn_config": {
            **layers,
            "num_heads": kda["heads"],
            "head_dim": round(kda["expand_k"] * width) // kda["heads"],
            "short_conv_kernel_size": kda["conv_width"],
        },
        "hidden_act": "silu",
        "rms_norm_eps": model["norm_eps"],
        **_mlp_keys(family, model),
    }


def _mlp_keys(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
    if model["mlp"] == "swiglu":
        return {"intermediate_size": model["mlp_width"], "num_experts": None}
    dense, width = list(model["dense_layers"]), model["mlp_width"]
    if dense != list(range(len(dense))):
        raise ValueError(f"{family} has the layers without experts first; got {dense}")
    if model["shared_gate"] or model["shared_width"] % width:
        raise ValueError(f"{family} has no gate of what all tokens pass, and whole experts there")
    if not model["expert_weights"].startswith("sigmoid"):
        raise ValueError(f"{family} has sigmoids for weights of experts")
    return {
        "intermediate_size": model["dense_width"] or None,
        "moe_intermediate_size": width,
        "num_experts": model["experts"],
        "num_experts_per_token": model["experts_per_token"],
        "num_shared_experts": model["shared_width"] // width,
        "moe_renormalize": model["expert_weights"] == "sigmoid_normalised",
        "routed_scaling_factor": model["expert_scale"],
        "num_expert_group": 1,
        "topk_group": 1,
        "moe_router_activation_func": "sigmoid",
        "first_k_dense_replace": len(dense),
        "moe_layer_freq": 1,
    }
