"""S-Mamba (Wang et al., Neurocomputing 2025, arXiv 2403.11144).

    python -m experiments.train --config=experiments/configs/s_mamba.py:etth1_96 \
        --workdir=runs/s_mamba --config.task.data_dir=...
    python -m experiments.train --config=experiments/configs/s_mamba.py:forecasting,smoke \
        --workdir=runs/waves

Some minutes on 2 CPU cores. Published error of the test windows, 96 rows ahead, MSE and MAE: ETTh1
0.386 and 0.405, ETTh2 0.296 and 0.348, exchange 0.086 and 0.207."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.forecasting import (
    HORIZONS,
    encoder,
    is_smoke,
    require_forecasting,
    set_epochs,
)

# Of the authors' scripts, by set: width, states, and a learning rate for each horizon.
SETTINGS: dict[str, tuple[int, int, tuple[float, ...]]] = {
    "ETTh1": (256, 2, (7e-5, 7e-5, 5e-5, 5e-5)),
    "ETTh2": (256, 2, (4e-5, 4e-5, 3e-5, 7e-5)),
    "exchange": (128, 32, (1e-4, 1e-4, 5e-5, 5e-5)),
    "waves": (128, 16, (1e-4,) * 4),  # ours
}


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    require_forecasting(config, "s_mamba", task)
    dataset, horizon = config.task.dataset, config.task.horizon
    width, states, rates = SETTINGS[dataset]
    encoder(config, "s_mamba", mixer_options("s_mamba", state_size=states), width=width, depth=2)
    lr = 3e-3 if is_smoke(config) else rates[HORIZONS.index(horizon)]
    set_epochs(config, lr=lr, batch_size=16 if (dataset, horizon) == ("exchange", 96) else 32)
    return config
