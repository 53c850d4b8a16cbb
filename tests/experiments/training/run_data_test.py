"""A run goes on with the data and the tokenizer that it began with, and is used with them."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from experiments import train
from experiments.configs.linear_attention import get_config
from experiments.evaluate import evaluate
from experiments.training import run_data
from experiments.training.prompts import find_prompt_coder
from experiments.training.run_loading import load_run
from tests.experiments.training.resume_test import interrupt_at

TINY = {
    "steps": 6,
    "batch_size": 4,
    "log_every_steps": 2,
    "eval.every_steps": 3,
    "eval.examples": 8,
    "checkpoint.every_steps": 3,
    "model.width": 16,
    "model.depth": 1,
    "optimizer.warmup_steps": 0,
    "task.tokenizer": "bpe",
    "task.vocabulary_size": 300,
    "task.sequence_length": 32,
}


def config(folder: Path, **more: Any) -> Any:
    given = {"task.path": str(folder / "texts"), "task.data_dir": str(folder / "data")}
    made: Any = get_config("text,smoke")
    made.update_from_flattened_dict(TINY | given | more)
    return made


def lines(what: str, count: int) -> str:
    words = (hashlib.sha256(f"{what} {place}".encode()).hexdigest() for place in range(count))
    return "".join(f"{what} {word}\n" for word in words)


def write_texts(folder: Path) -> None:
    (folder / "texts").mkdir()
    for number in range(60):
        (folder / "texts" / f"{number}.txt").write_text(lines("number", 5))


def add_other_text(folder: Path) -> None:
    """Text of another kind for training; the files of validation and test stay."""
    (folder / "texts" / "other_2.txt").write_text(lines("ANOTHER language", 400))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("source")
    write_texts(folder)
    return folder, train.run(config(folder), folder / "run", quiet=True)


@pytest.fixture
def folder(source: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A finished run and its data, to be spoilt; the config in run.json names this copy."""
    copy = Path(shutil.copytree(source[0], tmp_path / "copy"))
    record = json.loads((copy / "run/run.json").read_text())
    for name in ("path", "data_dir"):
        place = record["config"]["task"][name]
        record["config"]["task"][name] = place.replace(str(source[0]), str(copy))
    (copy / "run/run.json").write_text(json.dumps(record))
    return copy


def age(folder: Path) -> None:
    """Makes the run one from before hashes and kept files."""
    record = json.loads((folder / "run/run.json").read_text())
    del record["sizes"], record["kept"], record["provenance"]["tokenizer_sha256"]
    (folder / "run/run.json").write_text(json.dumps(record))
    (folder / "run/tokenizer.json").unlink()


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer_and_records_its_data(source):
    folder, summary = source
    record = json.loads((folder / "run/run.json").read_text())
    kept = (folder / "run/tokenizer.json").read_bytes()
    assert kept == next((folder / "data").rglob("bpe-300.json")).read_bytes()
    sha256 = hashlib.sha256(kept).hexdigest()
    assert record["kept"] == {"tokenizer": sha256}
    assert record["provenance"]["tokenizer_sha256"] == sha256
    assert record["sizes"] == {"vocabulary": Tokenizer.from_str(kept.decode()).get_vocab_size()}
    assert summary["provenance"] == record["provenance"]


def test_evaluation_is_that_of_training_or_says_that_the_text_is_another(source, folder, capsys):
    expected = source[1]["evaluations"]
    assert evaluate(load_run(folder / "run"))["evaluations"] == expected
    add_other_text(folder)
    with pytest.raises(
        ValueError,
        match=r"path=.*texts'.* not those .*text_files: 60 -> 61; .*text_sha256: .*--changed_data",
    ):
        load_run(folder / "run")
    # The files of validation are the same, and so is what they are to the run's own tokenizer.
    again = evaluate(load_run(folder / "run", changed_data=True))["evaluations"]
    assert again == expected
    assert "text_files: 60 -> 61" in capsys.readouterr().err


def test_generation_needs_no_text_and_takes_the_tokenizer_of_the_run(source, folder):
    shutil.rmtree(folder / "texts")
    shutil.rmtree(folder / "data")
    run = load_run(folder / "run", reads_data=False)
    coder, first = (
        find_prompt_coder(each.config, each.task)
        for each in (run, load_run(source[0] / "run", reads_data=False))
    )
    assert coder.encode("number 0abc") == first.encode("number 0abc")
    assert coder.decode(coder.encode("number 0abc")) == "number 0abc"
    jax.tree.map(np.testing.assert_array_equal, run.params, load_run(source[0] / "run").params)


def test_a_run_does_not_go_on_with_another_text(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text(lines("first", 200))
    made = config(tmp_path, **{"task.path": str(file)})
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(SystemExit):
            train.run(made, tmp_path / "run", quiet=True)
    record = (tmp_path / "run/run.json").read_bytes()
    file.write_text(lines("second", 200))
    with pytest.raises(ValueError, match=r"a.txt'.*text_bytes.* -> .*text_sha256: .*init_from=/"):
        train.run(made, tmp_path / "run", quiet=True)
    assert (tmp_path / "run/run.json").read_bytes() == record
    file.write_text(lines("first", 200))
    shutil.rmtree(tmp_path / "data")
    assert train.run(made, tmp_path / "run", quiet=True)["step"] == 6


@pytest.mark.slow
def test_weights_are_not_taken_from_a_run_with_another_tokenizer(folder, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(lines("Wholly Different", 5))
    start = {"init_from": str(folder / "run"), "task.data_dir": str(folder / "data")}
    with pytest.raises(
        ValueError,
        match=r"config.init_from: .*another tokenizer \(bpe-300, .* its own, with"
        r" config.task.tokenizer=.*/run/tokenizer.json",
    ):
        train.run(config(tmp_path, **start), tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()
    start["task.tokenizer"] = str(folder / "run/tokenizer.json")
    train.run(config(tmp_path, **start), tmp_path / "new", quiet=True)
    assert "config.init_from: the run in" in (err := capsys.readouterr().err)
    assert "had other data" in err and "text_sha256: " in err
    # Without the tables of tokens, of which there are more here, nothing means another text.
    start |= {"task.tokenizer": "bpe", "task.vocabulary_size": 320}
    train.run(config(tmp_path, **start), tmp_path / "larger", quiet=True)
    assert "not taken from the checkpoint: embedding" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"{}", b"\xff", b'{"model": 3}', b""])
def test_a_damaged_tokenizer_is_named_and_a_missing_one_is_made_again(source, folder, content):
    kept = folder / "run/tokenizer.json"
    kept.write_bytes(content)
    for reads_data in (True, False):
        with pytest.raises(ValueError, match=r"run/tokenizer.json' is not the tokenizer that the"):
            load_run(folder / "run", reads_data=reads_data)
    kept.unlink()
    assert evaluate(load_run(folder / "run"))["evaluations"] == source[1]["evaluations"]
    load_run(folder / "run", reads_data=False)
    add_other_text(folder)
    with pytest.raises(ValueError, match=r"is neither in .*run/tokenizer.json nor what"):
        load_run(folder / "run", reads_data=False)


def test_an_older_run_works_with_a_warning_and_not_with_another_tokenizer(source, folder, capsys):
    age(folder)
    assert evaluate(load_run(folder / "run"))["evaluations"] == source[1]["evaluations"]
    assert "does not say tokenizer_sha256, as it is older" in capsys.readouterr().err
    load_run(folder / "run", reads_data=False)
    (folder / "run/summary.json").unlink()
    train.run(config(folder), folder / "run", quiet=True)
    add_other_text(folder)
    for options in ({"changed_data": True}, {"reads_data": False}):
        with pytest.raises(ValueError, match=r"tokenizer of the run in .* is neither in"):
            load_run(folder / "run", **options)


@pytest.mark.slow
def test_a_given_tokenizer_may_change_and_the_run_keeps_to_its_own(folder, tmp_path, capsys):
    given = tmp_path / "given.json"
    shutil.copy(folder / "run/tokenizer.json", given)
    made = config(folder, **{"task.tokenizer": str(given), "steps": 3})
    summary = train.run(made, tmp_path / "run", quiet=True)
    given.write_text("{}")
    assert evaluate(load_run(tmp_path / "run"))["evaluations"] == summary["evaluations"]
    assert f"{str(given)!r} has changed since the run" in capsys.readouterr().err


def test_only_what_both_know_is_compared_and_a_hash_outranks_a_name():
    then = {"text": "directory a", "text_sha256": "1" * 64, "count": 3, "gone": 1}
    now = {"text": "directory b", "text_sha256": "1" * 64, "count": 4, "new": 2}
    assert run_data._differences(then, now) == ["count: 3 -> 4"]
    now["text_sha256"] = "2" * 64
    assert run_data._differences(then, now) == [
        "text: directory a -> directory b",
        f"text_sha256: {12 * '1'} -> {12 * '2'}",
        "count: 3 -> 4",
    ]
