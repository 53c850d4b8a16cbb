"""MAD and induction heads: oracles answer everything that is asked, and nothing else is asked."""

from typing import Any

import numpy as np
import pytest

from experiments.tasks import mad
from experiments.training.task import Examples, find_task

INDICES = np.arange(64)


def training(task, seed):
    examples = task.train(seed)
    assert isinstance(examples, Examples)
    return examples


def sequences_of(kind, **options):
    task: Any = find_task("mad", {"kind": kind, **options})
    batch = task.evaluations["test"].fetch(INDICES)
    return task, batch["tokens"], batch["targets"], batch["weights"] > 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [("recall", {}), ("noisy_recall", {"noise": 0.6}), ("recall", {"length": 6})],
)
def test_a_lookup_of_earlier_pairs_answers_recall(kind, options):
    _, tokens, targets, asked = sequences_of(kind, **options)
    assert tokens.shape[1] == options.get("length", 128) - 1
    keys = 8  # half of 16, or half of the half that is no noise
    for row in range(len(tokens)):
        known = {}
        for t in range(0, tokens.shape[1], 2):
            key, value = tokens[row, t], targets[row, t]
            real = key < keys
            assert asked[row, t] == (real and key in known)
            if asked[row, t]:
                assert known[key] == value
            if real:
                assert keys <= value < 2 * keys
                known[key] = value
            else:
                assert min(key, value) >= 2 * keys
        assert not asked[row, 1::2].any()
    assert asked[:, -1].all()  # the probe
    if kind == "noisy_recall":
        share = (tokens[:, ::2] >= 2 * keys).mean()
        assert share == pytest.approx(0.6, abs=0.03)


def test_fuzzy_recall_ends_with_a_key_that_occurred_and_asks_for_its_value():
    task, tokens, targets, asked = sequences_of("fuzzy_recall")
    sequences = np.concatenate([tokens, targets[:, -1:]], axis=1)
    assert sequences.shape[1] == 128 + 1
    for row, sequence in enumerate(sequences):
        sequence = [int(token) for token in sequence if token != 15]
        size = int(asked[row, -3:].sum())  # of the probe's value
        value, key = sequence[-size:], sequence[-size - 3 : -size]
        assert 1 <= size <= 3 and max(key) < 7 <= min(value)
        earlier = [sequence[i : i + 3 + size] for i in range(len(sequence) - 6)]
        assert key + value in earlier
        assert (targets[row][asked[row]] >= 7).all()
    lengths = (sequences != 15).sum(axis=1)
    assert lengths.max() <= 129 and lengths.min() > 129 - 6
    batch = training(task, 0).fetch(INDICES)
    counted = batch["weights"] > 0
    assert (counted == (batch["targets"] != 15)).all()


def test_memorisation_has_one_map_for_training_and_test():
    task, tokens, targets, asked = sequences_of("memorisation")
    known = {}
    batch = training(task, 3).fetch(np.arange(256))
    assert training(task, 3).length == 256
    for t, a in ((batch["tokens"], batch["targets"]), (tokens, targets)):
        assert (t[:, 1::2] == 255).all() and (t[:, ::2] < 127).all()
        for key, value in zip(t[:, ::2].ravel(), a[:, 1::2].ravel(), strict=True):
            assert known.setdefault(key, value) == value
            assert 127 <= value < 255
    assert asked[:, 1::2].all() and not asked[:, ::2].any()


def test_selective_copying_asks_for_the_data_in_order():
    _, tokens, targets, asked = sequences_of("selective_copying", copied=8, length=40)
    assert (tokens[:, 31] == 15).all() and (tokens[:, 32:] == 14).all()
    assert (tokens[:, 30] < 14).all()  # no blank between the last of the data and COPY
    for row, answer in zip(tokens, targets, strict=True):
        np.testing.assert_array_equal(row[:31][row[:31] < 14], answer[-8:])
    assert asked[:, -8:].all() and not asked[:, :-8].any()


def test_compression_asks_for_everything():
    _, tokens, targets, asked = sequences_of("compression")
    assert (tokens[:, -1] == 15).all() and (tokens[:, :-1] < 15).all() and asked.all()
    np.testing.assert_array_equal(tokens, targets)


def test_recall_is_trained_on_every_next_token_unless_told_otherwise():
    batch = training(mad.make("recall"), 0).fetch(INDICES)
    assert (batch["weights"] == 1).all()
    batch = training(mad.make("recall", targets_only=True), 0).fetch(INDICES)
    assert 0 < (batch["weights"] > 0).mean() < 0.5


def test_examples_are_a_function_of_their_number_and_differ_between_streams():
    task = mad.make("recall", train_examples=-1)
    few, many = training(task, 0).fetch(INDICES[5:7]), training(task, 0).fetch(INDICES)
    np.testing.assert_array_equal(few["tokens"], many["tokens"][5:7])
    others = [training(task, 1), task.evaluations["test"]]
    assert all((o.fetch(INDICES)["tokens"] != many["tokens"]).any() for o in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "copy"}, "kind must be one of recall, .*; got 'copy'"),
        ({"kind": "recall", "length": 7}, "need an even length .*; got 7 and 16"),
        ({"kind": "recall", "noise": 1.0}, r"noise must be a finite number in \[0, 1\); got 1.0"),
        ({"kind": "recall", "train_examples": -2}, "train_examples must be .* got -2"),
        ({"kind": "fuzzy_recall", "length": 8}, "needs length >= 12 .*; got 8 and 16"),
        ({"kind": "selective_copying", "length": 32}, "2 copied .*; got 16, 32 and 16"),
        ({"kind": "compression", "targets_only": True}, "targets_only belongs to"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        find_task("mad", options)


def test_induction_heads_ask_for_what_followed_the_special_token():
    task: Any = find_task("induction_heads", {"length": 20, "test_lengths": (5, 64)})
    assert set(task.evaluations) == {"test", "length_5", "length_64"}
    for examples in (training(task, 0), *task.evaluations.values()):
        batch = examples.fetch(INDICES)
        tokens, length = batch["tokens"], batch["tokens"].shape[1]
        special = tokens == 15
        assert special[:, -1].all() and (special.sum(axis=1) == 2).all()
        first = special.argmax(axis=1)
        np.testing.assert_array_equal(tokens[np.arange(64), first + 1], batch["targets"][:, 0])
        assert (batch["readout_positions"] == length - 1).all()
        assert length < 10 or len(set(first)) > 10
    with pytest.raises(ValueError, match="must be at least 3; got 2 and 16"):
        find_task("induction_heads", {"length": 2})
