"""Language modelling: bytes or byte-level BPE, on the running Python's standard library or any text
files.

A split's documents stand one after another and are cut into windows of T tokens. With
packing="documents" the tokens of one file share a segment id, the recurrent states start afresh at
its first token, and no token of one file is predicted from another; with packing="stream" the text
is one stream."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.objectives.next_token import NextToken, token_metrics
from experiments.tasks.sources.text_builder import WindowsConfig, prepare_windows, read_windows
from experiments.tasks.sources.text_corpus import Corpus, standard_library, text_files
from experiments.tasks.sources.text_tokenizer import Coder, find_coder
from experiments.training.task import Batch, Examples, Length, Task, Vocabulary

DEFAULT_DATA_DIR = "~/.cache/scanax"


def make(
    path: str = "",
    tokenizer: str = "bytes",
    vocabulary_size: Vocabulary = 4096,
    sequence_length: Length = 1024,
    packing: str = "documents",
    data_dir: str = DEFAULT_DATA_DIR,
    validation_path: str = "",
    test_path: str = "",
) -> Task:
    """Windows of text; evaluations "validation" and "test", which are files of their own.

    path                a text file (its last tenth is validation and test) or a directory (files
                        are split by their names, or, where that leaves a split with no more than T
                        bytes, each is cut like a single file); "": the sources and documentation
                        of the running Python's standard library, about 10 MB
    tokenizer           "bytes" (vocabulary 256), "bpe" (byte-level BPE, trained on the training
                        split once), or a file tokenizer.json with byte-level tokens
    vocabulary_size     of "bpe"; the others have their own
    sequence_length     T
    packing             "documents" or "stream"
    data_dir            where the prepared windows and the trained tokenizer are kept
    validation_path     a file or a directory for validation: all else of `path` is for training
    test_path           likewise, beside it; "": there is no evaluation "test"

    Metrics: token_metrics and bits_per_byte. Provenance: source, number of files, size and sha256
    of the text, tokenizer and its sha256. A run keeps the tokenizer."""
    if packing not in ("documents", "stream"):
        raise ValueError(f"packing must be 'documents' or 'stream'; got {packing!r}")
    if validation_path and not path:
        raise ValueError("validation_path needs a path of text for training; got path=''")
    text_dir = Path(data_dir).expanduser() / "text"
    corpus = (
        text_files(
            path, validation_path, test_path, window=sequence_length, hashes=text_dir / "hashes"
        )
        if path
        else standard_library()
    )
    corpus_dir = text_dir / f"{corpus.sha256[:16]}{'-inside' if corpus.inside else ''}"
    coder = find_coder(tokenizer, vocabulary_size, lambda: corpus.splits["train"], corpus_dir)
    directory = corpus_dir / f"{coder.name}-{sequence_length}"
    if not directory.exists():
        _prepare(directory, corpus, coder, sequence_length)
    sources = read_windows(directory)

    def examples(split: str) -> Examples:
        def fetch(indices: np.ndarray) -> Batch:
            windows = sources[split].__getitems__(indices.tolist())
            tokens = np.stack([window["tokens"] for window in windows]).astype(np.int32)
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
            weights = np.ones(batch["targets"].shape, np.float32)
            if packing == "documents":
                documents = np.stack([window["documents"] for window in windows])
                batch["segment_ids"] = documents[:, :-1]
                # The first token of a file has nothing before it.
                weights[documents[:, 1:] != documents[:, :-1]] = 0
            target_bytes = coder.token_bytes[batch["targets"]]
            return batch | {
                "weights": weights,
                "bytes": np.sum(target_bytes * weights, axis=1, dtype=np.float32),
            }

        return Examples(fetch, len(sources[split]))

    return Task(
        sizes={"vocabulary": len(coder.token_bytes)},
        train=lambda seed: examples("train"),
        evaluations={
            split: examples(split) for split in ("validation", "test") if split in sources
        },
        objective=NextToken(derive=text_metrics),
        provenance={
            "text": corpus.source,
            "text_files": corpus.files,
            "text_bytes": corpus.size,
            "text_sha256": corpus.sha256,
            **({"text_splits": "inside files"} if corpus.inside else {}),
            "tokenizer": coder.name,
            **({"tokenizer_sha256": hashlib.sha256(coder.file).hexdigest()} if coder.file else {}),
        },
        kept={"tokenizer": coder.file} if coder.file else {},
    )


def text_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """token_metrics, and bits_per_byte: the loss in bits over the bytes that the targets stand
    for."""
    return token_metrics(sums) | {
        "bits_per_byte": float(sums["loss_sum"] / np.log(2) / sums["bytes_sum"])
    }


def _prepare(directory: Path, corpus: Corpus, coder: Coder, sequence_length: int) -> None:
    documents = {
        split: [coder.encode(document) for document in corpus.splits[split]]
        for split in corpus.splits
    }
    for split, arrays in documents.items():
        total = sum(map(len, arrays))
        if total <= sequence_length:
            raise ValueError(
                f"the {split} split of the {corpus.source} has {total} tokens, fewer"
                f" than one window of sequence_length + 1 = {sequence_length + 1}; give"
                " more text or a shorter sequence_length"
            )
    dtype = (
        np.uint8
        if len(coder.token_bytes) <= 2**8
        else np.uint16
        if len(coder.token_bytes) <= 2**16
        else np.int32
    )
    name = f"{coder.name}-{sequence_length}"
    prepare_windows(
        directory,
        WindowsConfig(name=name, documents=documents, length=sequence_length, token_dtype=dtype),
    )
