"""A user's mistake is found before anything is built, and costs one line that says how to mend
it."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import train
from experiments.configs.linear_self_attention import get_config
from experiments.configs.recipes.base import available_recipes, recipe
from experiments.reporting.table import Cell, config_hash
from experiments.training import command_line
from experiments.training import config as configs
from experiments.training.checkout import CHECKOUT

FILE = "experiments/configs/linear_self_attention.py"


def changed(**overrides: Any) -> Any:
    config: Any = get_config("icl_regression,smoke")
    for key, value in overrides.items():
        section, _, name = key.replace("__", ".").rpartition(".")
        (config[section] if section else config).update({name: value})
    return config


@pytest.mark.parametrize(
    "argument", [f"{name}{variant}" for name in available_recipes() for variant in ("", ",smoke")]
)
def test_every_recipe_is_valid(argument):
    configs.validate(recipe(argument))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"steps": 0}, "config.steps must be greater than 0; got 0"),
        ({"batch_size": -8}, "config.batch_size must be greater than 0; got -8"),
        ({"optimizer__lr": -1.0}, "config.optimizer.lr must be greater than 0; got -1.0"),
        ({"optimizer__b2": 1.0}, r"config.optimizer.b2 must be in \[0, 1\); got 1.0"),
        (
            {"optimizer__warmup_steps": 301},
            "config.optimizer.warmup_steps must be at most config.steps=300; got 301",
        ),
        ({"seeds": ()}, "config.seeds must be a tuple of distinct integers"),
        ({"seeds": (1, 1)}, r"config.seeds must be .* got \(1, 1\)"),
        (
            {"param_dtype": "float8"},
            "config.param_dtype must be one of float32, bfloat16; got 'float8'",
        ),
        ({"profile_steps": "9:3"}, "config.profile_steps must be \"first:last\" .* got '9:3'"),
        ({"eval__best_mode": "best"}, "config.eval.best_mode must be one of max, min; got 'best'"),
        (
            {"optimizer__name": "sgd"},
            "config.optimizer.name must be one of adamw, lion, lamb, muon, kar3; got 'sgd'",
        ),
        (
            {"optimizer__schedule": "step"},
            "config.optimizer.schedule must be one of cosine, .* got 'step'",
        ),
        (
            {"optimizer__schedule": "refined:"},
            "config.optimizer.schedule must be .*<workdir of .* got 'refined:'",
        ),
        ({"optimizer__schedule": "refined:/nowhere"}, "/nowhere holds no run"),
        ({"optimizer__schedule": "halving:0"}, "must be .* or halving:<updates, 1 or more>; got"),
        (
            {"eval__at_best": True, "eval__best_metric": ""},
            "config.eval.at_best must be False without a metric .*; got True",
        ),
        (
            {"optimizer__schedule": "refined:/nowhere", "optimizer__warmup_steps": 9},
            "config.optimizer.warmup_steps must be 0 for a refined schedule, .* got 9",
        ),
        ({"accumulate": 0}, "config.accumulate must be greater than 0; got 0"),
        (
            {"accumulate": 7},
            "config.batch_size must be a multiple of accumulate x .* = 7 x 1 x 1 = 7; got 1024",
        ),
        ({"mesh__zero": 2}, "config.mesh.zero must be one of 1, 3; got 2"),
        (
            {"heartbeat_timeout_seconds": 0},
            "config.heartbeat_timeout_seconds must be greater than 0; got 0",
        ),
        ({"model__name": "rnn"}, "config.model.name must be one of .*lm.*; got 'rnn'"),
        ({"task__name": "chess"}, "config.task.name must be one of .*mqar.*; got 'chess'"),
        ({"model__init": "zeros"}, "init must be one of 'gaussian', 'guaranteed'; got 'zeros'"),
        ({"model__heads": 2}, "model linear_self_attention has no option 'heads'"),
        (
            {"task__width": 2},
            "task icl_regression has no option 'width'; known options in task: dimension",
        ),
        ({"mesh__sequence": 2}, "must multiply to the number of devices, 1; got .*sequence=2"),
        (
            {"mesh__data": 3},
            "config.mesh sizes must multiply to the number of devices, 1; got data=3",
        ),
        ({"mesh__data": -1, "mesh__fsdp": -1}, "at most one of them -1"),
        (
            {"eval__best_metric": "test/loss"},
            "config.eval.best_metric must be .*in_distribution/loss.* 'test/loss'",
        ),
        ({"init_from": "/nowhere"}, "config.init_from: /nowhere holds no checkpoint"),
    ],
)
def test_an_impossible_entry_is_named_and_nothing_is_written(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train.run(changed(**overrides), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_missing_an_unknown_and_an_ill_typed_key_are_named():
    config = changed()
    with config.unlocked():
        del config.optimizer.lr
    with pytest.raises(
        ValueError, match=r"config.optimizer.lr is missing; expected a value of type float"
    ):
        configs.validate(config)
    config = changed()
    with config.unlocked():
        config.optimizer.momentum = 0.9
    with pytest.raises(ValueError, match=r"config.optimizer.momentum is not a known key"):
        configs.validate(config)
    config = ConfigDict(changed().to_dict() | {"steps": "many"})
    with pytest.raises(ValueError, match=r"config.steps must be of type int; got 'many' \(str\)"):
        configs.validate(config)


@pytest.mark.parametrize(
    "key", ["optimizer.lr", "optimizer.weight_decay", "z_loss", "model.norm_eps", "task.power"]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused_in_every_section(key, value):
    config: Any = recipe("mqar")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=rf"config\.{key} must be a finite number; got"):
        configs.validate(config)


@pytest.mark.parametrize("name", available_recipes())
def test_a_config_survives_json(name):
    config = recipe(name)
    assert configs.from_json(configs.to_json(config)).to_dict() == config.to_dict()


def test_entries_younger_than_results_are_hashed_and_recorded_only_where_they_say_something():
    young = recipe("mqar")
    old = young.to_dict()
    del old["z_loss"], old["accumulate"], old["heartbeat_timeout_seconds"]
    del old["kernels"], old["ema_decay"], old["init_except"]
    del old["optimizer"]["offload"], old["optimizer"]["frozen"]
    del old["eval"]["averaged"], old["eval"]["at_best"]
    del old["mesh"]["zero"], old["mesh"]["sequence_method"]
    digest = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    assert config_hash(young) == digest[:12]
    assert configs.from_json(old).to_dict() == young.to_dict()
    for key, value in {"mesh.zero": 1, "z_loss": 1e-4, "optimizer.frozen": ("a",)}.items():
        other: Any = recipe("mqar")
        other.update_from_flattened_dict({key: value})
        assert config_hash(other) != config_hash(young)
        assert configs.from_json(configs.to_json(other)).to_dict() == other.to_dict()


def test_younger_options_of_one_task_are_not_given_to_another():
    old = recipe("images").to_dict()
    del old["task"]["grey"], old["task"]["answer"]
    assert configs.to_json(recipe("images"))["task"].keys() == old["task"].keys()
    assert configs.from_json(old).task.grey is False
    assert "grey" not in configs.from_json(configs.to_json(recipe("text"))).task
    assert configs.to_json(recipe("lra_image"))["task"]["grey"] is True
    assert "data_dir" not in configs.to_json(recipe("listops"))["task"]
    assert configs.to_json(recipe("lra_listops"))["task"]["data_dir"]


@pytest.mark.parametrize(
    ("mixer", "option", "other"),
    [("s4", "init", "fout"), ("s5", "gate", "half_glu2"), ("seqboat", "attention", "squared_relu")],
)
def test_options_younger_than_results_leave_their_hashes_alone(mixer, option, other):
    get_config = importlib.import_module(f"experiments.configs.{mixer}").get_config
    config = get_config("images,smoke")
    recorded = configs.to_json(config)
    assert option not in recorded["model"]["mixers"][mixer]
    assert configs.from_json(recorded).to_dict() == config.to_dict()
    config.model.mixers[mixer][option] = other
    recorded = configs.to_json(config)
    assert recorded["model"]["mixers"][mixer][option] == other


def test_only_what_computes_nothing_may_differ_on_resume():
    recorded = configs.to_json(changed())
    free = changed(log_every_steps=7, checkpoint__keep=9, profile_steps="1:2", eval__every_steps=1)
    assert configs.differences(recorded, configs.to_json(free)) == []
    bound = changed(steps=7, seeds=(1,), task__noise=0.5)
    assert configs.differences(recorded, configs.to_json(bound)) == [
        "seeds: (0,) -> (1,)".replace("(0,)", "[0]").replace("(1,)", "[1]"),
        "steps: 300 -> 7",
        "task.noise: 0.0 -> 0.5",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [f"--config={FILE}:icl_regression", "--config.optimizer.learning_rate=1"],
            "error: --config.optimizer.learning_rate: unknown key 'learning_rate'; known keys",
        ),
        (
            [f"--config={FILE}:icl_regression", "--config.optimiser.lr=1"],
            "error: --config.optimiser.lr: unknown key 'optimiser'; did you mean 'optimizer'?",
        ),
        (
            [f"--config={FILE}:icl_regression", "--config.steps=many"],
            "error: flag --config.steps=many: ",
        ),
        ([f"--config={FILE}:chess"], "error: a config argument is <task> or <task>,smoke"),
        (
            [f"--config={FILE}:icl_regression", "--step=3"],
            "error: Unknown command line flag 'step'",
        ),
        (
            [f"--config={FILE}:icl_regression", "7"],
            "error: unexpected argument '7'; flags are written --name=value",
        ),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_status_2(capsys, monkeypatch, arguments, message):
    assert refused(monkeypatch, capsys, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("content", "argument", "message"),
    [
        (None, "", "is no file; give a file of experiments/configs, as <file>:<task>[,smoke]"),
        ("TITLE = 1", "", "has no function get_config; give a file of experiments/configs"),
        ('{"steps": true}', "", "NameError: name 'true' is not defined (PATH, line 1)"),
        (
            "def get_config(task)\n    return 1",
            ":a",
            "SyntaxError: expected ':' (config.py, line 1)",
        ),
        ("def get_config(task):\n    return {}[task]", ":a", "KeyError: 'a' (PATH, line 2)"),
        ("def get_config(task):\n    return 1", "", "missing a required argument: 'task'"),
        ("def get_config():\n    return 1", ":a", "too many positional arguments"),
        ("def get_config():\n    pass", "", "get_config must return a ConfigDict; got None"),
        ("folder", "", "is a folder; give a file of experiments/configs"),
    ],
)
def test_a_config_file_that_gives_no_config_costs_one_line(
    tmp_path, capsys, monkeypatch, content, argument, message
):
    path = tmp_path / "config.py"
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_text(content)
    line = refused(monkeypatch, capsys, f"--config={path}{argument}")
    assert line.startswith(f"error: --config={path}{argument}: ")
    assert message.replace("PATH", str(path)) in line


def test_every_file_of_the_folder_of_configs_is_one_or_is_refused_in_one_line(capsys, monkeypatch):
    of_workdirs = {"of_run", "liger", "lolcats", "hedgehog", "mm_mamba"}
    of_workdirs |= {"lit", "linfusion", "clear"}
    for file in sorted((CHECKOUT / "experiments/configs").rglob("*.py")):
        line = refused(monkeypatch, capsys, f"--config={file}:nope")
        known = "has no function get_config" if file.parent.name == "recipes" else "got 'nope'"
        if file.stem in of_workdirs:
            known = "nope holds no run"
        assert line.startswith("error: ") and known in line, line
    assert "a mixer of based, clear, delta_net" in refused(
        monkeypatch, capsys, "--config=experiments/configs/recall.py:recall"
    )


def refused(monkeypatch, capsys, *arguments: str) -> str:
    """The one line with which the flags are refused, with status 2."""
    # config_flags finds the overrides there.
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.chdir(CHECKOUT)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    with pytest.raises(SystemExit) as ended:
        command_line.parse(sys.argv, values)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and len(printed.splitlines()) == 1, printed
    return printed


def test_a_flag_that_is_no_pattern_is_refused(capsys):
    values = flags.FlagValues()
    flags.DEFINE_string("only", "", "A pattern.", flag_values=values)
    flags.register_validator("only", command_line.check_pattern, flag_values=values)
    with pytest.raises(SystemExit) as ended:
        command_line.parse(["reproduce", "--only=("], values)
    line = capsys.readouterr().err
    assert ended.value.code == 2
    assert line.startswith("error: flag --only=(: must be a regular expression (missing )")


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        (["steps=10"], 1),
        (["steps=15"], 15),
        (["steps=0"], 15),
        (["steps=10", "optimizer.warmup_steps=20"], 20),
    ],
)
def test_a_warmup_that_nobody_chose_fits_the_steps(capsys, monkeypatch, given, warmup):
    arguments = ["--config=experiments/configs/gla.py:text,smoke"]
    arguments += [f"--config.{text}" for text in given]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    monkeypatch.setattr(command_line.flags, "FLAGS", values)
    command_line.parse(sys.argv, values)
    assert command_line.given_config().optimizer.warmup_steps == warmup
    told = "warning: config.optimizer.warmup_steps=1: the recipe's are more than config.steps=10\n"
    assert capsys.readouterr().err == (told if warmup == 1 else "")


def test_a_cell_has_the_warmup_that_its_command_trains_with():
    for overrides, warmup in (({"steps": 9}, 0), ({"optimizer.warmup_steps": 200}, 200)):
        config: Any = Cell("a", "b", "gla:text,smoke", "x/y", overrides=overrides).make_config()
        assert config.optimizer.warmup_steps == warmup


@pytest.mark.slow
def test_a_mistake_in_a_real_process_shows_its_traceback_only_with_verbosity(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config={FILE}:icl_regression",
        "--config.steps=0",
    ]
    root, environment = (CHECKOUT, os.environ | {"JAX_PLATFORMS": "cpu"})

    def start(*more: str) -> subprocess.Popen[str]:
        arguments = [*command, f"--workdir={tmp_path / 'run'}", *more]
        return subprocess.Popen(
            arguments, cwd=root, env=environment, stderr=subprocess.PIPE, text=True
        )

    plain, verbose = start(), start("--verbosity=1")
    _, printed = plain.communicate(timeout=120)
    assert (
        plain.returncode == 1 and printed == "error: config.steps must be greater than 0; got 0\n"
    )
    _, printed = verbose.communicate(timeout=120)
    assert verbose.returncode == 1 and "Traceback" in printed
    assert printed.endswith("error: config.steps must be greater than 0; got 0\n")
    assert not (tmp_path / "run").exists()
