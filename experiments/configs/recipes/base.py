"""What recipes share: every field of a config, the options of a language model, the smoke size.

A recipe is everything of a run but the mixers: a public function of `smoke` in a file of this
folder. recipe("mqar") is the published one; recipe("mqar,smoke") trains in about a minute on two
CPU cores and shows that a model learns. All options of a task are there, so that all can be
overridden; 0, "" and () mean a task's own default. Where a paper gives a grid (learning rates,
widths, depths), the recipe holds one point and says which. A model's config file takes a recipe and
adds pattern and mixers."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def recipe(argument: str) -> ConfigDict:
    """The complete config for "<task>" or "<task>,smoke"; raises ValueError, naming the tasks, for
    anything else."""
    name, _, variant = argument.partition(",")
    recipes = available_recipes()
    if name not in recipes or variant not in ("", "smoke"):
        raise ValueError(
            "a config argument is <task> or <task>,smoke with a task of"
            f" {', '.join(recipes)}; got {argument!r}"
        )
    return recipes[name](variant == "smoke")


@functools.cache
def available_recipes() -> dict[str, Callable[[bool], ConfigDict]]:
    """The recipes by name: those of all files beside this one."""
    found = {}
    for file in Path(__file__).parent.glob("*.py"):
        module = importlib.import_module(f"experiments.configs.recipes.{file.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and list(inspect.signature(function).parameters) == ["smoke"]:
                found[name] = function
    return dict(sorted(found.items()))


def base(
    *,
    task: Mapping[str, Any],
    model: Mapping[str, Any],
    steps: int,
    batch_size: int,
    optimizer: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> Any:
    """A config with every field: those given, and the values that most recipes share.

    task        as `task_options` of recipes/defaults.py
    model       as `language_model`, without pattern and mixers; or a whole model
    optimizer   the entries of its section that differ
    evaluation  the same of the section `eval`
    """
    config: Any = ConfigDict(
        {
            "seeds": (0,),  # several: independent replicas, trained together
            "steps": steps,
            "batch_size": batch_size,  # sequences, over all devices, per replica
            "accumulate": 1,  # the batch in this many parts, one after the other
            "z_loss": 0.0,  # times log^2 of the sum of exponentials of logits; 1e-4 is usual
            "ema_decay": 0.0,  # of an average of the parameters beside them; 0: none
            "log_every_steps": 50,
            "task": dict(task),
            "model": dict(model),
            "param_dtype": "float32",
            "compute_dtype": "float32",
            "optimizer": {
                "name": "adamw",
                "lr": 1e-3,
                "schedule": "cosine",
                "warmup_steps": 0,
                "end_lr": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip_norm": 1.0,  # 0: no clipping
                "ssm_lr": 0.0,  # 0: lr
                "frozen": (),  # regular expressions for paths of parameters that stay as they start
                "offload": False,  # moments in host memory between steps
            },
            "eval": {
                "every_steps": 1_000,
                "examples": 1_024,
                "averaged": False,  # the average of the parameters (ema_decay)
                "at_best": False,  # the summary has the step that best_metric chose, not the last
                "best_metric": "",
                "best_mode": "max",
            },
            "checkpoint": {"every_steps": 1_000, "keep": 2},
            "mesh": {
                "data": -1,  # -1: the devices that are left
                "fsdp": 1,
                "sequence": 1,
                "tensor": 1,
                "zero": 3,  # over fsdp: 3 parameters and moments, 1 moments alone
                "sequence_method": "all_gather",  # or ring, pipelined
            },
            "kernels": True,  # of ops, where the platform has them; False: plain JAX
            "heartbeat_timeout_seconds": 100,  # then a silent process counts as lost
            "init_from": "",
            "init_except": (),  # regular expressions for paths that start from the seed
            "profile_steps": "",
            "max_rejected_steps": 20,
        }
    )
    config.optimizer.update(optimizer)
    config.eval.update(evaluation)
    return config


def language_model(*, width: int, depth: int, **options: Any) -> dict[str, Any]:
    """The section `model` of models/networks/lm.py, to which a model adds pattern and mixers."""
    return {
        "name": "lm",
        "width": width,
        "depth": depth,
        "mlp": "swiglu",
        "mlp_ratio": 4.0,
        "norm_eps": 1e-5,
        "tie_embeddings": False,
        "embedding_dropout": 0.0,
        "scan_layers": True,
        "remat": "none",
        **options,
    }


def shrink(config: Any, *, steps: int, batch_size: int, width: int, lr: float) -> None:
    """Sets the smoke size: `width`, at most two layers, a tenth of the steps as warm-up, two
    evaluations."""
    config.steps, config.batch_size, config.log_every_steps = steps, batch_size, 20
    config.model.update({"width": width, "depth": min(config.model.depth, 2)})
    config.optimizer.update({"lr": lr, "warmup_steps": steps // 10})
    config.eval.update({"every_steps": steps // 2, "examples": min(config.eval.examples, 512)})
    config.checkpoint.update({"every_steps": steps // 2})
