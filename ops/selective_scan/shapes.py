"""Named sizes of selective scans, for tests and benchmarks: batch B, length T, width D (inner channels), state N."""

from collections.abc import Mapping
from types import MappingProxyType

SHAPES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "test": dict(batch=2, length=129, width=6, state=4),
        # Parity on a CPU: sequences of at most 40 bits.
        "parity": dict(batch=64, length=40, width=64, state=8),
        "cpu": dict(batch=4, length=1024, width=128, state=16),
        # Language models of the Mamba paper: model width 768 and 2560, expanded by 2.
        "mamba_130m": dict(batch=8, length=2048, width=1536, state=16),
        "mamba_2.8b": dict(batch=2, length=2048, width=5120, state=16),
        "decode": dict(batch=128, length=1, width=1536, state=16),
    }
)
