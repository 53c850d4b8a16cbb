"""Forecasting of the sets that S-Mamba (Wang et al., 2025, arXiv 2403.11144) and iTransformer (Liu
et al., ICLR 2024, arXiv 2310.06625) report: 96 rows are read, 96 to 720 forecast.

An epoch is every training window once, without a last batch that is not full. The learning rate is
that of the first two epochs and halved after each further one; ten epochs, of which the best
validation error counts. The papers stop after three epochs without a better one; we go on, at rates
that are hardly 1 % of the first. What differs by model and set is in the models' configs."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base
from experiments.configs.recipes.defaults import task_options

# Training rows of the published sets and of waves; of the last two, 70 % of 7,588 and of 8,000.
TRAINING_ROWS = {"ETTh1": 8_640, "ETTh2": 8_640, "exchange": 5_311, "waves": 5_600}
HORIZONS = (96, 192, 336, 720)
EPOCHS = 10


def etth1_96(smoke: bool) -> ConfigDict:
    """Seven variates of a transformer station, hour by hour; the next four days."""
    return _recipe("ETTh1", 96, smoke)


def etth1_192(smoke: bool) -> ConfigDict:
    return _recipe("ETTh1", 192, smoke)


def etth1_336(smoke: bool) -> ConfigDict:
    return _recipe("ETTh1", 336, smoke)


def etth1_720(smoke: bool) -> ConfigDict:
    return _recipe("ETTh1", 720, smoke)


def etth2_96(smoke: bool) -> ConfigDict:
    """The same of another station."""
    return _recipe("ETTh2", 96, smoke)


def etth2_192(smoke: bool) -> ConfigDict:
    return _recipe("ETTh2", 192, smoke)


def etth2_336(smoke: bool) -> ConfigDict:
    return _recipe("ETTh2", 336, smoke)


def etth2_720(smoke: bool) -> ConfigDict:
    return _recipe("ETTh2", 720, smoke)


def exchange_96(smoke: bool) -> ConfigDict:
    """Eight exchange rates, day by day."""
    return _recipe("exchange", 96, smoke)


def exchange_192(smoke: bool) -> ConfigDict:
    return _recipe("exchange", 192, smoke)


def exchange_336(smoke: bool) -> ConfigDict:
    return _recipe("exchange", 336, smoke)


def exchange_720(smoke: bool) -> ConfigDict:
    return _recipe("exchange", 720, smoke)


def forecasting(smoke: bool) -> ConfigDict:
    """Generated waves, or `--config.task.dataset=<file.csv>`: any series with dates. Sizes of our
    own."""
    return _recipe("waves", 96, smoke)


def set_epochs(config: Any, *, lr: float, batch_size: int, epochs: int = EPOCHS) -> None:
    """Sets the learning rate, the batch and with them steps, schedule and what is done once an
    epoch; at smoke size only the rate. An override of the data set leaves the steps as they are."""
    config.optimizer.lr = lr
    if is_smoke(config):
        return
    task = config.task
    windows = TRAINING_ROWS[task.dataset] - task.context - task.horizon + 1
    steps = windows // batch_size
    config.batch_size, config.steps = batch_size, epochs * steps
    config.log_every_steps = max(steps // 4, 1)
    config.optimizer.schedule = f"halving:{steps}"
    config.eval.every_steps = config.checkpoint.every_steps = steps


def is_smoke(config: Any) -> bool:
    """Whether a forecasting recipe has its smoke size."""
    return config.optimizer.schedule == "cosine"


def encoder(config: Any, mixer: str, options: dict[str, Any], *, width: int, depth: int) -> None:
    """Makes the model the papers': an encoder of variates, norms behind the sums, an MLP as wide
    inside as outside. At smoke size no wider than 64."""
    width = min(width, 64) if is_smoke(config) else width
    config.model.update(
        {
            "tokens": "variates",
            "width": width,
            "depth": depth,
            "pre_norm": False,
            "mlp_width": width,
            "mlp_init": "fan_in",
            "mlp_dropout": 0.1,
            "embedding_dropout": 0.1,
            "dropout": 0.0,
            "pattern": (mixer,),
            "mixers": {mixer: options},
        }
    )


def require_forecasting(config: Any, model: str, task: str) -> None:
    """Raises ValueError unless the recipe's model is a forecaster."""
    if config.model.name != "forecaster":
        raise ValueError(
            f"{model} reads series: use a task of forecasting, such as etth1_96; got {task!r}"
        )


def _recipe(dataset: str, horizon: int, smoke: bool) -> ConfigDict:
    """A forecaster of tokens along time, of sizes of our own, to which a config adds a causal
    mixer; configs of papers change it with `encoder`. At smoke size waves in the place of files."""
    config: Any = base(
        task=task_options("forecasting", dataset=dataset, horizon=horizon),
        model={
            "name": "forecaster",
            "tokens": "time",
            "instance_norm": True,
            "width": 128,
            "depth": 2,
            "pre_norm": True,
            "mlp": "gelu",
            "mlp_width": 128,
            "mlp_init": "normal",
            "mlp_dropout": 0.0,
            "norm": "layer",
            "norm_eps": 1e-5,
            "embedding_dropout": 0.1,
            "dropout": 0.1,
            "scan_layers": True,
            "remat": "none",
        },
        steps=1,
        batch_size=32,
        # Adam, without decay and clipping.
        optimizer={"weight_decay": 0.0, "clip_norm": 0.0, "schedule": "constant"},
        evaluation={
            "examples": 100_000,
            "best_metric": "validation/mse",
            "best_mode": "min",
            "at_best": True,
        },
    )
    if smoke:
        config.task.update({"dataset": "waves", "horizon": min(horizon, 96)})
        config.steps, config.log_every_steps = 200, 20
        config.model.width = config.model.mlp_width = 32
        config.optimizer.update({"schedule": "cosine", "warmup_steps": 20})
        config.eval.update({"every_steps": 100, "examples": 256})
        config.checkpoint.every_steps = 100
    set_epochs(config, lr=3e-3 if smoke else 5e-4, batch_size=32)
    return config
