"""Named sizes of window attention, for tests and benchmarks: batch B, length T, heads H, key heads HK, sizes K and V, window."""

from collections.abc import Mapping
from types import MappingProxyType

SHAPES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "test": dict(batch=2, length=129, heads=4, key_heads=2, key=8, value=12, window=37),
        "cpu": dict(batch=4, length=512, heads=4, key_heads=4, key=32, value=32, window=64),
        # Hybrids of about 1.3B parameters: Based at width 1792; width 2048 with a long window.
        "based_1.3b": dict(batch=8, length=2048, heads=16, key_heads=16, key=112, value=112, window=128),
        "hybrid_1.3b": dict(batch=8, length=4096, heads=32, key_heads=32, key=64, value=64, window=2048),
        "decode": dict(batch=128, length=1, heads=16, key_heads=16, key=112, value=112, window=128),
    }
)
