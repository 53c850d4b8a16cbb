"""Runs a binary so that a user's mistake costs one line, not a traceback.

Mistakes are ValueError (a config that cannot work), OSError (a file that is not there) and
FloatingPointError (a run that diverged); each message says what is wrong and how to mend it. They
end the process with status 1, and with status 2 if they are in what was asked for.
--verbosity=1 shows where they were raised. Anything else is our own bug and keeps its
traceback."""

import difflib
import logging as stdlib_logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments.training.config import Config, fit_warmup
from experiments.training.process_setup import keep_freed_memory, keep_programs

MISTAKES = (ValueError, OSError, FloatingPointError)


class Misuse(ValueError):
    """A mistake in what was asked for, found before anything was done."""


flags.DEFINE_bool(
    "cache",
    True,
    "Keep compiled programs, in JAX_COMPILATION_CACHE_DIR or else in ~/.cache/scanax/jax.",
)


def run(main: Callable[[], Any], *, cache: bool = True) -> None:
    """Parses the flags, calls `main()` and exits. Libraries' own log lines appear from
    --verbosity=0 on.

    cache: whether compiled programs may come from the cache; not where a command measures how they
    are compiled, or compiles for devices that are not there, whose programs cannot be read back."""
    app.run(lambda _: _guarded(main, cache), flags_parser=parse)


def given_config() -> Config:
    """The config of the flag --config with its overrides. A recipe's warm-up that is longer than
    the steps that were asked for is shortened, with a warning."""
    config = flags.FLAGS.config
    if fit_warmup(config, config_flags.get_override_values(flags.FLAGS["config"])):
        fitted = config.optimizer.warmup_steps
        steps = f"the recipe's are more than config.steps={config.steps}"
        print(f"warning: config.optimizer.warmup_steps={fitted}: {steps}", file=sys.stderr)
    return config


def _guarded(main: Callable[[], Any], cache: bool) -> None:
    keep_freed_memory()
    keep_programs(cache and flags.FLAGS.cache)
    try:
        main()
    except MISTAKES as error:
        _exit(str(error) or type(error).__name__, 2 if isinstance(error, Misuse) else 1)


def parse(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the flags into `values`; a mistake ends the process like one in `main`."""
    try:
        rest = values(argv)
    except (AttributeError, KeyError) as error:
        _exit(_unknown_key(argv, values, str(error)))
    except (flags.Error, *MISTAKES, TypeError) as error:
        # A config file that raises arrives with its traceback as text, the message in the last
        # line.
        _exit(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))
    if len(rest) > 1:
        _exit(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    if "verbosity" in values and values["verbosity"].using_default_value:
        # absl would raise its default to INFO after this; a run's own output would drown in its
        # libraries'.
        values.verbosity = logging.ERROR
        # Reads of a damaged checkpoint leave failed tasks behind, and asyncio tells of each; we
        # tell of the checkpoint.
        stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
        # What goes wrong in a thread of the storage layer it logs, and raises again in ours.
        stdlib_logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    return rest


def _unknown_key(argv: Sequence[str], values: flags.FlagValues, problem: str) -> str:
    """The message for an override --config.a.b=value of which a part does not exist."""
    arguments = [argument.lstrip("-").partition("=") for argument in argv[1:]]
    file = next((value for name, _, value in arguments if name == "config"), "")
    config = values["config"].parser.parse(file) if file else None
    for path, _, _ in arguments:
        section = config
        for name in path.split(".")[1:] if path.startswith("config.") else ():
            if not isinstance(section, ConfigDict):
                break
            if name not in section:
                close = difflib.get_close_matches(name, list(section), 1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                return (
                    f"--{path}: unknown key {name!r}; {hint}known keys there: {', '.join(section)}"
                )
            section = section[name]
    return problem


def _exit(message: str, status: int = 1) -> NoReturn:
    """Prints one line and ends the process; with --verbosity=1 or higher, the traceback before
    it."""
    if any(
        argument.lstrip("-") in [f"verbosity={level}" for level in range(1, 10)]
        for argument in sys.argv
    ):
        traceback.print_exc()
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(status)
