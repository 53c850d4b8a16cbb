"""Multi-query associative recall, after Zoology (Arora et al., ICLR 2024, arXiv 2312.04927)."""

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base, language_model, shrink
from experiments.configs.recipes.defaults import task_options


def mqar(smoke: bool) -> ConfigDict:
    """256 tokens and 16 pairs: 64 epochs of 100,000 sequences in batches of 256.

    Widths there are 64, 128, 256, 512; learning rates four points spaced evenly in log between 1e-4
    and 1e-2, here the third."""
    config = base(
        task=task_options("mqar", train=((256, 16, 100_000),), test=((256, 16),)),
        model=language_model(
            width=128,
            depth=2,
            mlp="none",
            tie_embeddings=True,
            embedding_dropout=0.1,
            embedding_std=0.02,
        ),
        steps=25_000,
        batch_size=256,
        optimizer={"lr": 10 ** (-8 / 3)},
        evaluation={
            "every_steps": 390,
            "examples": 3_000,
            "best_metric": "length_256_pairs_16/accuracy",
        },
    )
    if smoke:
        # Half the length and the pairs: a delta rule needs hundreds of steps for it instead of
        # thousands.
        config.task.update({"train": ((32, 8, 20_000),), "test": ((32, 8),), "vocabulary_size": 64})
        shrink(config, steps=800, batch_size=32, width=32, lr=1e-2)
        # 0.02 is meant for widths of a thousand; here it would take longer to outgrow than the run
        # lasts.
        config.model.update({"embedding_std": 32**-0.5, "embedding_dropout": 0.0})
        config.eval.best_metric = "length_32_pairs_8/accuracy"
    return config
