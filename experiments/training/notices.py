"""Warnings that are for the person who started a run, apart from the log lines of libraries."""

import sys


def warn(message: str) -> None:
    """Prints one line on standard error."""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr, flush=True)
