"""Windows of tokens on disk: a TFDS data set in ArrayRecord files, written once per corpus,
tokenizer and length.

No TensorFlow: TFDS reads and writes ArrayRecord by itself, and the features are plain arrays stored
as bytes."""

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

VERSION = "1.0.0"


@dataclass
class WindowsConfig(tfds.core.BuilderConfig):
    """What is written: per split the tokens of its documents, one after another, cut into
    windows."""

    documents: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict, repr=False)
    length: int = 0
    token_dtype: type = np.uint8


class TextWindows(tfds.core.GeneratorBasedBuilder):
    """Windows of `length` + 1 tokens; each begins at the last token of the one before, so every
    token is a target once.

    tokens          the token numbers
    documents       the number of the token's document within the window, 0 for the first: documents
                    that follow each other differ
    """

    VERSION = tfds.core.Version(VERSION)
    # Nothing is downloaded: without checksums TFDS need not look for a checksum file next to this
    # one.
    url_infos = None

    @property
    def _config(self) -> WindowsConfig:
        return cast(WindowsConfig, self.builder_config)

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (self._config.length + 1,)
        features = {
            "tokens": tfds.features.Tensor(
                shape=shape, dtype=self._config.token_dtype, encoding="bytes"
            ),
            "documents": tfds.features.Tensor(shape=shape, dtype=np.int32, encoding="zlib"),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self._config.documents}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        arrays, length = self._config.documents[split], self._config.length
        tokens = np.concatenate(arrays).astype(self._config.token_dtype)
        documents = np.repeat(
            np.arange(len(arrays), dtype=np.int32), [len(array) for array in arrays]
        )
        for window, start in enumerate(range(0, len(tokens) - length, length)):
            inside = slice(start, start + length + 1)
            yield (
                window,
                {"tokens": tokens[inside], "documents": documents[inside] - documents[start]},
            )


def prepare_windows(directory: Path, config: WindowsConfig) -> None:
    """Writes the data set at `directory`, which appears when it is complete. A data set that is
    there is left as it is.

    Several processes may do this at once: each writes a folder of its own, and the first to finish
    puts its folder in place."""
    if importlib.util.find_spec("array_record") is None:
        raise ImportError(
            "the text task keeps its data in ArrayRecord files, and this platform has"
            " no array-record; install it (pip install array-record; there are wheels"
            " for Linux and macOS)"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=directory.parent))
    try:
        logging.info("writing windows of %d tokens to %s", config.length, directory)
        tfds.disable_progress_bar()
        builder = TextWindows(data_dir=unfinished, config=config, file_format="array_record")
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # TFDS would announce a download; there is none
            builder.download_and_prepare()
        publish(Path(builder.data_path), directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """Moves a finished file or folder to `target` in one step, unless another process has put the
    same there."""
    try:
        os.rename(source, target)
    except OSError:
        if not target.exists():
            raise


def read_windows(directory: Path) -> dict[str, Any]:
    """Random access to the windows of each split: `source.__getitems__(indices)` is a list of
    dicts."""
    builder: Any = tfds.builder_from_directory(directory)
    return {split: builder.as_data_source(split=split) for split in builder.info.splits}
