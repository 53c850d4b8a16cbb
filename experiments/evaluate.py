"""Metrics of a checkpoint on all evaluations of its task.

    python -m experiments.evaluate --workdir=runs/gla
    python -m experiments.evaluate --workdir=runs/gla --step=best --examples=4096 --averaged

Prints one line per metric and writes nothing. For models with a recurrent state the last line is
the largest difference between logits computed in parallel and token by token: the two are the same
function, so it shows rounding only."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments.objectives.next_token import NextToken
from experiments.training import command_line
from experiments.training.evaluation import AppliedModel, check_examples, evaluate_task
from experiments.training.metrics import finite
from experiments.training.progress import spread
from experiments.training.run_loading import LoadedRun, load_run
from experiments.training.state import Blueprint
from experiments.training.task import Examples, Task

DECODED_EXAMPLES = 4
DECODED_TOKENS = 256


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
    check_examples(task, "--examples", examples or config.eval.examples)
    with jax.set_mesh(run.mesh):
        apply = AppliedModel(run.blueprint, run.mesh, config, examples=examples)
        results = evaluate_task(task, apply, (run.params, run.variables))
    tokens_BT, difference = _decoded_tokens(task), None
    if run.blueprint.state_bytes is not None and tokens_BT is not None:
        check = functools.partial(decode_difference, run.blueprint, tokens_BT=tokens_BT)
        difference = max(check(*run.replica(place)) for place in range(len(run.seeds)))
    return {
        "workdir": str(run.workdir),
        "step": run.step,
        "seeds": list(run.seeds),
        "evaluations": results,
        "decode_max_abs_difference": difference,
    }


def _decoded_tokens(task: Task) -> jax.Array | None:
    """A few sequences [B, T] of the first evaluation, for a task of tokens."""
    sources = [source for source in task.evaluations.values() if isinstance(source, Examples)]
    if not isinstance(task.objective, NextToken) or not sources:
        return None
    count = min(DECODED_EXAMPLES, sources[0].length or DECODED_EXAMPLES)
    return jnp.asarray(sources[0].fetch(np.arange(count))["tokens"][:, :DECODED_TOKENS])


def main() -> None:
    options = flags.FLAGS
    if options.examples is not None and options.examples < 1:
        raise ValueError(f"--examples must be at least 1; got {options.examples}")
    run = load_run(
        Path(options.workdir),
        options.step,
        averaged=options.averaged,
        changed_data=options.changed_data,
    )
    result = evaluate(run, options.examples)
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
    flags.DEFINE_bool("averaged", False, "The average of the parameters (config.ema_decay).")
    flags.DEFINE_bool(
        "changed_data",
        False,
        "Evaluate also if the data are not those that the run was trained on.",
    )
    flags.DEFINE_bool("json", False, "Print one JSON object instead of lines.")
    command_line.run(main)
