"""Trains one config.

    python -m experiments.train --config=experiments/configs/gla.py:mqar,smoke --workdir=runs/gla
    python -m experiments.train --config=... --workdir=... --config.optimizer.lr=3e-4 \
        --config.seeds=(0,1,2)

The same command continues a run that was interrupted, to the bit on CPU. In the workdir: run.json
(config, commit, versions, devices; written before the first step), metrics.jsonl, tensorboard/,
checkpoints/, and at the end loss.png and summary.json. SIGTERM and SIGINT end the run after the
step at hand with a checkpoint and status 143 and 130: not zero, so that a scheduler knows there is
more to do."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from experiments.evaluate import evaluate_task, make_eval_step
from experiments.objectives.objective import report_metrics
from experiments.training import checkpoints, command_line, run_record
from experiments.training import config as configs
from experiments.training.config import Config
from experiments.training.mesh import (
    check_batch_size,
    check_host_memory,
    check_lengths,
    join_processes,
    make_mesh,
    place_batch,
    process_rows,
    traced_on,
    wait_for_all_processes,
)
from experiments.training.metrics import (
    MetricsLog,
    draw_loss,
    finite,
    read_rows,
    run_summary,
    training_row,
)
from experiments.training.notices import warn
from experiments.training.optimizer import make_optimizer, make_schedule, parameter_groups
from experiments.training.processes import Interruption
from experiments.training.progress import ProgressReport
from experiments.training.run_loading import load_model
from experiments.training.speed import SpeedMeter
from experiments.training.state import (
    TrainState,
    empty_window,
    initial_state,
    make_blueprint,
    make_step,
    state_shardings,
    state_specs,
    sum_names,
    with_shardings,
)
from experiments.training.task import Task, configured_task, lengths, tokens_read, train_batches


def run(config: Config, workdir: str | Path, *, quiet: bool = False) -> dict[str, Any]:
    """Trains `config` in `workdir` to its last step, from its newest checkpoint if there is one.

    Returns the summary, as in summary.json: "evaluations" {evaluation: {metric: [per seed]}} at the
    last step, "best" {"step", "value"} of config.eval.best_metric (mean over seeds) or None,
    "train", "rejected_steps", "parameters", "tokens" (read by one seed), "state_bytes",
    "provenance", times, and the environment. A finished run returns what it has. Raises ValueError
    for a config that cannot work, before anything is written; FloatingPointError if the run
    diverged; SystemExit after a checkpoint if the process was told to end."""
    began = time.monotonic()
    workdir = Path(workdir).expanduser().absolute()

    # --- Config: everything that can be wrong is found before the workdir is touched.
    run_record.check_same_everywhere(workdir, config)
    configs.validate(config)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir must be a directory; {workdir} is a file")
    run_record.check_continues(workdir, config)
    if (summary := run_record.read_json(workdir / "summary.json")) is not None:
        return summary
    seeds, steps = tuple(config.seeds), config.steps
    several = len(seeds) > 1
    profile = configs.profile_range(config.profile_steps, steps)
    schedule = make_schedule(config.optimizer, steps)

    # --- Mesh
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh, config.batch_size, config.accumulate)
    if config.optimizer.offload:
        check_host_memory(mesh)
    leading = jax.process_index() == 0

    # --- Data
    task = configured_task(config)
    if mesh.shape["sequence"] > 1:
        check_lengths(mesh, lengths(task, seeds[0]))
    rows = process_rows(mesh, config.batch_size)
    batches = train_batches(task, seeds=seeds, batch_size=config.batch_size, rows=rows)
    beginning = batches.get_state()
    example_batch = next(batches)
    batches.set_state(beginning)

    # --- State: abstract so far; nothing is computed
    blueprint = make_blueprint(config, task)
    tx = make_optimizer(config.optimizer, schedule, parameter_groups(blueprint.params))
    one_part = {
        name: jax.ShapeDtypeStruct(
            (config.batch_size // config.accumulate, *array.shape[1 + several :]), array.dtype
        )
        for name, array in example_batch.items()
    }
    with traced_on(mesh, config):
        sums = sum_names(blueprint, task, one_part)
    best = checkpoints.Best(
        _known_metric(config.eval.best_metric, task, sums), config.eval.best_mode
    )

    def initial() -> TrainState:
        return initial_state(blueprint, tx, sums, seeds)

    abstract = jax.eval_shape(initial)
    specs = state_specs(mesh, blueprint, tx, abstract, seeds, config.mesh.zero)
    shardings = state_shardings(mesh, specs, config.optimizer.offload)
    abstract = with_shardings(abstract, shardings)

    directory, initial_params = workdir / "checkpoints", None
    if config.init_from and not checkpoints.steps(directory):
        source = Path(config.init_from).expanduser().absolute()
        try:
            _, initial_params, _ = load_model(source, "latest", config, blueprint, mesh)
        except ValueError as error:
            raise ValueError(f"config.init_from: {error}") from error

    workdir.mkdir(parents=True, exist_ok=True)
    with traced_on(mesh, config), run_record.exclusive(workdir), Interruption() as interruption:
        # --- State: from the newest whole checkpoint, from another run's weights, or from the seeds
        step_done = 0
        restored = checkpoints.restore_latest(directory, _parts(abstract), batches)
        if restored is not None:
            step_done, parts, damaged = restored
            state = TrainState(**parts["model"], **parts["optimizer"])
            for problem in damaged:
                warn(f"damaged checkpoint {problem}: going on from step {step_done}")
        elif initial_params is not None:
            state = replace(jax.jit(initial, out_shardings=shardings)(), params=initial_params)
        else:
            state = jax.jit(initial, out_shardings=shardings)()
        if leading:
            checkpoints.set_aside_unusable(workdir, newest=step_done)
        wait_for_all_processes("restored")

        def evaluate_now(state: TrainState) -> dict[str, dict[str, list[float]]]:
            return evaluate_task(
                task,
                eval_step,
                state.params,
                state.variables,
                mesh=mesh,
                seeds=seeds,
                examples=config.eval.examples,
                batch_size=config.batch_size // config.accumulate,
            )

        # --- Step
        step_options = {"accumulate": config.accumulate, "offload": config.optimizer.offload}
        train_step = jax.jit(
            make_step(blueprint, task, tx, seeds, **step_options),
            donate_argnums=0,
            out_shardings=shardings,
        )
        empty = jax.jit(lambda: empty_window(sums, seeds), out_shardings=shardings.window)
        eval_step = make_eval_step(blueprint, task, seeds)

        facts = {
            "seeds": list(seeds),
            "parameters": blueprint.parameter_count,
            "state_bytes": blueprint.state_bytes,
            "provenance": dict(task.provenance),
        }
        if leading:
            run_record.write(workdir, config, facts, step=step_done)
        meter = SpeedMeter(blueprint.params)
        evaluations: dict[str, dict[str, list[float]]] = {}
        waiting = None
        with (
            MetricsLog(workdir, step=step_done, seeds=seeds, active=leading) as log,
            checkpoints.Checkpoints(directory, keep=config.checkpoint.keep, best=best) as saves,
            ProgressReport(step_done, steps, quiet=quiet or not leading) as progress,
        ):
            for step in range(step_done + 1, steps + 1):
                if profile and step == max(profile[0], step_done + 1) and step <= profile[1]:
                    jax.profiler.start_trace(str(workdir / "profile"))
                batch = place_batch(mesh, next(batches), config.batch_size, several)
                state = train_step(state, batch)
                meter.count(batch)
                if step == step_done + 1:
                    jax.block_until_ready(state)
                    meter.compiled()
                progress.advance(step)
                if profile and step == profile[1]:
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()

                # --- Log: a window is read when the step after it is already under way, so that
                # devices never wait.
                if waiting:
                    _report(training_row(*waiting, schedule, meter), log, progress, config)
                    waiting = None
                if step % config.log_every_steps == 0 or step == steps:
                    waiting = (step, state.window, meter.take())
                    state = replace(state, window=empty())

                # --- Evaluate
                told = interruption.at(step)
                evaluating = step % config.eval.every_steps == 0 or step == steps
                saving = (
                    step % config.checkpoint.every_steps == 0 or step == steps or told is not None
                )
                if not (evaluating or saving):
                    continue
                jax.block_until_ready(state)
                meter.pause()
                row = training_row(*waiting, schedule, meter) if waiting else {"step": step}
                waiting, score = None, {}
                if evaluating:
                    evaluations = evaluate_now(state)
                    row |= {
                        f"{name}/{key}": each
                        for name, part in evaluations.items()
                        for key, each in part.items()
                    }
                    score = {best.metric: float(np.mean(row[best.metric]))} if best.metric else {}
                if len(row) > 1:
                    _report(row, log, progress, config)

                # --- Checkpoint: rows first, so that no row before a checkpoint can be missing.
                if saving or saves.is_best(score):
                    log.flush()
                    saves.save(step, _parts(state), batches, score)
                if told is not None:
                    saves.close()
                    progress.say(
                        f"{told.name}: saved step {step}/{steps}; the same command goes"
                        " on from there"
                    )
                    raise SystemExit(128 + told)
                meter.resume()

        # --- Summary
        wait_for_all_processes("finished")
        summary = {
            "workdir": str(workdir),
            "step": steps,
            **facts,
            "tokens": tokens_read(task, seed=seeds[0], batch_size=config.batch_size, steps=steps),
            "evaluations": evaluations or evaluate_now(state),
            **run_summary(read_rows(workdir), best),
            "compile_seconds": meter.compile_seconds,
            "seconds": time.monotonic() - began,
            **run_record.environment(),
        }
        summary = finite(summary)
        if leading:
            draw_loss(workdir, seeds)
            run_record.write_json(workdir / "summary.json", summary)
        return summary


def _parts(state: TrainState) -> dict[str, Any]:
    """How a state lies in a checkpoint: what evaluation reads is apart from what only training
    needs."""
    return {
        "model": {"params": state.params, "variables": state.variables},
        "optimizer": {"opt_state": state.opt_state, "window": state.window},
    }


def _known_metric(metric: str, task: Task, sums: tuple[str, ...]) -> str:
    """`metric` if it is "" or one that the task reports; raises ValueError otherwise."""
    ones = dict.fromkeys(sums, 1.0)
    metrics = task.derive(ones) | report_metrics(ones)
    known = [f"{evaluation}/{name}" for evaluation in task.evaluations for name in metrics]
    if metric and metric not in known:
        raise ValueError(
            f'config.eval.best_metric must be "" or one of {", ".join(known)}; got {metric!r}'
        )
    return metric


def _report(
    row: Mapping[str, Any], log: MetricsLog, progress: ProgressReport, config: Config
) -> None:
    """Writes a row, and ends the run if it says that steps are being rejected without end."""
    log.write(row)
    progress.report(row)
    for seed, length in zip(config.seeds, row.get("train/longest_rejected_run", ()), strict=False):
        if length >= config.max_rejected_steps:
            raise FloatingPointError(
                f"the run diverged: of seed {seed}, {length} steps in a row up to step"
                f" {row['step']} had a loss or a gradient that is not finite and were"
                f" rejected (config.max_rejected_steps={config.max_rejected_steps});"
                " lower config.optimizer.lr or config.optimizer.clip_norm, or lengthen"
                " config.optimizer.warmup_steps, and use a new --workdir"
            )


def main() -> None:
    config = flags.FLAGS.config
    # An impossible time-out is named once all processes are there to be told.
    join_processes(max(1, config.heartbeat_timeout_seconds))
    summary = run(config, flags.FLAGS.workdir)
    if jax.process_index() == 0:
        print(
            f"{summary['workdir']}: {summary['step']} steps, {summary['seconds']:.1f}"
            " s, see summary.json and loss.png"
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
