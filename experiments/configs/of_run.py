"""The config of a run, to train its weights further in another workdir.

    python -m experiments.train --config=experiments/configs/of_run.py:runs/smollm2 \
        --workdir=runs/tuned --config.steps=500

The argument is the workdir of any run, trained here or brought in by `experiments.convert`."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from experiments.training.config import from_json


def get_config(workdir: str) -> ConfigDict:
    """The run's config with init_from=workdir. Raises ValueError if there is no run."""
    file = Path(workdir).expanduser() / "run.json"
    try:
        config = from_json(json.loads(file.read_text("utf-8"))["config"])
    except FileNotFoundError as error:
        raise ValueError(f"{workdir} holds no run ({file} is missing)") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the record of a run ({error!r})") from error
    config.init_from, config.init_except = workdir, ()
    return config
