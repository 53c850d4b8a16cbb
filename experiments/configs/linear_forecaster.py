"""A linear map from history to forecast (Zeng et al., AAAI 2023, arXiv 2205.13504), the baseline.

    python -m experiments.train --config=experiments/configs/linear_forecaster.py:etth1_96 \
        --workdir=runs/linear --config.task.data_dir=...

Half a minute on 2 CPU cores. DLinear (`--config.model.decomposition=True
--config.model.instance_norm=False`), as iTransformer's paper reports it 96 rows ahead, MSE and MAE:
ETTh1 0.386 and 0.400, ETTh2 0.333 and 0.387, exchange 0.088 and 0.218."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.forecasting import is_smoke, require_forecasting, set_epochs


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    require_forecasting(config, "linear_forecaster", task)
    config.model = ConfigDict(
        {"name": "linear_forecaster", "instance_norm": True, "decomposition": False, "kernel": 25}
    )
    set_epochs(config, lr=3e-3 if is_smoke(config) else 1e-3, batch_size=32)
    return config
