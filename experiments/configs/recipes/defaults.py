"""Options of mixers and tasks, completed with the defaults that stand in their signatures.

Signatures are read from the source: importing models takes jax, and configs must be readable where
there is none. A default is a literal, arithmetic of literals and `math`, or a constant of its file.
"""

import ast
import functools
import math
from pathlib import Path
from typing import Any

from experiments.training.checkout import CHECKOUT


def mixer_options(name: str, **chosen: Any) -> dict[str, Any]:
    """All options of the mixer in models/<name>: `chosen`, and the defaults of the others.

    Raises ValueError for a mixer or an option that does not exist."""
    models = CHECKOUT / "models"
    files = [
        file for file in (models / f"{name}.py", models / name / "__init__.py") if file.exists()
    ]
    if not files:
        raise ValueError(f"there is no mixer {name!r} in {models}")
    definitions = _definitions(files[0])
    mixer = definitions[definitions["Mixer"].id]
    init = next(node for node in mixer.body if getattr(node, "name", "") == "__init__")
    return _completed(f"mixer {name}", init.args, definitions, chosen)


def task_options(name: str, **chosen: Any) -> dict[str, Any]:
    """The section `task` of a config: the name of a file in experiments/tasks and all options of
    its `make`, `chosen` and the defaults of the others.

    Raises ValueError for an option that does not exist."""
    definitions = _definitions(CHECKOUT / f"experiments/tasks/{name}.py")
    options = _completed(f"task {name}", definitions["make"].args, definitions, chosen)
    return {"name": name, **options}


@functools.cache
def _definitions(file: Path) -> dict[str, Any]:
    """{name: syntax tree} of what a file defines: classes, functions, values of constants."""
    found: dict[str, Any] = {}
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {
                target.id: node.value for target in node.targets if isinstance(target, ast.Name)
            }
    return found


def _completed(
    what: str, signature: ast.arguments, definitions: dict[str, Any], chosen: dict[str, Any]
) -> dict[str, Any]:
    """`chosen` after the defaults of the other arguments of `signature`."""
    positional, keyword = signature.args, signature.kwonlyargs
    required = [None] * (len(positional) - len(signature.defaults))
    values = [*required, *signature.defaults, *signature.kw_defaults]
    arguments = {a.arg: value for a, value in zip((*positional, *keyword), values, strict=True)}
    if unknown := set(chosen) - set(arguments):
        raise ValueError(f"{what} has no option {min(unknown)!r}; it has {', '.join(arguments)}")
    defaults = {name: _evaluate(value, definitions) for name, value in arguments.items() if value}
    return {**defaults, **chosen}


def _evaluate(expression: ast.expr, definitions: dict[str, Any]) -> Any:
    names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)} - {"math"}
    constants = {name: _evaluate(definitions[name], definitions) for name in names}
    code = compile(ast.Expression(expression), "<default>", "eval")
    return eval(code, {"__builtins__": {}, "math": math, **constants})
