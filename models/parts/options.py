"""Checks the options that a config gives to a model against the signature of what it configures."""

import inspect
from collections.abc import Mapping
from typing import Any

# Keyword arguments of models and mixers that the builder fills in; they are not options of a
# config.
SUPPLIED = ("depth", "layer", "rngs", "param_dtype", "compute_dtype")


def check_options(
    what: str,
    where: str,
    options: Mapping[str, Any],
    *configured: type,
    supplied: tuple[str, ...] = SUPPLIED,
) -> None:
    """Raises ValueError unless `options` are keyword arguments of the `configured` classes, and all
    that have no default are among them.

    `what` names the configured thing and `where` the config field, for the message; `supplied` are
    arguments that come from the caller."""
    parameters = {
        name: parameter
        for one in configured
        for name, parameter in inspect.signature(one.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in supplied
    }
    known = ", ".join(sorted(parameters))
    for name in options:
        if name not in parameters:
            raise ValueError(f"{what} has no option {name!r}; known options in {where}: {known}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ValueError(
                f"{what} needs the option {name!r}; set {where}.{name} (known options: {known})"
            )


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
