"""Draws pictures or videos with a trained run, out of noise.

    python -m experiments.sample --workdir=runs/dit --count=64
    python -m experiments.sample --workdir=runs/dit --classes=3,7 --guidance=2 --sampler=ddim \
        --steps=50 --out=runs/dit/sevens

In <workdir>/samples, or --out: grid.png, all pictures, or film.gif and grid.png, all videos and the
frames of some; and their pixels in batches, which are kept
as they are done: the same command goes on where it was interrupted, and with a larger --count draws
the others. A picture depends on --seed and its own number. The samplers are those of
experiments/sampling/samplers.py. With --classifier=runs/vit it says what that run takes the
pictures for, and how far its features are from those of real ones
(experiments/sampling/scores.py)."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.objectives.flow_matching import FlowMatching
from experiments.sampling.pictures import GRID, Drawing, draw_pictures
from experiments.sampling.samplers import Sampler
from experiments.sampling.scores import scores
from experiments.tasks.image_generation import objective_of
from experiments.training import command_line, run_record
from experiments.training.progress import ProgressReport
from experiments.training.run_loading import LoadedRun, load_run

TASKS = ("image_generation", "video_generation")


def class_numbers(text: str, classes: int) -> tuple[int, ...]:
    """Classes of a list such as "3,7,none"; "" is all of them. Raises ValueError for other text."""
    if not text:
        return tuple(range(classes))
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "none" or part.isdecimal() for part in parts):
        raise ValueError(
            f"--classes must be numbers in 0..{classes - 1} or none, with commas; got {text!r}"
        )
    return tuple(classes if part == "none" else int(part) for part in parts)


def drawing_of(run: LoadedRun, options: Any) -> Drawing:
    """What is drawn from a loaded run with the command's flags."""
    sizes, task = run.task.sizes, run.config.task.to_dict()
    objective = objective_of(sizes["classes"], **task)
    flow = isinstance(objective, FlowMatching)
    sampler = Sampler(
        options.sampler or ("euler" if flow else "ddpm"),
        options.steps if options.steps is not None else (50 if flow else min(250, objective.steps)),
        guidance=options.guidance,
        eta=options.eta,
        clip=options.clip,
    )
    if not 0 <= options.replica < len(run.seeds):
        raise ValueError(f"--replica must be in 0..{len(run.seeds) - 1}; got {options.replica}")
    return Drawing(
        (run.blueprint.graphdef, run.replica(options.replica)),
        objective,
        tuple(sizes[n] for n in ("frames", "height", "width", "channels") if n in sizes),
        sampler,
        class_numbers(options.classes, sizes["classes"]),
        options.seed,
        options.batch_size,
        {"step": run.step, "averaged": options.averaged, "replica": options.replica},
    )


def main() -> None:
    options, began = flags.FLAGS, time.monotonic()
    workdir = Path(options.workdir).expanduser()
    config = run_record.read_config(workdir)
    if config.task.name not in TASKS:
        raise ValueError(
            f"--workdir must hold a run of {' or '.join(TASKS)}; it has learned {config.task.name}"
        )
    if options.averaged is None:
        options.averaged = bool(config.ema_decay)
    run = load_run(workdir, options.step, averaged=options.averaged, reads_data=False)
    folder = Path(options.out).expanduser() if options.out else workdir / "samples"
    drawing = drawing_of(run, options)
    classifier = load_run(Path(options.classifier), "best") if options.classifier else None
    with ProgressReport(-(-options.count // max(1, options.batch_size))) as progress:
        pictures = draw_pictures(drawing, folder, options.count, progress)
    if classifier is not None:
        classes = np.resize(drawing.classes, len(pictures))
        for name, value in scores(classifier, pictures, classes)._asdict().items():
            print(f"{name}  {value:.4g}")
    print(f"{folder / GRID}: {options.count} pictures, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a run of experiments.train.", required=True)
    flags.DEFINE_integer("count", 64, "Pictures.")
    flags.DEFINE_string(
        "classes", "", "Their classes in turn, as 3,7 or none; all if it is left out."
    )
    flags.DEFINE_string("step", "latest", "Step of the checkpoint: a number, latest or best.")
    flags.DEFINE_bool(
        "averaged", None, "The average of the parameters; left out: where the run has one."
    )
    flags.DEFINE_string("sampler", "", "ddpm, ddim, euler or heun; left out: ddpm, euler of flows.")
    flags.DEFINE_integer("steps", None, "Steps of the sampler; left out: 250, of flows 50.")
    flags.DEFINE_float("guidance", 1.0, "Without a classifier; 1: none.")
    flags.DEFINE_float("eta", 0.0, "Of ddim: how much of ddpm's noise is drawn anew.")
    flags.DEFINE_bool("clip", False, "Keep guesses of the image in [-1, 1]; of ddpm and ddim.")
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_integer("batch_size", 64, "Pictures that are drawn together.")
    flags.DEFINE_integer("replica", 0, "Which of config.seeds, counted from 0.")
    flags.DEFINE_string(
        "classifier", "", "Workdir of a run of image_classification that scores the pictures."
    )
    flags.DEFINE_string("out", "", "Folder of what is written; <workdir>/samples if left out.")
    command_line.run(main)
