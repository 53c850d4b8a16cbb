"""Every recipe fits its task, and a launcher can read it anywhere."""

import importlib
import inspect
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments import train
from experiments.configs.recipes.base import available_recipes, recipe
from experiments.configs.recipes.defaults import mixer_options, task_options
from experiments.objectives.segmentation import REGIONS
from experiments.training.checkout import CHECKOUT
from experiments.training.config import flatten, validate
from experiments.training.state import find_network
from experiments.training.task import available_tasks, find_task
from models.blocks.stack import available_mixers, find_mixer
from models.networks import image_classifier
from tests.support.lra_files import prepare_reviews, write_listops, write_pairs, write_pathfinder

SUMS = (
    "loss_sum",
    "weight_sum",
    "correct_sum",
    "sequence_correct_sum",
    "sequence_sum",
    "bytes_sum",
    "target_square_sum",
    "absolute_sum",
    "last_square_sum",
    "last_absolute_sum",
    "square_sum",
    "bound_sum",
    *(f"{region}_{number}" for region in REGIONS for number in range(9)),
    "improvement_sum",
)


def little_data(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Options by which a recipe's task has data, laid out as released, in `directory`."""
    found: dict[str, Any] = {"data_dir": str(directory)}
    if options["name"] == "listops":
        write_listops(directory)
    elif options["name"] == "retrieval":
        write_pairs(directory)
    elif options["name"] == "pathfinder":
        write_pathfinder(directory, options["size"], images=10)
    elif options["name"] == "text_classification":
        prepare_reviews(directory)
        found["dataset"] = "tiny_reviews"
    else:
        found |= {"dataset": "digits", "grey": False}
    return found


@pytest.mark.parametrize("variant", ["", ",smoke"])
@pytest.mark.parametrize("name", available_recipes())
def test_a_recipe_names_a_task_its_options_and_a_metric_of_it(
    name: str, variant: str, tmp_path: Path
) -> None:
    config: Any = recipe(name + variant)
    validate(config)
    options = config.task.to_dict()
    if name == "text":
        (tmp_path / "lines.txt").write_text("a line of text\n" * 5000)
        options |= {"path": str(tmp_path / "lines.txt"), "data_dir": str(tmp_path)}
    if name.startswith("lra_") and options.get("data_dir"):
        options |= little_data(options, tmp_path)
    if options["name"] in ("image_classification", "image_generation"):
        options |= {"dataset": "digits"}
    if options["name"] == "forecasting":
        options["dataset"] = "waves"
    if options["name"] == "separation":
        options["dataset"] = "voices"
    task = find_task(options.pop("name"), options)
    evaluation, metric = config.eval.best_metric.split("/")
    assert evaluation in task.evaluations
    assert metric in task.objective.metrics(dict.fromkeys(SUMS, 1.0))
    make = importlib.import_module(f"experiments.tasks.{config.task.name}").make
    assert set(options) == set(inspect.signature(make).parameters), (
        "an option that is not there cannot be overridden"
    )


# Of the Long Range Arena: what the papers and their authors' code publish, and S4's where they do
# not, in the order ListOps, text, retrieval, image, Pathfinder, Path-X.
S4: dict[str, Any] = {
    "steps": [120_000, 49_984, 45_960, 180_000, 500_000, 500_000],
    "batch_size": [32, 16, 64, 50, 64, 16],
    "model.width": [256, 256, 256, 512, 256, 256],
    "model.depth": [6] * 6,
    "optimizer.lr": [0.01, 0.01, 0.01, 0.01, 0.004, 0.001],
    "optimizer.weight_decay": [0.05] * 6,
    "optimizer.warmup_steps": [12_000, 4_998, 4_596, 18_000, 50_000, 50_000],
    "optimizer.schedule": ["cosine"] * 6,
}
LAYERS_OF_S4 = {
    "state_size": [4, 4, 4, 64, 64, 64],
    "dt_min": [1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-4],
    "dt_max": [0.1] * 6,
}
# Of their networks.
CLASSIFIER: dict[str, Any] = {
    "model.name": ["sequence_classifier"] * 6,
    "model.encoder": ["embedding"] * 3 + ["linear"] * 3,
    "model.input_mean": [0.0] * 3 + [122.6] + [127.5] * 2,
    "model.pooling": ["mean"] * 6,
    "model.norm": ["batch"] * 6,
    "model.pre_norm": [True] * 6,
    "model.tied_dropout": [True] * 6,
    "task.answer": ["class"] * 6,
}
DROPOUT_OF_S4 = [0.0, 0.0, 0.0, 0.1, 0.0, 0.0]
DROPOUT_OF_S5 = [0.0, 0.1, 0.0, 0.1, 0.05, 0.0]
BLOCKS_OF_S4 = {
    **CLASSIFIER,
    "model.pre_norm": [False, True, True, False, True, True],
    "model.dropout": DROPOUT_OF_S4,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "s4": {
        **S4,
        **BLOCKS_OF_S4,
        "model.mixers.s4.causal": [False] * 6,
        "model.mixers.s4.dropout": DROPOUT_OF_S4,
        "optimizer.ssm_lr": [0.001] * 6,
        **{f"model.mixers.s4.{key}": row for key, row in LAYERS_OF_S4.items()},
        "model.mixers.s4.kernel_length": [2000, 4096, 4000, 1024, 1024, 16384],
    },
    "s4d": {
        **S4,
        **BLOCKS_OF_S4,
        "model.mixers.s4d.causal": [False] * 6,
        "model.mixers.s4d.dropout": DROPOUT_OF_S4,
        "optimizer.ssm_lr": [0.001] * 6,
        **{f"model.mixers.s4d.{key}": row for key, row in LAYERS_OF_S4.items()},
    },
    "s5": {
        **CLASSIFIER,
        "model.dropout": DROPOUT_OF_S5,
        "model.mixers.s5.dropout": DROPOUT_OF_S5,
        "model.mixers.s5.causal": [False] * 6,
        "model.mixers.s5.read_init": [
            *("lecun_normal", "lecun_normal", "trunc_standard_normal"),
            *("lecun_normal", "trunc_standard_normal", "complex_normal"),
        ],
        "model.mixers.s5.write_rate": ["full", "ssm", "ssm", "full", "ssm", "ssm_decay"],
        "model.mixers.s5.step_rate": ["ssm", "full", "full", "ssm", "ssm", "ssm"],
        "steps": [76_800, 17_500, 91_920, 225_000, 500_000, 375_000],
        "batch_size": [50, 50, 32, 50, 64, 32],
        "model.width": [128, 256, 128, 512, 192, 128],
        "model.depth": [8, 6, 6, 6, 6, 6],
        "model.mixers.s5.state_size": [16, 192, 256, 384, 256, 256],
        "model.mixers.s5.blocks": [8, 12, 16, 3, 8, 16],
        "model.mixers.s5.gate": ["half_glu2"] * 2 + ["half_glu1"] * 4,
        "model.mixers.s5.clip_eigenvalues": [False] * 3 + [True] + [False] * 2,
        "model.mixers.s5.dt_min": [1e-3] * 5 + [1e-4],
        "optimizer.lr": [0.003, 0.004, 0.002, 0.0045, 0.0045, 0.0018],
        "optimizer.ssm_lr": [0.001, 0.001, 0.001, 0.001, 0.0009, 0.0006],
        "optimizer.weight_decay": [0.04, 0.07, 0.05, 0.07, 0.03, 0.06],
        "optimizer.warmup_steps": [1_920, 0, 4_596, 900, 2_500, 5_000],  # an epoch
    },
    "lru": {
        **S4,
        **CLASSIFIER,
        "model.mixers.lru.causal": [False] * 6,
        "model.mixers.lru.state_size": S4["model.width"],
        "model.mixers.lru.max_phase": [2 * math.pi] * 5 + [math.pi / 10],
        "optimizer.ssm_lr": [0.0025, 0.0025, 0.0025, 0.0025, 0.001, 0.00025],
    },
    "seqboat": {
        **CLASSIFIER,
        "model.norm": ["layer"] * 3 + ["batch"] * 3,
        "model.mixers.seqboat.causal": [False] * 6,
        "steps": [90_000, *S4["steps"][1:]],
        "batch_size": [64, *S4["batch_size"][1:]],
        "model.width": [80, 128, 128, 160, 128, 128],
        "model.depth": [6, 4, 6, 8, 6, 6],
        "model.mixers.seqboat.expand_v": [2.0] * 6,
        "model.mixers.seqboat.key_size": [64, 64, 64, 96, 64, 64],
        "model.mixers.seqboat.state_size": [16] * 6,
        "model.mixers.seqboat.window": [128] * 5 + [256],
        "model.mixers.seqboat.init_temperature": [0.3, 0.3, 0.3, 0.4, 1.0, 1.0],
        "model.mixers.seqboat.attention": ["softmax"] * 3 + ["squared_relu"] * 3,
        "optimizer.lr": [0.004, 0.004, 0.003, 0.01, 0.01, 0.01],
        "optimizer.b2": [0.98] * 6,
        "optimizer.schedule": ["linear"] * 6,
        "optimizer.weight_decay": [0.001, 0.01, 0.04, 0.02, 0.01, 0.01],
        "optimizer.warmup_steps": [27_000, *S4["optimizer.warmup_steps"][1:]],
        "optimizer.clip_norm": [1.0] * 6,
    },
    "transnormer": {
        **CLASSIFIER,
        "model.encoder": ["embedding"] * 6,
        "model.mixers.transnormer.causal": [False] * 6,
        "model.mixers.diag_attention.causal": [False] * 6,
        "steps": [30_000, 12_480, 45_960, 45_000, 250_000, 125_000],
        "batch_size": [128, 64, 64, 200, 128, 64],
        "model.width": [128, 128, 128, 128, 128, 64],
        "model.depth": [4, 4, 4, 12, 4, 6],
        "model.mlp_ratio": [4.0, 4.0, 4.0, 2.0, 1.0, 2.5],
        "model.mixers.transnormer.heads": [8, 8, 4, 4, 8, 8],
        "model.mixers.diag_attention.heads": [8, 8, 4, 4, 8, 8],
        "optimizer.lr": [1e-4, 1e-3, 1e-3, 1e-3, 5e-4, 1e-4],
        "optimizer.weight_decay": [0.05] * 6,
    },
    # lr n / warmup / sqrt(warmup) after n steps of the warm-up, which retrieval does not finish.
    "flowformer": {
        "steps": [5_000, 20_000, 5_000, 35_000, 62_400, S4["steps"][5]],
        "batch_size": [32, 32, 32, 256, 512, 16],
        "model.width": [512, 256, 128, 128, 256, 256],
        "model.depth": [1, 1, 4, 1, 1, 6],
        "model.mlp_ratio": [2.0, 4.0, 4.0, 1.0, 1.0, 4.0],
        "model.dropout": [0.1, 0.1, 0.1, 0.3, 0.2, 0.1],
        "model.mixers.flowformer.causal": [False] * 6,
        "model.mixers.flowformer.heads": [2, 4, 4, 4, 8, 4],
        "model.mixers.flowformer.expand": [1.0, 1.0, 1.0, 0.5, 0.5, 1.0],
        "optimizer.lr": [
            *(0.005 / math.sqrt(1_000), 0.005 / math.sqrt(8_000)),
            *(0.05 * 5_000 / 8_000 / math.sqrt(8_000), 5e-4, 1e-4, 1e-3),
        ],
        "optimizer.weight_decay": [0.1, 0.1, 0.1, 0.0, 0.0, 0.05],
        "optimizer.warmup_steps": [1_000, 8_000, 5_000, 175, 312, 50_000],
    },
}
ARENA = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
WHOLE_MODELS = {
    *("linear_self_attention", "linear_forecaster", "s_mamba", "itransformer", "dit", "lion"),
    *("mossformer2", "hyper_zzw", "lingen"),
}
OF_IMAGES = {"slab", "soft", "vig", "vit"}
CONFIGS = sorted(
    path.stem
    for path in (CHECKOUT / "experiments/configs").glob("*.py")
    if "def get_config(task" in path.read_text("utf-8")
    and path.stem not in WHOLE_MODELS | OF_IMAGES
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_long_range_arena_has_the_published_settings_and_its_smoke_size_has_not(
    name: str,
) -> None:
    get_config = importlib.import_module(f"experiments.configs.{name}").get_config
    for place, task in enumerate(ARENA):
        expected = {key: row[place] for key, row in PUBLISHED[name].items()}
        for argument in (f"lra_{task}", *(["listops"] if task == "listops" else [])):
            config, smoke = get_config(argument), get_config(f"{argument},smoke")
            validate(config)
            validate(smoke)
            values = dict(flatten(config))
            assert {key: values[key] for key in expected} == expected, argument
            assert len(config.model.pattern) in (1, config.model.depth)
            assert (smoke.model.width, smoke.model.depth) == (32, 2)
            assert smoke.steps <= 300


@pytest.mark.parametrize("name", [*sorted(OF_IMAGES), "flowformer"])
def test_models_of_images_read_digits_and_imagenet(name: str) -> None:
    """Nothing is computed."""
    get_config = importlib.import_module(f"experiments.configs.{name}").get_config
    for task, side, channels in (("digits", 8, 1), ("digits,smoke", 8, 1), ("imagenet", 224, 3)):
        config = get_config(task)
        validate(config)
        model = config.model.to_dict()
        assert model.pop("name") == "image_classifier"
        sizes = {"classes": 10, "channels": channels, "height": side, "width": side}

        def logits(image: jax.Array, model: Any = model, sizes: Any = sizes) -> jax.Array:
            rngs, dtypes = nnx.Rngs(0, dropout=1), ("float32", "float32")
            built = image_classifier.build(
                model, rngs=rngs, param_dtype=dtypes[0], compute_dtype=dtypes[1], **sizes
            )
            built.eval()
            return built(image)

        image = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
        assert jax.eval_shape(logits, image).shape == (2, 10), task
    if name in OF_IMAGES:
        with pytest.raises(ValueError, match=f"{name} classifies images: use a task of"):
            get_config("mqar")
        with pytest.raises(ValueError, match="a config argument is <task> or <task>,smoke"):
            get_config("imagenet,huge_hierarchical")


# By set: what the scripts of S-Mamba's and iTransformer's authors set, for horizons of 96, 192, 336
# and 720 rows.
FORECASTERS: dict[str, dict[str, dict[str, list[Any]]]] = {
    "s_mamba": {
        "etth1": {
            "steps": [2640, 2610, 2560, 2440],
            "batch_size": [32] * 4,
            "model.width": [256] * 4,
            "model.mixers.s_mamba.state_size": [2] * 4,
            "optimizer.lr": [7e-5, 7e-5, 5e-5, 5e-5],
        },
        "etth2": {"model.width": [256] * 4, "optimizer.lr": [4e-5, 4e-5, 3e-5, 7e-5]},
        "exchange": {
            "steps": [3200, 1570, 1520, 1400],
            "batch_size": [16, 32, 32, 32],
            "model.width": [128] * 4,
            "model.mixers.s_mamba.state_size": [32] * 4,
            "optimizer.lr": [1e-4, 1e-4, 5e-5, 5e-5],
        },
    },
    "itransformer": {
        "etth1": {"model.width": [256, 256, 512, 512], "model.mlp_width": [256, 256, 512, 512]},
        "etth2": {"model.width": [128] * 4, "optimizer.lr": [1e-4] * 4},
        "exchange": {"steps": [1600, 1570, 152, 1400], "model.width": [128] * 4},
    },
}
HORIZONS = (96, 192, 336, 720)


@pytest.mark.parametrize("name", FORECASTERS)
def test_forecasters_have_the_published_settings_and_read_no_tokens(name: str) -> None:
    get_config = importlib.import_module(f"experiments.configs.{name}").get_config
    for dataset, settings in FORECASTERS[name].items():
        for place, horizon in enumerate(HORIZONS):
            config, smoke = (get_config(f"{dataset}_{horizon}{v}") for v in ("", ",smoke"))
            validate(config)
            validate(smoke)
            values = dict(flatten(config))
            expected = {key: row[place] for key, row in settings.items()}
            assert {key: values[key] for key in expected} == expected, (dataset, horizon)
            assert values["optimizer.schedule"] == f"halving:{values['eval.every_steps']}"
            assert (smoke.task.dataset, smoke.steps, smoke.model.width) == ("waves", 200, 64)
    with pytest.raises(ValueError, match=f"{name} reads series: use a task of forecasting"):
        get_config("mqar")


def test_a_separator_has_the_published_size_and_reads_no_tokens() -> None:
    get_config = importlib.import_module("experiments.configs.mossformer2").get_config
    large, small = get_config("separation_large"), get_config("separation,smoke")
    for config in (large, small):
        validate(config)
    mixer = large.model.mixers.mossformer2
    assert (large.model.width, large.model.depth, large.optimizer.lr) == (512, 24, 1.5e-4)
    assert (mixer.group, mixer.qk_size, mixer.recurrent_width, mixer.order) == (256, 128, 256, 20)
    assert (small.task.dataset, small.model.width, small.model.depth) == ("voices", 64, 2)
    with pytest.raises(ValueError, match="mossformer2 separates sounds: use the task separation"):
        get_config("mqar")


def check_reads(config: Any, length: int) -> None:
    """Nothing is computed."""
    model = config.model.to_dict()
    name = model.pop("name")
    given: dict[str, Any] = {"vocabulary": 260, "param_dtype": "float32"}
    if name == "sequence_classifier":
        given |= {"classes": 7, "documents": 2 if config.task.name == "retrieval" else 1}

    def logits(tokens: jax.Array) -> jax.Array:
        network = find_network(name).build(
            model, compute_dtype="float32", rngs=nnx.Rngs(0), **given
        )
        if name == "lm":
            return network(tokens, readout_positions=jnp.zeros((2, 1), jnp.int32))[0]
        return network(tokens, mask=tokens > 0)

    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    shape = (2, 1, 260) if name == "lm" else (2, 7)
    assert jax.eval_shape(logits, tokens).shape == shape


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_reads_the_long_range_arena(name: str) -> None:
    get_config = importlib.import_module(f"experiments.configs.{name}").get_config
    for task, length in zip(ARENA, (2000, 4096, 8000, 1024, 1024, 16384), strict=True):
        check_reads(get_config(f"lra_{task}"), length)


@pytest.mark.parametrize(
    ("name", "task", "options"),
    [("s4d", "lra_text", {}), ("s5", "lra_pathx", {}), ("s5", "lra_listops", {"blocks": 1})],
)
def test_the_arena_can_start_from_perturbed_matrices(
    name: str, task: str, options: dict[str, Any]
) -> None:
    get_config = importlib.import_module(f"experiments.configs.{name}").get_config
    config = get_config(task)
    config.model.mixers[name].update({"init": "ptd", **options})
    check_reads(config, 16)


@pytest.mark.parametrize(
    "name",
    [
        *("s4", "s4d", "lru", "lssl", "seqboat", "monarch_mixer"),
        pytest.param("s5", marks=pytest.mark.slow),  # trains
    ],
)
def test_a_smoke_recipe_of_the_arena_trains_an_encoder(name: str, tmp_path: Path) -> None:
    get_config = importlib.import_module(f"experiments.configs.{name}").get_config
    config = get_config("lra_listops,smoke")
    assert (config.model.name, config.model.mixers[name].causal) == ("sequence_classifier", False)
    if name != "s5":
        return
    config.steps, config.optimizer.warmup_steps = 2, 0
    config.eval.update({"every_steps": 2, "examples": 4})
    config.task.update({"train_examples": 64, "test_examples": 4})
    summary = train.run(config, tmp_path, quiet=True)
    assert summary["state_bytes"] is None
    assert {"loss", "accuracy"} <= set(summary["evaluations"]["test"])


def test_kernels_of_s4_are_as_long_as_the_sequences_also_when_these_are_overridden() -> None:
    get_config = importlib.import_module("experiments.configs.s4").get_config
    config = get_config("lra_retrieval")
    config.task.length = 300
    assert config.model.mixers.s4.kernel_length == 300
    assert get_config("lra_pathx,smoke").model.mixers.s4.kernel_length == 16384


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lra_text", "imdb_reviews is not prepared under"),
        ("lra_image", "cifar10 is not prepared under"),
        ("lra_retrieval", "has no new_aan_pairs.train.tsv"),
        ("lra_pathfinder", "has no curv_contour_length_14/metadata"),
        ("lra_pathx", "has no curv_contour_length_14/metadata"),
    ],
)
@pytest.mark.parametrize("variant", ["", ",smoke"])
def test_an_arena_without_its_files_fails_before_anything_is_written(
    name: str, variant: str, message: str, tmp_path: Path
) -> None:
    get_config = importlib.import_module("experiments.configs.s5").get_config
    config = get_config(name + variant)
    config.task.data_dir = str(tmp_path)
    with pytest.raises(ValueError, match=message):
        train.run(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"task of .*delay, .*; got 'parity,tiny'"):
        recipe("parity,tiny")


@pytest.mark.parametrize("name", available_mixers())
def test_the_defaults_of_a_mixer_are_those_of_its_signature(name: str) -> None:
    check_defaults(mixer_options(name), find_mixer(name).__init__)


@pytest.mark.parametrize("name", available_tasks())
def test_the_defaults_of_a_task_are_those_of_its_signature(name: str) -> None:
    options = task_options(name)
    assert options.pop("name") == name
    check_defaults(options, importlib.import_module(f"experiments.tasks.{name}").make)


def check_defaults(options: dict[str, Any], function: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert options == {p.name: p.default for p in parameters if p.default is not p.empty}


def test_an_option_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"mixer retnet has no option 'head'; it has .*heads"):
        mixer_options("retnet", head=2)
    with pytest.raises(ValueError, match=r"task delay has no option 'lag'; it has .*delay"):
        task_options("delay", lag=2)
    with pytest.raises(ValueError, match="there is no mixer 'rnn'"):
        mixer_options("rnn")
