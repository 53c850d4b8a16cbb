"""Monarch Mixer (Fu et al., NeurIPS 2023, arXiv 2310.12109).

    python -m experiments.train --config=experiments/configs/monarch_mixer.py:text,smoke \
        --workdir=runs/monarch

text,smoke: minutes on 2 CPU cores. The paper's numbers are for bidirectional models (GLUE average
79.9 at 80M parameters, as BERT-base with 110M); its causal ones match the perplexity of a
Transformer at 360M parameters. listops and lra_listops .. lra_pathx, which the paper lacks, are
S4's, with both directions and the layer normalisation behind a block of the released models."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.long_range_arena import as_classifier, is_arena, sequence_length


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.mlp = "none"  # the mixer has its own
    # Lags beyond this are not seen; 1024 is the longest of the other tasks.
    context_length: Any = 1024
    if config.task.name == "text":
        context_length = config.task.get_ref("sequence_length")
    if is_arena(task):
        as_classifier(config, norm="layer", encoder="linear", pre_norm=False)
        context_length = sequence_length(config.task)
    options = mixer_options(
        "monarch_mixer", context_length=context_length, causal=not is_arena(task)
    )
    config.model.pattern = ("monarch_mixer",)
    config.model.mixers = {"monarch_mixer": options}
    return config
