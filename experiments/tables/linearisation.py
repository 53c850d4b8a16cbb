"""Softmax attention of a trained model made linear: the methods, and what their stages add.

Zhang et al., "LoLCATs", ICLR 2025, arXiv 2410.10254: Llama-3-8B, zero-shot average in per cent, in
the ablation of its parts. Liger's and mmMamba's parts have tables of their own.

    python -m experiments.reproduce --table=linearisation --scale=cpu
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Softmax attention made linear"
SOURCE = "zero-shot averages of Llama-3-8B, arXiv 2410.10254 (ablation): larger is better"
METRIC = (
    "Bits per byte of validation text; of the first stage alone the mean squared error of heads"
    " (LoLCATs, mmMamba) or the divergence of weights (Hedgehog)"
)
SCALES = {
    "cpu": (
        "two seeds: a teacher of four layers of width 64, 4 heads over 2 of keys and values, 500"
        " steps of 8 windows of 128 bytes of the Python standard library; window 16, 16 features,"
        " 100 steps a stage. LoRA of rank 8 at a rate of 1e-3, ten times the published one of"
        " LoLCATs; full fine-tuning after Hedgehog's maps, as published."
    )
}
STEPS = 100
LOLCATS = "model.mixers.lolcats."
SECOND = {"steps": STEPS, "optimizer.lr": 1e-3}
FIRST = {"steps": STEPS, "optimizer.lr": 1e-2}
WINDOW = {f"{LOLCATS}window": 16, f"{LOLCATS}feature_size": 16, f"{LOLCATS}context_length": 128}
TERRACED = WINDOW | {f"{LOLCATS}terraced": True}
LINEAR = WINDOW | {f"{LOLCATS}window": 0}
RELU = TERRACED | {f"{LOLCATS}feature_map": "relu"}
NO_STEPS = {"steps": 1, "optimizer.lr": 1e-12}


def _lolcats(options: Mapping[str, Any], transfer: bool) -> list[tuple[str, dict[str, Any]]]:
    """Without a transfer the first stage leaves the maps as they start."""
    first = FIRST if transfer else NO_STEPS
    return [("lolcats", {**first, **options}), ("lolcats", SECOND)]


MM_MAMBA = [("mm_mamba", {"steps": STEPS, "optimizer.lr": rate}) for rate in (1e-3, 5e-4, 3e-4)]
# row -> (stages, published)
ROWS: dict[str, tuple[list[tuple[str, dict[str, Any]]], float | None]] = {
    "softmax, the teacher": ([], None),
    "linear attention, no transfer": (_lolcats(LINEAR, transfer=False), 44.20),
    "linear attention, transfer": (_lolcats(LINEAR, transfer=True), 55.32),
    "window, no transfer": (_lolcats(TERRACED, transfer=False), 68.78),
    "window, transfer: LoLCATs": (_lolcats(TERRACED, transfer=True), 70.66),
    "the same, sliding window": (_lolcats(WINDOW, transfer=True), None),
    "T2R, window, no transfer": (_lolcats(RELU, transfer=False), 39.52),
    "T2R, window, transfer": (_lolcats(RELU, transfer=True), 68.28),
    "Hedgehog": (
        [
            ("hedgehog", {**FIRST, "model.mixers.hedgehog.context_length": 128}),
            ("hedgehog", {"steps": STEPS, "optimizer.lr": 6e-4}),
        ],
        None,
    ),
    "Liger": ([("liger", {**SECOND, "model.mixers.liger.window": 16})], None),
    "mmMamba": (MM_MAMBA, None),
}


def cells(scale: str) -> list[Cell]:
    del scale
    found: list[Cell] = []
    for row, (stages, published) in ROWS.items():
        bits = "validation/bits_per_byte"
        if stages:
            config, overrides = stages[-1]
            start = [*stages[:-1], (config, {**overrides, **NO_STEPS})]
            found.append(_cell(row, "as converted", start, bits))
        found.append(_cell(row, "in the end", stages, bits, published))
        if len(stages) > 1 and stages[0][1]["steps"] > 1:
            metric = "validation/transfer_error"
            found.append(_cell(row, "error after stage 1", stages[:1], metric))
    return found


def _cell(
    row: str,
    column: str,
    stages: Sequence[tuple[str, dict[str, Any]]],
    metric: str,
    published: float | None = None,
) -> Cell:
    return Computation(
        row,
        column,
        "linearisation:chain",
        metric,
        overrides={"stages": list(stages)},
        seeds=(0, 1),
        published=published,
    )


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """A dot for each seed of each row."""
    for cell, found in results:
        if cell.column == "in the end":
            values = found["evaluations"]["validation"]["bits_per_byte"]
            axes.plot(values, [list(ROWS).index(cell.row)] * len(values), "o", color="C0")
    axes.set_yticks(range(len(ROWS)), ROWS, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="bits per byte")
