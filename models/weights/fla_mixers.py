"""The mixers of flash-linear-attention: the tensors of each, and its keys of config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.weights.keys import Keys
from models.weights.table import Entry, Part

ATTN = "model.layers.{layer}.attn"
# Constants of the classes.
GATE_RANK, GATE_TEMPERATURE, HGRN2_EPS, LIGHTNET_EPS = 16, 16.0, 1e-5, 1e-6

Options = Mapping[str, Any]


@dataclass(frozen=True)
class FlaMixer:
    """A mixer of the library.

    name        in models/
    tensors     of a layer with these options
    read        (keys, width, norm_eps) -> options
    write       (options, width, norm_eps) -> keys; raises ValueError for options that it has not
    network     tensors of the network beside those of the layers
    short       whether an absent use_short_conv is true; None: it has none
    """

    name: str
    tensors: Callable[[Options], list[Entry]]
    read: Callable[[Keys, int, float], dict[str, Any]]
    write: Callable[[Options, int, float], dict[str, Any]]
    network: tuple[Entry, ...] = ()
    short: bool | None = True


def linear(theirs: str, ours: str) -> Entry:
    """A linear map without bias."""
    return Entry(f"{ATTN}.{theirs}.weight", (f"mixer/{ours}/kernel",), "linear")


def same(theirs: str, ours: str, layout: str = "same") -> Entry:
    """A tensor that is a parameter."""
    return Entry(f"{ATTN}.{theirs}", (f"mixer/{ours}",), layout)


QUERY_KEY_VALUE = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
CONVOLUTIONS = {"conv_q": "q_conv1d", "conv_k": "k_conv1d", "conv_v": "v_conv1d"}


def _projections() -> list[Entry]:
    found = [linear(theirs, ours) for ours, theirs in QUERY_KEY_VALUE.items()]
    return [*found, linear("o_proj", "output")]


def _convolutions(options: Options) -> list[Entry]:
    if not options["conv_width"]:
        return []
    return [
        same(f"{theirs}.weight", f"{ours}/weight_WD", "convolution")
        for ours, theirs in CONVOLUTIONS.items()
    ]


def _must_be(options: Options, only: Mapping[str, Any]) -> None:
    for name, value in only.items():
        if options[name] != value:
            raise ValueError(f"it has {name} {value}; got {options[name]}")


def _heads_and_sizes(keys: Keys, heads: int, width: int, expand: float) -> dict[str, Any]:
    """From head_dim, which is free of the width."""
    size = keys.integer("head_dim", 256)
    return {
        "heads": heads,
        "expand_k": heads * size / width,
        "expand_v": heads * size * keys.number("expand_v", expand) / width,
    }


def _head_keys(options: Options, width: int) -> dict[str, Any]:
    heads = options["heads"]
    size = round(options["expand_k"] * width) // heads
    return {
        "num_heads": heads,
        "head_dim": size,
        "expand_v": round(options["expand_v"] * width) / heads / size,
    }


def _eigenvalues(keys: Keys) -> dict[str, Any]:
    return {"eigenvalue_range": (-1, 1) if keys.flag("allow_neg_eigval", False) else (0, 1)}


def _negative(options: Options) -> dict[str, Any]:
    return {"allow_neg_eigval": tuple(options["eigenvalue_range"]) == (-1, 1)}


def _expansions(keys: Keys, expand_k: float, expand_v: float) -> dict[str, Any]:
    return {
        "expand_k": float(keys.number("expand_k", expand_k)),
        "expand_v": float(keys.number("expand_v", expand_v)),
    }


# --- GLA


def _gla_tensors(options: Options) -> list[Entry]:
    return [
        *_projections(),
        *_convolutions(options),
        linear("gk_proj.0", "gate_in"),
        linear("gk_proj.1", "gate_out"),
        same("gk_proj.1.bias", "gate_out/bias"),
        linear("g_proj", "output_gate"),
        same("g_norm_swish_gate.weight", "norm/scale"),
    ]


def _read_gla(keys: Keys, width: int, eps: float) -> dict[str, Any]:
    heads = keys.integer("num_heads", 4)
    keys.must("num_kv_heads", heads, (heads,))
    for name, only in (("clamp_min", None), ("feature_map", None), ("use_gv", False)):
        keys.must(name, only, (only,))
    for name in ("use_output_gate", "use_gk"):
        keys.must(name, True, (True,))
    constants = {"gate_rank": GATE_RANK, "gate_temperature": GATE_TEMPERATURE, "norm_eps": eps}
    return {"heads": heads, **_expansions(keys, 0.5, 1.0), **constants}


def _write_gla(options: Options, width: int, eps: float) -> dict[str, Any]:
    only = {"gate_rank": GATE_RANK, "gate_temperature": GATE_TEMPERATURE, "norm_eps": eps}
    _must_be(options, only)
    return {"num_heads": options["heads"]} | {
        name: options[name] for name in ("expand_k", "expand_v")
    }


# --- The delta rules


def _delta_net_tensors(options: Options) -> list[Entry]:
    return [
        *_projections(),
        *_convolutions(options),
        linear("b_proj", "beta"),
        same("o_norm.weight", "norm/scale"),
    ]


def _read_delta_net(keys: Keys, width: int, eps: float) -> dict[str, Any]:
    keys.must("use_gate", False, (False,))
    for name in ("use_beta", "use_output_norm"):
        keys.must(name, True, (True,))
    keys.must("qk_norm", "l2", ("l2",))
    keys.must("qk_activation", "silu", ("silu",))
    heads = {"heads": keys.integer("num_heads", 16), "norm_eps": eps}
    return {**heads, **_expansions(keys, 1.0, 1.0), **_eigenvalues(keys)}


def _write_delta_net(options: Options, width: int, eps: float) -> dict[str, Any]:
    _must_be(options, {"norm_eps": eps})
    sizes = {name: options[name] for name in ("expand_k", "expand_v")}
    return {"num_heads": options["heads"], **sizes, **_negative(options)}


def _gated_tensors(options: Options) -> list[Entry]:
    return [
        *_projections(),
        *_convolutions(options),
        linear("a_proj", "dt"),
        linear("b_proj", "beta"),
        same("A_log", "a_log_H"),
        same("dt_bias", "dt_bias_H"),
        linear("g_proj", "output_gate"),
        same("o_norm.weight", "norm/scale"),
    ]


def _read_gated(keys: Keys, width: int, eps: float) -> dict[str, Any]:
    heads = keys.integer("num_heads", 6)
    value_heads = keys.integer("num_v_heads", heads)
    keys.must("use_gate", True, (True,))
    keys.must("output_gate_activation", "swish", ("swish", "silu"))
    found = _heads_and_sizes(keys, heads, width, 2.0) | {"norm_eps": eps} | _eigenvalues(keys)
    if value_heads != heads:
        found["value_heads"] = value_heads
        found["expand_v"] *= value_heads / heads
    return found


def _write_gated(options: Options, width: int, eps: float) -> dict[str, Any]:
    _must_be(options, {"norm_eps": eps})
    found = _head_keys(options, width) | _negative(options)
    heads, value_heads = options["heads"], options["value_heads"] or options["heads"]
    if value_heads != heads:
        found["num_v_heads"] = value_heads
        found["expand_v"] *= heads / value_heads
    return found


def _kda_tensors(options: Options) -> list[Entry]:
    return [
        *_projections(),
        *_convolutions(options),
        linear("f_proj.0", "dt_in"),
        linear("f_proj.1", "dt_out"),
        linear("b_proj", "beta"),
        same("A_log", "a_log_H"),
        same("dt_bias", "dt_bias_HK", "flat"),
        linear("g_proj.0", "output_gate_in"),
        linear("g_proj.1", "output_gate_out"),
        same("g_proj.1.bias", "output_gate_out/bias"),
        same("o_norm.weight", "norm/scale"),
    ]


def _read_kda(keys: Keys, width: int, eps: float) -> dict[str, Any]:
    heads = keys.integer("num_heads", 16)
    keys.must("num_v_heads", heads, (heads,))
    keys.must("allow_neg_eigval", False, (False,))
    keys.must("safe_gate", False, (False,))
    keys.must("lower_bound", None, (None,))
    return _heads_and_sizes(keys, heads, width, 1.0) | {"norm_eps": eps}


def _write_kda(options: Options, width: int, eps: float) -> dict[str, Any]:
    _must_be(options, {"norm_eps": eps})
    return _head_keys(options, width)


# --- RetNet, HGRN2, LightNet


def _retnet_tensors(options: Options) -> list[Entry]:
    gate = linear("g_proj", "output_gate")
    return [*_projections(), gate, same("g_norm_swish_gate.weight", "scale_V")]


def _read_retnet(keys: Keys, width: int, eps: float) -> dict[str, Any]:
    heads = keys.integer("num_heads", 8)
    keys.must("num_kv_heads", heads, (heads,))
    keys.must("expand_k", 1.0, (1.0, 1))
    keys.must("feature_map", None, (None,))
    keys.must("use_output_gate", True, (True,))
    expand_v = float(keys.number("expand_v", 2.0))
    return {"heads": heads, "expand_v": expand_v, "norm_eps": eps, "norm_scale": True}


def _write_retnet(options: Options, width: int, eps: float) -> dict[str, Any]:
    _must_be(options, {"norm_eps": eps, "norm_scale": True, "rope_base": 10000.0})
    return {"num_heads": options["heads"], "expand_k": 1.0, "expand_v": options["expand_v"]}


def _hgrn2_tensors(options: Options) -> list[Entry]:
    return [
        linear("q_proj", "query"),
        linear("f_proj", "forget"),
        linear("i_proj", "value"),
        linear("o_proj", "output"),
        same("g_norm.weight", "norm/scale"),
    ]


def _ratio(keys: Keys, width: int) -> int:
    """The heads, of expand_ratio channels, which wins, or num_heads of them."""
    given = keys.get("num_heads", None)
    size = keys.integer("expand_ratio", width // given if given else 128)
    if width % size:
        raise ValueError(f"{keys.where}: expand_ratio must divide hidden_size={width}; got {size}")
    return width // size


def _read_hgrn2(keys: Keys, width: int, eps: float) -> dict[str, Any]:
    heads = _ratio(keys, width)
    keys.must("use_lower_bound", True, (True,))
    # Its queries are divided by sqrt(K), and ours are not: the norm sees the difference in its eps.
    return {"heads": heads, "norm_eps": HGRN2_EPS * (width // heads)}


def _write_hgrn2(options: Options, width: int, eps: float) -> dict[str, Any]:
    heads = options["heads"]
    _must_be(options, {"norm_eps": HGRN2_EPS * (width // heads)})
    return {"num_heads": heads, "expand_ratio": width // heads, "use_lower_bound": True}


def _lightnet_tensors(options: Options) -> list[Entry]:
    return [
        *_projections(),
        linear("g_proj.0", "output_gate_in"),
        linear("g_proj.1", "output_gate_out"),
        same("g_norm.weight", "norm/scale"),
    ]


def _read_lightnet(keys: Keys, width: int, eps: float) -> dict[str, Any]:
    rank = keys.integer("gate_low_rank_dim", 128)
    return {"heads": _ratio(keys, width), "gate_rank": rank, "norm_eps": LIGHTNET_EPS}


def _write_lightnet(options: Options, width: int, eps: float) -> dict[str, Any]:
    _must_be(options, {"norm_eps": LIGHTNET_EPS, "empty_sum": "zero"})
    heads = options["heads"]
    return {"expand_ratio": width // heads, "gate_low_rank_dim": options["gate_rank"]}


# --- MoM


def _mom_tensors(options: Options) -> list[Entry]:
    own = {"k": "key", "v": "value", "b": "rule/beta", "a": "rule/dt"}
    names = {f"{letter}_proj.{m}": m for m in range(options["memories"]) for letter in own}
    if options["shared_memory"]:
        names |= {f"shared_{letter}": options["memories"] for letter in own}
    memories = [
        Entry(
            f"{ATTN}.{name}.weight",
            (Part(f"mixer/{own[name.removeprefix('shared_')[0]]}/kernel_EDX", (place,)),),
            "linear",
        )
        for name, place in names.items()
    ]
    return [
        *memories,
        *_convolutions(options),
        linear("gate", "router/logits"),
        linear("q_proj", "query"),
        same("A_log", "rule/a_log_H"),
        same("dt_bias", "rule/dt_bias_H"),
        linear("g_proj", "output_gate"),
        same("o_norm.weight", "norm/scale"),
        linear("o_proj", "output"),
    ]


def _read_mom(keys: Keys, width: int, eps: float) -> dict[str, Any]:
    keys.must("mom_backend", "gated_deltanet", ("gated_deltanet",))
    keys.must("single_kv_proj", False, (False,))
    keys.must("use_output_gate", True, (True,))
    # How it is trained.
    keys.ignore("capacity", "use_layer_wise_balance")
    return _heads_and_sizes(keys, keys.integer("num_heads", 4), width, 1.0) | {
        "memories": keys.integer("num_memories", 8),
        "top_k": keys.integer("topk", 2),
        "shared_memory": keys.flag("shared_mem", False),
        "balance_weight": float(keys.get("aux_loss_scale", 0.01)),
        "norm_eps": eps,
    }


def _write_mom(options: Options, width: int, eps: float) -> dict[str, Any]:
    _must_be(options, {"norm_eps": eps, "rule": "gated_delta_net"})
    return _head_keys(options, width) | {
        "num_memories": options["memories"],
        "topk": options["top_k"],
        "shared_mem": options["shared_memory"],
        "single_kv_proj": False,
        "mom_backend": "gated_deltanet",
        "use_output_gate": True,
        "aux_loss_scale": options["balance_weight"],
    }


LOWER_BOUNDS = Entry("model.lower_bounds", ("stack/shared/hgrn2/gamma_LD",))
MIXERS = {
    "gla": FlaMixer("gla", _gla_tensors, _read_gla, _write_gla, short=False),
    "delta_net": FlaMixer("delta_net", _delta_net_tensors, _read_delta_net, _write_delta_net),
    "gated_deltanet": FlaMixer("gated_delta_net", _gated_tensors, _read_gated, _write_gated),
    "kda": FlaMixer("kda", _kda_tensors, _read_kda, _write_kda),
    "retnet": FlaMixer("retnet", _retnet_tensors, _read_retnet, _write_retnet, short=None),
    "hgrn2": FlaMixer(
        "hgrn2", _hgrn2_tensors, _read_hgrn2, _write_hgrn2, network=(LOWER_BOUNDS,), short=None
    ),
    "lightnet": FlaMixer(
        "lightnet", _lightnet_tensors, _read_lightnet, _write_lightnet, short=None
    ),
    "mom": FlaMixer("mom", _mom_tensors, _read_mom, _write_mom),
}
