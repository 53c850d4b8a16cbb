"""S4D, diagonal state-space models (Gu et al., NeurIPS 2022, arXiv 2206.11893).

    python -m experiments.train --config=experiments/configs/s4d.py:images,smoke --workdir=runs/s4d

images,smoke: less than a minute on 2 CPU cores, to a test accuracy near 0.75; listops,smoke: a minute, to about 0.25
(guessing 0.1), as S4 and S5. listops is the recipe that the paper shares with S4. Published mean accuracies on the Long
Range Arena, bidirectional: 84.89 from "legs", 85.50 from "inv", 78.39 from "lin" (which fails at Path-X), against 86.09
of S4.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes import recipe


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.mlp = "none"  # the block has its own GLU
    options = {
        "state_size": 64 if config.model.width >= 128 else 16,
        "init": "lin",
        "dt_min": 1e-3,
        "dt_max": 1e-1,
        "discretisation": "zoh",
        "parallel": "convolution",
    }
    if task == "listops":
        options["state_size"] = 4
    config.model.pattern = ("s4d",)
    config.model.mixers = ConfigDict({"s4d": options})
    config.optimizer.ssm_lr = min(1e-3, config.optimizer.lr)
    return config
