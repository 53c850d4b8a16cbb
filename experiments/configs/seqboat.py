"""SeqBoat, sparse modular activation (Ren et al., NeurIPS 2023, arXiv 2306.11197).

    python -m experiments.train --config=experiments/configs/seqboat.py:text,smoke --workdir=runs/seqboat

text,smoke: minutes on 2 CPU cores; the log shows the share of activated tokens as activation_density. listops is the
authors' recipe, but causal and without dropout, with RMSNorm and rotary positions. The paper's numbers are for
bidirectional layers (Long Range Arena) and for enwik8 at 8,192 tokens with windows of 1,024: none compares with the
other sizes.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes import recipe


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.mlp = "none"
    options = {
        "window": 128,
        "key_size": 64,
        "expand_v": 2.0,
        "state_size": 16,
        "attention": "softmax",
        "init_temperature": 0.3,
        "rope_base": 10000.0,
    }
    if config.model.width < 128:  # smoke sizes
        options.update(window=32, key_size=16)
    if task == "listops":
        config.steps, config.batch_size = 90_000, 64
        config.model.update({"width": 80, "depth": 6})
        config.optimizer.update(
            {
                "lr": 4e-3,
                "schedule": "linear",
                "warmup_steps": 27_000,
                "b2": 0.98,
                "weight_decay": 0.001,
            }
        )
    config.model.pattern = ("seqboat",)
    config.model.mixers = ConfigDict({"seqboat": options})
    return config
