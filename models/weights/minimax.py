"""MiniMax: lightning attention and softmax attention, experts in each layer, and a stream that goes
on as its norm. What a head of lightning attention has stands together: query, key and value."""

from collections.abc import Mapping
from typing import Any

from models.weights import llama, mixtral
from models.weights.keys import Keys
from models.weights.llama import BLOCK, EMBEDDING, HEAD, network_entries
from models.weights.table import Entry, head_columns

__all__ = ["EMBEDDING", "HEAD", "network_entries"]

FAMILY = "minimax"
CLASSES = {FAMILY: "MiniMaxForCausalLM"}
MIXERS = {"lightning", "transformer"}
MLPS = ("experts",)
OPTIONS = {"normed_residual", "stream_factors"}
TIED = {FAMILY: False}
FLOAT32 = ()
LIGHTNING_EPS = 1e-6  # a constant of the class
KINDS = {"linear_attention": "lightning", "full_attention": "transformer"}
# What follows from heads and layers, which files hold all the same.
CONSTANTS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
# The halves in our names, and the beginnings of the two keys of each.
FACTORS = {"lightning": "linear_attn", "transformer": "full_attn", "mlp": "mlp"}
LIGHTNING = {
    "decay": "minimax",
    "lrpe": "none",
    "gate_rank": 0,
    "norm_eps": LIGHTNING_EPS,
    "value_silu": True,
    "norm_scale": True,
    "sigmoid_gate": True,
}


def ignored(name: str) -> bool:
    """Whether a tensor is a constant."""
    return name.endswith(CONSTANTS) or llama.ignored(name)


def layer_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer with this mixer."""
    experts = llama.expert_entries(model, f"{BLOCK}.block_sparse_moe", mixtral.EXPERT)
    if mixer == "transformer":
        return [*llama.attention_entries(mixer, model), *experts]
    options, where = model["mixers"][mixer], f"{BLOCK}.self_attn"
    heads = options["heads"]
    size = options["size_per_head"] or model["width"] // heads
    together = tuple(
        head_columns(f"mixer/{name}/kernel", head, size)
        for head in range(heads)
        for name in ("query", "key", "value")
    )
    return [
        Entry(f"{BLOCK}.input_layernorm.weight", ("mixer_norm/scale",)),
        Entry(f"{BLOCK}.post_attention_layernorm.weight", ("mlp_norm/scale",)),
        Entry(f"{where}.qkv_proj.weight", together, "linear"),
        Entry(f"{where}.output_gate.weight", ("mixer/gate/kernel",), "linear"),
        Entry(f"{where}.norm.weight", ("mixer/norm/scale",)),
        Entry(f"{where}.out_proj.weight", ("mixer/output/kernel",), "linear"),
        *experts,
    ]


def read(keys: Keys, context_length: int) -> dict[str, Any]:
    """The section `model` of a config; context_length 0 takes that of config.json.

    Raises ValueError for keys that are missing or ask for what the layers are not."""
    keys.get("model_type")
    width, depth = keys.integer("hidden_size"), keys.integer("num_hidden_layers")
    trained = keys.integer("max_position_embeddings", 131072)
    keys.must("hidden_act", "silu", ("silu", "swish"))
    keys.must("sliding_window", None, (None,))
    keys.must("router_jitter_noise", 0.0, (0.0, 0))
    keys.ignore("block_size")
    heads = keys.integer("num_attention_heads", 32)
    size = keys.integer("head_dim", width // heads)
    own = 0 if size * heads == width else size
    rope = {"rope_theta": 1000000.0, **keys.values}
    turning = Keys(rope, keys.where)
    options = {
        "lightning": {"heads": heads, "size_per_head": own, **LIGHTNING},
        "transformer": {
            "context_length": context_length or trained,
            "heads": heads,
            "key_value_heads": keys.integer("num_key_value_heads", 8),
            "size_per_head": own,
            **llama.rotation(turning, trained, size),
        },
    }
    keys.ignore("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
    every_second = [("full_attention", "linear_attention")[i % 2] for i in range(depth)]
    kinds = keys.get("layer_types", every_second)
    if not isinstance(kinds, list) or len(kinds) != depth or not set(kinds) <= set(KINDS):
        raise ValueError(
            f"{keys.where}: layer_types must be {depth} of {' and '.join(KINDS)}; got {kinds!r}"
        )
    names = tuple(KINDS[kind] for kind in kinds)
    return {
        "width": width,
        "depth": depth,
        "pattern": names,
        "mixers": {name: options[name] for name in sorted(set(names))},
        "mlp": "experts",
        "mlp_width": keys.integer("intermediate_size"),
        "experts": keys.integer("num_local_experts", 8),
        "experts_per_token": keys.integer("num_experts_per_tok", 2),
        "balance_weight": llama.balance_weight(keys),
        "normed_residual": True,
        "stream_factors": tuple(
            (ours, *(float(keys.number(f"{theirs}_{n}_factor", 1.0)) for n in ("alpha", "beta")))
            for ours, theirs in FACTORS.items()
        ),
        "norm_eps": keys.number("rms_norm_eps", 1e-5),
    }


def write(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for a model; raises ValueError for one that the family is not."""
    pattern, depth = model["pattern"], model["depth"]
    if set(pattern) != MIXERS:
        raise ValueError(f"{family} has {' and '.join(sorted(MIXERS))}")
    lightning, attention = model["mixers"]["lightning"], model["mixers"]["transformer"]
    for name, value in LIGHTNING.items():
        if lightning[name] != value:
            raise ValueError(f"{family} has lightning with {name}={value}; got {lightning[name]}")
    same = {name: lightning[name] for name in ("heads", "size_per_head")}
    only = {"rope": True} | dict.fromkeys(
        ("qk_norm", "output_gate", "qkv_bias", "output_bias", "zero_centred_norm"), False
    )
    for name, value in (only | same).items():
        if attention[name] != value:
            raise ValueError(f"{family} has attention with {name}={value}; got {attention[name]}")
    if not model["normed_residual"] or model["shared_width"]:
        raise ValueError(f"{family} has normed_residual=True, and no expert that all tokens pass")
    if model["expert_weights"] != "normalised":
        raise ValueError(f"{family} has weights of experts that add up to 1")
    factors = {name: (a, b) for name, a, b in model["stream_factors"]}
    keys: dict[str, Any] = {}
    for ours, theirs in FACTORS.items():
        kept, added = factors.get(ours, (1.0, 1.0))
        keys |= {f"{theirs}_alpha_factor": kept, f"{theirs}_beta_factor": added}
    heads = attention["heads"]
    size = attention["size_per_head"] or model["width"] // heads
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
    if attention["rotary_size"]:
        keys["partial_rotary_factor"] = attention["rotary_size"] / size
    return keys | {
        "hidden_size": model["width"],
        "intermediate_size": model["mlp_width"],
        "num_hidden_layers": depth,
        "layer_types": [kinds[pattern[i % len(pattern)]] for i in range(depth)],
        "num_attention_heads": heads,
        "num_key_value_heads": attention["key_value_heads"] or heads,
        "head_dim": size,
        "max_position_embeddings": attention["context_length"],
        "rope_theta": attention["rope_base"],
        "rope_scaling": llama.scaling_keys(attention["rope_scaling"]),
        "num_local_experts": model["experts"],
        "num_experts_per_tok": model["experts_per_token"],
        "router_aux_loss_coef": model["balance_weight"],
        "hidden_act": "silu",
        "rms_norm_eps": model["norm_eps"],
    }
