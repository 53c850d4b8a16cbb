"""Metrics of a checkpoint on all evaluations of its task.

    python -m experiments.evaluate --workdir=runs/gla [--step=best] [--examples=4096]

Prints one line per metric and writes nothing. For models with a recurrent state the last line is
the largest difference between logits computed in parallel and token by token: the two are the same
function, so it shows rounding only."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax import P
from jax.sharding import Mesh

from experiments.objectives.objective import objective, report_metrics
from experiments.training import command_line
from experiments.training.mesh import place_batch, process_rows
from experiments.training.metrics import finite
from experiments.training.progress import spread
from experiments.training.run_loading import LoadedRun, load_run
from experiments.training.state import Blueprint, over_replicas
from experiments.training.task import Task, evaluation_batches

DECODED_EXAMPLES = 4
DECODED_TOKENS = 256

EvalStep = Callable[[Any, Any, Any], dict[str, jax.Array]]


def make_eval_step(blueprint: Blueprint, task: Task, seeds: Sequence[int]) -> EvalStep:
    """Compiled (params, variables, batch) -> sums; all replicas see the same batch. No dropout.

    To be called under a mesh; every process gets all sums.
    """

    def one(params: Any, variables: Any, batch: Any) -> dict[str, jax.Array]:
        model = nnx.merge(blueprint.graphdef, params, variables)
        model.eval()
        return objective(task.loss, model, batch)[1]

    return jax.jit(over_replicas(one, seeds, in_axes=(0, 0, None)), out_shardings=P())


def evaluate_task(
    task: Task,
    eval_step: EvalStep,
    params: Any,
    variables: Any,
    *,
    mesh: Mesh,
    seeds: Sequence[int],
    examples: int,
    batch_size: int,
) -> dict[str, dict[str, list[float]]]:
    """{evaluation: {metric: [one value per seed]}} over up to `examples` examples each."""
    results = {}
    for name in task.evaluations:
        batches = evaluation_batches(
            task,
            name,
            examples=examples,
            batch_size=batch_size,
            rows=process_rows(mesh, batch_size),
        )
        per_batch = jax.device_get(
            [
                eval_step(params, variables, place_batch(mesh, batch, batch_size))
                for batch in batches
            ]
        )
        stacked = {
            key: np.stack([np.atleast_1d(part[key]) for part in per_batch]) for key in per_batch[0]
        }
        sums = {key: array.astype(np.float64).sum(axis=0) for key, array in stacked.items()}
        with np.errstate(divide="ignore", invalid="ignore"):
            replicas = [{key: sums[key][replica] for key in sums} for replica in range(len(seeds))]
            metrics = [task.derive(each) | report_metrics(each) for each in replicas]
        results[name] = {
            metric: [float(values[metric]) for values in metrics] for metric in metrics[0]
        }
    return results


def decode_difference(
    blueprint: Blueprint, params: Any, variables: Any, tokens_BT: jax.Array
) -> float:
    """max |parallel logits - token-by-token logits| of one replica on tokens [B, T]."""

    @jax.jit
    def difference(params: Any, variables: Any, tokens_BT: jax.Array) -> jax.Array:
        model: Any = nnx.merge(blueprint.graphdef, params, variables)
        model.eval()
        batch, length = tokens_BT.shape
        positions_BT = jnp.broadcast_to(
            jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length)
        )
        parallel_BTW, _ = model(tokens_BT, positions=positions_BT)

        def decode(state: Any, column: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            token_B, position_B = column
            logits_B1W, state = model(token_B[:, None], state, positions=position_B[:, None])
            return state, logits_B1W[:, 0]

        _, stepwise_TBW = jax.lax.scan(
            decode, model.init_state(batch), (tokens_BT.T, positions_BT.T)
        )
        return jnp.max(jnp.abs(parallel_BTW - jnp.swapaxes(stepwise_TBW, 0, 1)))

    return float(difference(params, variables, tokens_BT))


def evaluate(run: LoadedRun, examples: int | None = None) -> dict[str, Any]:
    """All metrics of a loaded checkpoint: {"step", "seeds", "evaluations",
    "decode_max_abs_difference"}.

    The difference is the largest over replicas, on a few examples of the first evaluation, packed
    documents read as one sequence; None for models that keep no state."""
    config, task = run.config, run.task
    devices = run.mesh.devices.size
    part = config.batch_size // config.accumulate
    with jax.set_mesh(run.mesh):
        results = evaluate_task(
            task,
            make_eval_step(run.blueprint, task, run.seeds),
            run.params,
            run.variables,
            mesh=run.mesh,
            seeds=run.seeds,
            examples=examples or config.eval.examples,
            batch_size=-(-part // devices) * devices,
        )
    source = next(iter(task.evaluations.values()))
    batch = source.fetch(np.arange(min(DECODED_EXAMPLES, source.length or DECODED_EXAMPLES)))
    difference = None
    if run.blueprint.state_bytes is not None and "tokens" in batch:
        tokens_BT = jnp.asarray(batch["tokens"][:, :DECODED_TOKENS])
        check = functools.partial(decode_difference, run.blueprint, tokens_BT=tokens_BT)
        difference = max(check(*run.replica(place)) for place in range(len(run.seeds)))
    return {
        "workdir": str(run.workdir),
        "step": run.step,
        "seeds": list(run.seeds),
        "evaluations": results,
        "decode_max_abs_difference": difference,
    }


def main() -> None:
    options = flags.FLAGS
    if options.examples is not None and options.examples < 1:
        raise ValueError(f"--examples must be at least 1; got {options.examples}")
    result = evaluate(load_run(Path(options.workdir), options.step), options.examples)
    if options.json:
        print(json.dumps(finite(result)))
        return
    print(f"{result['workdir']}  step {result['step']}  seeds {result['seeds']}")
    for evaluation, metrics in result["evaluations"].items():
        for metric, values in metrics.items():
            print(f"{evaluation}/{metric}  {spread(values)}")
    if result["decode_max_abs_difference"] is not None:
        print(f"decode_max_abs_difference  {result['decode_max_abs_difference']:.3g}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a run of experiments.train.", required=True)
    flags.DEFINE_string("step", "latest", "Step of the checkpoint: a number, latest or best.")
    flags.DEFINE_integer(
        "examples", None, "Examples per evaluation (default: config.eval.examples)."
    )
    flags.DEFINE_bool("json", False, "Print one JSON object instead of lines.")
    command_line.run(main)
