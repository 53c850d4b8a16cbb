"""Brings a public checkpoint into a workdir, and a run out into a public checkpoint.

    python -m experiments.convert --from=SmolLM2-135M --workdir=runs/smollm2
    python -m experiments.convert --from=SmolLM2-135M.gguf --workdir=runs/smollm2
    python -m experiments.convert --workdir=runs/smollm2 --to=exported

A public checkpoint is a folder in the format of Hugging Face: config.json, safetensors, in one file
or in several with an index, and tokenizer.json. Of the families Llama, Qwen2 and Qwen3 it may also
be one file of llama.cpp, with its tokenizer where that is a byte-level one that splits as GPT-2's
does; a tokenizer.json beside the file comes first. The workdir is like that of a run at step 0:
`experiments.generate` and `experiments.evaluate` take it, and experiments/configs/of_run.py is the
config that trains it further. Nothing is guessed: tensors that are missing, superfluous or of
another shape are named, and so are keys of config.json that are not understood."""

from pathlib import Path

from absl import flags

from experiments.conversion.runs import bring_in, bring_out
from experiments.training import command_line
from experiments.training.progress import warn
from experiments.training.run_loading import load_run


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
    flags.DEFINE_string("from", "", "Folder of a public checkpoint to bring in, or a file *.gguf.")
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
