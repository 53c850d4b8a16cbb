"""Where this checkout and its recorded results lie, and what git says of it; imports nothing of
ours, so that all may."""

import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
RESULTS = CHECKOUT / "experiments/results"
# The documents beside the results that show recorded rows.
DOCUMENTS = (CHECKOUT / "README.md", CHECKOUT / "experiments/MESH.md")


def git(*arguments: str) -> str | None:
    """What a git command prints in the checkout; None where it fails, or where there is no git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit_here() -> tuple[str | None, bool | None]:
    """The commit of the checkout, and whether files differ from it; None outside a git checkout.

    Recorded results and the documents they are shown in do not count: nothing is computed from
    them, and each new row changes them."""
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None, None
    generated = [f":(exclude){path.relative_to(CHECKOUT)}" for path in (RESULTS, *DOCUMENTS)]
    return commit, bool(git("status", "--porcelain", ".", *generated))
