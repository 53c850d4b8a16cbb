"""Answers as classes: a task that asks for a token after the last one, for a network with a head of
classes, such as models/networks/sequence_classifier.py."""

import dataclasses
from collections.abc import Callable

import numpy as np

from experiments.objectives.classification import Classification
from experiments.training.task import Batch, Examples, Task
from models.parts.options import check_choice

ANSWERS = ("token", "class")


def answered_by(answer: str, task: Task, classes: int) -> Task:
    """`task` itself for answer="token", whose answers are the last `classes` tokens of its
    vocabulary; for "class" with these as labels and without them in the vocabulary. The tokens that
    there are end where the answer was asked for. Raises ValueError for another answer."""
    check_choice("answer", answer, ANSWERS)
    if answer == "token":
        return task
    vocabulary = task.sizes["vocabulary"] - classes

    def labelled(batch: Batch) -> Batch:
        tokens = batch["tokens"]
        return {
            "tokens": tokens,
            "mask": np.arange(tokens.shape[1])[None] <= batch["readout_positions"],
            "labels": batch["targets"][:, 0] - vocabulary,
            "weights": batch["weights"][:, 0],
        }

    return classified(task, labelled, {"vocabulary": vocabulary, "classes": classes})


def classified(task: Task, labelled: Callable[[Batch], Batch], sizes: dict[str, int]) -> Task:
    """`task` with batches as `labelled` makes them of what they were, to be classified."""

    def of(examples: Examples) -> Examples:
        return dataclasses.replace(
            examples, fetch=lambda indices: labelled(examples.fetch(indices))
        )

    def train(seed: int) -> Examples | tuple[Examples, ...]:
        parts = task.train(seed)
        return of(parts) if isinstance(parts, Examples) else tuple(map(of, parts))

    return dataclasses.replace(
        task,
        sizes=sizes,
        train=train,
        evaluations={
            name: of(scored) if isinstance(scored, Examples) else scored
            for name, scored in task.evaluations.items()
        },
        objective=Classification(),
    )
