"""What a run's config must hold, checked before anything is built, written or compiled.

A config is an ml_collections.ConfigDict from a file in experiments/configs. The sections `task` and
`model` hold a name and that task's or model's own options, which it checks itself; everything else
is listed in KEYS."""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

from ml_collections import ConfigDict

# An ml_collections.ConfigDict. Its entries are attributes that no type checker can know.
Config: TypeAlias = Any

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# Keys and their types. A float may be written as an int.
KEYS: dict[str, type] = {
    "seeds": tuple,
    "steps": int,
    "batch_size": int,
    "accumulate": int,
    "z_loss": float,
    "ema_decay": float,
    "log_every_steps": int,
    "param_dtype": str,
    "compute_dtype": str,
    "init_from": str,
    "init_except": tuple,
    "profile_steps": str,
    "max_rejected_steps": int,
    "task.name": str,
    "model.name": str,
    "optimizer.name": str,
    "optimizer.lr": float,
    "optimizer.schedule": str,
    "optimizer.warmup_steps": int,
    "optimizer.end_lr": float,
    "optimizer.b1": float,
    "optimizer.b2": float,
    "optimizer.eps": float,
    "optimizer.weight_decay": float,
    "optimizer.clip_norm": float,
    "optimizer.ssm_lr": float,
    "optimizer.frozen": tuple,
    "optimizer.offload": bool,
    "eval.every_steps": int,
    "eval.examples": int,
    "eval.averaged": bool,
    "eval.at_best": bool,
    "eval.best_metric": str,
    "eval.best_mode": str,
    "checkpoint.every_steps": int,
    "checkpoint.keep": int,
    **{f"mesh.{axis}": int for axis in MESH_AXES},
    "mesh.zero": int,
    "mesh.sequence_method": str,
    "heartbeat_timeout_seconds": int,
    "kernels": bool,
}
# Entries younger than the oldest recorded results, with what they are where a record does not have
# them. `to_json` leaves them out while they are that, so that a config is recorded and hashed as it
# was before they came. An option of one task is written task.<name of the task>.<option>.
ADDED = {
    "accumulate": 1,
    "z_loss": 0.0,
    "ema_decay": 0.0,
    "init_except": (),
    "optimizer.frozen": (),
    "optimizer.offload": False,
    "eval.averaged": False,
    "eval.at_best": False,
    "mesh.zero": 3,
    "mesh.sequence_method": "all_gather",
    "heartbeat_timeout_seconds": 100,
    "kernels": True,
    "task.images.grey": False,
    **{
        f"task.{task}.answer": "token"
        for task in ("images", "listops", "pathfinder", "retrieval", "text_classification")
    },
    "task.listops.data_dir": "",
    "task.pathfinder.points": 7,
    "task.pathfinder.distractors": 1,
    "task.pathfinder.train_examples": 0,
    "task.pathfinder.test_examples": 2_000,
    "task.text.validation_path": "",
    "task.text.test_path": "",
    **{
        f"model.mixers.{mixer}.causal": True
        for mixer in (
            *("s4", "s4d", "s5", "lru", "lssl", "seqboat", "monarch_mixer"),
            *("transnormer", "diag_attention"),
        )
    },
    **{
        f"model.mixers.{mixer}.dropout": 0.0
        for mixer in ("s4", "s4d", "s5", "lru", "lssl", "seqboat")
    },
    "model.mixers.s5.read_init": "trunc_standard_normal",
    "model.mixers.s5.write_rate": "full",
    "model.mixers.s5.step_rate": "ssm",
    "model.mixers.transnormer.feature_map": "elu_plus_one",
    "model.mixers.diag_attention.attention": "softmax",
    "model.mixers.s4.init": "legs",
    "model.mixers.s5.gate": "half_glu1",
    "model.mixers.seqboat.attention": "softmax",
    "model.mixers.mamba2.norm_groups": 1,
    "model.mixers.vit.init": "normal",
    "model.mixers.retnet.norm_scale": False,
    "model.mixers.gated_delta_net.value_heads": 0,
    "model.mixers.kda.gate_bias": True,
    "model.mixers.hedgehog.key_value_heads": 0,
    "model.mixers.hedgehog.stage": "student",
    "model.mixers.hedgehog.context_length": 1024,
    "model.mixers.lightning.size_per_head": 0,
    **{
        f"model.mixers.lightning.{option}": False
        for option in ("value_silu", "norm_scale", "sigmoid_gate")
    },
    **{
        f"model.mixers.{mixer}.{option}": value
        for mixer in ("mamba", "mamba2")
        for option, value in {"bias": False, "conv_bias": True}.items()
    },
    **{
        f"model.mixers.{mixer}.{option}": value
        for mixer in ("transformer", "window_attention")
        for option, value in {
            "size_per_head": 0,
            "rope_scaling": (),
            "qkv_bias": False,
            "output_bias": False,
            "rotary_size": 0,
            "output_gate": False,
            "zero_centred_norm": False,
            "whole_norm": False,
        }.items()
    },
}
OPEN_SECTIONS = ("task", "model")

OPTIMIZERS = ("adamw", "lion", "lamb", "muon", "kar3")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
REFINED = "refined:"  # and then the workdir of a first run
HALVING = "halving:"  # and then the updates after which the rate is halved again and again

# A run may be continued with other values of these: they decide what is reported, kept and where it
# runs, never what is computed. `steps` is not among them: the schedule depends on it.
FREE_ON_RESUME = (
    "log_every_steps",
    "profile_steps",
    "max_rejected_steps",
    "eval.every_steps",
    "checkpoint.every_steps",
    "checkpoint.keep",
    *(f"mesh.{axis}" for axis in MESH_AXES),
    "mesh.zero",
    "mesh.sequence_method",
    "kernels",
    "optimizer.offload",
    "heartbeat_timeout_seconds",
)

# Steps, rows and examples are counted in int32; the others are learning rates and factors, of which
# larger ones are slips of the pen.
INT_AT_MOST = 2**31 - 1
AT_MOST = {
    "steps": 2**25,  # the rate of every step stands in a table
    "z_loss": 100,
    "optimizer.lr": 100,
    "optimizer.end_lr": 100,
    "optimizer.ssm_lr": 100,
    "optimizer.weight_decay": 100,
    "optimizer.eps": 1,
    "optimizer.clip_norm": 1e30,
}
FLOAT_AT_LEAST = 1.1754944e-38  # positive ones: the optimizer computes in float32
POSITIVE = (
    "steps",
    "batch_size",
    "accumulate",
    "log_every_steps",
    "max_rejected_steps",
    "heartbeat_timeout_seconds",
    "eval.every_steps",
    "eval.examples",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "optimizer.lr",
    "optimizer.eps",
)
NOT_NEGATIVE = (
    "z_loss",
    "optimizer.warmup_steps",
    "optimizer.end_lr",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.ssm_lr",
)
CHOICES = {
    "param_dtype": ("float32", "bfloat16"),
    "compute_dtype": ("float32", "bfloat16"),
    "eval.best_mode": ("max", "min"),
    "optimizer.name": OPTIMIZERS,
    "mesh.zero": (1, 3),
}


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) pairs of a nested mapping."""
    for key, value in config.items():
        if hasattr(value, "items") and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def validate(config: Config) -> None:
    """Raises ValueError for a missing, unknown, ill-typed or impossible entry: the key, what is
    expected, what came."""
    values = dict(flatten(config))
    for key in values:
        if key not in KEYS and key.split(".")[0] not in OPEN_SECTIONS:
            raise ValueError(f"config.{key} is not a known key; known keys: {', '.join(KEYS)}")
    for key, expected in KEYS.items():
        if key not in values:
            raise ValueError(
                f"config.{key} is missing; expected a value of type {expected.__name__}"
            )
        value = values[key]
        accepted = {float: (float, int), tuple: (tuple, list)}.get(expected, (expected,))
        if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
            raise ValueError(
                f"config.{key} must be of type {expected.__name__}; got {value!r}"
                f" ({type(value).__name__})"
            )
    for key, value in values.items():
        # Sections of tasks and models, too: there is no option for which it would be a choice.
        _require(
            not isinstance(value, float) or math.isfinite(value), key, "a finite number", value
        )
    for key in POSITIVE:
        least = FLOAT_AT_LEAST if KEYS[key] is float else 1
        _require(values[key] >= least, key, "greater than 0", values[key])
    for key in NOT_NEGATIVE:
        _require(values[key] >= 0, key, "0 or greater", values[key])
    for key, expected in KEYS.items():
        if expected in (int, float):
            most = AT_MOST.get(key, INT_AT_MOST)
            _require(values[key] <= most, key, f"at most {most:.10g}", values[key])
    for key, choices in CHOICES.items():
        _require(values[key] in choices, key, f"one of {', '.join(map(str, choices))}", values[key])
    for key in ("optimizer.b1", "optimizer.b2"):
        _require(0 <= values[key] < 1, key, "in [0, 1)", values[key])
    steps, warmup, seeds = (
        values["steps"],
        values["optimizer.warmup_steps"],
        tuple(values["seeds"]),
    )
    schedule = values["optimizer.schedule"]
    refined = schedule.startswith(REFINED) and schedule != REFINED
    _require(
        schedule in SCHEDULES or refined or halving_period(schedule) is not None,
        "optimizer.schedule",
        f"one of {', '.join(SCHEDULES)}, {REFINED}<workdir of a finished run>, or"
        f" {HALVING}<updates, 1 or more>",
        schedule,
    )
    _require(
        warmup == 0 or not schedule.startswith(REFINED),
        "optimizer.warmup_steps",
        "0 for a refined schedule, which has its own warm-up",
        warmup,
    )
    _require(warmup <= steps, "optimizer.warmup_steps", f"at most config.steps={steps}", warmup)
    _require(
        len(seeds) > 0
        and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
        and len(set(seeds)) == len(seeds),
        "seeds",
        "a tuple of distinct integers in [0, 2^32), such as (0,) or (0, 1)",
        seeds,
    )
    _require(0 <= values["ema_decay"] < 1, "ema_decay", "in [0, 1)", values["ema_decay"])
    for key, needed, what in (
        ("eval.averaged", "ema_decay", "an average of the weights"),
        ("eval.at_best", "eval.best_metric", "a metric that says what is best"),
    ):
        expected = f"False without {what} (config.{needed})"
        _require(bool(values[needed]) or not values[key], key, expected, values[key])
    _check_patterns(values)
    profile_range(values["profile_steps"], steps)


def fit_warmup(config: Config, chosen: Collection[str]) -> bool:
    """Shortens a recipe's warm-up to a tenth of `steps` where it would be longer than the run, and
    says whether it did. One that is `chosen`, as the dotted keys that were set, stays: `validate`
    then refuses it."""
    steps, warmup = config.get("steps"), config.get("optimizer", {}).get("warmup_steps")
    if not (isinstance(steps, int) and isinstance(warmup, int)) or not 0 < steps < warmup:
        return False
    if "optimizer.warmup_steps" in chosen:
        return False
    config.optimizer.warmup_steps = steps // 10
    return True


def halving_period(schedule: str) -> int | None:
    """The updates n of "halving:<n>", or None for another schedule or no such number."""
    number = schedule.removeprefix(HALVING)
    counted = schedule.startswith(HALVING) and number.isascii() and number.isdecimal()
    return int(number) if counted and 0 < int(number) <= INT_AT_MOST else None


def profile_range(text: str, steps: int) -> tuple[int, int] | None:
    """The first and last step of "a:b", or None for "". Raises ValueError unless 1 <= a <= b <=
    steps."""
    if not text:
        return None
    first, separator, last = text.partition(":")
    valid = (
        bool(separator)
        and first.isdecimal()
        and last.isdecimal()
        and 1 <= int(first) <= int(last) <= steps
    )
    _require(
        valid,
        "profile_steps",
        f'"first:last" with 1 <= first <= last <= config.steps={steps}, or ""',
        text,
    )
    return int(first), int(last)


def to_json(config: Config) -> dict[str, Any]:
    """The config as JSON types (tuples become lists), without the ADDED entries that say nothing
    new."""
    values = json.loads(json.dumps(config.to_dict()))
    for section, name, value in _added(values):
        if section.get(name) == json.loads(json.dumps(value)):
            del section[name]
    return values


def from_json(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_json` for a config of a run; sequences come back as tuples."""

    def restore(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(restore(item) for item in value)
        return (
            {key: restore(item) for key, item in value.items()}
            if isinstance(value, dict)
            else value
        )

    restored = restore(dict(values))
    for section, name, value in _added(restored):
        section.setdefault(name, value)
    return ConfigDict(restored)


def _added(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The section of `values` for every entry of ADDED, the entry's name there and what it is by
    default."""
    for key, value in ADDED.items():
        *path, name = key.split(".")
        of_task = path.pop() if path[:1] == ["task"] else None
        if of_task and of_task != values.get("task", {}).get("name"):
            continue
        section = values
        for part in path:
            section = section.get(part, {})
        yield section, name, value


def differences(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """ "key: recorded -> requested" for every entry that must not change when a run is continued;
    both as `to_json`."""
    old, new = dict(flatten(recorded)), dict(flatten(requested))
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in dict.fromkeys((*old, *new))
        if key not in FREE_ON_RESUME and old.get(key, absent) != new.get(key, absent)
    ]


def _check_patterns(values: Mapping[str, Any]) -> None:
    """Raises ValueError for what is no regular expression, or leaves out of nothing."""
    for key in ("optimizer.frozen", "init_except"):
        for pattern in values[key]:
            try:
                re.compile(pattern)
            except (TypeError, re.error) as error:
                raise ValueError(
                    f"config.{key} must be a tuple of regular expressions; got {pattern!r}: {error}"
                ) from error
    _require(
        bool(values["init_from"]) or not values["init_except"],
        "init_except",
        "() without config.init_from",
        values["init_except"],
    )


def _require(condition: bool, key: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"config.{key} must be {expected}; got {value!r}")
