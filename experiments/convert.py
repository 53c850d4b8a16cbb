"""Brings a public checkpoint into a workdir, and a run out into a public checkpoint.

    python -m experiments.convert --from=SmolLM2-135M --workdir=runs/smollm2
    python -m experiments.convert --workdir=runs/smollm2 --to=exported

A public checkpoint is a folder in the format of Hugging Face: config.json, safetensors, in one file
or in several with an index, and tokenizer.json. The workdir is like that of a run at step 0:
`experiments.generate` and `experiments.evaluate` take it, and experiments/configs/of_run.py is the
config that trains it further. Nothing is guessed: tensors that are missing, superfluous or of
another shape are named, and so are keys of config.json that are not understood."""

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import flags

from experiments.configs.recipes.base import base, language_model
from experiments.configs.recipes.defaults import mixer_options, task_options
from experiments.training import checkpoints, command_line, run_data, run_record
from experiments.training.config import Config, validate
from experiments.training.mesh import parameter_name
from experiments.training.progress import warn
from experiments.training.run_loading import LoadedRun, load_run
from experiments.training.state import Blueprint, by_path, initial_model, make_blueprint, seed_array
from experiments.training.task import Examples, Task
from models.weights import table
from models.weights.families import find_format, read_model, write_config
from models.weights.folder import TensorFolder, read_config, write_tensors

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# What of config.json is about tokens and not about numbers, and the files that go with them.
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER = "tokenizer.json"
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
PUBLIC = "public"  # folder of a workdir with what came along
FILE_BYTES = 2 * 10**9


@dataclass(frozen=True)
class _Start:
    """The place of a run before its first batch, as a checkpoint wants it."""

    def get_state(self) -> dict[str, int]:
        return {"next_index": 0}


# --- In


@dataclass(frozen=True)
class Checkpoint:
    """A public checkpoint as a run would have it.

    public      config.json
    config      of the run
    task        sizes and origin of its tokens, without examples
    params      arrays by path, float32 or bfloat16
    warnings    keys of config.json that were not understood
    """

    public: Mapping[str, Any]
    config: Config
    task: Task
    blueprint: Blueprint
    params: dict[str, np.ndarray]
    warnings: tuple[str, ...]


def read_checkpoint(
    folder: Path, *, dtype: str = "keep", context_length: int = 0, tokenizer: Path | None = None
) -> Checkpoint:
    """The checkpoint in `folder`.

    dtype             of the parameters: "keep" (bfloat16 if that is all there is in the file, else
                      float32), "float32" or "bfloat16"
    context_length    tokens that full attention sees at most; 0: as config.json says
    tokenizer         where the run will have its tokenizer.json; None: in `folder`

    Raises ValueError for one that cannot be read, with the key or tensor."""
    _check_dtype(dtype)
    if context_length < 0:
        raise ValueError(f"--context_length must be 0 or positive; got {context_length}")
    public = read_config(folder)
    model, keys = read_model(public, context_length)
    format = find_format(public["model_type"])
    source = TensorFolder(folder)
    if format.EMBEDDING not in source.shapes:
        raise ValueError(f"the checkpoint lacks the tensors {format.EMBEDDING}")
    rows = source.shapes[format.EMBEDDING][0]
    file = folder / TOKENIZER
    config = _config(model, rows, (tokenizer or file) if file.is_file() else None)
    config.param_dtype = _dtype(source, format) if dtype == "keep" else dtype
    validate(config)
    task = _task(config, file)
    blueprint = make_blueprint(config, task)
    ours = by_path(_shapes(blueprint, config))
    tensors = _tensors(format, config.model.to_dict(), ours)
    tied = config.model.tie_embeddings
    constants = {name for name in source.shapes if format.ignored(name)}
    table.check_fits(source, tensors, ours, constants | ({format.HEAD} if tied else set()))
    if tied and format.HEAD in source.shapes:
        same = np.array_equal(source.read(format.HEAD), source.read(format.EMBEDDING))
        if not same:
            raise ValueError(f"tie_word_embeddings is true, but {format.HEAD} differs")
    names = ", ".join(keys.left)
    warnings = (f"keys of config.json taken to change no logits: {names}",) if names else ()
    params = table.load(source, tensors, ours)
    return Checkpoint(public, config, task, blueprint, params, warnings)


def bring_in(
    folder: Path, workdir: Path, *, dtype: str = "keep", context_length: int = 0
) -> tuple[str, ...]:
    """Makes `workdir` a run at step 0 of the checkpoint in `folder`, as `read_checkpoint` reads it;
    returns warnings.

    Raises ValueError, before anything is written, also for a workdir that has something in it."""
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ValueError(f"{workdir} must be new or empty: it would become a run")
    tokenizer = (workdir / TOKENIZER).expanduser().absolute()
    checkpoint = read_checkpoint(
        folder, dtype=dtype, context_length=context_length, tokenizer=tokenizer
    )
    workdir.mkdir(parents=True, exist_ok=True)
    _keep_files(folder, workdir, checkpoint.public)
    origin = {"folder": str(folder.absolute()), "model_type": checkpoint.public["model_type"]}
    facts = run_data.facts(checkpoint.config, checkpoint.task) | {"checkpoint": origin}
    run_record.write(workdir, checkpoint.config, facts, step=0)
    run_data.keep_files(workdir, checkpoint.task)
    _save(workdir, checkpoint)
    return checkpoint.warnings


def _check_dtype(dtype: str) -> None:
    if dtype not in ("keep", *DTYPES):
        raise ValueError(f"--dtype must be keep, {' or '.join(DTYPES)}; got {dtype!r}")


def _dtype(source: TensorFolder, format: ModuleType) -> str:
    """The narrowest type of parameters that holds every number of the file."""
    free = {t for name, t in source.dtypes.items() if not name.endswith(format.FLOAT32)}
    return "bfloat16" if free == {DTYPES["bfloat16"]} else "float32"


def _config(model: Mapping[str, Any], rows: int, tokenizer: Path | None) -> Config:
    """The config of a run that has the model.

    With a tokenizer its task is text. Without one tokens are numbers, and the task one of
    numbers."""
    contexts = (options.get("context_length", 0) for options in model["mixers"].values())
    length = min([1024, *(context for context in contexts if context)])
    best: dict[str, Any] = {}
    if tokenizer is not None:
        task = task_options("text", tokenizer=str(tokenizer), sequence_length=length)
        best = {"best_metric": "validation/bits_per_byte", "best_mode": "min"}
    else:
        task = task_options("induction_heads", length=min(length, 64), vocabulary_size=rows)
    mixers = {name: mixer_options(name, **options) for name, options in model["mixers"].items()}
    return base(
        task=task,
        model=language_model(**model, vocabulary_rows=rows) | {"mixers": mixers},
        steps=1000,
        batch_size=8,
        optimizer={"lr": 1e-5, "warmup_steps": 50, "b2": 0.95},
        evaluation={"examples": 64, **best},
    )


def _task(config: Config, tokenizer: Path) -> Task:
    """Sizes and origin of the tokens; the task itself would read its data."""
    nothing = Examples(lambda indices: {})
    provenance, kept = {}, {}
    if tokenizer.is_file():
        content = tokenizer.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        provenance = {"tokenizer": f"tokenizer-{sha256[:16]}", "tokenizer_sha256": sha256}
        kept = {"tokenizer": content}
    sizes = {"vocabulary": config.model.vocabulary_rows}
    return Task(sizes, lambda seed: nothing, {}, provenance=provenance, kept=kept)


def _shapes(blueprint: Blueprint, config: Config) -> Any:
    initial = functools.partial(initial_model, blueprint)
    return jax.eval_shape(initial, seed_array(config.seeds))[0]


def _tensors(
    format: ModuleType, model: Mapping[str, Any], ours: Mapping[str, Any]
) -> list[table.Tensor]:
    names = [model["pattern"][i % len(model["pattern"])] for i in range(model["depth"])]
    layers = [format.layer_entries(name, model) for name in names]
    return table.placed(format.network_entries(model), layers, ours)


def _keep_files(folder: Path, workdir: Path, public: Mapping[str, Any]) -> None:
    """What an export must give back beside tensors and tokenizer."""
    (workdir / PUBLIC).mkdir()
    for name in TOKEN_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, workdir / PUBLIC / name)
    run_record.write_json(workdir / PUBLIC / "config.json", public)


def _save(workdir: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint of step 0; takes the arrays out of `checkpoint`, so that none is there
    twice."""
    blueprint, config = checkpoint.blueprint, checkpoint.config
    seeds = seed_array(config.seeds)
    variables = jax.jit(lambda: initial_model(blueprint, seeds)[1])()
    params = jax.tree.map_with_path(
        lambda path, _: jnp.asarray(checkpoint.params.pop(parameter_name(path))),
        _shapes(blueprint, config),
    )
    best = checkpoints.Best("", "max")
    with checkpoints.Checkpoints(workdir / "checkpoints", keep=1, best=best) as saves:
        saves.save(0, {"model": {"params": params, "variables": variables}}, _Start(), None)


# --- Out


def write_checkpoint(
    folder: Path,
    config: Config,
    ours: Mapping[str, Any],
    *,
    family: str | None = None,
    dtype: str = "keep",
    extra: Mapping[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
) -> str:
    """Writes parameters, by path, of the model of a config to `folder` as a public checkpoint, and
    returns its model_type.

    family        model_type; None: the first that has what the model has
    dtype         "keep", "float32" or "bfloat16"
    extra         more keys of config.json
    file_bytes    size of a file at most, unless a single tensor is larger

    Raises ValueError, before anything is written, for a model that the family is not."""
    _check_dtype(dtype)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be new or empty")
    if config.model.name != "lm":
        raise ValueError(f"only language models are written; got {config.model.name}")
    model = _complete(config.model.to_dict(), ours)
    narrow = dtype if dtype != "keep" else config.param_dtype
    rows = ours["embedding/embedding"].shape[0]
    public = write_config(family, model, rows, narrow) | dict(extra or {})
    format = find_format(public["model_type"])
    tensors = _tensors(format, model, ours)
    dtypes = {
        tensor.name: np.dtype(ours[tensor.parts[0][0]].dtype)
        if dtype == "keep" or tensor.name.endswith(format.FLOAT32)
        else DTYPES[dtype]
        for tensor in tensors
    }
    sizes = {t.name: math.prod(t.shape(ours)) * dtypes[t.name].itemsize for t in tensors}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, sizes, table.public(tensors, ours, dtypes), most_bytes=file_bytes)
    (folder / "config.json").write_text(json.dumps(public, indent=1) + "\n", encoding="utf-8")
    return public["model_type"]


def bring_out(
    run: LoadedRun,
    folder: Path,
    *,
    family: str | None = None,
    dtype: str = "keep",
    replica: int = 0,
) -> str:
    """Writes a run to `folder` as `write_checkpoint` does, with the tokenizer that the run has;
    family None is that of the checkpoint which it began with, if it did."""
    if not 0 <= replica < len(run.seeds):
        raise ValueError(f"--replica must be in 0..{len(run.seeds) - 1}; got {replica}")
    origin = run_record.read(run.workdir) or {}
    kept = run.workdir / PUBLIC
    original = run_record.read_json(kept / "config.json") or {}
    written = write_checkpoint(
        folder,
        run.config,
        by_path(run.replica(replica)[0]),
        family=family or origin.get("checkpoint", {}).get("model_type"),
        dtype=dtype,
        extra={key: original[key] for key in TOKEN_KEYS if key in original},
    )
    for file in (run.workdir / TOKENIZER, *(kept / name for name in TOKEN_FILES)):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return written


def _complete(model: dict[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The section `model` with every option that a format asks for."""
    widths = [leaf.shape[-1] for path, leaf in ours.items() if path.endswith("mlp/up/kernel")]
    mixers = {
        name: mixer_options(name, **model["mixers"].get(name, {}))
        for name in dict.fromkeys(model["pattern"])
    }
    defaults = {"mlp": "swiglu", "norm": "rms", "norm_eps": 1e-5, "mlp_bias": False}
    return {
        **defaults,
        "tie_embeddings": False,
        **model,
        "mixers": mixers,
        "mlp_width": widths[0] if widths else 0,
    }


def main() -> None:
    options = flags.FLAGS
    source, target = options["from"].value, options.to
    if bool(source) == bool(target):
        raise ValueError("give either --from=<folder of a checkpoint> or --to=<new folder>")
    workdir = Path(options.workdir)
    if source:
        for warning in bring_in(
            Path(source).expanduser(),
            workdir.expanduser(),
            dtype=options.dtype,
            context_length=options.context_length,
        ):
            warn(warning)
        print(
            f"{workdir}: train it further with"
            f" --config=experiments/configs/of_run.py:{workdir} --workdir=<new>"
        )
        return
    run = load_run(workdir, options.step, averaged=options.averaged, reads_data=False)
    family = bring_out(
        run,
        Path(target).expanduser(),
        family=options.family or None,
        dtype=options.dtype,
        replica=options.replica,
    )
    print(f"{target}: step {run.step} of {workdir} as {family}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run, made or read.", required=True)
    flags.DEFINE_string("from", "", "Folder of a public checkpoint to bring in.")
    flags.DEFINE_string("to", "", "New folder for the run as a public checkpoint.")
    flags.DEFINE_string("dtype", "keep", "Of the weights: keep, float32 or bfloat16.")
    flags.DEFINE_integer(
        "context_length", 0, "Tokens that full attention sees; 0: as config.json says."
    )
    flags.DEFINE_string("family", "", "model_type to write, such as llama; by itself if not given.")
    flags.DEFINE_string("step", "latest", "Step to write: a number, latest or best.")
    flags.DEFINE_bool("averaged", False, "Write the average of the parameters (config.ema_decay).")
    flags.DEFINE_integer("replica", 0, "Which of config.seeds to write, counted from 0.")
    command_line.run(main)
