"""MoM, mixture of memories (Du et al., ICLR 2026, arXiv 2502.13685).

    python -m experiments.train --config=experiments/configs/mom.py:text,smoke --workdir=runs/mom
    python -m experiments.train --config=experiments/configs/mom.py:text --workdir=runs/mom_gla \
      --config.model.mixers.mom.rule=gla --config.model.mixers.mom.execution=gathered

text,smoke: minutes on 2 CPU cores. The paper's language models (380M parameters, 15B tokens of
SlimPajama): average over six recall-intensive tasks 28.16, against 24.78 of Gated DeltaNet and
31.70 of a Transformer; WikiText perplexity 25.86, 26.47 and 26.88. """

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = {
        "memories": 4,
        "top_k": 2,
        "shared_memory": True,
        "rule": "gated_delta_net",
        "execution": "padded",
        "load_balancing": "global_batch",
        "micro_batch_size": 1,
        "balance_weight": 0.01,
        "heads": 4,
        "expand_k": 1.0,
        "expand_v": 1.0,
        "conv_width": 4,
        "dt_min": 1e-3,
        "dt_max": 1e-1,
        "gate_rank": 16,
        "gate_temperature": 16.0,
        "norm_eps": 1e-5,
    }
    if config.task.name == "mqar":
        options.update(heads=2)  # as the other models have there
    config.model.pattern = ("mom",)
    config.model.mixers = ConfigDict({"mom": options})
    return config
