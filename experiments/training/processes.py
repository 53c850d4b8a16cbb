"""Ends a run at the next step when it is told to: by SIGTERM, SIGINT, or the preemption notice of a
cluster."""

import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


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
