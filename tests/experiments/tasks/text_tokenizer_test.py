"""Tokenizers keep every byte, or are refused with what they change."""

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from experiments.tasks.sources import text_tokenizer
from experiments.tasks.sources.text_corpus import Document
from tests.support.texts import documents, everything, make, write_texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


def test_a_bpe_token_stands_for_its_bytes(folder: Path, tmp_path: Path) -> None:
    task = make(folder, tmp_path, tokenizer="bpe", vocabulary_size=300, packing="stream")
    assert task.sizes["vocabulary"] <= 300
    (file,) = (tmp_path / "data").rglob("bpe-300.json")
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode, "data_dir may be shared"
    tokenizer = Tokenizer.from_file(str(file))
    batch = everything(task, "train")
    text = b"".join(documents(folder, "train")).decode()
    assert batch["tokens"].size < len(text.encode()) / 1.2, "tokens are longer than bytes"
    for targets, count in zip(batch["targets"], batch["bytes"], strict=True):
        decoded = tokenizer.decode(targets.tolist(), skip_special_tokens=False)
        # A token may hold part of a character, which the decoder shows as U+FFFD; whole texts
        # compare exactly.
        if "�" not in decoded:
            assert decoded in text
            assert len(decoded.encode()) == count
    assert (
        make(folder, tmp_path, tokenizer=str(file)).sizes["vocabulary"] == task.sizes["vocabulary"]
    )


def test_bytes_that_are_no_text_need_the_byte_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(ValueError, match=r"not UTF-8 .*use tokenizer='bytes'"):
        make(tmp_path / "binary", tmp_path, tokenizer="bpe")
    assert make(tmp_path / "binary", tmp_path).sizes["vocabulary"] == 256


def test_a_tokenizer_that_loses_bytes_is_refused(folder: Path, tmp_path: Path) -> None:
    words: Any = Tokenizer(models.WordLevel(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(["a b c"], trainers.WordLevelTrainer(special_tokens=["?"]))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"words.json' must be byte-level"):
        make(folder, tmp_path, tokenizer=str(tmp_path / "words.json"))
    with pytest.raises(
        ValueError, match=r"must be 'bytes', 'bpe' or the path of a tokenizer.json; got 'bpee'"
    ):
        make(folder, tmp_path, tokenizer="bpee")


@pytest.mark.parametrize(
    ("normalizer", "text", "message"),
    [
        # As many bytes as before: only a comparison of the text itself finds it.
        (normalizers.Lowercase(), "Is THE 0\n", r"from byte 0 on b'Is THE 0.* back as b'is the 0"),
        (
            normalizers.NFD(),
            "x läuft\n",
            r"from byte 3 on b'\\xc3\\xa4uft.* back as b'a\\xcc\\x88uft",
        ),
        (normalizers.Strip(), " ab\n", r"from byte 0 on b' ab.* comes back as b'ab"),
        (normalizers.Prepend("_"), "ab\n", r"from byte 0 on b'ab.* comes back as b'_ab"),
    ],
)
def test_a_tokenizer_that_changes_the_text_is_refused_and_shows_how(
    tmp_path: Path, normalizer: Any, text: str, message: str
) -> None:
    changing: Any = Tokenizer(models.BPE())
    changing.normalizer = normalizer
    changing.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    changing.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    changing.train_from_iterator(["a"], trainers.BpeTrainer(initial_alphabet=alphabet))
    changing.save(str(tmp_path / "changing.json"))
    (tmp_path / "a.txt").write_text(text * 40)
    with pytest.raises(ValueError, match=rf"changing.json' does not keep the text of .*{message}"):
        make(tmp_path / "a.txt", tmp_path, tokenizer=str(tmp_path / "changing.json"))


def test_added_tokens_stand_for_their_own_bytes(tmp_path: Path) -> None:
    adding: Any = Tokenizer(models.BPE())
    adding.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    adding.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    adding.train_from_iterator(["a"], trainers.BpeTrainer(initial_alphabet=alphabet))
    adding.add_special_tokens(["<|größe|>", "two words"])
    adding.save(str(tmp_path / "adding.json"))
    (tmp_path / "a.txt").write_text("<|größe|>two words\n" * 200)
    options = {"tokenizer": str(tmp_path / "adding.json"), "packing": "stream"}
    batch = everything(make(tmp_path / "a.txt", tmp_path, **options), "train")
    meant = {256: "<|größe|>", 257: "two words"}
    for targets, count in zip(batch["targets"], batch["bytes"], strict=True):
        assert {256, 257} < set(targets.tolist())
        assert count == sum(len(meant.get(target, "\n").encode()) for target in targets.tolist())


def test_a_tokenizer_that_is_none_is_named(folder: Path, tmp_path: Path) -> None:
    for content in (b"{}", b"\xff", b""):
        (tmp_path / "damaged.json").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"damaged.json' is no tokenizer.json \(.*; restore it"
        ):
            make(folder, tmp_path, tokenizer=str(tmp_path / "damaged.json"))


def test_one_long_line_trains_a_tokenizer_like_its_pieces(tmp_path: Path) -> None:
    letters = "".join(chr(97 + int(digit, 16) % 4) for digit in hashlib.sha512(b"0").hexdigest())
    words = [letters[place:] * 500 for place in range(8)]  # of 60,000 letters
    text = " " * 5000 + " ".join(words) + "1.5 " * 900
    pieces = list(text_tokenizer._without_long_words(text))
    assert "".join(pieces) == text
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lengths = [len(word) for piece in pieces for word, _ in pre_tokenizer.pre_tokenize_str(piece)]
    assert max(lengths) <= text_tokenizer.LONGEST_WORD + 1
    assert list(text_tokenizer._without_long_words("1.5," * 5000)) == ["1.5," * 5000]
    file = tmp_path / "bpe.json"
    began = time.monotonic()
    text_tokenizer._train_bpe(file, [Document("line", text.encode())], 300)
    assert time.monotonic() - began < 60, "its words are not cut"
