"""The loop of a run: steps, and what happens between them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.objectives.evaluation import Metrics
from experiments.training import checkpoints
from experiments.training import config as configs
from experiments.training.evaluation import AppliedModel, evaluate_task
from experiments.training.metrics import MetricsLog, training_row
from experiments.training.processes import Interruption
from experiments.training.program import Program
from experiments.training.progress import ProgressReport
from experiments.training.speed import SpeedMeter
from experiments.training.state import TrainState


class Training:
    """The steps of a run from `step` on, with what happens between them: log, evaluations,
    checkpoints.

    evaluations: those of the last step that had them."""

    def __init__(
        self,
        program: Program,
        workdir: Path,
        best: checkpoints.Best,
        step: int,
        progress: ProgressReport,
    ):
        config, seeds = program.config, program.seeds
        leading = jax.process_index() == 0
        self.program, self.config, self.workdir = program, config, workdir
        self.first, self.steps, self.best = step + 1, config.steps, best
        self.evaluations: dict[str, Metrics] = {}
        self.meter = SpeedMeter(program.blueprint.params, replicas=len(seeds))
        self.log = MetricsLog(workdir, step=step, seeds=seeds, active=leading)
        self.saves = checkpoints.Checkpoints(
            workdir / "checkpoints", keep=config.checkpoint.keep, best=best
        )
        self.progress = progress
        self.apply = AppliedModel(program.blueprint, program.mesh, config)
        self._profiled = configs.profile_range(config.profile_steps, config.steps)

    def advance(self, state: TrainState, batches: Any, interruption: Interruption) -> TrainState:
        """The state after the last step. Raises SystemExit, after a checkpoint, if the process is
        told to end."""
        with self.log, self.saves:
            waiting, hyperparameters = None, self.program.place_hyperparameters()
            for step in range(self.first, self.steps + 1):
                self._start_profile(step)
                batch, work = self.program.place(next(batches))
                state = self.program.step(state, batch, np.int32(step), hyperparameters)
                self.meter.count(work)
                if step == self.first:
                    jax.block_until_ready(state)
                    self.meter.compiled()
                self.progress.advance(step)
                self._stop_profile(step, state)

                # --- Log: a window is read when the step after it is already under way, so that
                # devices never wait.
                if waiting:
                    self._report(self._row(*waiting))
                    waiting = None
                if self._due(step, self.config.log_every_steps):
                    waiting = (step, state.window, self.meter.take())
                    state = replace(state, window=self.program.empty_window())

                told = interruption.at(step)
                evaluating = self._due(step, self.config.eval.every_steps)
                saving = self._due(step, self.config.checkpoint.every_steps) or told is not None
                if not (evaluating or saving):
                    continue
                jax.block_until_ready(state)
                self.meter.pause()
                row = self._row(*waiting) if waiting else {"step": step}
                waiting, score = None, {}

                # --- Evaluate
                if evaluating:
                    self.evaluations = self.evaluate(state)
                    row |= _named(self.evaluations)
                    if self.best.metric:
                        score = {self.best.metric: float(np.mean(row[self.best.metric]))}
                if len(row) > 1:
                    self._report(row)

                # --- Checkpoint: rows first, so that no row before a checkpoint can be missing.
                if saving or self.saves.is_best(score):
                    self.log.flush()
                    self.saves.save(step, parts_of(state), batches, score)
                if told is not None:
                    self.saves.close()
                    self.progress.say(
                        f"{told.name}: saved step {step}/{self.steps}; the same command goes on"
                        " from there"
                    )
                    raise SystemExit(128 + told)
                self.meter.resume()
        return state

    def evaluate(self, state: TrainState) -> dict[str, Metrics]:
        """All evaluations of the task, of the parameters or, as the config says, their average."""
        self.progress.doing("evaluating")
        params = state.average if self.config.eval.averaged else state.params
        return evaluate_task(self.program.task, self.apply, (params, state.variables))

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.steps

    def _row(self, step: int, window: Any, interval: Any) -> dict[str, Any]:
        return training_row(step, window, interval, self.program.hyperparameters.rates, self.meter)

    def _report(self, row: Mapping[str, Any]) -> None:
        """Writes a row, and ends the run if it says that steps are being rejected without end."""
        self.log.write(row)
        self.progress.report(row)
        limit = self.config.max_rejected_steps
        for seed, length in zip(
            self.config.seeds, row.get("train/longest_rejected_run", ()), strict=False
        ):
            if length >= limit:
                raise FloatingPointError(
                    f"the run diverged: of seed {seed}, {length} steps in a row up to step"
                    f" {row['step']} had a loss or a gradient that is not finite and were rejected"
                    f" (config.max_rejected_steps={limit}); lower config.optimizer.lr or"
                    " config.optimizer.clip_norm, or lengthen config.optimizer.warmup_steps, and"
                    " use a new --workdir"
                )

    def _start_profile(self, step: int) -> None:
        if self._profiled is None:
            return
        first, last = self._profiled
        if step == max(first, self.first) and step <= last:
            jax.profiler.start_trace(str(self.workdir / "profile"))

    def _stop_profile(self, step: int, state: TrainState) -> None:
        if self._profiled is not None and step == self._profiled[1]:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()


def parts_of(state: TrainState) -> dict[str, Any]:
    """How a state lies in a checkpoint: what evaluation reads is apart from what only training
    needs."""
    parts: dict[str, Any] = {
        "model": {"params": state.params, "variables": state.variables},
        "optimizer": {"opt_state": state.opt_state, "window": state.window},
    }
    if state.average is not None:
        parts["average"] = {"params": state.average}
    return parts


def _named(evaluations: Mapping[str, Metrics]) -> dict[str, list[float]]:
    """{"<evaluation>/<metric>": [per seed]}"""
    return {
        f"{name}/{metric}": values
        for name, metrics in evaluations.items()
        for metric, values in metrics.items()
    }
