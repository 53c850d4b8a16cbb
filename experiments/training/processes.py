"""The processes of a run: how they join, wait for each other, and end together.

A run ends after the step at hand when it is told to: by SIGTERM, SIGINT, or the preemption notice
of a cluster."""

import os
import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


def join_processes(heartbeat_timeout_seconds: int) -> None:
    """Joins the other processes of this run, if the environment says that there are any.

    That is: JAX_COORDINATOR_ADDRESS (host:port) with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a Slurm
    step of several tasks, or a TPU slice of several hosts. To be called before anything asks jax
    for devices. From then on a process that gives no sign of life for `heartbeat_timeout_seconds`
    is lost, and jax aborts all others, however deep in a collective they wait for it; the same
    command then goes on from the last checkpoint."""
    variables = os.environ
    if (
        "JAX_COORDINATOR_ADDRESS" in variables
        or "MEGASCALE_COORDINATOR_ADDRESS" in variables
        or int(variables.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or "," in variables.get("TPU_WORKER_HOSTNAMES", "")
    ):
        count, place = (variables.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(
            num_processes=int(count) if count else None,
            process_id=int(place) if place else None,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )


def wait_for_all_processes(place: str) -> None:
    """Returns when every process has come to this `place`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


class Interruption:
    """While this context is open the first SIGTERM or SIGINT only sets a flag; a second one acts as
    usual.

    With several processes SIGTERM belongs to jax's preemption service, which lets all of them agree
    on a step, and SIGINT acts as usual. Outside the main thread, where Python delivers no signals,
    nothing is caught."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            caught = [] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            self._previous = {number: signal.signal(number, self._receive) for number in caught}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def at(self, step: int) -> signal.Signals | None:
        """The signal to end after `step` for, if any; the same answer in every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return self._received
