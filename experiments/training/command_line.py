"""Runs a binary so that a user's mistake costs one line, not a traceback.

Mistakes are ValueError (a config that cannot work), OSError (a file that is not there) and
FloatingPointError (a run that diverged); each message says what is wrong and how to mend it. They
end the process with status 1, and with status 2 if they are in what was asked for: in the flags, or
in a config file, which is run while the flags are read. --verbosity=1 shows where they were raised.
Anything else is our own bug and keeps its traceback."""

import difflib
import functools
import inspect
import logging as stdlib_logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments.training.config import Config, fit_warmup
from experiments.training.process_setup import keep_freed_memory, keep_programs

MISTAKES = (ValueError, OSError, FloatingPointError)
RUN, ASKED = 1, 2  # statuses of a mistake
HOW_TO = "give a file of experiments/configs, as <file>:<task>[,smoke]"


class Misuse(ValueError):
    """A mistake in what was asked for, found before anything was done."""


flags.DEFINE_bool(
    "cache",
    True,
    "Keep compiled programs, in JAX_COMPILATION_CACHE_DIR or else in ~/.cache/scanax/jax.",
)


def run(main: Callable[..., Any], *, cache: bool = True, files: bool = False) -> None:
    """Parses the flags, calls `main()` and exits. Libraries' own log lines appear from
    --verbosity=0 on.

    files: whether names of files may stand beside the flags; then it calls `main(names)`.
    cache: whether compiled programs may come from the cache; not where a command measures how they
    are compiled, or compiles for devices that are not there, whose programs cannot be read back."""
    parser = functools.partial(parse, files=files)
    app.run(lambda rest: _guarded(main, cache, *[rest[1:]] * files), flags_parser=parser)


def given_config() -> Config:
    """The config of the flag --config with its overrides. A recipe's warm-up that is longer than
    the steps that were asked for is shortened, with a warning."""
    config = flags.FLAGS.config
    if fit_warmup(config, config_flags.get_override_values(flags.FLAGS["config"])):
        fitted = config.optimizer.warmup_steps
        steps = f"the recipe's are more than config.steps={config.steps}"
        print(f"warning: config.optimizer.warmup_steps={fitted}: {steps}", file=sys.stderr)
    return config


def _guarded(main: Callable[..., Any], cache: bool, *arguments: Any) -> None:
    keep_freed_memory()
    keep_programs(cache and flags.FLAGS.cache)
    try:
        main(*arguments)
    except MISTAKES as error:
        _exit(str(error) or type(error).__name__, ASKED if isinstance(error, Misuse) else RUN)


def parse(
    argv: Sequence[str], values: flags.FlagValues = flags.FLAGS, *, files: bool = False
) -> list[str]:
    """Parses the flags into `values`, and returns the program's name and, if `files` may be named,
    what is no flag; a mistake ends the process with one line and status 2."""
    config = _config(argv, values) if "config" in values else None
    try:
        rest = values(argv)
    except (AttributeError, KeyError) as error:
        _exit(_unknown_key(argv, config, str(error)), ASKED)
    except (flags.Error, *MISTAKES, TypeError) as error:
        _exit(str(error).strip().splitlines()[-1], ASKED)
    if len(rest) > 1 and not files:
        _exit(f"unexpected argument {rest[1]!r}; flags are written --name=value", ASKED)
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


def _config(argv: Sequence[str], values: flags.FlagValues) -> ConfigDict | None:
    """The config that --config names, before overrides; None without the flag. A file that gives
    none ends the process."""
    arguments = [argument.partition("=") for argument in argv[1:]]
    given = [
        value if separator else "".join(argv[place + 2 : place + 3])
        for place, (name, separator, value) in enumerate(arguments)
        if name in ("-config", "--config")
    ]
    if not given:
        return None
    flag, (name, *argument) = f"--config={given[-1]}", given[-1].split(":", 1)
    if not os.path.isfile(name):
        what = "a folder" if os.path.isdir(name) else "no file"
        _exit(f"{flag}: {name!r} is {what}; {HOW_TO}", ASKED)
    module = ModuleType("config_of_a_flag")
    module.__file__ = name
    sys.modules[module.__name__] = module  # where dataclasses look
    try:
        SourceFileLoader(module.__name__, name).exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            _exit(f"{flag}: {name!r} has no function get_config; {HOW_TO}", ASKED)
        try:
            inspect.signature(get_config).bind(*argument)
        except TypeError as error:
            _exit(f"{flag}: get_config has another argument: {error}; {HOW_TO}", ASKED)
        config = get_config(*argument)
    except ValueError as error:
        _exit(str(error), ASKED)
    # A config file is a user's program: whatever it raises is a mistake in it, not a bug of ours.
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, SyntaxError) else f" ({last.filename}, line {last.lineno})"
        _exit(f"{flag}: {type(error).__name__}: {error}{place}; {HOW_TO}", ASKED)
    if not isinstance(config, ConfigDict):
        _exit(f"{flag}: get_config must return a ConfigDict; got {config!r}", ASKED)
    return config


def _unknown_key(argv: Sequence[str], config: ConfigDict | None, problem: str) -> str:
    """The message for an override --config.a.b=value of which a part does not exist."""
    for path, _, _ in (argument.lstrip("-").partition("=") for argument in argv[1:]):
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


def check_pattern(text: str) -> bool:
    """True, for the validator of a flag; raises flags.ValidationError unless `text` is a regular
    expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise flags.ValidationError(f"must be a regular expression ({error})") from error
    return True


def _exit(message: str, status: int) -> NoReturn:
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
