"""How text becomes tokens: bytes, or a byte-level tokenizer, given or trained here."""

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.tasks.sources.text_builder import publish
from experiments.tasks.sources.text_corpus import Document

# The trainer's time is quadratic in the length of a word, and a text without spaces is one word.
LONGEST_WORD = 1000
LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD + 1},}}|\s{{{LONGEST_WORD + 1},}}")


@dataclass(frozen=True)
class Coder:
    """`encode` maps a document to token numbers; token_bytes [vocabulary] is how many bytes each
    token stands for; file is the tokenizer.json, None for bytes."""

    name: str
    encode: Callable[[Document], np.ndarray]
    token_bytes: np.ndarray
    file: bytes | None = None


def find_coder(
    tokenizer: str,
    vocabulary_size: int,
    documents: Callable[[], Sequence[Document]],
    directory: Path,
) -> Coder:
    """The coder of a `tokenizer` option; "bpe" is trained on the documents unless `directory` has
    it.

    A file with the bytes of that one is that one: data prepared with it is found by its name.
    Raises ValueError for a file that is no byte-level tokenizer."""
    if tokenizer == "bytes":
        return Coder("bytes", _bytes, np.ones(256, np.int64))
    trained = directory / f"bpe-{vocabulary_size}.json"
    if tokenizer == "bpe" and not trained.exists():
        _train_bpe(trained, documents(), vocabulary_size)
    file = trained if tokenizer == "bpe" else Path(tokenizer).expanduser()
    if not file.is_file():
        raise ValueError(
            f"tokenizer must be 'bytes', 'bpe' or the path of a tokenizer.json; got {tokenizer!r}"
        )
    content = file.read_bytes()
    known = tokenizer == "bpe" or (trained.is_file() and trained.read_bytes() == content)
    name = trained.stem if known else f"tokenizer-{hashlib.sha256(content).hexdigest()[:16]}"
    return _file_coder(file, content, name)


def _file_coder(file: Path, content: bytes, name: str) -> Coder:
    try:
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    # The library raises plain Exceptions for what it cannot read.
    except Exception as error:
        raise ValueError(
            f"tokenizer {str(file)!r} is no tokenizer.json ({error}); restore it, or, if it was"
            " trained here, remove it to train it anew"
        ) from error
    if (json.loads(tokenizer.to_str()).get("decoder") or {}).get("type") != "ByteLevel":
        raise ValueError(
            f"tokenizer {str(file)!r} must be byte-level (a ByteLevel decoder), so that bits"
            " per byte can be computed"
        )
    tokens = _bytes_of_tokens(tokenizer)

    def encode(document: Document) -> np.ndarray:
        ids = tokenizer.encode(_decode(document), add_special_tokens=False).ids
        text = b"".join(tokens[number] for number in ids)
        if text != document.content:
            raise ValueError(_other_text(file, document, text))
        return np.array(ids, np.int64)

    return Coder(name, encode, np.array([len(token) for token in tokens]), content)


def _bytes_of_tokens(tokenizer: Any) -> list[bytes]:
    """What each token stands for. A byte-level tokenizer writes each byte as one character; tokens
    added to it are the text itself."""
    # GPT-2's table: printable bytes are themselves, the others follow from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    byte_of |= {chr(256 + place): byte for place, byte in enumerate(others)}
    added = tokenizer.get_added_tokens_decoder()

    def meaning(number: int) -> bytes:
        text = tokenizer.id_to_token(number) or ""
        if number in added or not set(text) <= byte_of.keys():
            return text.encode("utf-8")
        return bytes(byte_of[character] for character in text)

    return [meaning(number) for number in range(tokenizer.get_vocab_size())]


def _other_text(file: Path, document: Document, text: bytes) -> str:
    """The message for a document that comes back from the tokenizer as another text."""
    pairs = enumerate(zip(document.content, text, strict=False))
    shorter = min(len(document.content), len(text))
    place = next((place for place, (a, b) in pairs if a != b), shorter)
    there, back = (part[place : place + 20] for part in (document.content, text))
    return (
        f"tokenizer {str(file)!r} does not keep the text of {document.name!r}: from byte {place} on"
        f" {there!r} comes back as {back!r}; use a tokenizer that decodes to what it encoded (no"
        " normaliser, no prefix space, a token for every byte)"
    )


def _train_bpe(file: Path, documents: Sequence[Document], vocabulary_size: int) -> None:
    if vocabulary_size < 256:
        raise ValueError(f"vocabulary_size must be at least 256, the bytes; got {vocabulary_size}")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=alphabet, show_progress=False
    )
    texts = (text for document in documents for text in _without_long_words(_decode(document)))
    tokenizer.train_from_iterator(texts, trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile, whose files are their owner's alone: data_dir may be shared.
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    tokenizer.save(str(unfinished))
    publish(unfinished, file)


def _without_long_words(text: str) -> Iterator[str]:
    """The text, in one piece unless it has words of more than LONGEST_WORD characters, which are
    cut."""
    done = 0
    for run in LONG_RUN.finditer(text):
        for _, (start, end) in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(
            run.group()
        ):
            for cut in range(run.start() + start + LONGEST_WORD, run.start() + end, LONGEST_WORD):
                yield text[done:cut]
                done = cut
    yield text[done:]


def _bytes(document: Document) -> np.ndarray:
    return np.frombuffer(document.content, np.uint8)


def _decode(document: Document) -> str:
    try:
        return document.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{document.name!r} is not UTF-8 ({error}); use tokenizer='bytes' for such files"
        ) from error
