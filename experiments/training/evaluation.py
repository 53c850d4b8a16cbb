"""The evaluations of a task, run on a mesh."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jax import P
from jax.sharding import Mesh

from experiments.objectives.evaluation import Metrics, OfModel, Sums
from experiments.objectives.objective import Batch, Work, all_metrics
from experiments.training.batches import evaluation_batches
from experiments.training.config import Config
from experiments.training.mesh import place_batch, process_rows
from experiments.training.program import filling_batch_size
from experiments.training.state import Blueprint, over_replicas, replicas_in_turn
from experiments.training.task import Examples, Task

# Random numbers of evaluations follow from this seed: not from the run's, nor from its step.
SEED = 0


# Of an evaluation without end: hours, on any device.
MOST_EXAMPLES = 10_000_000


def check_examples(task: Task, name: str, examples: int) -> None:
    """Raises ValueError if an evaluation that never ends would read more than MOST_EXAMPLES."""
    for evaluation in task.evaluations:
        scored = task.evaluation(evaluation)
        if isinstance(scored, Sums) and scored.examples.length is None and examples > MOST_EXAMPLES:
            raise ValueError(
                f"{name} must be at most {MOST_EXAMPLES}, as evaluation {evaluation} draws its"
                f" examples without end; got {examples}"
            )


class AppliedModel:
    """The `Apply` of evaluations: the model of a blueprint on a mesh, under which it is to be
    called."""

    def __init__(
        self, blueprint: Blueprint, mesh: Mesh, config: Config, *, examples: int | None = None
    ):
        """examples: of each evaluation, at most; config.eval.examples if None. A batch is the part
        of a training batch that is computed at once, raised to fill the mesh."""
        self.replicas = len(config.seeds)
        self._blueprint, self._mesh = blueprint, mesh
        self._examples = examples or config.eval.examples
        self._batch_size = filling_batch_size(config, mesh) // config.accumulate
        self._compiled: dict[OfModel, Any] = {}

    def __call__(self, function: OfModel, params: Any, batch: Any, key: jax.Array) -> Any:
        def one(params: Any, batch: Any, key: jax.Array) -> Any:
            model = nnx.merge(self._blueprint.graphdef, *params)
            model.eval()
            return function(model, batch, key)

        if function not in self._compiled:
            over = over_replicas(
                one, self.replicas, in_axes=(0, None, None), in_turn=replicas_in_turn(self._mesh)
            )
            self._compiled[function] = jax.jit(over, out_shardings=P())
        values = self._compiled[function](params, batch, key)
        return jax.tree.map(lambda x: x[None], values) if self.replicas == 1 else values

    def batches(
        self, examples: Examples, work: Callable[[Batch], Work] | None = None
    ) -> Iterator[Batch]:
        rows = process_rows(self._mesh, self._batch_size)
        batches = evaluation_batches(
            examples, examples=self._examples, batch_size=self._batch_size, rows=rows
        )
        for batch in batches:
            length = work(batch).length if work else None
            yield place_batch(self._mesh, batch, self._batch_size, length)


def evaluate_task(task: Task, apply: AppliedModel, params: Any) -> dict[str, Metrics]:
    """{evaluation: {metric: [one value per seed]}}; `params` is (parameters, variables)."""
    key = jax.random.key(SEED)
    return {
        name: task.evaluation(name).run(apply, params, jax.random.fold_in(key, number))
        for number, name in enumerate(task.evaluations)
    }


def known_metrics(task: Task, sums: Sequence[str] | None = None) -> list[str]:
    """<evaluation>/<metric> for all evaluations of a task, whose objective has these sums; of None,
    as if it had all that it asks for, but without what layers report."""
    ones = defaultdict(lambda: 1.0) if sums is None else dict.fromkeys(sums, 1.0)
    known = []
    for name in task.evaluations:
        evaluation = task.evaluation(name)
        metrics = (
            all_metrics(evaluation.objective, ones)
            if isinstance(evaluation, Sums)
            else evaluation.metrics
        )
        known += [f"{name}/{metric}" for metric in metrics]
    return known
