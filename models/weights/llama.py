"""Softmax transformers as `transformers` stores them: Llama, Mistral, Mixtral, Qwen2, Qwen3 and its
mixture of experts.

One block for all: RMSNorm, attention with grouped heads and rotation in halves, RMSNorm, SwiGLU.
They differ in biases (Qwen2: on q, k and v; Llama: where it says so), in a norm per head before the
rotation (Qwen3) and in a window (Mistral)."""

import math
from collections.abc import Mapping
from typing import Any

from models.weights.keys import Keys
from models.weights.table import Entry, Part

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
MLPS = ("swiglu", "experts")
OPTIONS = {"dense_layers"}
MIXERS = {"transformer", "window_attention"}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# What the classes take for an absent key.
TIED = dict.fromkeys(CLASSES, False)
FLOAT32 = ()
EPS = {"mixtral": 1e-5}  # others: 1e-6
KEY_VALUE_HEADS = {
    "mistral": 8,
    "qwen2": 32,
    "qwen3": 32,
    "qwen3_moe": 4,
    "mixtral": 8,
}  # others: as many as heads
HEAD_DIM = {"qwen3": 128}  # others: width / heads
WINDOW = {"mistral": 4096}
CONTEXT = {
    "llama": 2048,
    "mistral": 131072,
    "mixtral": 131072,
    "qwen2": 32768,
    "qwen3": 32768,
    "qwen3_moe": 32768,
}
QWEN3 = ("qwen3", "qwen3_moe")

NETWORK = (Entry(EMBEDDING, ("embedding/embedding",)), Entry("model.norm.weight", ("norm/scale",)))
BLOCK = "model.layers.{layer}"
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
# Maps of an MLP, and of the experts of Mixtral.
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def ignored(name: str) -> bool:
    """Whether a tensor is a constant that older files hold."""
    return name.endswith("rotary_emb.inv_freq")


def network_entries(model: Mapping[str, Any]) -> list[Entry]:
    head = [] if model["tie_embeddings"] else [Entry(HEAD, ("head_WD",))]
    return [*NETWORK, *head]


def layer_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer with this mixer."""
    return attention_entries(mixer, model) + mlp_entries(model)


def attention_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer beside those of its MLP."""
    options = model["mixers"][mixer]
    found = [
        Entry(f"{BLOCK}.input_layernorm.weight", ("mixer_norm/scale",)),
        Entry(f"{BLOCK}.post_attention_layernorm.weight", ("mlp_norm/scale",)),
    ]
    for ours, theirs in PROJECTIONS.items():
        found.append(
            Entry(f"{BLOCK}.self_attn.{theirs}.weight", (f"mixer/{ours}/kernel",), "linear")
        )
        if options["output_bias" if ours == "output" else "qkv_bias"]:
            found.append(Entry(f"{BLOCK}.self_attn.{theirs}.bias", (f"mixer/{ours}/bias",)))
    if options["qk_norm"]:
        found += [
            Entry(f"{BLOCK}.self_attn.{name[0]}_norm.weight", (f"mixer/{name}_norm/scale",))
            for name in ("query", "key")
        ]
    return found


def mlp_entries(model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of an MLP or of experts."""
    if model["mlp"] == "experts":
        return expert_entries(model, f"{BLOCK}.mlp", MLP)
    found = []
    for ours, theirs in MLP.items():
        found.append(Entry(f"{BLOCK}.mlp.{theirs}.weight", (f"mlp/{ours}/kernel",), "linear"))
        if model.get("mlp_bias"):
            found.append(Entry(f"{BLOCK}.mlp.{theirs}.bias", (f"mlp/{ours}/bias",)))
    return found


def expert_entries(model: Mapping[str, Any], where: str, names: Mapping[str, str]) -> list[Entry]:
    """The tensors of experts, whose three maps have these `names`, and of their router."""
    stacks = {"gate": "gate_EDM", "up": "up_EDM", "down": "down_EMD"}
    return [
        Entry(f"{where}.gate.weight", ("mlp/router/logits/kernel",), "linear"),
        *(
            Entry(
                f"{where}.experts.{expert}.{names[ours]}.weight",
                (Part(f"mlp/{stack}", (expert,)),),
                "linear",
            )
            for expert in range(model["experts"])
            for ours, stack in stacks.items()
        ),
    ]


def read(keys: Keys, context_length: int) -> dict[str, Any]:
    """The section `model` of a config; context_length 0 takes that of config.json.

    Raises ValueError for keys that are missing or ask for what the block is not."""
    family = keys.get("model_type")
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    depth = keys.integer("num_hidden_layers")
    trained = keys.integer("max_position_embeddings", CONTEXT[family])
    keys.must("hidden_act", "silu", ("silu", "swish"))
    keys.must("rope_interleaved", False, (False,))
    eps = keys.number("rms_norm_eps", EPS.get(family, 1e-6))
    size = keys.integer("head_dim", HEAD_DIM.get(family, width // heads))
    bias = keys.flag("attention_bias", False) if family in ("llama", *QWEN3) else False
    options = {
        "heads": heads,
        "key_value_heads": keys.integer("num_key_value_heads", KEY_VALUE_HEADS.get(family, heads)),
        # What follows from the others is left to the mixer.
        "size_per_head": 0 if size * heads == width else size,
        **rotation(keys, trained),
        "qk_norm": family in QWEN3,
        "norm_eps": eps,
        "qkv_bias": bias or family == "qwen2",
        "output_bias": bias,
    }
    window, names = _layers(keys, family, depth)
    mixers = {
        "transformer": {"context_length": context_length or trained, **options},
        "window_attention": {"window": window, **options},
    }
    if options["rope_scaling"][:1] == ("dynamic",) and context_length > trained:
        raise ValueError(
            f"--context_length must be at most max_position_embeddings={trained} for a dynamic"
            f" rope_scaling, whose angles would change with the text; got {context_length}"
        )
    return {
        "width": width,
        "depth": depth,
        "pattern": names if len(set(names)) > 1 else names[:1],
        "mixers": {name: mixers[name] for name in sorted(set(names))},
        **_read_mlp(keys, family, depth),
        "norm_eps": eps,
    }


def _read_mlp(keys: Keys, family: str, depth: int) -> dict[str, Any]:
    if family == "qwen3_moe":
        return read_experts(keys, depth, absent=128, per_token=8, inner=768, normalised=False)
    if family == "mixtral":
        keys.must("router_jitter_noise", 0.0, (0.0, 0))
        return {
            "mlp": "experts",
            "mlp_width": keys.integer("intermediate_size"),
            "experts": keys.integer("num_local_experts", 8),
            "experts_per_token": keys.integer("num_experts_per_tok", 2),
            "balance_weight": balance_weight(keys),
        }
    return {
        "mlp": "swiglu",
        "mlp_width": keys.integer("intermediate_size"),
        "mlp_bias": keys.flag("mlp_bias", False) if family == "llama" else False,
    }


def balance_weight(keys: Keys) -> float:
    """Of the load-balancing loss, in training."""
    keys.ignore("output_router_logits")
    return float(keys.get("router_aux_loss_coef", 0.001))


def read_experts(
    keys: Keys, depth: int, *, absent: int, per_token: int, inner: int, normalised: bool
) -> dict[str, Any]:
    """The MLP of a Qwen model with experts in some layers; the numbers are what absent keys stand
    for."""
    dense = keys.get("mlp_only_layers", [])
    step = keys.integer("decoder_sparse_step", 1)
    # Newer versions of the library have another name for it.
    count = int(keys.get("num_experts", keys.get("num_local_experts", absent)))
    with_experts = {i for i in range(depth) if count and (i + 1) % step == 0} - set(dense)
    balance = balance_weight(keys)
    wide = keys.get("intermediate_size", None)
    names = "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"
    if not with_experts:
        keys.ignore(*names, "shared_expert_intermediate_size")
        return {"mlp": "swiglu", "mlp_width": wide}
    without = tuple(sorted(set(range(depth)) - with_experts))
    apart = {"dense_layers": without, "dense_width": int(wide or 0)} if without else {}
    renormalised = keys.flag("norm_topk_prob", normalised)
    return {
        "mlp": "experts",
        "mlp_width": keys.integer("moe_intermediate_size", inner),
        "experts": count,
        "experts_per_token": keys.integer("num_experts_per_tok", per_token),
        "expert_weights": "normalised" if renormalised else "softmax",
        "balance_weight": balance,
        **apart,
    }


def _layers(keys: Keys, family: str, depth: int) -> tuple[int, tuple[str, ...]]:
    """(tokens that a query sees in layers with a window, itself included; the mixer of each
    layer)."""
    full, sliding = "full_attention", "sliding_attention"
    absent = 0 if "sliding_window" in keys.values else WINDOW.get(family, 0)
    window = keys.integer("sliding_window", absent)
    first = keys.get("max_window_layers", 28)
    kinds = keys.get("layer_types", None)
    slides = family in ("mistral", "mixtral") or (
        family != "llama" and keys.flag("use_sliding_window", False)
    )
    if not window or not slides:
        kinds = [full] * depth
    elif kinds is None:
        # The first layers see everything.
        seeing = 0 if family in ("mistral", "mixtral") else min(first, depth)
        kinds = [full] * seeing + [sliding] * (depth - seeing)
    known = isinstance(kinds, list) and len(kinds) == depth and set(kinds) <= {full, sliding}
    if not known:
        raise ValueError(
            f"{keys.where}: layer_types must be {depth} of {full} and {sliding}; got {kinds!r}"
        )
    return window, tuple("transformer" if kind == full else "window_attention" for kind in kinds)


def rotation(keys: Keys, trained: int, size: int = 0, absent_share: float = 1.0) -> dict[str, Any]:
    """rope_base, rope_scaling and, for heads of `size` channels that may turn in part, rotary_size,
    from either place in which versions of `transformers` write them."""
    newer = keys.get("rope_parameters", {})
    given = newer or keys.get("rope_scaling", {})
    if not isinstance(given, dict):
        raise ValueError(f"{keys.where}: rope_scaling must be an object; got {given!r}")
    base = keys.number("rope_theta", 10000.0)
    rope = Keys({"rope_theta": base, **given}, f"{keys.where}: rope_scaling")
    base = float(rope.number("rope_theta"))
    # Older files have it beside.
    share = rope.number("partial_rotary_factor", keys.number("partial_rotary_factor", absent_share))
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling: tuple[Any, ...] = ()
    if kind == "linear":
        scaling = (kind, float(rope.number("factor")))
    elif kind == "dynamic":
        scaling = (kind, float(rope.number("factor")), float(trained))
        rope.ignore("original_max_position_embeddings")
    elif kind == "llama3":
        names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
        scaling = (kind, *(float(rope.number(name)) for name in names))
    elif kind == "yarn":
        factor = float(rope.number("factor"))
        rope.must("truncate", True, (True,))
        for name in ("mscale", "mscale_all_dim"):
            rope.must(name, 0, (0,))
        scaling = (
            kind,
            factor,
            float(rope.number("beta_fast", 32)),
            float(rope.number("beta_slow", 1)),
            float(rope.number("original_max_position_embeddings", trained)),
            float(rope.number("attention_factor", 1.0 + 0.1 * math.log(max(factor, 1.0)))),
        )
    elif kind != "default":
        raise ValueError(
            f"{keys.where}: rope_type must be default, linear, dynamic, llama3 or yarn; got"
            f" {kind!r}"
        )
    if rope.left and kind != "default":
        raise ValueError(f"{rope.where} has keys that are not known: {', '.join(rope.left)}")
    found = {"rope": True, "rope_base": base, "rope_scaling": scaling}
    if not size and share != 1:
        raise ValueError(f"{keys.where}: partial_rotary_factor must be 1; got {share}")
    return found | ({"rotary_size": int(size * share)} if share != 1 else {})


def write(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for a model; raises ValueError for one that the family is not."""
    options, window, context, names = _attention(model, family)
    heads = options["heads"]
    needs = {
        "biases on q, k and v": ("qkv_bias", family == "qwen2"),
        "a norm of queries and keys": ("qk_norm", family in QWEN3),
    }
    free = {"qkv_bias"} if family in ("llama", *QWEN3) else set()
    for what, (name, has) in needs.items():
        if options[name] != has and name not in free:
            raise ValueError(f"{family} {'always has' if has else 'has no'} {what}")
    if options["output_bias"] != (options["qkv_bias"] and family in ("llama", *QWEN3)):
        raise ValueError(f"{family} has biases on all projections or not on the last")
    if model["mlp_bias"] and family != "llama":
        raise ValueError(f"{family} has no biases in its MLP")
    if window and family == "llama":
        raise ValueError("llama has no window")
    if not options["rope"]:
        raise ValueError(f"{family} rotates queries and keys; the model has rope=False")
    for name in ("rotary_size", "output_gate", "zero_centred_norm"):
        if options[name]:
            raise ValueError(f"{family} has no {name}")
    if options["qk_norm"] and options["norm_eps"] != model["norm_eps"]:
        raise ValueError(f"{family} has one norm_eps for blocks and heads")
    keys: dict[str, Any] = {
        "hidden_size": model["width"],
        **_mlp_keys(family, model),
        "num_hidden_layers": model["depth"],
        "num_attention_heads": heads,
        "num_key_value_heads": options["key_value_heads"] or heads,
        "head_dim": options["size_per_head"] or model["width"] // heads,
        "hidden_act": "silu",
        "rms_norm_eps": model["norm_eps"],
        "max_position_embeddings": context,
        "rope_theta": options["rope_base"],
        "rope_scaling": scaling_keys(options["rope_scaling"]),
    }
    if family in ("llama", *QWEN3):
        keys["attention_bias"] = options["qkv_bias"]
    if family == "llama":
        keys["mlp_bias"] = model["mlp_bias"]
    if family != "llama":
        keys["sliding_window"] = window
    if family in ("qwen2", *QWEN3):
        keys["use_sliding_window"] = window is not None
        # Windows begin after this many layers.
        keys["max_window_layers"] = names.index("window_attention") if window else len(names)
        if len(set(names)) > 1:
            kinds = {"transformer": "full_attention", "window_attention": "sliding_attention"}
            keys["layer_types"] = [kinds[name] for name in names]
    return keys


def _mlp_keys(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
    width = {"intermediate_size": model["mlp_width"]}
    if (model["mlp"] == "experts") != (family in ("qwen3_moe", "mixtral")):
        raise ValueError(
            f"{family} {'always has' if model['mlp'] == 'swiglu' else 'has no'} experts"
        )
    if model["mlp"] == "swiglu":
        return width
    if model["shared_width"]:
        raise ValueError(f"{family} has no expert that all tokens pass")
    if family == "qwen3_moe":
        return expert_keys(model)
    if model["expert_weights"] != "normalised":
        raise ValueError("mixtral has weights of experts that add up to 1")
    return width | {
        "num_local_experts": model["experts"],
        "num_experts_per_tok": model["experts_per_token"],
        "router_aux_loss_coef": model["balance_weight"],
    }


def expert_keys(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a Qwen model with experts."""
    if model["expert_weights"] not in ("normalised", "softmax"):
        raise ValueError("it has softmax over experts")
    dense = list(model["dense_layers"])
    return {
        **({"intermediate_size": model["dense_width"]} if dense else {}),
        "num_experts": model["experts"],
        "num_experts_per_tok": model["experts_per_token"],
        "moe_intermediate_size": model["mlp_width"],
        "norm_topk_prob": model["expert_weights"] == "normalised",
        "router_aux_loss_coef": model["balance_weight"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


def _attention(
    model: Mapping[str, Any], family: str
) -> tuple[dict[str, Any], int | None, int, list[str]]:
    """(options that all attention layers have, window or None, context_length, mixer of each
    layer); raises ValueError for layers that differ otherwise."""
    pattern = model["pattern"]
    names = [pattern[layer % len(pattern)] for layer in range(model["depth"])]
    reach: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name in sorted(set(names)):
        options = dict(model["mixers"][name])
        reach |= {key: options.pop(key) for key in ("window", "context_length") if key in options}
        if rest and rest != options:
            raise ValueError("its layers with and without a window differ in nothing else")
        rest = options
    if len(set(names)) > 1 and family in ("mistral", "mixtral"):
        raise ValueError(f"{family} has a window in all layers or in none")
    scaling = rest["rope_scaling"]
    trained = int(scaling[2]) if scaling[:1] == ("dynamic",) else CONTEXT[family]
    return rest, reach.get("window"), reach.get("context_length", trained), names


def scaling_keys(scaling: tuple[Any, ...]) -> dict[str, Any] | None:
    """The key rope_scaling."""
    if not scaling:
        return None
    kind, *numbers = scaling
    names = {
        "linear": ("factor",),
        "dynamic": ("factor",),  # its length is max_position_embeddings
        "llama3": (
            *("factor", "low_freq_factor", "high_freq_factor"),
            "original_max_position_embeddings",
        ),
        "yarn": (
            *("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
            "attention_factor",
        ),
    }[kind]
    found = dict(zip(names, numbers, strict=kind != "dynamic"))
    if "original_max_position_embeddings" in found:
        found["original_max_position_embeddings"] = int(found["original_max_position_embeddings"])
    return {"rope_type": kind, **found}
