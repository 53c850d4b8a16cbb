"""TransNormer T2 (Qin et al., EMNLP 2022, arXiv 2210.10340): DiagAttention in the lower half of the layers,
NormAttention in the upper half.

    python -m experiments.train --config=experiments/configs/transnormer.py:text,smoke --workdir=runs/transnormer

text,smoke: a few minutes on 2 CPU cores. The paper's autoregressive WikiText-103: test perplexity 31.01, as softmax
attention. listops has the paper's sizes, batch and learning rate, the rest as S4; mean accuracy on the Long Range
Arena, bidirectional, 64.80 (softmax attention 57.37). Bidirectional, of 12 layers 0, 6 and 12 with DiagAttention: 4.23,
3.82, 4.75.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes import recipe


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    heads = 4
    if task == "listops":
        heads, config.batch_size = 8, 128
        # 40 epochs, as the recipe has it
        config.steps, config.optimizer.warmup_steps = 30_000, 3_000
        config.model.update({"width": 128, "depth": 4, "mlp_ratio": 4.0})
        config.optimizer.lr = 1e-4
    lower = config.model.depth // 2
    config.model.pattern = ("diag_attention",) * lower + ("transnormer",) * (
        config.model.depth - lower
    )
    config.model.mixers = ConfigDict(
        {
            "diag_attention": {"heads": heads, "block": 64},
            "transnormer": {"heads": heads, "norm_eps": 1e-6},
        }
    )
    return config
