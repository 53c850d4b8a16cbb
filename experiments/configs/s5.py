"""S5, simplified state-space layers (Smith, Warrington, Linderman, ICLR 2023, arXiv 2208.04933).

    python -m experiments.train --config=experiments/configs/s5.py:images,smoke --workdir=runs/s5

images,smoke: half a minute on 2 CPU cores, to a test accuracy near 0.75. listops is the paper's recipe, but causal,
with RMSNorm, and with larger C at the start. Published test accuracies on the Long Range Arena, bidirectional: ListOps
62.15, text 89.31, retrieval 91.40, image 88.00, Pathfinder 95.33, Path-X 98.58, mean 87.46.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes import recipe


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.mlp = "none"  # the block has its own gate
    options = {
        "state_size": config.model.width,
        "blocks": 4,
        "init": "legs",
        "dt_min": 1e-3,
        "dt_max": 1e-1,
        "discretisation": "zoh",
        "gate": "half_glu1",
        "clip_eigenvalues": False,
    }
    config.model.pattern = ("s5",)
    # The paper's ratios lie between 1/5 and 1/2.
    config.optimizer.ssm_lr = 0.25 * config.optimizer.lr
    if task == "listops":
        epoch = 96_000 // 50
        config.steps, config.batch_size = 40 * epoch, 50
        config.model.update({"width": 128, "depth": 8})
        options.update(state_size=16, blocks=8, gate="half_glu2")
        config.optimizer.update(
            {"lr": 3e-3, "ssm_lr": 1e-3, "warmup_steps": epoch, "weight_decay": 0.04}
        )
    config.model.mixers = ConfigDict({"s5": options})
    return config
