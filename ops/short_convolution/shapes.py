"""Named sizes of short convolutions, for tests and benchmarks: batch B, length T, width D (channels), taps W."""

from collections.abc import Mapping
from types import MappingProxyType

SHAPES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "test": dict(batch=2, length=129, width=6, taps=4),
        "parity": dict(batch=64, length=40, width=64, taps=4),
        "cpu": dict(batch=4, length=1024, width=128, taps=4),
        # Inner channels of Mamba at model width 768; keys and values of a 1.3B DeltaNet or GLA.
        "mamba_130m": dict(batch=8, length=2048, width=1536, taps=4),
        "delta_net_1.3b": dict(batch=8, length=2048, width=2048, taps=4),
        "decode": dict(batch=128, length=1, width=1536, taps=4),
    }
)
