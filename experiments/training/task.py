"""What a task is: numbered examples, the sizes that a network needs, what is minimised, and how it
is scored."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from experiments.objectives.evaluation import Evaluation, Sums
from experiments.objectives.next_token import NextToken
from experiments.objectives.objective import Objective
from experiments.training.checkout import CHECKOUT
from models.parts.options import Range, check_value

Batch = dict[str, np.ndarray]

# An example is made as a whole: at the largest length, of 128 MB of random numbers.
LONGEST = 2**24
Length = Annotated[int, Range(1, LONGEST)]
LengthOrDefault = Annotated[int, Range(0, LONGEST)]  # 0: the task's own
Vocabulary = Annotated[int, Range(2, 2**20)]


@dataclass(frozen=True)
class Examples:
    """Numbered examples, random access.

    fetch       maps indices [n] to a dict of arrays [n, ...]; a pure function
    length      how many there are, each numbered below it; training shuffles them anew every epoch.
                None: a stream without end, every example fresh, taken in order
    augment     (arrays [n, ...], indices [n], epochs [n]) -> arrays, a pure function: what training
                makes of examples that it sees for the `epochs`-th time, from 0 on; an evaluation
                sees them as they are. An augmentation that mixes examples fetches the others itself

    Every batch has float "weights" [n, ...]; an example whose weights are all zero does not count.
    """

    fetch: Callable[[np.ndarray], Batch]
    length: int | None = None
    augment: Callable[[Batch, np.ndarray, np.ndarray], Batch] | None = None

    def seen(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        """What training is given of the examples, when it sees them for the `epochs`-th time."""
        arrays = self.fetch(indices)
        return arrays if self.augment is None else self.augment(arrays, indices, epochs)


def from_arrays(arrays: Batch) -> Examples:
    """The rows of arrays [length, ...] that are held in memory."""
    return Examples(
        lambda indices: {name: array[indices] for name, array in arrays.items()},
        len(next(iter(arrays.values()))),
    )


@dataclass(frozen=True)
class Task:
    """What is learned, from which examples, and how it is scored.

    sizes               what a network must know of the data, by the field's names: "vocabulary" of
                        tokens; "classes", "channels", "height", "width" of images; "variates",
                        "horizon" of series. A network's `build` takes those that it names
    train               seed -> examples, a function of the seed; or a tuple of examples which never
                        share a batch (their lengths differ), whose batches then alternate in
                        proportion to their numbers of examples
    evaluations         name -> examples, which the objective scores, or another `Evaluation`; the
                        same for all seeds, none of them drawn from the training stream or split
    objective           what training minimises
    provenance          facts that are recorded with every result, among them the names and hashes
                        of all data: a run goes on only where they are the same
    kept                bytes of the files that options name, by option: a run keeps a copy of them
                        in its workdir, and is continued, evaluated and sampled with that
    """

    sizes: Mapping[str, int]
    train: Callable[[int], Examples | tuple[Examples, ...]]
    evaluations: Mapping[str, Examples | Evaluation]
    objective: Objective = field(default_factory=NextToken)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, bytes] = field(default_factory=dict)

    def evaluation(self, name: str) -> Evaluation:
        """The evaluation `name`. Raises ValueError for one that does not exist."""
        if name not in self.evaluations:
            raise ValueError(
                f"evaluation must be one of {', '.join(self.evaluations)}; got {name!r}"
            )
        scored = self.evaluations[name]
        return Sums(scored, self.objective) if isinstance(scored, Examples) else scored


def lengths(task: Task, seed: int) -> dict[str, int | None]:
    """T of all examples that a run with `seed` reads: training batches (each part of them) and
    evaluations, by name; None where nothing can be cut along time."""
    parts = task.train(seed)
    named = (
        {"training batches": parts}
        if isinstance(parts, Examples)
        else {f"training part {number}": part for number, part in enumerate(parts)}
    )
    evaluations = {name: task.evaluation(name) for name in task.evaluations}
    named |= {
        f"evaluation {name}": evaluation.examples
        for name, evaluation in evaluations.items()
        if isinstance(evaluation, Sums)
    }
    work = task.objective.work
    return {name: work(part.fetch(np.arange(1))).length for name, part in named.items()}


def available_tasks() -> tuple[str, ...]:
    """Names of the files in experiments/tasks."""
    return tuple(sorted(file.stem for file in (CHECKOUT / "experiments/tasks").glob("[!_]*.py")))


def find_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task of experiments/tasks/<name>.py, made with `options`.

    Raises ValueError for a name or an option that does not exist, with those that do, and for a
    value that is not of the option's type in the signature of `make`.
    """
    if name not in available_tasks():
        raise ValueError(
            f"config.task.name must be one of {', '.join(available_tasks())} (files in"
            f" experiments/tasks); got {name!r}"
        )
    make = importlib.import_module(f"experiments.tasks.{name}").make
    known = inspect.signature(make).parameters
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"task {name} has no option {option!r}; known options in task: {', '.join(known)}"
            )
        check_value(f"config.task.{option}", known[option].annotation, value)
    return make(**options)


def configured_task(config: Any) -> Task:
    """The task of a run's config, with the objective that it trains.

    Raises ValueError as `find_task`, and for a z-loss where there are no logits.
    """
    options = config.task.to_dict()
    task = find_task(options.pop("name"), options)
    if not config.z_loss:
        return task
    if not isinstance(task.objective, NextToken):
        raise ValueError(
            "config.z_loss is for tasks with a vocabulary; got"
            f" {config.z_loss} for {config.task.name}"
        )
    objective = dataclasses.replace(task.objective, z_loss=config.z_loss)
    return dataclasses.replace(task, objective=objective)
