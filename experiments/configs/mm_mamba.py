"""mmMamba (Liao et al., 2025, arXiv 2502.13145): a run with softmax attention becomes Mamba-2 in
three stages.

    python -m experiments.train --config=experiments/configs/mm_mamba.py:runs/teacher \
        --workdir=runs/new
    python -m experiments.train --config=experiments/configs/mm_mamba.py:runs/new --workdir=runs/all
    python -m experiments.train --config=experiments/configs/mm_mamba.py:runs/all \
        --workdir=runs/mm_mamba

The argument is the workdir of a run. One with softmax attention gets the layers, whose new
parameters learn what its attention returns (1000 times the mean of transfer_error over the layers);
then W_q, W_k and W_v learn it, too; then both learn the distribution of the first run, which is the
teacher. Published: 20,000 steps each, at rates of 1e-3, 5e-4 and 5e-5 with 128, 128 and 64
sequences, AdamW with decay 0.05, rates that rise and fall over a tenth of the steps each; the last
loss is a sum over the tokens of a sequence there, and a mean here. Published, of a vision-language
model of 2.6B on TextVQA: 47.7, of 66.0. With the name of a task, as in mqar,smoke, a model of these
layers is trained from nothing."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import of_run
from experiments.configs.recipes.base import available_recipes, recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.linearisation import SOFTMAX, fine_tuning, linearised

NAME = "mm_mamba"
NEW = r"conv_[qkv]/.*|dt/.*|dt_bias_H|a_log_H|gate/.*|norm/.*"
# What is not trained: all but these of the mixers, which no mixer of a teacher is.
ALL_BUT_NEW = (rf"(?!stack/(?:period|remainder)/\d+/mixer/(?:{NEW})$).*",)
ALL_BUT_MIXERS = (rf"(?!stack/(?:period|remainder)/\d+/mixer/(?:(?:query|key|value)/.*|{NEW})$).*",)


def get_config(run: str) -> ConfigDict:
    if run.partition(",")[0] in available_recipes():
        config: Any = recipe(run)
        config.model.pattern = (NAME,)
        config.model.mixers = {NAME: mixer_options(NAME)}
        return config
    source: Any = of_run.get_config(run)
    first = NAME not in source.model.pattern
    before = "softmax" if first else source.model.mixers[NAME].stage
    if before == "softmax":
        config = linearised(run, NAME, stage="new")
        fine_tuning(config, lr=1e-3, steps=20_000, batch_size=128)
        config.optimizer.frozen = ALL_BUT_NEW
    elif before == "new":
        config = linearised(run, NAME, stage="all")
        fine_tuning(config, lr=5e-4, steps=20_000, batch_size=128)
        config.optimizer.frozen = ALL_BUT_MIXERS
    else:
        config = linearised(run, NAME, stage="student")
        fine_tuning(config, lr=5e-5, steps=20_000, batch_size=64)
        config.optimizer.frozen = ALL_BUT_MIXERS
        config.model.teacher = teacher_of(config)
    config.optimizer.update({"schedule": "wsd", "warmup_steps": 2_000, "weight_decay": 0.05})
    return config


def teacher_of(config: Any) -> dict[str, Any]:
    """The section of the model that a model of these layers came from."""
    model = config.model.to_dict()
    model.pop("name")
    model.pop("teacher", None)
    known = mixer_options(SOFTMAX, context_length=1)
    own = {name: v for name, v in model["mixers"].pop(NAME).items() if name in known}
    model["mixers"] |= {SOFTMAX: mixer_options(SOFTMAX, **own)}
    model["pattern"] = tuple(SOFTMAX if name == NAME else name for name in model["pattern"])
    return model
