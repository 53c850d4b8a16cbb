"""Every entry of every config with values that nobody means: they are taken where they have a
meaning, and otherwise cost one line that names the entry, before anything is compiled."""

import importlib
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from experiments import train
from experiments.configs.recipes.base import available_recipes, recipe
from experiments.training import config as configs
from experiments.training.config import flatten
from experiments.training.mesh import make_mesh
from models.blocks.stack import available_mixers
from tests.experiments.configs_test import OF_IMAGES, little_data

NAN, INFINITE, HUGE, LARGEST_INT = math.nan, math.inf, 10**20, 2**31 - 1
VALUES = (NAN, INFINITE, -INFINITE, -1, 0, HUGE, LARGEST_INT, True, "x", (), None)

# The entries, by their last names, for which a value is a choice, in one section at least.
MEANINGFUL: dict[Any, set[str]] = {
    0: {
        *("z_loss", "ema_decay", "warmup_steps", "end_lr", "b1", "b2", "weight_decay"),
        *("clip_norm", "ssm_lr", "embedding_dropout"),
        *("conv_width", "dt_rank", "gate_rank", "heads", "key_value_heads", "balance_weight"),
        *("r_min", "noise", "delay", "levels", "length", "vocabulary_size", "train_examples"),
        *("train_max_length", "test_max_length", "size_per_head"),
        *("value_heads", "rotary_size", "recurrence_share"),
        *("kernel_size", "size", "padding", "erasing", "mixup", "cutmix"),
        *("label_smoothing", "drop_path", "mlp_width", "norm_eta", "norm_steps"),
        *("norm_warmup_steps", "jitter", "dropout", "mlp_dropout", "distractors", "class_dropout"),
        *("occlusion", "clutter", "generated"),
        *("distil_output", "distil_variance", "distil_features"),
        *("lift", "slow_loss_weight", "window", "speed"),
    },
    -1: {"data", "train_examples"},
    HUGE: {"clip_norm"},
    LARGEST_INT: {
        *("every_steps", "log_every_steps", "max_rejected_steps", "keep", "examples"),
        *("heartbeat_timeout_seconds", "clip_norm", "rope_base", "train_examples"),
        *("test_examples", "micro_batch_size", "gate_rank"),
        *("norm_steps", "norm_warmup_steps", "trained_tokens"),
    },
    True: {
        *("scan_layers", "tie_embeddings", "rope", "qk_norm", "clip_eigenvalues", "shared_memory"),
        *("kernels", "offload", "mask_query", "exponential_covariance", "test_reversed", "grey"),
        *("bias", "conv_bias", "qkv_bias", "output_bias", "norm_scale"),
        *("output_gate", "zero_centred_norm", "gated", "global_attention"),
        *("flip", "blend", "normalise", "pre_norm", "gaps"),
        *(
            "learned_variance",
            "download",
            "random_non_queries",
            "targets_only",
            "multiplication",
            "validation",
        ),
        *("rotated", "crop", "shifted_windows", "fill_groups", "descriptor", "branch_norm"),
        *("sequence", "global_branch", "hyper_kernels", "context"),
        *("whole_norm", "gate_projection", "sigmoid_gate", "value_silu", "terraced", "at_best"),
    },
    "x": {"data_dir", "test_split", "date_column", "init_from"},  # a run is looked for later
    None: {"conv_width"},  # of mixtures: that of the rule
    (): {
        *("frozen", "init_except"),
        *("covariance", "task_covariance", "test_lengths", "test_input_scales"),
        *("test_length_grid", "test", "rope_scaling"),
        *("origin", "ignored", "orders"),
        *("rand_augment", "enlarged", "stages", "position_grid", "kernel_sizes", "windows"),
    },
}

# Parts of hybrids have no config of their own: recall.py and based.py have them.
# Of the sets of images, digits stand for all, of series waves, of shapes voxels with classes.
IMAGE_SETS = {"mnist_subset", "fashion_mnist", "cifar10", "cifar100", "imagenet"}
IMAGE_SETS |= {f"diffusion_{name}" for name in IMAGE_SETS}
SERIES = ("etth", "exchange")
SOUNDS = {"separation_speech", "separation_large"}  # likewise voices that are generated
OF_SERIES = {"s_mamba", "itransformer"}
OF_NOISE = {"lit", "linfusion", "clear"}
OF_VIDEOS = {"lingen"}
CONFIGS = sorted(
    {"recall", "hyper_zzw", *available_mixers()} - {"base_conv", "window_attention"}
) + [
    f"task {name}"
    for name in available_recipes()
    if name not in {*IMAGE_SETS, *SOUNDS, "shape_classification"} and not name.startswith(SERIES)
]


def config_of(what: str, directory: Path) -> tuple[Any, list[str]]:
    """A config that can start, and the entries that are tried in it: those of its mixers, or of
    a whole model; of its task; and once all others."""
    config: Any
    mixer, _, name = what.rpartition("task ") if what.startswith("task ") else (what, "", "")
    if not name:
        module = importlib.import_module(f"experiments.configs.{mixer}")
        tasks = {
            "recall": "gla,smoke",
            **dict.fromkeys({*OF_IMAGES, "hyper_zzw"}, "digits,smoke"),
            **dict.fromkeys(OF_SERIES, "forecasting,smoke"),
            "lion": "shape_classification,smoke",
            "mossformer2": "separation,smoke",
            **dict.fromkeys(OF_NOISE, "diffusion_digits,smoke"),
            **dict.fromkeys(OF_VIDEOS, "diffusion_moving_digits,smoke"),
        }
        config = module.get_config(tasks.get(mixer, "mqar,smoke"))
        if mixer == "lion":
            config.model.orders = ("x",)
        parts: tuple[str, ...] = ("model.mixers." if "mixers" in config.model else "model.",)
    else:
        config = recipe(f"{name},smoke")
        parts = ("task.",) if config.model.name == "lm" else ("task.", "model.")
        if config.model.name == "lm":
            config = importlib.import_module("experiments.configs.gla").get_config(f"{name},smoke")
        elif config.model.name == "image_classifier":
            config = importlib.import_module("experiments.configs.vit").get_config(f"{name},smoke")
            config.task.dataset = "digits"
        elif config.model.name == "diffusion_transformer":
            config = importlib.import_module("experiments.configs.dit").get_config(f"{name},smoke")
        elif config.model.name == "point_cloud":
            config = importlib.import_module("experiments.configs.lion").get_config(f"{name},smoke")
            config.model.orders = ("x",)  # half of the operators to trace
        elif config.model.name == "forecaster":
            module = importlib.import_module("experiments.configs.itransformer")
            config = module.get_config(f"{name},smoke")
        elif config.model.name == "separator":
            module = importlib.import_module("experiments.configs.mossformer2")
            config = module.get_config(f"{name},smoke")
    if name == "text":
        (directory / "lines.txt").write_text("a line of text\n" * 5000)
        config.task.update({"path": str(directory / "lines.txt"), "data_dir": str(directory)})
    elif name.startswith("lra_") and name != "lra_listops":
        config.task.update(little_data(config.task.to_dict(), directory))
    keys = [key for key, _ in flatten(config)]
    if name == "mqar":
        return config, [key for key in keys if not key.startswith("model.mixers.")]
    return config, [key for key in keys if key.startswith(parts)]


def with_value(config: Any, key: str, value: Any) -> Any:
    """A config may not hold a value of another type than before, but one from JSON does."""
    values = config.to_dict()
    *path, name = key.split(".")
    section = values
    for part in path:
        section = section[part]
    section[name] = value
    return ConfigDict(values)


def means_something(key: str, value: Any) -> bool:
    name = key.split(".")[-1]
    return any(
        type(choice) is type(value) and choice == value and name in names
        for choice, names in MEANINGFUL.items()
    )


def start(config: Any) -> None:
    configs.validate(config)
    train.prepare(config, make_mesh(config.mesh))


def complaints(config: Any, key: str, value: Any) -> list[str]:
    """What is wrong with how a value is met: a complaint, or none."""
    case = f"config.{key}={value!r}"
    try:
        start(with_value(config, key, value))
    except ValueError as error:
        message, name = str(error), key.split(".")[-1]
        right = name in message and "\n" not in message
        return [] if right else [f"{case}: the message does not name it: {message}"]
    # Any other is a traceback for the user.
    except Exception as error:
        return [f"{case}: {type(error).__name__}: {error}"]
    finally:
        shutil.rmtree("x", ignore_errors=True)  # made as a data_dir, it would be a text
    same = [v for k, v in flatten(config) if k == key and type(v) is type(value) and v == value]
    return [] if same or means_something(key, value) else [f"{case}: is taken"]


def check(what: str, directory: Path, count: int | None) -> None:
    config, keys = config_of(what, directory)
    start(config)
    cases = [(key, value) for key in keys for value in VALUES]
    if count:
        cases = random.Random(what).sample(cases, count)
    found = [complaint for case in cases for complaint in complaints(config, *case)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("what", CONFIGS)
def test_a_value_that_nobody_means_costs_one_line_that_names_the_entry(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a folder "x" is made there
    check(what, tmp_path, 5)


@pytest.mark.full
@pytest.mark.parametrize("what", CONFIGS)
def test_every_value_that_nobody_means_costs_one_line_that_names_the_entry(
    what, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    check(what, tmp_path, None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", HUGE, "config.steps must be at most 33554432; got 100000000000000000000"),
        ("batch_size", 10**9, "a step needs more memory than .* config.batch_size=1000000000"),
        ("optimizer.lr", 3e4, "config.optimizer.lr must be at most 100; got 30000.0"),
        ("optimizer.eps", 1e-60, "config.optimizer.eps must be greater than 0; got 1e-60"),
        ("seeds", (True,), r"config.seeds must be a tuple of distinct integers"),
        ("model.width", -32, r"config.model.width must be an integer in \[1, 2\^31\); got -32"),
        ("model.width", 10**7, "a step needs more memory than .* config.model.width=10000000"),
        (
            "model.depth",
            100_000,
            r"config.model.depth must be an integer in \[1, 10000\]; got 100000",
        ),
        ("model.mlp_ratio", -4.0, r"config.model.mlp_ratio must be a finite number in \[1.2e-38, "),
        ("model.norm_eps", -1.0, r"config.model.norm_eps must be a finite number in .* got -1.0"),
        (
            "model.pattern",
            ("gla", 1),
            "config.model.pattern must be a tuple whose elements are each a string",
        ),
        (
            "model.mixers.gla.norm_eps",
            -1.0,
            r"config.model.mixers.gla.norm_eps must be .* got -1.0",
        ),
        (
            "model.mixers.gla.heads",
            True,
            r"config.model.mixers.gla.heads must be an integer .* got True",
        ),
        (
            "model.mixers.gla.heads",
            "2",
            r"config.model.mixers.gla.heads must be an integer .* got '2'",
        ),
        (
            "task.train",
            ((32, 8),),
            r"config.task.train must be .* a tuple of 3 .* got \(\(32, 8\),\)",
        ),
        ("task.train", ((32, 8, 10**9),), "config.task.train must fit into the .* GiB"),
        (
            "task.vocabulary_size",
            "64",
            r"config.task.vocabulary_size must be an integer in .* got '64'",
        ),
    ],
)
def test_the_message_says_what_was_expected_and_what_came(key, value, message):
    gla = importlib.import_module("experiments.configs.gla").get_config("mqar,smoke")
    with pytest.raises(ValueError, match=message):
        start(with_value(gla, key, value))


def test_bounds_of_step_sizes_are_in_order():
    mamba = importlib.import_module("experiments.configs.mamba").get_config("mqar,smoke")
    with pytest.raises(ValueError, match=r"need 0 < dt_min <= dt_max; got dt_min=0.1, dt_max=0.01"):
        start(
            with_value(
                with_value(mamba, "model.mixers.mamba.dt_min", 0.1),
                "model.mixers.mamba.dt_max",
                0.01,
            )
        )
