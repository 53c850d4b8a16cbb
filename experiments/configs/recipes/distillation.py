"""Configs that give a trained run of images another attention, and the run itself as a teacher."""

from typing import Any

from experiments.configs import of_run

SOFTMAX = "vit"
ALL_BUT_ATTENTION = r"(?!stack/.*/mixer/).*"


def taught(workdir: str, mixer: str) -> Any:
    """The config of the run in `workdir`, with `mixer` where it has softmax attention, whose
    options are left to the caller; with the run's model as a teacher that stays as it is; a quarter
    of its steps.

    Raises ValueError for a run without softmax attention, or of another network."""
    config: Any = of_run.get_config(workdir)
    model = config.model.to_dict()
    if model["name"] != "diffusion_transformer" or SOFTMAX not in model["pattern"]:
        raise ValueError(
            f"{workdir} must be a run of diffusion_transformer with softmax attention ({SOFTMAX});"
            f" it has {model['name']} with {', '.join(model['pattern'])}"
        )
    teacher = {name: value for name, value in model.items() if name not in ("name", "teacher")}
    config.model.teacher = teacher
    config.model.pattern = tuple(mixer if name == SOFTMAX else name for name in model["pattern"])
    config.optimizer.frozen = ("teacher/.*",)
    config.steps = max(config.steps // 4, 1)
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.steps // 10)
    config.eval.every_steps = min(config.eval.every_steps, config.steps)
    config.checkpoint.every_steps = min(config.checkpoint.every_steps, config.steps)
    return config
