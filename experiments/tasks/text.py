"""Language modelling: bytes or byte-level BPE, on the running Python's standard library or any text
files.

A split's documents stand one after another and are cut into windows of T tokens. With
packing="documents" the tokens of one file share a segment id, the recurrent states start afresh at
its first token, and no token of one file is predicted from another; with packing="stream" the text
is one stream."""

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.objectives.next_token import NextToken, token_metrics
from experiments.tasks.sources.text_builder import (
    WindowsConfig,
    prepare_windows,
    publish,
    read_windows,
)
from experiments.tasks.sources.text_corpus import Corpus, Document, standard_library, text_files
from experiments.training.task import Batch, Examples, Task

DEFAULT_DATA_DIR = "~/.cache/scanax"


def make(
    path: str = "",
    tokenizer: str = "bytes",
    vocabulary_size: int = 4096,
    sequence_length: int = 1024,
    packing: str = "documents",
    data_dir: str = DEFAULT_DATA_DIR,
) -> Task:
    """Windows of text; evaluations "validation" and "test", which are files of their own.

    path                a text file (its last tenth is validation and test) or a directory (files
                        are split by their names); "": the sources and documentation of the running
                        Python's standard library, about 10 MB
    tokenizer           "bytes" (vocabulary 256), "bpe" (byte-level BPE, trained on the training
                        split once), or a file tokenizer.json with byte-level tokens
    vocabulary_size     of "bpe"; the others have their own
    sequence_length     T
    packing             "documents" or "stream"
    data_dir            where the prepared windows and the trained tokenizer are kept

    Metrics: token_metrics and bits_per_byte. Provenance: source, number of files, size and sha256
    of the text, tokenizer."""
    if packing not in ("documents", "stream"):
        raise ValueError(f"packing must be 'documents' or 'stream'; got {packing!r}")
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1; got {sequence_length}")
    corpus = text_files(path) if path else standard_library()
    corpus_dir = Path(data_dir).expanduser() / "text" / corpus.sha256[:16]
    coder = find_coder(tokenizer, vocabulary_size, corpus, corpus_dir)
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
        evaluations={split: examples(split) for split in ("validation", "test")},
        objective=NextToken(derive=text_metrics),
        provenance={
            "text": corpus.source,
            "text_files": corpus.files,
            "text_bytes": corpus.size,
            "text_sha256": corpus.sha256,
            "tokenizer": coder.name,
        },
    )


def text_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """token_metrics, and bits_per_byte: the loss in bits over the bytes that the targets stand
    for."""
    return token_metrics(sums) | {
        "bits_per_byte": float(sums["loss_sum"] / np.log(2) / sums["bytes_sum"])
    }


@dataclass(frozen=True)
class Coder:
    """`encode` maps a document to token numbers; token_bytes [vocabulary] is how many bytes each
    token stands for."""

    name: str
    encode: Callable[[Document], np.ndarray]
    token_bytes: np.ndarray


def find_coder(tokenizer: str, vocabulary_size: int, corpus: Corpus, directory: Path) -> Coder:
    """The coder of a `tokenizer` option; "bpe" is trained on the corpus unless `directory` has
    it."""
    if tokenizer == "bytes":
        return Coder("bytes", _bytes, np.ones(256, np.int64))
    if tokenizer == "bpe":
        file = directory / f"bpe-{vocabulary_size}.json"
        if not file.exists():
            _train_bpe(file, corpus.splits["train"], vocabulary_size)
        return _file_coder(file, f"bpe-{vocabulary_size}")
    file = Path(tokenizer).expanduser()
    if not file.is_file():
        raise ValueError(
            f"tokenizer must be 'bytes', 'bpe' or the path of a tokenizer.json; got {tokenizer!r}"
        )
    return _file_coder(file, f"tokenizer-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}")


def _file_coder(file: Path, name: str) -> Coder:
    """The coder of a byte-level tokenizer: it writes each byte as one character, so a token's
    length is its bytes."""
    tokenizer = Tokenizer.from_file(str(file))
    if (json.loads(tokenizer.to_str()).get("decoder") or {}).get("type") != "ByteLevel":
        raise ValueError(
            f"tokenizer {file} must be byte-level (a ByteLevel decoder), so that bits"
            " per byte can be computed"
        )
    tokens = [tokenizer.id_to_token(number) or "" for number in range(tokenizer.get_vocab_size())]
    token_bytes = np.array([len(token) for token in tokens])

    def encode(document: Document) -> np.ndarray:
        encoding = tokenizer.encode(_decode(document), add_special_tokens=False)
        numbers = np.array(encoding.ids, np.int64)
        if np.sum(token_bytes[numbers]) != len(document.content):
            raise ValueError(
                f"tokenizer {file} does not keep the text of {document.name}: its"
                f" tokens stand for {np.sum(token_bytes[numbers])} of"
                f" {len(document.content)} bytes; use one that does not normalise"
            )
        return numbers

    return Coder(name, encode, token_bytes)


def _train_bpe(file: Path, documents: Sequence[Document], vocabulary_size: int) -> None:
    if vocabulary_size < 256:
        raise ValueError(f"vocabulary_size must be at least 256, the bytes; got {vocabulary_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((_decode(document) for document in documents), trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile, whose files are their owner's alone: data_dir may be shared.
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    tokenizer.save(str(unfinished))
    publish(unfinished, file)


def _bytes(document: Document) -> np.ndarray:
    return np.frombuffer(document.content, np.uint8)


def _decode(document: Document) -> str:
    try:
        return document.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{document.name} is not UTF-8 ({error}); use tokenizer='bytes' for such files"
        ) from error


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
