"""Says whether the runs of a table or a sweep can work, before any of them is started.

    python -m experiments.check --sweep=mqar --scale=cpu

Every config is validated, and every metric must be one that its task reports; status 2 and one line
name what is wrong. A task whose data are not on this machine cannot be asked: a line says so.
`python -m launch.sweep` does this first."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from absl import flags

from experiments.reporting.sweep_file import cells_of, find_sweep
from experiments.reporting.table import Cell, Computation, runs_of
from experiments.training import command_line
from experiments.training import config as configs
from experiments.training.command_line import Misuse
from experiments.training.config import MESH_AXES, Config
from experiments.training.evaluation import known_metrics
from experiments.training.mesh import make_mesh
from experiments.training.program import make_program
from experiments.training.task import configured_task


def check(cells: Sequence[Cell]) -> Iterator[str]:
    """Lines about what could not be checked. Raises Misuse for a config that cannot work and for a
    metric that its task does not report."""
    groups: dict[str, list[tuple[Cell, Config]]] = {}
    # What chooses is a metric like the one that is shown.
    choosing = [replace(v, metric=c.choice.metric) for c in cells if c.choice for v in c.variants()]
    for cell in (*runs_of(cells), *choosing):
        if cell.gap or isinstance(cell, Computation):
            continue
        config: Config = cell.make_config()
        try:
            configs.validate(config)
        except ValueError as error:
            raise Misuse(f"cell {cell.label}: {error}") from error
        key = json.dumps([config.task.to_dict(), config.z_loss], sort_keys=True, default=str)
        groups.setdefault(key, []).append((cell, config))
    for group in groups.values():
        cell, config = group[0]
        try:
            known = known_metrics(configured_task(config))
            for cell, config in group:
                if cell.metric not in known:
                    _check_reported(cell, config)
        except Misuse:
            raise
        except (ValueError, OSError) as error:
            yield f"not checked: {cell.label}: {' '.join(str(error).split())}"


def _check_reported(cell: Cell, config: Config) -> None:
    """Raises Misuse unless the cell's metric is among those that the model's layers report."""
    config.mesh.update(dict.fromkeys(MESH_AXES, 1) | {"data": -1})
    config.batch_size, config.accumulate = 1, 1
    with config.unlocked():
        program = make_program(config, make_mesh(config.mesh))
    known = known_metrics(program.task, program.sums)
    if cell.metric not in known:
        raise Misuse(
            f"cell {cell.label}: metric must be one of {', '.join(known)}; got {cell.metric!r}"
        )


def main() -> None:
    options = flags.FLAGS
    _, sweep = find_sweep(options.sweep)
    cells = cells_of(sweep, options.scale or next(iter(sweep.SCALES)))
    for line in check(cells):
        print(line)


if __name__ == "__main__":
    flags.DEFINE_string(
        "sweep", None, "A table by name, or the path of a sweep file.", required=True
    )
    flags.DEFINE_string("scale", "", "One of the sweep's scales (default: its first).")
    command_line.run(main)
