"""What a new kind of model enters through, each walked through by a toy: sizes, an objective that
draws random numbers and counts its own work, an evaluation that is not a sum, an average of
weights, frozen parameters, weights of another model."""

import json
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from experiments import train
from experiments.configs.linear_self_attention import get_config
from experiments.evaluate import evaluate
from experiments.objectives.objective import Work, weighted_mean
from experiments.training import checkpoints, program, state
from experiments.training.mesh import make_mesh
from experiments.training.run_loading import load_run
from experiments.training.task import Examples, Task

SIDE = 4


class Denoiser(nnx.Module):
    """Noise out of noisy images [B, H, W], by two linear maps."""

    causal = False

    def __init__(self, pixels, inner, rngs):
        metadata = {"kernel_metadata": {"out_sharding": (None, None)}, "use_bias": False}
        self.encoder = nnx.Linear(pixels, inner, rngs=rngs, **metadata)
        self.decoder = nnx.Linear(inner, pixels, rngs=rngs, **metadata)

    def __call__(self, x_BHW):
        flat = x_BHW.reshape(len(x_BHW), -1)
        return self.decoder(jnp.tanh(self.encoder(flat))).reshape(x_BHW.shape)


def build(options, *, height, width, rngs, param_dtype, compute_dtype):
    del param_dtype, compute_dtype
    return Denoiser(height * width, options["inner"], rngs)


@dataclass(frozen=True)
class Denoising:
    """The squared error of the noise, found in images with noise added."""

    def __call__(self, model, batch, key):
        noise = jax.random.normal(key, batch["image"].shape)
        error = jnp.mean(jnp.square(model(batch["image"] + noise) - noise), axis=(1, 2))
        sums = {
            "loss_sum": jnp.sum(batch["weights"] * error),
            "weight_sum": jnp.sum(batch["weights"]),
        }
        return weighted_mean(sums["loss_sum"], sums["weight_sum"]), sums

    def work(self, batch):
        return Work("images", batch["image"].shape[0])

    def metrics(self, sums):
        return {"loss": float(sums["loss_sum"] / sums["weight_sum"])}


@dataclass(frozen=True)
class Drawing(Denoising):
    """The same, but what it reports as its loss is a number that it draws from its key."""

    def __call__(self, model, batch, key):
        loss, sums = super().__call__(model, batch, key)
        return loss, sums | {"loss_sum": sums["weight_sum"] * jax.random.uniform(key)}


@dataclass(frozen=True)
class Spread:
    """Not a sum over batches: the spread of samples made from noise."""

    metrics: tuple[str, ...] = ("spread",)

    def run(self, apply, params, key):
        samples = apply(sample, params, (), key)
        return {"spread": [float(np.std(each)) for each in samples]}


def sample(model, batch, key):
    del batch
    noise = jax.random.normal(key, (16, SIDE, SIDE))
    return noise - model(noise)


def fetch(indices: np.ndarray) -> dict[str, np.ndarray]:
    images = np.stack([np.random.default_rng(index).normal(size=(SIDE, SIDE)) for index in indices])
    return {"image": images.astype(np.float32), "weights": np.ones(len(indices), np.float32)}


def flipped(batch: Any, indices: np.ndarray, epochs: np.ndarray) -> Any:
    """Every second time a mirror image."""
    image = batch["image"]
    return batch | {"image": np.where((epochs % 2 == 1)[:, None, None], image[:, :, ::-1], image)}


TASK = Task(
    {"height": SIDE, "width": SIDE},
    lambda seed: Examples(fetch, 12, flipped),
    {"test": Examples(lambda indices: fetch(1000 + indices), 8), "samples": Spread()},
    Denoising(),
)


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    monkeypatch.setattr(program, "configured_task", lambda config: TASK)
    monkeypatch.setattr("experiments.training.run_loading.configured_task", lambda config: TASK)
    monkeypatch.setattr(state, "available_networks", lambda: ("denoiser",))
    monkeypatch.setitem(sys.modules, "models.networks.denoiser", SimpleNamespace(build=build))


def config_of(**options: Any) -> Any:
    config: Any = get_config("icl_regression,smoke")
    config.model = ConfigDict({"name": "denoiser", "inner": 5})
    config.steps, config.batch_size, config.log_every_steps = 6, 8, 1
    config.optimizer.warmup_steps = 0
    config.eval.update({"every_steps": 3, "examples": 8, "best_metric": "samples/spread"})
    config.checkpoint.update({"every_steps": 3, "keep": 9})
    config.update_from_flattened_dict(options)
    return config


def rows_of(workdir) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in rows]


def test_a_model_of_images_trains_is_sampled_and_resumes_to_the_bit(tmp_path):
    summary = train.run(config_of(), tmp_path / "whole", quiet=True)
    assert set(summary["evaluations"]) == {"test", "samples"}
    assert summary["best"]["value"] > 0 and summary["unit"] == "images"
    assert summary["tokens"] == 6 * 8 and summary["state_bytes"] is None
    row = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[1])
    assert row["speed/images_per_second_per_device"] > 0
    losses = [row["train/loss"] for row in rows_of(tmp_path / "whole")]
    assert len(set(map(tuple, losses))) == 6

    # The noise of a step and the flips of an epoch are those of the run that was not interrupted.
    short = config_of(**{"checkpoint.keep": 1})
    (tmp_path / "cut").mkdir()
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / "cut" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    saved = tmp_path / "whole" / "checkpoints" / "3"
    saved.parent.joinpath("3").rename(_made(tmp_path / "cut" / "checkpoints") / "3")
    train.run(short, tmp_path / "cut", quiet=True)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def _made(folder):
    folder.mkdir()
    return folder


def test_the_same_key_scores_a_checkpoint_the_same_at_any_time(tmp_path):
    summary = train.run(config_of(), tmp_path, quiet=True)
    again = evaluate(load_run(tmp_path))
    assert again["evaluations"] == summary["evaluations"]
    assert again["decode_max_abs_difference"] is None


def test_an_objective_draws_other_numbers_in_every_step(tmp_path, monkeypatch):
    task = replace(TASK, objective=Drawing())
    monkeypatch.setattr(program, "configured_task", lambda config: task)
    train.run(config_of(), tmp_path, quiet=True)
    drawn = [row["train/loss"][0] for row in rows_of(tmp_path)]
    assert len(drawn) == 6 and len(set(drawn)) == 6


def test_accumulated_parts_draw_noise_of_their_own(tmp_path):
    whole = train.run(config_of(), tmp_path / "whole", quiet=True)
    parts = train.run(config_of(accumulate=2), tmp_path / "parts", quiet=True)
    assert parts["train"]["loss"] != whole["train"]["loss"]
    assert parts["train"]["loss"][0] == pytest.approx(whole["train"]["loss"][0], rel=0.5)


def test_a_network_is_refused_a_task_without_its_sizes(monkeypatch, tmp_path):
    monkeypatch.setattr(
        program, "configured_task", lambda config: replace(TASK, sizes={"width": 4})
    )
    message = "model.name=denoiser needs a task with the size 'height'; .* config.task are: width"
    with pytest.raises(ValueError, match=message):
        train.run(config_of(), tmp_path / "run", quiet=True)


@pytest.mark.slow
def test_the_average_follows_the_parameters_is_saved_and_evaluated(tmp_path):
    decay = 0.75
    averaging = {"ema_decay": decay, "checkpoint.every_steps": 1, "eval.averaged": True}
    config = config_of(**averaging)
    summary = train.run(config, tmp_path, quiet=True)
    expected = None
    for step in range(1, 7):
        params = load_run(tmp_path, str(step)).params
        if step == 1:
            first = config_of(ema_decay=decay)
            made = program.make_program(first, load_run(tmp_path).mesh)
            expected = jax.tree.map(np.asarray, made.start().params)
        expected = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, expected, params)
    averaged = load_run(tmp_path, averaged=True)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5),
        averaged.params,
        expected,
    )
    assert evaluate(averaged)["evaluations"] == summary["evaluations"]
    plain = evaluate(load_run(tmp_path))["evaluations"]
    assert plain["test"] != summary["evaluations"]["test"]
    with pytest.raises(ValueError, match=r"--averaged needs a run with an average"):
        train.run(config_of(), tmp_path / "without", quiet=True)
        load_run(tmp_path / "without", averaged=True)


def test_an_average_that_is_not_kept_cannot_be_evaluated(tmp_path):
    with pytest.raises(ValueError, match=r"config.eval.averaged must be False without an average"):
        train.run(config_of(**{"eval.averaged": True}), tmp_path / "run", quiet=True)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay_and_the_others_learn(tmp_path, name):
    options = {"optimizer.frozen": ("encoder/.*",), "optimizer.name": name, "ema_decay": 0.5}
    train.run(config_of(**options), tmp_path, quiet=True)
    made = program.make_program(config_of(), load_run(tmp_path).mesh)
    start, end = made.start().params, load_run(tmp_path).params
    np.testing.assert_array_equal(end["encoder"]["kernel"], start["encoder"]["kernel"])
    assert np.abs(end["decoder"]["kernel"] - start["decoder"]["kernel"]).max() > 1e-3
    saved = checkpoints.stored_shapes(tmp_path / "checkpoints", "optimizer")
    assert "encoder" not in str(jax.tree.leaves_with_path(saved["opt_state"]))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_norm_is_that_of_the_parameters_that_are_trained(accumulate):
    mesh = make_mesh(config_of().mesh)
    norms = {}
    for frozen in ("", "encoder", "decoder"):
        patterns = (f"{frozen}/.*",) if frozen else ()
        config = config_of(**{"optimizer.frozen": patterns, "accumulate": accumulate})
        made = program.make_program(config, mesh)
        batch, _ = made.place(fetch(np.arange(8)))
        numbers = made.place_hyperparameters()
        window = made.step(made.start(), batch, np.int32(1), numbers).window
        norms[frozen] = float(window["gradient_norm"])
    assert 0 < norms["encoder"] < norms[""] and 0 < norms["decoder"] < norms[""]
    # The squares of the parts are the square of the whole.
    assert norms["encoder"] ** 2 + norms["decoder"] ** 2 == pytest.approx(norms[""] ** 2, rel=1e-5)


@pytest.mark.parametrize(
    "patterns, message",
    [
        (("head/.*",), "'head/.\\*' match none of decoder/kernel, encoder/kernel"),
        ((".*",), "leaves no parameter to train"),
        (("(",), r"must be a tuple of regular expressions; got '\('"),
    ],
)
def test_patterns_that_freeze_nothing_or_all_are_refused(tmp_path, patterns, message):
    with pytest.raises(ValueError, match=message):
        train.run(config_of(**{"optimizer.frozen": patterns}), tmp_path / "run", quiet=True)


@pytest.mark.slow
def test_the_matching_weights_of_another_model_are_taken_and_the_rest_is_named(
    tmp_path, monkeypatch, capsys
):
    train.run(config_of(), tmp_path / "source", quiet=True)
    wider = config_of(init_from=str(tmp_path / "source"), ema_decay=0.9)
    wider.steps = wider.checkpoint.every_steps = 1
    wider.optimizer.lr = 1e-12

    class Deeper(Denoiser):
        def __init__(self, pixels, inner, rngs):
            super().__init__(pixels, inner, rngs)
            self.decoder = nnx.Linear(inner, pixels, rngs=rngs)

    def deeper(options, *, height, width, rngs, param_dtype, compute_dtype):
        return Deeper(height * width, options["inner"], rngs)

    source = load_run(tmp_path / "source").params
    monkeypatch.setitem(sys.modules, "models.networks.denoiser", SimpleNamespace(build=deeper))
    train.run(wider, tmp_path / "new", quiet=True)
    warning = "init_from: not in the checkpoint, starting from the seed: decoder/bias"
    assert warning in capsys.readouterr().err
    for averaged in (False, True):
        new = load_run(tmp_path / "new", averaged=averaged).params
        for part in ("encoder", "decoder"):
            np.testing.assert_allclose(new[part]["kernel"], source[part]["kernel"], rtol=1e-6)
