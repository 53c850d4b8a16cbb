"""Ways to cut one long sequence over 64 chips, compiled and modelled: LASP-2's state gather, rings,
heads.

Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid", 2025,
arXiv 2502.07563. No TPU is needed and none is timed:
experiments/tables/computations/compiled_step.py reads the program that the TPU's compiler makes of
a whole train step (extra `aot`).

    python -m experiments.reproduce --table=lasp2_scaling --scale=cpu
"""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.rows import value_of
from experiments.reporting.table import Cell, Computation

TITLE = "Sequence parallelism over 64 chips, compiled and modelled"
SOURCE = (
    "tokens per second and GB per GPU of LASP-2 on 64 A100 with 80 GB (arXiv"
    " 2502.07563), timed there, where 2048K did not fit. It is published as faster than"
    " LASP by 7.3% at 512K and 15.2% at 2048K, than ring attention by 17.8% and 36.6%"
)
METRIC = (
    "Compiled for v6e:8x8 (64 chips of 32 GiB) and modelled, not timed. GB: memory per chip. sent:"
    " GB per chip and step, the sum of the gradients over the chips included. collectives: how"
    " often. ms: of the collectives, the matmuls and the memory traffic, each alone. tokens/s: if"
    " the three run at once. Softmax rows do other work: their matmuls grow with the square of the"
    " length, and the logits of the ring go through memory, because its blocks are plain JAX"
)
SCALES = {
    "cpu": (
        "complete. Linear-Llama3-1B of the paper (16 layers of width 2,048, 16 heads of"
        " 128) with a vocabulary of bytes, one sequence, bfloat16 products, activations"
        " recomputed; some minutes of compilation for each row and length."
    )
}
LENGTHS = {"512K": 2**19, "2048K": 2**21}
COLUMNS = {
    "GB": "gigabytes",
    "sent": "sent_gigabytes",
    "collectives": "collectives",
    "ms collectives": "collectives_ms",
    "ms matmuls": "compute_ms",
    "ms memory": "memory_ms",
    "tokens/s": "tokens_per_second",
}
PUBLISHED = {("LASP-2", "512K", "GB"): 40.2, ("LASP-2", "512K", "tokens/s"): 245_353.0}
LINEAR = {
    "model.mixers.linear_attention.heads": 16,
    "model.mixers.linear_attention.feature_map": "identity",
    "model.mixers.linear_attention.normaliser": "rms_norm",
}
SOFTMAX = {"model.mixers.transformer.heads": 16}
OVER_TIME = {"mesh.sequence": 64, "mesh.data": 1, "batch_size": 1}
# row -> config, settings. Tensor parallelism takes a whole dimension of the slice, and eight
# sequences fill the other.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "LASP-2": ("linear_attention:text", {**OVER_TIME, **LINEAR}),
    "LASP, a ring": (
        "linear_attention:text",
        {**OVER_TIME, **LINEAR, "mesh.sequence_method": "ring"},
    ),
    "pipelined ring": (
        "linear_attention:text",
        {**OVER_TIME, **LINEAR, "mesh.sequence_method": "pipelined"},
    ),
    "softmax, LASP-2H": ("transformer:text", {**OVER_TIME, **SOFTMAX}),
    "softmax, ring attention": (
        "transformer:text",
        {**OVER_TIME, **SOFTMAX, "mesh.sequence_method": "ring"},
    ),
    "heads over 8 chips (Megatron)": (
        "linear_attention:text",
        {"mesh.tensor": 8, "mesh.data": 8, "batch_size": 8, **LINEAR},
    ),
}
SHARED = {
    "model.width": 2048,
    "model.depth": 16,
    "model.remat": "full",
    "compute_dtype": "bfloat16",
    "task.packing": "stream",
}


def cells(scale: str) -> list[Cell]:
    del scale
    return [
        Computation(
            row,
            f"{label}: {column}",
            "compiled_step:measure",
            f"step/{metric}",
            overrides={
                "config": config,
                "topology": "v6e:8x8",
                "sequence_length": length,
                "settings": tuple(f"{key}={value}" for key, value in (SHARED | settings).items()),
            },
            published=PUBLISHED.get((row, label, column)),
            missing="does not fit",
        )
        for label, length in LENGTHS.items()
        for row, (config, settings) in ROWS.items()
        for column, metric in COLUMNS.items()
    ]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Milliseconds of each resource by way, at both lengths."""
    ways = list(ROWS)
    for label, filled in zip(LENGTHS, ("none", "full"), strict=True):
        for place, name in enumerate(("collectives", "matmuls", "memory")):
            column = f"{label}: ms {name}"
            points = [
                (value, ways.index(cell.row))
                for cell, row in results
                if cell.column == column
                for value in value_of(cell, row)
            ]
            axes.plot(
                [value for value, _ in points],
                [way for _, way in points],
                "osd"[place],
                color=f"C{place}",
                fillstyle=filled,
                label=f"{name}, {label}",
            )
    axes.set(xscale="log", xlabel="ms, modelled", yticks=range(len(ways)))
    axes.set(yticklabels=ways, ylim=(len(ways) - 0.5, -0.5))
    axes.legend(fontsize=7)
