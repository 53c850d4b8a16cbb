"""MossFormer2 (Zhao et al., ICASSP 2024, arXiv 2312.11825).

    python -m experiments.train --config=experiments/configs/mossformer2.py:separation,smoke \
        --workdir=runs/voices
    python -m experiments.separate --workdir=runs/voices mixture.wav

The first takes about a minute and a half on 2 CPU cores and then improves the SI-SDR of the test by
6 to 7 dB. The published size is separation_large, for speech of your own.

Without the recurrent module, --config.model.mixers.mossformer2.recurrent=none, it is MossFormer."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.separation import is_large, require_separation

# Of our own, for two layers and more on a CPU.
SMALL = {"group": 128, "qk_size": 32, "rotary_size": 16, "recurrent_width": 32, "order": 10}


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    require_separation(config, "mossformer2", task)
    sizes = {} if is_large(config) else {**SMALL, "dropout": 0.0}
    config.model.update(
        {
            # The mixer has norms and everything else of a block.
            "norm": "none",
            "mlp": "none",
            "pattern": ("mossformer2",),
            "mixers": {"mossformer2": mixer_options("mossformer2", **sizes)},
        }
    )
    return config
