"""How an engine is spoken to: by its own commands, which may give no answer, or say no.

What was not answered may have been done all the same, and says nothing of the runs: whoever asks
asks again later (launch/execution.py), and looks before a second submission."""

import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 120.0
# Words of engines that cannot be reached or are too busy; everything else that fails is a no.
TEMPORARY = re.compile(
    r"unable to contact|time[d-]? ?out|temporar|try again|retry|connection|connect to|unreachable"
    r"|unavailable|no route|network|\bEOF\b|handshake|deadline|too many requests|throttl|overload"
    r"|internal ?error|internal server|etcd|busy|communication|zero bytes|no such host"
    r"|name resolution|i/o error|broken pipe",
    re.IGNORECASE,
)


class NoAnswer(Exception):
    """The engine could not be reached, or took too long. It may have done what it was told."""


class Refused(ValueError):
    """The engine says no, or its command is not there."""


def ask(*command: str) -> str:
    """What a command that changes nothing prints. Raises NoAnswer if it fails, for whatever reason:
    that says nothing of the runs; Refused if it is not installed."""
    try:
        return tell(*command)
    except Refused as problem:
        if isinstance(problem.__cause__, OSError):
            raise
        raise NoAnswer(str(problem)) from problem


def tell(
    *command: str, text: str | None = None, cwd: Path | None = None, timeout_s: float | None = None
) -> str:
    """What a command prints that is to do something, with `text` as its input. Raises Refused, with
    the engine's words, or NoAnswer."""
    timeout_s = timeout_s or TIMEOUT_S
    said = " ".join(command[: 3 if command[0] == "xpk" else 2 if command[0] == "kubectl" else 1])
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            cwd=cwd,
            timeout=timeout_s,
            # Ctrl-C is for the sweep, which tells the engine what it means.
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise Refused(f"{command[0]} is not installed, or not on the path") from error
    except OSError as error:
        raise Refused(f"{command[0]} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"{said} did not answer within {timeout_s:.0f} s") from error
    if not done.returncode:
        return done.stdout
    # xpk prints what is wrong.
    words = " ".join((done.stderr if command[0] != "xpk" else done.stderr + done.stdout).split())
    if done.returncode < 0 or not words or TEMPORARY.search(words):
        raise NoAnswer(f"{said} failed: {words or f'status {done.returncode}, without a word'}")
    raise Refused(f"{said} refused: {words}")


def insist(*command: str, harmless: str = "", pauses_s: Sequence[float] = (1.0, 4.0)) -> None:
    """Tells a command to stop runs, again after each pause if it fails; says so if all of it fails,
    because runs may then go on. Words that match `harmless` are as good as done."""
    for pause_s in (*pauses_s, None):
        try:
            tell(*command)
            return
        except (NoAnswer, Refused) as problem:
            if harmless and re.search(harmless, str(problem)):
                return
            if pause_s is None:
                print(f"{problem}; runs may go on: {' '.join(command)}", flush=True)
                return
            time.sleep(pause_s)
