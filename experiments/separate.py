"""Sources of a mixture of any length, by a trained separator.

    python -m experiments.separate --workdir=runs/voices mixture.wav
    python -m experiments.separate --workdir=runs/voices --out=sources first.wav second.flac

Of each mixture, a file with one channel at the run's rate, it writes <name>_1.wav, <name>_2.wav and
so on into the workdir, or the folder --out: one for each source, which add up to the mixture as
nearly as they can. Long sounds are separated in chunks of --chunk seconds that overlap by --overlap
(left out: those that the run was trained on, and half of them); who speaks in which file stays the
same from chunk to chunk. It says how long that took beside how long the sound lasts."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments.separation.chunks import Separate, separated
from experiments.tasks.sources.sound_files import read_sound, write_wav
from experiments.training import command_line, run_record
from experiments.training.run_loading import LoadedRun, load_run

NAME = "separation"


def compiled(run: LoadedRun, replica: int, batch: int, chunk: int) -> Separate:
    """The model of a replica for `batch` chunks of `chunk` samples."""
    if not 0 <= replica < len(run.seeds):
        raise ValueError(f"--replica must be in 0..{len(run.seeds) - 1}; got {replica}")
    model: Any = nnx.merge(run.blueprint.graphdef, *run.replica(replica))
    model.eval()
    shapes = jax.ShapeDtypeStruct((batch, chunk), jnp.float32), jnp.zeros(batch, jnp.int32)
    call = jax.jit(lambda model, *inputs: model(*inputs)).lower(model, *shapes).compile()
    return lambda chunks_BC, lengths_B: np.asarray(call(model, chunks_BC, lengths_B))


def separate_file(
    separate: Separate, path: Path, mixture_T: np.ndarray, folder: Path, rate: int, **chunks: int
) -> str:
    """Writes the sources of a mixture, read from `path`, and returns a line about it; `chunks` as
    in `separated`."""
    began = time.monotonic()
    sources = separated(separate, mixture_T, **chunks)
    took, lasts = time.monotonic() - began, len(mixture_T) / rate
    for number, source_T in enumerate(sources, start=1):
        write_wav(folder / f"{path.stem}_{number}.wav", source_T, rate)
    return (
        f"{folder / path.stem}_1.wav to _{len(sources)}.wav: {lasts:.2f} s of sound in"
        f" {took:.2f} s, {lasts / took:.1f} times as fast as it sounds"
    )


def samples(seconds: float | None, default: float, rate: int, name: str) -> int:
    """Samples of a flag's seconds. Raises ValueError, with its name, for a negative time."""
    seconds = default if seconds is None else seconds
    if not 0 <= seconds <= 3600:
        raise ValueError(f"--{name} must be in [0, 3600] seconds; got {seconds:g}")
    return round(seconds * rate)


def main(files: Sequence[str]) -> None:
    options = flags.FLAGS
    if not files:
        raise command_line.Misuse("name a file of sound, such as mixture.wav, after the flags")
    workdir = Path(options.workdir).expanduser()
    task = run_record.read_config(workdir).task
    if task.name != NAME:
        raise ValueError(f"--workdir must hold a run of {NAME}; it has learned {task.name}")
    rate = task.sample_rate
    chunk = samples(options.chunk, task.seconds, rate, "chunk")
    overlap = samples(options.overlap, chunk / rate / 2, rate, "overlap")
    if not 0 <= overlap < chunk:
        raise ValueError(
            f"--overlap must be shorter than a chunk of {chunk / rate:g} s; got {overlap / rate:g}"
        )
    if options.batch < 1:
        raise ValueError(f"--batch must be 1 or more; got {options.batch}")
    mixtures = [(Path(file), read_sound(Path(file).expanduser(), rate)) for file in files]
    began = time.monotonic()
    run = load_run(workdir, options.step, reads_data=False)
    separate = compiled(run, options.replica, options.batch, chunk)
    print(f"loaded and compiled in {time.monotonic() - began:.1f} s")
    folder = Path(options.out).expanduser() if options.out else workdir
    folder.mkdir(parents=True, exist_ok=True)
    chunks = {"chunk": chunk, "overlap": overlap, "batch": options.batch}
    for path, mixture_T in mixtures:
        print(separate_file(separate, path, mixture_T, folder, rate, **chunks))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a run of experiments.train.", required=True)
    flags.DEFINE_string("out", "", "Folder of what is written; the workdir if it is left out.")
    flags.DEFINE_float("chunk", None, "Seconds of a chunk; those of training if it is left out.")
    flags.DEFINE_float("overlap", None, "Seconds that chunks share; half of one if left out.")
    flags.DEFINE_integer("batch", 4, "Chunks that are separated together.")
    flags.DEFINE_string("step", "best", "Step of the checkpoint: a number, latest or best.")
    flags.DEFINE_integer("replica", 0, "Which of config.seeds, counted from 0.")
    command_line.run(main, files=True)
