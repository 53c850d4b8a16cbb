"""Data sets that TFDS has prepared, read without TensorFlow."""

import hashlib
import json
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.registered import DatasetNotFoundError


def prepared(
    dataset: str, data_dir: str, download: bool, choices: str, test_split: str = "test"
) -> Any:
    """The builder of a data set that is prepared under `data_dir` and has the splits "train" and
    `test_split`.

    `choices` are what else the option dataset could be. Raises ValueError for a data set that TFDS
    does not know, that is not prepared or cannot be without another package, or that has other
    splits."""
    directory = Path(data_dir).expanduser()
    try:
        builder: Any = tfds.builder(dataset, data_dir=directory, file_format="array_record")
    except DatasetNotFoundError:
        raise ValueError(f"dataset must be {choices}a data set of TFDS; got {dataset!r}") from None
    if download:
        try:
            builder.download_and_prepare()
        except ImportError as error:
            raise ValueError(
                f"data set {dataset} cannot be prepared without the package {error.name or error}."
                " Only preparing needs it: pip install tensorflow importlib_resources, here or on"
                f" another machine, and copy what it writes under {directory}"
            ) from error
    if not builder.is_prepared():
        raise ValueError(
            f"data set {dataset} is not prepared under {directory}. Set task.data_dir to"
            " where it is, or prepare it once, connected to the internet (many data sets need"
            " TensorFlow for this step): set task.download=True, or run python -c"
            ' "import tensorflow_datasets as tfds;'
            f" tfds.builder({dataset!r}, data_dir={str(directory)!r}, file_format='array_record')"
            '.download_and_prepare()"'
        )
    if not {"train", test_split} <= set(builder.info.splits):
        raise ValueError(
            f"data set {dataset} must have the splits train and {test_split}; it has"
            f" {', '.join(builder.info.splits)}"
        )
    return builder


def prepared_sha256(builder: Any) -> str:
    """The hash of a prepared data set: of its name with version, and of the numbers of examples in
    all files and of bytes of its splits; contents are not read."""
    splits = {
        name: (list(split.shard_lengths), split.num_bytes)
        for name, split in sorted(builder.info.splits.items())
    }
    listing = json.dumps([builder.info.full_name, splits])
    return hashlib.sha256(listing.encode()).hexdigest()
