"""Shapes among clutter, as sparse voxels, for models/networks/point_cloud.py.

At full size up to 50,000 voxels to a row, with blocks, windows and groups as LION (Liu et al.,
NeurIPS 2024) has them for scans of roads; its optimiser's rates, with a cosine in the place of its
one cycle. Steps are of our own: data without end have no epochs. `--config.task.data_dir=...` reads
files in the place of shapes."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base
from experiments.configs.recipes.defaults import task_options


def shape_segmentation(smoke: bool) -> ConfigDict:
    """Which shape is each voxel a part of, or is it clutter?"""
    return _recipe("voxel", "validation/mean_iou", smoke)


def shape_classification(smoke: bool) -> ConfigDict:
    """Which shape is each cloud?"""
    return _recipe("cloud", "validation/accuracy", smoke)


def require_points(config: Any, model: str, task: str) -> None:
    """Raises ValueError unless the recipe's model reads voxels."""
    if config.model.name != "point_cloud":
        raise ValueError(
            f"{model} reads point clouds: use a task of those, such as shape_segmentation; got"
            f" {task!r}"
        )


def _recipe(labels: str, best: str, smoke: bool) -> ConfigDict:
    of_voxels = labels == "voxel"
    config: Any = base(
        task=task_options(
            "point_clouds",
            labels=labels,
            grid=(256, 256, 32) if of_voxels else (64, 64, 32),
            voxels=50_000,
            clouds=2 if of_voxels else 64,
            shapes=60,
            radius=(4.0, 12.0),
        ),
        model={
            "name": "point_cloud",
            "width": 64,
            "windows": ((13, 13, 32), (13, 13, 16), (13, 13, 8), (13, 13, 4), (13, 13, 2)),
            "groups": (4096, 2048, 1024, 512, 256),
            "orders": ("x", "y"),
            "shifted_windows": True,
            "fill_groups": False,
            "descriptor": True,
            "generated": 0.2,
            "growth": 1.8,
            "mlp": "gelu",
            "mlp_ratio": 4.0,
            "norm": "layer",
            "norm_eps": 1e-5,
            "branch_norm": False,
            "drop_path": 0.0,
        },
        steps=20_000,
        batch_size=8,
        optimizer={"lr": 3e-3, "weight_decay": 0.05, "clip_norm": 10.0, "warmup_steps": 2_000},
        evaluation={"examples": 64, "best_metric": best},
    )
    if smoke:
        config.task.update({"grid": (16, 16, 16), "radius": (4.0, 6.0), "voxels": 1_024})
        config.task.update({"clouds": 4, "shapes": 2, "noise": 0.1, "clutter": 0.05})
        config.task.test_examples = 64
        config.model.update({"width": 32, "windows": ((5, 5, 16), (5, 5, 8)), "groups": (128, 64)})
        config.steps, config.batch_size, config.log_every_steps = 150, 4, 25
        config.optimizer.warmup_steps = 15
        config.eval.update({"every_steps": 75, "examples": 64})
        config.checkpoint.every_steps = 75
    return config
