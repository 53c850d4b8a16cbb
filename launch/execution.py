"""A sweep on an engine, from the first submission to the last summary.

What an engine does not answer is asked again, patiently: no run is taken for ended, and none is
cancelled or submitted twice, because a question failed."""

import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from launch.backend import ENDED, RUNNING, Backend
from launch.engine import NoAnswer, Refused
from launch.runs import Run, lasts

LONGEST_PAUSE_S = 300.0


def execute(backend: Backend, runs: Sequence[Run], *, retries: int, poll_s: float) -> list[str]:
    """Runs all to their summaries, up to 1 + `retries` times each; returns the names of those that
    failed. A mistake that would be the same the next time is not tried again.

    Raises Refused if the engine takes nothing from the start; SystemExit, after telling the runs to
    save, if this process is told to end."""
    print(f"{len(runs)} runs", flush=True)
    if not runs:
        print("nothing is left to do", flush=True)
        return []
    execution = _Execution(backend, runs, retries, poll_s)
    told: list[int] = []

    def tell(number: int, frame: FrameType | None) -> None:
        told.append(number)

    handlers = {s: signal.signal(s, tell) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while execution.open and not told:
            execution.step()
            until = time.monotonic() + execution.pause_s
            while execution.open and not told and (left := until - time.monotonic()) > 0:
                time.sleep(min(left, 0.5))
    finally:
        try:
            if execution.open:
                print("telling the runs to save and end", flush=True)
                backend.cancel()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if told:
        raise SystemExit(128 + told[0])
    return execution.failed


class _Execution:
    """open: runs that are not over; pause_s: how long to wait before the next `step`."""

    def __init__(self, backend: Backend, runs: Sequence[Run], retries: int, poll_s: float):
        self.open = {run.name: run for run in runs}
        self.failed: list[str] = []
        self.pause_s = poll_s
        self._backend, self._retries, self._poll_s = backend, retries, poll_s
        self._total = len(runs)
        self._waiting = list(runs)  # to be submitted
        self._attempts = dict.fromkeys(self.open, 1)
        self._log_begins = {run.name: _size(run) for run in runs}
        self._began = time.monotonic()

    def step(self) -> None:
        """Submits what waits, looks at the rest."""
        self.pause_s, patience_s = self._poll_s, min(2 * self.pause_s, LONGEST_PAUSE_S)
        refusal = None
        try:
            if self._waiting:
                self._backend.submit(self._waiting)
                self._waiting = []
        except Refused as problem:
            refusal = problem
        except NoAnswer as problem:
            self._ask_again(problem, patience_s)
        states: dict[str, str] = {}
        try:
            states = self._backend.states()
        except (NoAnswer, Refused) as problem:
            self._ask_again(problem, patience_s)
        # Of a submission that failed, a part may be under way.
        self._waiting = [run for run in self._waiting if states.get(run.name, ENDED) == ENDED]
        waiting = {run.name for run in self._waiting}
        if refusal:
            self._refused(refusal, patience_s)
        for name, run in list(self.open.items()):
            if name not in waiting:
                self._look(run, states.get(name))
        if sys.stdout.isatty():
            running = sum(state == RUNNING for state in states.values())
            print(f"\r{running} running ", end="", flush=True)

    def _look(self, run: Run, state: str | None) -> None:
        """Decides whether a submitted run is finished, is to be given again, or failed."""
        outcome = run.outcome()
        if outcome.summary is not None:
            self._over(run, "finished")
        elif state == ENDED:
            error = run.last_error(self._log_begins[run.name])
            why = outcome.problem or error or "it ended without a summary"
            lasting = outcome.lasting or (not outcome.problem and lasts(error))
            attempts = self._attempts[run.name]
            if not lasting and attempts <= self._retries:
                self._attempts[run.name] += 1
                self._log_begins[run.name] = _size(run)
                self._waiting.append(run)
                self._report(run, f"ended early, attempt {attempts + 1}")
            else:
                again = "; it would fail again" if lasting and attempts <= self._retries else ""
                self._fail(run, f"{why}{again}")

    def _refused(self, problem: Refused, patience_s: float) -> None:
        """What an engine refuses it may take when others have ended: limits count jobs."""
        if len(self._waiting) < len(self.open):
            self._ask_again(problem, patience_s)
        elif len(self.open) == self._total and set(self._attempts.values()) == {1}:
            self.open = {}
            raise problem
        else:
            for run in self._waiting:
                self._fail(run, str(problem))
            self._waiting = []

    def _ask_again(self, problem: Exception, patience_s: float) -> None:
        self.pause_s = patience_s
        print(f"{problem}; asked again in {patience_s:.3g} s", flush=True)

    def _fail(self, run: Run, why: str) -> None:
        self.failed.append(run.name)
        run.note_failure(why)
        self._over(run, f"failed, see {run.log}: {why.removeprefix('error: ')}")

    def _over(self, run: Run, news: str) -> None:
        del self.open[run.name]
        self._report(run, news)

    def _report(self, run: Run, news: str) -> None:
        over = self._total - len(self.open)
        each_s = (time.monotonic() - self._began) / over if over else None
        eta = "" if each_s is None else f", ETA {each_s * len(self.open) / 60:.0f} min"
        counts = f"{over - len(self.failed)}/{self._total} done, {len(self.failed)} failed{eta}"
        print(f"[{counts}] {run.label}: {news}", flush=True)


def _size(run: Run) -> int:
    """Bytes of output that the run has so far."""
    try:
        return run.log.stat().st_size
    except OSError:
        return 0
