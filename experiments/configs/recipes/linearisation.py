"""Configs that turn the softmax attention of a trained run into another mixer with its weights."""

from typing import Any

from experiments.configs import of_run
from experiments.configs.recipes.defaults import mixer_options

SOFTMAX = "transformer"
# Everything but what LoRA adds; everything but the maps and mixing weights of LoLCATs.
ALL_BUT_LORA = (r"(?!.*/lora_(?:a|b|gain)$).*",)
ALL_BUT_FEATURES = (r"(?!.*/(?:query_map_HKF|key_map_HKF|query_bias_H|key_bias_H|mix_H)$).*",)


def linearised(workdir: str, mixer: str, **own: Any) -> Any:
    """The config of the run in `workdir`, to start from its weights, with `mixer` where it has
    softmax attention; `own` are options of the mixer that softmax attention has not.

    A run that has `mixer` already keeps it, with the options in `own` changed. Raises ValueError
    for a run that has neither, and for softmax attention that is more than `mixer` can be."""
    config: Any = of_run.get_config(workdir)
    pattern, mixers = config.model.pattern, config.model.mixers.to_dict()
    source = mixer if mixer in pattern else SOFTMAX
    if source not in pattern:
        raise ValueError(
            f"{workdir} must be a run with softmax attention ({SOFTMAX}) or with {mixer}; it has"
            f" {', '.join(dict.fromkeys(pattern))}"
        )
    known = mixer_options(mixer)
    given = mixers.pop(source)
    shared = {name: value for name, value in given.items() if name in known}
    if source == SOFTMAX:
        plain = mixer_options(SOFTMAX, context_length=given["context_length"])
        for name, value in given.items():
            if name not in known and value != plain[name]:
                raise ValueError(
                    f"{workdir} must be a run with {name}={plain[name]!r}, for {mixer} has no"
                    f" {name}; got {value!r}"
                )
    config.model.pattern = tuple(mixer if name == source else name for name in pattern)
    config.model.mixers = mixers | {mixer: mixer_options(mixer, **(shared | own))}
    return config


def fine_tuning(config: Any, *, lr: float, steps: int, batch_size: int) -> None:
    """Sets the optimiser that both papers have: AdamW without decay of weights, a constant rate."""
    config.steps, config.batch_size, config.seeds = steps, batch_size, (0,)
    config.optimizer.update(
        {"name": "adamw", "lr": lr, "schedule": "constant", "warmup_steps": 0, "end_lr": 0.0}
    )
    config.optimizer.update({"b2": 0.999, "weight_decay": 0.0, "clip_norm": 1.0, "ssm_lr": 0.0})


def low_rank(config: Any, *, alpha: float, targets: tuple[str, ...]) -> None:
    """Adds maps of rank 8, and trains nothing else."""
    config.model.update({"lora_rank": 8, "lora_alpha": alpha, "lora_targets": targets})
    config.optimizer.frozen = ALL_BUT_LORA
