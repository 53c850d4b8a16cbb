"""Recipes: everything of a run but the mixers, per task. A model's config file takes a recipe and
adds pattern and mixers.

recipe("mqar") is the published recipe; recipe("mqar,smoke") trains in about a minute on two CPU
cores and shows that a model learns. All options of a task are there, so that all can be overridden;
0, "" and () mean a task's own default. Where a paper gives a grid (learning rates, widths, depths),
the recipe holds one point and says which."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.long_range_arena import set_as_published


def recipe(argument: str) -> ConfigDict:
    """The complete config for "<task>" or "<task>,smoke"; raises ValueError, naming the tasks, for
    anything else."""
    name, _, variant = argument.partition(",")
    if name not in RECIPES or variant not in ("", "smoke"):
        raise ValueError(
            "a config argument is <task> or <task>,smoke with a task of"
            f" {', '.join(RECIPES)}; got {argument!r}"
        )
    return RECIPES[name](smoke=variant == "smoke")


def parity(smoke: bool) -> ConfigDict:
    """Negative eigenvalues (arXiv 2411.12537), released settings. Learning rates there: 1e-2, 1e-3,
    5e-4, 1e-4."""
    config = _state_tracking("parity")
    config.steps = 20_000
    config.optimizer.update({"warmup_steps": 2_000, "weight_decay": 0.0})
    if smoke:
        # Asking at every token makes parity learnable in hundreds of steps.
        config.task.supervision = "every"
        _shrink(config, steps=300, batch_size=64, width=32, lr=6e-3)
        config.model.mlp = "none"
    return config


def modular_arithmetic(smoke: bool) -> ConfigDict:
    """Negative eigenvalues (arXiv 2411.12537): 3 layers as in the paper, the rest as released."""
    config = _state_tracking("modular_arithmetic")
    config.model.depth = 3
    if smoke:
        config.task.train_max_length, config.task.test_max_length = 9, 31
        _shrink(config, steps=300, batch_size=64, width=64, lr=3e-3)
    return config


def modular_arithmetic_brackets(smoke: bool) -> ConfigDict:
    """As modular_arithmetic."""
    config: Any = modular_arithmetic(smoke)
    config.task.kind = "modular_arithmetic_brackets"
    return config


def s5(smoke: bool) -> ConfigDict:
    """Products of five-point permutations (arXiv 2411.12537): 100 epochs of 1.6 million sequences,
    here all different.

    The paper varies the depth, and states no schedule.
    """
    config = _state_tracking("s5")
    config.steps, config.batch_size = 312_500, 512
    config.model.depth = 3
    config.optimizer.update(
        {"lr": 1e-4, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.01}
    )
    config.eval.update({"every_steps": 5_000, "best_metric": "long/sequence_accuracy"})
    if smoke:
        config.task.update({"inputs": "swaps", "train_max_length": 8, "test_max_length": 32})
        _shrink(config, steps=300, batch_size=64, width=64, lr=3e-3)
        config.eval.best_metric = "in_distribution/accuracy"
    return config


def mqar(smoke: bool) -> ConfigDict:
    """Zoology (arXiv 2312.04927) at 256 tokens and 16 pairs: 64 epochs of 100,000 sequences in
    batches of 256.

    Widths there are 64, 128, 256, 512; learning rates four points spaced evenly in log between 1e-4
    and 1e-2, here the third."""
    config = _base()
    config.steps, config.batch_size = 25_000, 256
    config.task = ConfigDict(
        {
            "name": "mqar",
            "train": ((256, 16, 100_000),),
            "test": ((256, 16),),
            "vocabulary_size": 8192,
            "power": 0.01,
            "random_non_queries": False,
        }
    )
    config.model.update(
        {"width": 128, "depth": 2, "mlp": "none", "tie_embeddings": True, "embedding_dropout": 0.1}
    )
    config.model.embedding_std = 0.02
    config.optimizer.update({"lr": 10 ** (-8 / 3), "weight_decay": 0.1})
    config.eval.update(
        {"every_steps": 390, "examples": 3_000, "best_metric": "length_256_pairs_16/accuracy"}
    )
    if smoke:
        # Half the length and the pairs: a delta rule needs hundreds of steps for it instead of
        # thousands.
        config.task.update({"train": ((32, 8, 20_000),), "test": ((32, 8),), "vocabulary_size": 64})
        _shrink(config, steps=800, batch_size=32, width=32, lr=1e-2)
        # 0.02 is meant for widths of a thousand; here it would take longer to outgrow than the run
        # lasts.
        config.model.update({"embedding_std": 32**-0.5, "embedding_dropout": 0.0})
        config.eval.best_metric = "length_32_pairs_8/accuracy"
    return config


def mad(smoke: bool) -> ConfigDict:
    """MAD (arXiv 2403.17844) at the base setting of its tasks: 200 epochs of 12,800 sequences in
    batches of 128.

    Learning rates there are 1e-4, 5e-4, 1e-3, weight decays 0 and 0.1. `task.kind` is one of the
    six tasks; compression needs `model.name = "compressor"`."""
    config = _base()
    config.steps, config.batch_size = 20_000, 128
    config.task = ConfigDict(
        {
            "name": "mad",
            "kind": "recall",
            "length": 0,
            "vocabulary_size": 0,
            "train_examples": 0,
            "noise": 0.2,
            "copied": 16,
            "targets_only": False,
            "test_lengths": (),
        }
    )
    config.model.update({"width": 128, "depth": 2})
    config.optimizer.update({"lr": 5e-4, "end_lr": 1e-6, "warmup_steps": 0, "weight_decay": 0.1})
    config.eval.update({"examples": 1_280, "best_metric": "test/accuracy"})
    if smoke:
        # The predictable tokens alone: a model learns them in hundreds of steps instead of
        # thousands.
        config.task.update({"length": 64, "copied": 8, "targets_only": True})
        _shrink(config, steps=600, batch_size=32, width=64, lr=3e-3)
    return config


def selective_copying(smoke: bool) -> ConfigDict:
    """Mamba (arXiv 2312.00752, section 4.1.1): 4,096 tokens, 400,000 steps of 64 fresh
    sequences."""
    config: Any = mad(smoke=False)
    config.task.update({"kind": "selective_copying", "length": 4_096 + 17, "vocabulary_size": 17})
    config.task.train_examples = -1
    config.steps, config.batch_size = 400_000, 64
    config.model.update({"width": 64, "mlp": "none"})
    config.optimizer.update({"lr": 1e-4, "schedule": "constant", "end_lr": 1e-4})
    if smoke:
        config.task.update({"length": 64 + 9, "vocabulary_size": 10, "copied": 8})
        _shrink(config, steps=2_000, batch_size=64, width=32, lr=3e-3)
    return config


def induction_heads(smoke: bool) -> ConfigDict:
    """Mamba (arXiv 2312.00752, section 4.1.2): 25 times 8,192 steps of 8 fresh sequences; learning
    rates 2e-4, 1e-3."""
    config = _base()
    config.steps, config.batch_size = 204_800, 8
    config.task = ConfigDict(
        {
            "name": "induction_heads",
            "length": 256,
            "vocabulary_size": 16,
            "test_lengths": tuple(2**n for n in range(6, 15)),
        }
    )
    config.model.update({"width": 64, "depth": 2, "mlp": "none"})
    config.optimizer.update(
        {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    )
    config.eval.update({"every_steps": 8_192, "examples": 512, "best_metric": "test/accuracy"})
    if smoke:
        config.task.update({"length": 32, "test_lengths": (64, 128, 256)})
        _shrink(config, steps=2_000, batch_size=64, width=32, lr=3e-3)
    return config


def icl_regression(smoke: bool) -> ConfigDict:
    """In-context regression by one layer of linear self-attention (arXiv 2306.09927). The least
    risk here is 1.1538."""
    config = _base()
    config.steps, config.batch_size = 1_000, 1_024
    config.task = ConfigDict(
        {
            "name": "icl_regression",
            "dimension": 5,
            "examples": 20,
            "covariance": (),
            "exponential_covariance": False,
            "task_covariance": (),
            "noise": 0.0,
            "test_lengths": (),
            "test_input_scales": (),
            "test_reversed": False,
        }
    )
    config.model = ConfigDict(
        {
            "name": "linear_self_attention",
            "dimension": config.task.get_ref("dimension"),
            "depth": 1,
            "mask_query": False,
            "init": "gaussian",
            "init_scale": 0.1,
        }
    )
    config.optimizer.update({"lr": 1e-2, "weight_decay": 0.0, "clip_norm": 0.0})
    config.eval.update(
        {"examples": 65_536, "best_metric": "in_distribution/loss", "best_mode": "min"}
    )
    if smoke:
        config.steps = 300
        config.eval.update({"every_steps": 300, "examples": 16_384})
        config.checkpoint.every_steps = 300
    return config


def text(smoke: bool) -> ConfigDict:
    """Bytes of the Python standard library. Sizes of our own, for one accelerator; the usual
    optimiser settings."""
    config = _base()
    config.steps, config.batch_size = 10_000, 64
    config.task = ConfigDict(
        {
            "name": "text",
            "path": "",
            "tokenizer": "bytes",
            "vocabulary_size": 4096,
            "sequence_length": 1024,
            "packing": "documents",
            "data_dir": "~/.cache/scanax",
        }
    )
    config.model.update({"width": 512, "depth": 8})
    config.optimizer.update({"lr": 1e-3, "warmup_steps": 500, "end_lr": 1e-4, "b2": 0.95})
    config.eval.update(
        {"examples": 256, "best_metric": "validation/bits_per_byte", "best_mode": "min"}
    )
    if smoke:
        config.task.sequence_length = 256
        _shrink(config, steps=150, batch_size=8, width=64, lr=3e-3)
        config.eval.examples = 64
    return config


def images(smoke: bool) -> ConfigDict:
    """Sequential digits; config.task.dataset names another image data set. Sizes of our own."""
    config = _base()
    config.steps, config.batch_size = 5_000, 64
    config.task = ConfigDict(
        {
            "name": "images",
            "dataset": "digits",
            "levels": 0,
            "grey": False,
            "data_dir": "~/tensorflow_datasets",
            "download": False,
        }
    )
    config.model.update({"width": 128, "depth": 4})
    config.optimizer.lr = 1e-3
    config.eval.update(
        {"every_steps": 500, "examples": 10_000, "best_metric": "validation/accuracy"}
    )
    if smoke:
        _shrink(config, steps=200, batch_size=32, width=32, lr=3e-3)
    return config


def delay(smoke: bool) -> ConfigDict:
    """What the signal was 64 tokens ago. Sizes of our own; the task after arXiv 2206.12037."""
    config = _base()
    config.steps, config.batch_size = 5_000, 64
    config.task = ConfigDict(
        {"name": "delay", "sequence_length": 256, "delay": 64, "levels": 8, "bandwidth": 0.1}
    )
    config.model.update({"width": 128, "depth": 2})
    config.optimizer.update({"lr": 1e-3, "warmup_steps": 500})
    config.eval.best_metric = "test/accuracy"
    if smoke:
        _shrink(config, steps=300, batch_size=32, width=32, lr=3e-3)
    return config


def listops(smoke: bool) -> ConfigDict:
    """ListOps of the Long Range Arena, with expressions of our own."""
    config = _arena(
        "listops",
        {
            "name": "listops",
            "shortest": 500,
            "longest": 2000,
            "depth": 10,
            "arguments": 10,
            "train_examples": 96_000,
            "test_examples": 2_000,
            "data_dir": "",
        },
    )
    if smoke:
        config.task.update({"shortest": 8, "longest": 64, "depth": 3, "arguments": 4})
        _shrink(config, steps=300, batch_size=32, width=32, lr=3e-3)
    return config


def lra_listops(smoke: bool) -> ConfigDict:
    """The released expressions; at smoke size those of listops, which need no files."""
    config: Any = listops(smoke)
    if not smoke:
        config.task.data_dir = "~/lra_release/listops-1000"
    return config


def lra_text(smoke: bool) -> ConfigDict:
    """Text of the Long Range Arena: reviews of IMDB, byte by byte."""
    config = _arena(
        "lra_text",
        {
            "name": "text_classification",
            "dataset": "imdb_reviews",
            "length": 4096,
            "validation": True,
            "data_dir": "~/tensorflow_datasets",
            "download": False,
        },
    )
    if smoke:
        config.task.length = 512
        _shrink(config, steps=300, batch_size=8, width=32, lr=3e-3)
    return config


def lra_retrieval(smoke: bool) -> ConfigDict:
    """Retrieval of the Long Range Arena: pairs of papers, byte by byte."""
    config = _arena(
        "lra_retrieval",
        {"name": "retrieval", "data_dir": "~/lra_release/lra_release/tsv_data", "length": 4000},
    )
    if smoke:
        config.task.length = 256
        _shrink(config, steps=300, batch_size=8, width=32, lr=3e-3)
    return config


def lra_image(smoke: bool) -> ConfigDict:
    """Image of the Long Range Arena: CIFAR-10 in grey, its pixels as tokens where state-space
    papers have numbers."""
    config = _arena(
        "lra_image", images(smoke=False).task.to_dict() | {"dataset": "cifar10", "grey": True}
    )
    if smoke:
        _shrink(config, steps=200, batch_size=8, width=32, lr=3e-3)
    return config


def lra_pathfinder(smoke: bool) -> ConfigDict:
    """Pathfinder of the Long Range Arena."""
    config = _arena(
        "lra_pathfinder",
        {"name": "pathfinder", "data_dir": "~/lra_release/lra_release/pathfinder32", "size": 32},
    )
    if smoke:
        _shrink(config, steps=200, batch_size=8, width=32, lr=3e-3)
    return config


def lra_pathx(smoke: bool) -> ConfigDict:
    """Path-X of the Long Range Arena."""
    config = _arena(
        "lra_pathx",
        {"name": "pathfinder", "data_dir": "~/lra_release/lra_release/pathfinder128", "size": 128},
    )
    if smoke:
        _shrink(config, steps=40, batch_size=2, width=32, lr=3e-3)
        config.eval.examples = 8
    return config


RECIPES = {
    "parity": parity,
    "modular_arithmetic": modular_arithmetic,
    "modular_arithmetic_brackets": modular_arithmetic_brackets,
    "s5": s5,
    "mqar": mqar,
    "mad": mad,
    "selective_copying": selective_copying,
    "induction_heads": induction_heads,
    "icl_regression": icl_regression,
    "text": text,
    "images": images,
    "delay": delay,
    "listops": listops,
    "lra_listops": lra_listops,
    "lra_text": lra_text,
    "lra_retrieval": lra_retrieval,
    "lra_image": lra_image,
    "lra_pathfinder": lra_pathfinder,
    "lra_pathx": lra_pathx,
}


def _base() -> Any:
    """The fields of every config, with the values that most recipes share."""
    return ConfigDict(
        {
            "seeds": (0,),  # several: independent replicas, trained together
            "steps": 0,
            "batch_size": 0,  # sequences, over all devices, per replica
            "accumulate": 1,  # the batch in this many parts, one after the other
            "z_loss": 0.0,  # times log^2 of the sum of exponentials of logits; 1e-4 is usual
            "log_every_steps": 50,
            "task": {},
            "model": {
                "name": "lm",
                "width": 0,
                "depth": 0,
                "mlp": "swiglu",
                "mlp_ratio": 4.0,
                "norm_eps": 1e-5,
                "tie_embeddings": False,
                "embedding_dropout": 0.0,
                "scan_layers": True,
                "remat": "none",
            },
            "param_dtype": "float32",
            "compute_dtype": "float32",
            "optimizer": {
                "name": "adamw",
                "lr": 1e-3,
                "schedule": "cosine",
                "warmup_steps": 0,
                "end_lr": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip_norm": 1.0,  # 0: no clipping
                "ssm_lr": 0.0,  # 0: lr
                "offload": False,  # moments in host memory between steps
            },
            "eval": {
                "every_steps": 1_000,
                "examples": 1_024,
                "best_metric": "",
                "best_mode": "max",
            },
            "checkpoint": {"every_steps": 1_000, "keep": 2},
            "mesh": {
                "data": -1,  # -1: the devices that are left
                "fsdp": 1,
                "sequence": 1,
                "tensor": 1,
                "zero": 3,  # over fsdp: 3 parameters and moments, 1 moments alone
                "sequence_method": "all_gather",  # or ring, pipelined
            },
            "kernels": True,  # of ops, where the platform has them; False: plain JAX
            "heartbeat_timeout_seconds": 100,  # then a silent process counts as lost
            "init_from": "",
            "profile_steps": "",
            "max_rejected_steps": 20,
        }
    )


def _state_tracking(kind: str) -> Any:
    """Released settings of arXiv 2411.12537, but float32 where they have bfloat16: states must be
    exact far out."""
    config = _base()
    config.steps, config.batch_size = 100_000, 256
    config.task = ConfigDict(
        {
            "name": "state_tracking",
            "kind": kind,
            "supervision": "",
            "multiplication": True,
            "inputs": "all",
            "train_max_length": 0,
            "test_max_length": 0,
            "test_length_grid": (),
        }
    )
    config.model.update({"width": 128, "depth": 2})
    config.optimizer.update({"lr": 1e-3, "warmup_steps": 10_000, "end_lr": 1e-6})
    config.eval.update({"examples": 8_192, "best_metric": "long/scaled_accuracy"})
    return config


def _arena(argument: str, task: dict[str, Any]) -> Any:
    """A task of the Long Range Arena at S4's settings, evaluated after every epoch on all that
    there is."""
    config = _base()
    config.task = ConfigDict(task)
    config.eval.update({"examples": 25_000, "best_metric": "validation/accuracy"})
    set_as_published(config, argument)
    return config


def _shrink(config: Any, *, steps: int, batch_size: int, width: int, lr: float) -> None:
    """Smoke size: `width`, at most two layers, a tenth of the steps as warm-up, two evaluations."""
    config.steps, config.batch_size, config.log_every_steps = steps, batch_size, 20
    config.model.update({"width": width, "depth": min(config.model.depth, 2)})
    config.optimizer.update({"lr": lr, "warmup_steps": steps // 10})
    config.eval.update({"every_steps": steps // 2, "examples": min(config.eval.examples, 512)})
    config.checkpoint.update({"every_steps": steps // 2})
