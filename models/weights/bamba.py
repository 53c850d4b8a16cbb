"""Bamba: Mamba-2, softmax attention with half-turned heads in some layers, and an MLP in each."""

from collections.abc import Mapping
from typing import Any

from models.weights import llama, mamba
from models.weights.keys import Keys
from models.weights.llama import BLOCK, EMBEDDING, HEAD, MLP, PROJECTIONS, ignored
from models.weights.table import Entry

__all__ = ["EMBEDDING", "HEAD", "ignored"]

FAMILY = "bamba"
CLASSES = {FAMILY: "BambaForCausalLM"}
MIXERS = {"mamba2", "transformer"}
TIED = {FAMILY: False}
FLOAT32 = mamba.FLOAT32
SHARE = 0.5  # of a head that turns, where the key is absent


def network_entries(model: Mapping[str, Any]) -> list[Entry]:
    head = [] if model["tie_embeddings"] else [Entry(HEAD, ("head_WD",))]
    norm = Entry("model.final_layernorm.weight", ("norm/scale",))
    return [Entry(EMBEDDING, ("embedding/embedding",)), norm, *head]


def layer_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer with this mixer."""
    options = model["mixers"][mixer]
    found = [
        Entry(f"{BLOCK}.input_layernorm.weight", ("mixer_norm/scale",)),
        Entry(f"{BLOCK}.pre_ff_layernorm.weight", ("mlp_norm/scale",)),
    ]
    for ours, theirs in MLP.items():
        where = f"{BLOCK}.feed_forward.{theirs}"
        found.append(Entry(f"{where}.weight", (f"mlp/{ours}/kernel",), "linear"))
        if model.get("mlp_bias"):
            found.append(Entry(f"{where}.bias", (f"mlp/{ours}/bias",)))
    if mixer == "mamba2":
        return found + mamba.mixer_entries(mixer, options, f"{BLOCK}.mamba")
    for ours, theirs in PROJECTIONS.items():
        where = f"{BLOCK}.self_attn.{theirs}"
        found.append(Entry(f"{where}.weight", (f"mixer/{ours}/kernel",), "linear"))
        if options["qkv_bias"]:
            found.append(Entry(f"{where}.bias", (f"mixer/{ours}/bias",)))
    return found


def read(keys: Keys, context_length: int) -> dict[str, Any]:
    """The section `model` of a config; context_length 0 takes that of config.json.

    Raises ValueError for keys that are missing or ask for what the layers are not."""
    keys.get("model_type")
    width, depth = keys.integer("hidden_size"), keys.integer("num_hidden_layers")
    trained = keys.integer("max_position_embeddings", 262144)
    eps = keys.number("rms_norm_eps", 1e-5)
    keys.must("hidden_act", "silu", ("silu", "swish"))
    mamba.check_time_steps(keys)
    # How it is computed, and a loss of training.
    keys.ignore("mamba_chunk_size", "num_logits_to_keep", "z_loss_coefficient")
    heads = keys.integer("num_attention_heads", 32)
    bias = keys.flag("attention_bias", False)
    attention = {
        "context_length": context_length or trained,
        "heads": heads,
        "key_value_heads": keys.integer("num_key_value_heads", 8),
        **llama.rotation(keys, trained, width // heads, absent_share=SHARE),
        "qkv_bias": bias,
        "output_bias": bias,
    }
    inner = keys.integer("mamba_expand", 2) * width
    state_heads = keys.integer("mamba_n_heads", 128)
    size = keys.get("mamba_d_head", "auto")
    if size != "auto" and size * state_heads != inner:
        raise ValueError(
            f"{keys.where}: mamba_n_heads * mamba_d_head must be mamba_expand * hidden_size ="
            f" {inner}; got {state_heads} * {size}"
        )
    groups = keys.integer("mamba_n_groups", 1)
    recurrence = {
        "expand": inner / width,
        "heads": state_heads,
        "groups": groups,
        "norm_groups": groups,
        "state_size": keys.integer("mamba_d_state", 256),
        "conv_width": keys.integer("mamba_d_conv", 4),
        "norm_eps": eps,
        "bias": keys.flag("mamba_proj_bias", False),
        "conv_bias": keys.flag("mamba_conv_bias", True),
    }
    softmax = keys.get("attn_layer_indices", [])
    if not isinstance(softmax, list) or not set(softmax) <= set(range(depth)):
        raise ValueError(
            f"{keys.where}: attn_layer_indices must be indices below {depth}; got {softmax!r}"
        )
    names = tuple("transformer" if i in softmax else "mamba2" for i in range(depth))
    options = {"mamba2": recurrence, "transformer": attention}
    return {
        "width": width,
        "depth": depth,
        "pattern": names,
        "mixers": {name: options[name] for name in sorted(set(names))},
        "mlp": "swiglu",
        "mlp_width": keys.integer("intermediate_size"),
        "mlp_bias": keys.flag("mlp_bias", False),
        "norm_eps": eps,
    }


def write(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for a model; raises ValueError for one that the family is not."""
    pattern, depth, width = model["pattern"], model["depth"], model["width"]
    names = [pattern[i % len(pattern)] for i in range(depth)]
    if set(names) != MIXERS:
        raise ValueError(f"{family} has {' and '.join(sorted(MIXERS))}")
    attention, recurrence = model["mixers"]["transformer"], model["mixers"]["mamba2"]
    heads, state_heads = attention["heads"], recurrence["heads"]
    inner = round(recurrence["expand"] * width)
    only = {
        "rope": True,
        "qk_norm": False,
        "output_gate": False,
        "output_bias": attention["qkv_bias"],
        "size_per_head": 0,
    }
    for name, value in only.items():
        if attention[name] != value:
            raise ValueError(f"{family} has attention with {name}={value}; got {attention[name]}")
    own = {"norm": "after_gate", "norm_eps": model["norm_eps"], "norm_groups": recurrence["groups"]}
    for name, value in own.items():
        if recurrence[name] != value:
            raise ValueError(f"{family} has mamba2 with {name}={value}; got {recurrence[name]}")
    if inner % width or not state_heads or not recurrence["conv_width"]:
        raise ValueError(f"{family} has a convolution, whole multiples of width, and a given heads")
    size = width // heads
    return {
        "hidden_size": width,
        "intermediate_size": model["mlp_width"],
        "num_hidden_layers": depth,
        "attn_layer_indices": [i for i, name in enumerate(names) if name == "transformer"],
        "num_attention_heads": heads,
        "num_key_value_heads": attention["key_value_heads"] or heads,
        "attention_bias": attention["qkv_bias"],
        "mlp_bias": model["mlp_bias"],
        "max_position_embeddings": attention["context_length"],
        "rope_theta": attention["rope_base"],
        "rope_scaling": llama.scaling_keys(attention["rope_scaling"]),
        "partial_rotary_factor": (attention["rotary_size"] or size) / size,
        "mamba_expand": inner // width,
        "mamba_n_heads": state_heads,
        "mamba_d_head": inner // state_heads,
        "mamba_n_groups": recurrence["groups"],
        "mamba_d_state": recurrence["state_size"],
        "mamba_d_conv": recurrence["conv_width"],
        "mamba_proj_bias": recurrence["bias"],
        "mamba_conv_bias": recurrence["conv_bias"],
        "hidden_act": "silu",
        "rms_norm_eps": model["norm_eps"],
    }
