"""iTransformer (Liu et al., ICLR 2024, arXiv 2310.06625).

    python -m experiments.train --config=experiments/configs/itransformer.py:etth1_96 \
        --workdir=runs/itransformer --config.task.data_dir=...

Some minutes on 2 CPU cores. Published error of the test windows, 96 rows ahead, MSE and MAE: ETTh1
0.386 and 0.405, ETTh2 0.297 and 0.349, exchange 0.086 and 0.206."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.forecasting import (
    EPOCHS,
    encoder,
    is_smoke,
    require_forecasting,
    set_epochs,
)


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    require_forecasting(config, "itransformer", task)
    dataset, horizon = config.task.dataset, config.task.horizon
    # As in the authors' scripts.
    width = 128
    if dataset == "ETTh1":
        width = 256 if horizon <= 192 else 512
    encoder(config, "itransformer", mixer_options("itransformer"), width=width, depth=2)
    epochs = 1 if (dataset, horizon) == ("exchange", 336) else EPOCHS
    set_epochs(config, lr=3e-3 if is_smoke(config) else 1e-4, batch_size=32, epochs=epochs)
    return config
