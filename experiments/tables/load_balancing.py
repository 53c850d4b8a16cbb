"""Balancing a router over a micro-batch or over the global batch: loss, and how evenly memories are
used.

Qiu et al., "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized
Mixture-of-Expert Models", 2025, arXiv 2501.11873: balanced inside every micro-batch, each sequence
has to use all experts. Balanced over the global batch, experts may specialise, and perplexity
falls. Here the same loss balances the memories of MoM."""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell

TITLE = "Load balancing of memories: micro-batch or global batch"
SOURCE = (
    "natural logarithm of the perplexity per token of mixture-of-expert models with 3.4B parameters"
    " after 120B tokens, balanced over 4 and over 512 sequences (arXiv 2501.11873): another model"
    " on other data, so that the sign of the difference compares and nothing else"
)
METRIC = (
    "Validation loss in nats per byte, and entropy in nats of how often each of the 8"
    " memories is selected (even use: 2.079)"
)

_MODEL = (
    "MoM with 8 memories, 2 per token, none shared, rule GLA, balance weight 0.01; a"
    " micro-batch is one sequence"
)
SCALES = {
    "cpu": (
        f"{_MODEL}. Bytes of the Python standard library; two seeds trained together,"
        " width 64, 2 layers, 300 steps of 8 sequences of 256 bytes."
    ),
    "gpu": (
        f"{_MODEL}. Bytes of the Python standard library; three seeds trained together,"
        " width 256, 4 layers, 3,000 steps of 32 sequences of 1,024 bytes."
    ),
}
# row -> (overrides of the mixer, published loss)
BALANCE: dict[str, tuple[dict[str, Any], float | None]] = {
    "no balancing": ({"balance_weight": 0.0}, None),
    "micro-batch": ({"load_balancing": "micro_batch"}, 2.100),
    "global batch": ({"load_balancing": "global_batch"}, 2.084),
}
COLUMNS = {"loss": "validation/loss", "entropy of use": "validation/routing_entropy"}


def cells(scale: str) -> list[Cell]:
    mixer = {
        "memories": 8,
        "shared_memory": False,
        "rule": "gla",
        "execution": "gathered",
        "micro_batch_size": 1,
    }
    if scale == "cpu":
        config, steps, seeds, sizes = "mom:text,smoke", 300, (0, 1), {}
    else:
        config, steps, seeds = "mom:text", 3_000, (0, 1, 2)
        sizes = {"model.width": 256, "model.depth": 4, "batch_size": 32}
    run = {
        **sizes,
        "steps": steps,
        "optimizer.warmup_steps": steps // 10,
        "eval.every_steps": steps,
        "checkpoint.every_steps": steps // 3,
    }
    result = []
    for row, (balance, published) in BALANCE.items():
        options = {f"model.mixers.mom.{k}": v for k, v in (mixer | balance).items()}
        for column, metric in COLUMNS.items():
            result.append(
                Cell(
                    row,
                    column,
                    config,
                    metric,
                    overrides=run | options,
                    seeds=seeds,
                    published=published if column == "loss" else None,
                )
            )
    return result


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Loss against entropy of use, a point per seed."""
    for cell, row in results:
        if cell.column == "loss":
            validation = row["evaluations"]["validation"]
            axes.plot(
                validation["routing_entropy"], validation["loss"], "o", markersize=6, label=cell.row
            )
    axes.set(
        xlabel="entropy of use of the memories (nats)", ylabel="validation loss (nats per byte)"
    )
    axes.legend(fontsize=8)
