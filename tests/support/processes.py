"""Processes of one run on this machine: virtual CPU devices, a free port, output in files, and a
hard end."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.training.checkout import CHECKOUT


@dataclass(frozen=True)
class Child:
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 180) -> int:
        """The exit status; subprocess.TimeoutExpired if the process has not ended by then."""
        return self.process.wait(seconds)

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Waits until `condition()` holds; the process must still be running then."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.01)

    def succeed(self) -> None:
        """Waits; fails with what was printed unless the status is 0."""
        assert self.wait() == 0, self.printed


def train_command(file: str, workdir: Path, overrides: Mapping[str, Any]) -> list[str]:
    """Trains a config of experiments/configs."""
    return [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config=experiments/configs/{file}",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in overrides.items()),
    ]


@contextmanager
def started(
    commands: Sequence[Sequence[str]], logs: Path, devices: int = 1
) -> Iterator[list[Child]]:
    """One process per command, joined to one run if there are several, with `devices` virtual
    devices each.

    Whatever still runs at the end is killed: SIGTERM belongs to jax's preemption service.
    """
    logs.mkdir(exist_ok=True)
    # XLA sizes a thread pool by this count, and collectives block its threads: with fewer of them
    # than devices the CPU backend can wait for itself.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "NPROC": "16",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')}"
        f" --xla_force_host_platform_device_count={devices}",
    }
    if len(commands) > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(commands))}
    children: list[Child] = []
    try:
        for place, command in enumerate(commands):
            log = logs / f"{place}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    cwd=CHECKOUT,
                    env=environment | {"JAX_PROCESS_ID": str(place)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            children.append(Child(process, log))
        yield children
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
