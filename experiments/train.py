"""Trains one config.

    python -m experiments.train --config=experiments/configs/gla.py:mqar,smoke --workdir=runs/gla
    python -m experiments.train --config=experiments/configs/gla.py:mqar,smoke \\
        --workdir=runs/three --config.optimizer.lr=3e-4 --config.seeds="(0, 1, 2)"

The same command continues a run that was interrupted, to the bit on CPU. In the workdir: run.json
(config, commit, versions, devices, data; written before the first step), the run's own
tokenizer.json if it has one, metrics.jsonl, tensorboard/, checkpoints/, and at the end loss.png and
summary.json. SIGTERM and SIGINT end the run after the step at hand with a checkpoint and status 143
and 130: not zero, so that a scheduler knows there is more to do."""

import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from experiments.reporting.figures import draw_losses
from experiments.training import checkpoints, command_line, header, run_data, run_record
from experiments.training import config as configs
from experiments.training.batches import train_batches, units_read
from experiments.training.config import Config
from experiments.training.evaluation import check_examples, known_metrics
from experiments.training.loop import Training, parts_of
from experiments.training.memory import check_memory
from experiments.training.mesh import (
    check_host_memory,
    check_lengths,
    make_mesh,
    process_rows,
    traced_on,
)
from experiments.training.metrics import evaluations_at_best, finite, run_summary
from experiments.training.metrics_file import read_rows
from experiments.training.processes import Interruption, join_processes, wait_for_all_processes
from experiments.training.program import Program, make_program
from experiments.training.progress import ProgressReport, warn
from experiments.training.run_loading import matching_params
from experiments.training.state import TrainState
from experiments.training.task import lengths


def run(
    config: Config, workdir: str | Path, *, quiet: bool = False, brief: bool = False
) -> dict[str, Any]:
    """Trains `config` in `workdir` to its last step, from its newest checkpoint if there is one.
    `brief` prints a few lines, `quiet` none.

    Returns the summary, as in summary.json: "evaluations" {evaluation: {metric: [per seed]}} at the
    last step, with config.eval.at_best at the best one; "best" {"step", "value"} of
    config.eval.best_metric (mean over seeds) or None,
    "train", "rejected_steps", "parameters", "tokens" (read by one seed; for other objectives their
    unit, which is "unit"), "state_bytes", "provenance", times, and the environment. A finished run
    returns what it has. Raises ValueError for a config that cannot work, before anything is
    written; FloatingPointError if the run diverged; SystemExit after a checkpoint if the process
    was told to end."""
    began = time.monotonic()
    if not str(workdir):
        raise ValueError("--workdir must name a directory; got ''")
    workdir = Path(workdir).expanduser().absolute()

    # --- Config: everything that can be wrong is found before the workdir is touched.
    run_record.check_same_everywhere(workdir, config)
    configs.validate(config)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir must be a directory; {workdir} is a file")
    run_record.check_continues(workdir, config)
    if (summary := run_record.read_summary(workdir)) is not None:
        return summary

    mesh = make_mesh(config.mesh)
    quiet = quiet or jax.process_index() > 0
    with ProgressReport(config.steps, quiet=quiet, brief=brief) as progress:
        progress.say(header.beginning(config, mesh, workdir))
        progress.doing("preparing data and model")
        return _train(config, mesh, workdir, progress, began)


def _train(
    config: Config, mesh: Mesh, workdir: Path, progress: ProgressReport, began: float
) -> dict[str, Any]:
    """The summary, as of `run`, of a valid config that is not finished in its workdir."""
    program, best = prepare(run_data.with_kept_files(config, workdir), mesh)
    task, seeds = program.task, program.seeds
    data = run_data.facts(config, task)
    run_record.check_same_everywhere(workdir, config, data["provenance"])
    remedy = f"use another --workdir, with config.init_from={workdir} to start from its weights"
    run_data.check_same_data(workdir, config, data["provenance"], remedy)
    rows = process_rows(mesh, config.batch_size)
    batches = train_batches(task, seeds=seeds, batch_size=config.batch_size, rows=rows)
    first_params = None
    if config.init_from and not checkpoints.steps(workdir / "checkpoints"):
        first_params = matching_params(Path(config.init_from), program)

    progress.say(header.contents(program))
    workdir.mkdir(parents=True, exist_ok=True)
    with traced_on(mesh, config), run_record.exclusive(workdir), Interruption() as interruption:
        step, state = _begin(program, workdir, batches, first_params)
        facts = {
            "seeds": list(seeds),
            "parameters": program.blueprint.parameter_count,
            "state_bytes": program.blueprint.state_bytes,
            **data,
        }
        if step:
            progress.say(f"going on from step {step:,}")
        leading = jax.process_index() == 0
        if leading:
            run_record.write(workdir, config, facts, step=step)
            run_data.keep_files(workdir, task)
        progress.begin_at(step)
        training = Training(program, workdir, best, step, progress)
        state = training.advance(state, batches, interruption)
        evaluations = training.evaluations or training.evaluate(state)

        # --- Summary
        progress.doing("saving")
        wait_for_all_processes("finished")
        size = {"batch_size": config.batch_size, "steps": config.steps}
        rows = read_rows(workdir)
        if config.eval.at_best:
            evaluations = evaluations_at_best(rows, best, evaluations)
        summary = {
            "workdir": str(workdir),
            "step": config.steps,
            **facts,
            "tokens": units_read(task, seed=seeds[0], **size),
            "unit": program.work.unit,
            "evaluations": evaluations,
            **run_summary(rows, best),
            "compile_seconds": training.meter.compile_seconds,
            "seconds": time.monotonic() - began,
            **run_record.environment(),
        }
        summary = finite(summary)
        if leading:
            draw_losses(workdir, seeds)
            run_record.write_json(workdir / "summary.json", summary)
        return summary


def prepare(config: Config, mesh: Mesh) -> tuple[Program, checkpoints.Best]:
    """The programs of a validated config on a mesh, and what makes a checkpoint the best. Raises
    ValueError for what cannot work; traces, but compiles and allocates nothing."""
    if config.optimizer.offload:
        check_host_memory(mesh)
    program = make_program(config, mesh)
    if mesh.shape["sequence"] > 1:
        check_lengths(mesh, lengths(program.task, program.seeds[0]))
    check_examples(program.task, "config.eval.examples", config.eval.examples)
    check_memory(program)
    return program, checkpoints.Best(_known_metric(program), config.eval.best_mode)


def _begin(
    program: Program, workdir: Path, batches: Any, first_params: Any
) -> tuple[int, TrainState]:
    """The step that is done and the state after it: of the newest whole checkpoint, to whose place
    `batches` is moved; else of another run's parameters or of the seeds."""
    step = 0
    directory = workdir / "checkpoints"
    restored = checkpoints.restore_latest(directory, parts_of(program.state), batches)
    if restored is not None:
        step, parts, damaged = restored
        average = parts.get("average", {}).get("params")
        state = TrainState(**parts["model"], **parts["optimizer"], average=average)
        for problem in damaged:
            warn(f"damaged checkpoint {problem}: going on from step {step}")
    else:
        state = program.start(first_params)
    if jax.process_index() == 0:
        checkpoints.set_aside_unusable(workdir, newest=step)
    wait_for_all_processes("restored")
    return step, state


def _known_metric(program: Program) -> str:
    """config.eval.best_metric if it is "" or one that the task reports; raises ValueError
    otherwise."""
    metric, known = program.config.eval.best_metric, known_metrics(program.task, program.sums)
    if metric and metric not in known:
        raise ValueError(
            f'config.eval.best_metric must be "" or one of {", ".join(known)}; got {metric!r}'
        )
    return metric


def main() -> None:
    config = command_line.given_config()
    # An impossible time-out is named once all processes are there to be told.
    join_processes(max(1, config.heartbeat_timeout_seconds))
    summary = run(config, flags.FLAGS.workdir)
    if jax.process_index() == 0:
        print(
            f"{summary['workdir']}: {summary['step']} steps, {summary['seconds']:.1f} s, see"
            " summary.json and loss.png"
        )


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "File of experiments/configs, as <file>:<task>[,smoke]."
    )
    flags.DEFINE_string(
        "workdir", None, "Directory of the run; made if it does not exist.", required=True
    )
    flags.mark_flag_as_required("config")
    command_line.run(main)
