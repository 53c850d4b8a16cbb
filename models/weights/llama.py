"""Softmax transformers as `transformers` stores them: Llama, Mistral, Qwen2 and Qwen3.

One block for all: RMSNorm, attention with grouped heads and rotation in halves, RMSNorm, SwiGLU.
They differ in biases (Qwen2: on q, k and v; Llama: where it says so), in a norm per head before the
rotation (Qwen3) and in a window (Mistral)."""

import math
from collections.abc import Mapping
from typing import Any

from models.weights.keys import Keys
from models.weights.table import Entry

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
MIXERS = {"transformer", "window_attention"}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# What the classes take for an absent key.
TIED = dict.fromkeys(CLASSES, False)
FLOAT32 = ()
EPS = 1e-6
KEY_VALUE_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # others: as many as heads
HEAD_DIM = {"qwen3": 128}  # others: width / heads
WINDOW = {"mistral": 4096}
CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}

NETWORK = (Entry(EMBEDDING, ("embedding/embedding",)), Entry("model.norm.weight", ("norm/scale",)))
BLOCK = "model.layers.{layer}"
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def ignored(name: str) -> bool:
    """Whether a tensor is a constant that older files hold."""
    return name.endswith("rotary_emb.inv_freq")


def network_entries(model: Mapping[str, Any]) -> list[Entry]:
    head = [] if model["tie_embeddings"] else [Entry(HEAD, ("head_WD",))]
    return [*NETWORK, *head]


def layer_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer with this mixer."""
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
    for ours, theirs in MLP.items():
        found.append(Entry(f"{BLOCK}.mlp.{theirs}.weight", (f"mlp/{ours}/kernel",), "linear"))
        if model["mlp_bias"]:
            found.append(Entry(f"{BLOCK}.mlp.{theirs}.bias", (f"mlp/{ours}/bias",)))
    return found


def read(keys: Keys, context_length: int) -> dict[str, Any]:
    """The section `model` of a config; context_length 0 takes that of config.json.

    Raises ValueError for keys that are missing or ask for what the block is not."""
    family = keys.get("model_type")
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    depth = keys.integer("num_hidden_layers")
    trained = keys.integer("max_position_embeddings", CONTEXT[family])
    keys.must("hidden_act", "silu", ("silu", "swish"))
    keys.must("partial_rotary_factor", 1.0, (1.0, 1))
    keys.must("rope_interleaved", False, (False,))
    eps = keys.number("rms_norm_eps", EPS)
    size = keys.integer("head_dim", HEAD_DIM.get(family, width // heads))
    bias = keys.flag("attention_bias", False) if family in ("llama", "qwen3") else False
    options = {
        "heads": heads,
        "key_value_heads": keys.integer("num_key_value_heads", KEY_VALUE_HEADS.get(family, heads)),
        # What follows from the others is left to the mixer.
        "size_per_head": 0 if size * heads == width else size,
        **_rotation(keys, trained),
        "qk_norm": family == "qwen3",
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
        "mlp": "swiglu",
        "mlp_width": keys.integer("intermediate_size"),
        "mlp_bias": keys.flag("mlp_bias", False) if family == "llama" else False,
        "norm_eps": eps,
    }


def _layers(keys: Keys, family: str, depth: int) -> tuple[int, tuple[str, ...]]:
    """(tokens that a query sees in layers with a window, itself included; the mixer of each
    layer)."""
    full, sliding = "full_attention", "sliding_attention"
    absent = 0 if "sliding_window" in keys.values else WINDOW.get(family, 0)
    window = keys.integer("sliding_window", absent)
    first = keys.get("max_window_layers", 28)
    kinds = keys.get("layer_types", None)
    slides = family == "mistral" or (family != "llama" and keys.flag("use_sliding_window", False))
    if not window or not slides:
        kinds = [full] * depth
    elif kinds is None:
        # The first layers see everything.
        seeing = 0 if family == "mistral" else min(first, depth)
        kinds = [full] * seeing + [sliding] * (depth - seeing)
    known = isinstance(kinds, list) and len(kinds) == depth and set(kinds) <= {full, sliding}
    if not known:
        raise ValueError(
            f"{keys.where}: layer_types must be {depth} of {full} and {sliding}; got {kinds!r}"
        )
    return window, tuple("transformer" if kind == full else "window_attention" for kind in kinds)


def _rotation(keys: Keys, trained: int) -> dict[str, Any]:
    """rope_base and rope_scaling, from either place in which versions of `transformers` write
    them."""
    newer = keys.get("rope_parameters", {})
    given = newer or keys.get("rope_scaling", {})
    if not isinstance(given, dict):
        raise ValueError(f"{keys.where}: rope_scaling must be an object; got {given!r}")
    base = keys.number("rope_theta", 10000.0)
    rope = Keys({"rope_theta": base, **given}, f"{keys.where}: rope_scaling")
    base = float(rope.number("rope_theta"))
    rope.must("partial_rotary_factor", 1.0, (1.0, 1))
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
    return {"rope": True, "rope_base": base, "rope_scaling": scaling}


def write(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for a model; raises ValueError for one that the family is not."""
    options, window, context, names = _attention(model, family)
    heads = options["heads"]
    needs = {
        "biases on q, k and v": ("qkv_bias", family == "qwen2"),
        "a norm of queries and keys": ("qk_norm", family == "qwen3"),
    }
    free = {"qkv_bias"} if family in ("llama", "qwen3") else set()
    for what, (name, has) in needs.items():
        if options[name] != has and name not in free:
            raise ValueError(f"{family} {'always has' if has else 'has no'} {what}")
    if options["output_bias"] != (options["qkv_bias"] and family in ("llama", "qwen3")):
        raise ValueError(f"{family} has biases on all projections or not on the last")
    if model["mlp_bias"] and family != "llama":
        raise ValueError(f"{family} has no biases in its MLP")
    if window and family == "llama":
        raise ValueError("llama has no window")
    if not options["rope"]:
        raise ValueError(f"{family} rotates queries and keys; the model has rope=False")
    if options["qk_norm"] and options["norm_eps"] != model["norm_eps"]:
        raise ValueError(f"{family} has one norm_eps for blocks and heads")
    keys: dict[str, Any] = {
        "hidden_size": model["width"],
        "intermediate_size": model["mlp_width"],
        "num_hidden_layers": model["depth"],
        "num_attention_heads": heads,
        "num_key_value_heads": options["key_value_heads"] or heads,
        "head_dim": options["size_per_head"] or model["width"] // heads,
        "hidden_act": "silu",
        "rms_norm_eps": model["norm_eps"],
        "max_position_embeddings": context,
        "rope_theta": options["rope_base"],
        "rope_scaling": _scaling(options["rope_scaling"]),
    }
    if family in ("llama", "qwen3"):
        keys["attention_bias"] = options["qkv_bias"]
    if family == "llama":
        keys["mlp_bias"] = model["mlp_bias"]
    if family != "llama":
        keys["sliding_window"] = window
    if family in ("qwen2", "qwen3"):
        keys["use_sliding_window"] = window is not None
        # Windows begin after this many layers.
        keys["max_window_layers"] = names.index("window_attention") if window else len(names)
        if len(set(names)) > 1:
            kinds = {"transformer": "full_attention", "window_attention": "sliding_attention"}
            keys["layer_types"] = [kinds[name] for name in names]
    return keys


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
    if len(set(names)) > 1 and family == "mistral":
        raise ValueError("mistral has a window in all layers or in none")
    scaling = rest["rope_scaling"]
    trained = int(scaling[2]) if scaling[:1] == ("dynamic",) else CONTEXT[family]
    return rest, reach.get("window"), reach.get("context_length", trained), names


def _scaling(scaling: tuple[Any, ...]) -> dict[str, Any] | None:
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
