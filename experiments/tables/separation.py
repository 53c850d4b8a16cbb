"""Separation of two voices: MossFormer, and what its recurrent module adds.

Zhao et al., "MossFormer2", ICASSP 2024, arXiv 2312.11825, whose claims are that the module improves
MossFormer (Zhao and Ma, ICASSP 2023, arXiv 2302.11824), and dilation and gates improve the module.
Their figures, of WSJ0-2mix and other sets of speech, have not been checked against a source and are
not shown.

    python -m experiments.reproduce --table=separation --scale=cpu
"""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell

TITLE = "Separation of two voices"
SOURCE = "published figures have not been checked and are not shown"
METRIC = "Improvement of the SI-SDR of the test mixtures over doing nothing, dB"
SCALES = {
    "cpu": (
        "two seeds trained together: generated voices, crops of half a second at 8 kHz, two blocks"
        " of width 64, 200 steps of four mixtures (seven minutes of sound), 100 test mixtures that"
        " are always the same. So short a training tells large differences alone."
    )
}
SIZES = True
MIXER = "model.mixers.mossformer2."
# row -> overrides
ROWS: dict[str, dict[str, Any]] = {
    "MossFormer": {f"{MIXER}recurrent": "none"},
    "MossFormer, three blocks": {f"{MIXER}recurrent": "none", "model.depth": 3},
    "+ FSMN": {f"{MIXER}recurrent": "plain", f"{MIXER}gated": False},
    "+ FSMN, dilated": {f"{MIXER}gated": False},
    "+ FSMN, dilated, gated: MossFormer2": {},
    "MossFormer2 without the global part": {f"{MIXER}global_attention": False},
}
COLUMN = "SI-SDRi"


def cells(scale: str) -> list[Cell]:
    del scale
    common = {"task.test_examples": 100, "eval.every_steps": 200}
    return [
        Cell(
            row,
            COLUMN,
            "mossformer2:separation,smoke",
            "test/si_sdri",
            overrides=common | overrides,
            seeds=(0, 1),
        )
        for row, overrides in ROWS.items()
    ]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """A dot for each seed of each row."""
    for cell, found in results:
        values = found["evaluations"]["test"]["si_sdri"]
        axes.plot(values, [list(ROWS).index(cell.row)] * len(values), "o", color="C0")
    axes.set_yticks(range(len(ROWS)), ROWS, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="improvement of the SI-SDR, dB")
