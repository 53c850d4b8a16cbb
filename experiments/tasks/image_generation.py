"""Images of a class, learned by taking noise away."""

from typing import Annotated, Any

import numpy as np

from experiments.objectives.denoising import DenoisingGrid
from experiments.objectives.distillation import FEATURES, Distillation
from experiments.objectives.evaluation import Sums
from experiments.objectives.flow_matching import TIMES, FlowMatching
from experiments.objectives.noise_prediction import NoisePrediction
from experiments.objectives.noise_schedules import SCHEDULES, Steps
from experiments.tasks.image_classification import (
    EVALUATED,
    Changes,
    SideOrDefault,
    images_of,
    training_images,
)
from experiments.tasks.sources.image_sets import image_set, in_grey
from experiments.training.task import Batch, Examples, Task
from models.parts.options import Probability, Range, Weight, check_choice

# Times at which an evaluation sees each image.
Times = Annotated[int, Range(1, 1000)]


def make(
    dataset: str = "digits",
    size: SideOrDefault = 0,
    grey: bool = False,
    flip: bool = False,
    objective: str = "noise",
    schedule: str = "linear",
    noise_steps: Steps = 1000,
    learned_variance: bool = True,
    flow_times: str = "uniform",
    class_dropout: Probability = 0.1,
    distil_output: Weight = 0.0,
    distil_variance: Weight = 0.0,
    distil_features: Weight = 0.0,
    features: str = "outputs",
    evaluated_times: Times = 10,
    test_split: str = "test",
    data_dir: str = "~/tensorflow_datasets",
    download: bool = False,
) -> Task:
    """Examples of an image data set; evaluations "validation" and "test", the error on noise and at
    times that are the same for all models.

    dataset, size, grey, flip, test_split, data_dir, download
                      as of image_classification
    objective         "noise": NoisePrediction, with schedule, noise_steps and learned_variance;
                      "flow": FlowMatching, with flow_times
    class_dropout     the share of images whose class the model is not told
    distil_output, distil_variance, distil_features
                      weights of what a model with a teacher (model.teacher) learns from it:
                      experiments/objectives/distillation.py
    features          what distil_features is of: the "outputs" of mixers, or "attention"
    evaluated_times   at which an evaluation sees each image

    Pixels are scaled to [-1, 1]. Metrics: mse.

    Raises as image_classification does."""
    check_choice("objective", objective, ("noise", "flow"))
    check_choice("schedule", schedule, SCHEDULES)
    check_choice("flow_times", flow_times, TIMES)
    check_choice("features", features, FEATURES)
    source = image_set(dataset, data_dir, download, test_split=test_split, of_any_size=size > 0)
    if grey:
        source = in_grey(source)
    rows, columns = (size, size) if size else source.shape[:2]
    channels = 1 if len(source.shape) == 2 else source.shape[2]
    minimised = objective_of(
        source.classes,
        objective=objective,
        schedule=schedule,
        noise_steps=noise_steps,
        learned_variance=learned_variance,
        flow_times=flow_times,
        class_dropout=class_dropout,
    )
    doubled = isinstance(minimised, NoisePrediction) and learned_variance
    if distil_variance and not doubled:
        raise ValueError(
            "distil_variance must be 0 without objective='noise' and learned_variance=True; got"
            f" {distil_variance}"
        )
    weights = [float(weight) for weight in (distil_output, distil_variance, distil_features)]
    taught = any(weights)
    grid = DenoisingGrid(minimised, evaluated_times)
    changes = Changes(flip=flip)
    return Task(
        sizes={
            "classes": source.classes,
            "channels": channels,
            "output_channels": 2 * channels if doubled else channels,
            "height": rows,
            "width": columns,
        },
        train=lambda seed: training_images(source, rows, columns, changes, seed),
        evaluations={
            split: Sums(numbered(images_of(source, split, rows, columns)), grid)
            for split in EVALUATED
        },
        objective=Distillation(minimised, *weights, features=features) if taught else minimised,
        provenance={
            "images": source.origin,
            "train_images": len(source.splits["train"][0]),
            "images_sha256": source.sha256,
        },
    )


def objective_of(
    classes: int,
    *,
    objective: str,
    schedule: str,
    noise_steps: int,
    learned_variance: bool,
    flow_times: str,
    class_dropout: float,
    **others: Any,
) -> NoisePrediction | FlowMatching:
    """The objective of a task with these options, of which the others do not matter."""
    del others
    dropout = float(class_dropout)
    if objective == "flow":
        return FlowMatching(classes, flow_times, dropout)
    return NoisePrediction(classes, schedule, noise_steps, learned_variance, dropout)


def numbered(examples: Examples) -> Examples:
    """The examples, each with its number: the noise of evaluations follows from it."""

    def fetch(indices: np.ndarray) -> Batch:
        return {**examples.fetch(indices), "number": indices.astype(np.int32)}

    return Examples(fetch, examples.length)
