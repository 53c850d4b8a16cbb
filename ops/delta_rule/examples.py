"""Sizes of published models, for benchmarks and compiled tests: key heads, value heads, key and
value size per head."""

SHAPES = {
    "cpu": {"batch": 1, "length": 2048, "key_heads": 4, "heads": 4, "key": 64, "value": 64},
    "delta_net_1_3b": {
        "batch": 4,
        "length": 2048,
        "key_heads": 16,
        "heads": 16,
        "key": 128,
        "value": 128,
    },
    "gated_delta_net_1_3b": {
        "batch": 4,
        "length": 4096,
        "key_heads": 6,
        "heads": 6,
        "key": 256,
        "value": 512,
    },
    "kda_3b": {"batch": 1, "length": 8192, "key_heads": 32, "heads": 32, "key": 128, "value": 128},
    "long": {"batch": 1, "length": 65536, "key_heads": 8, "heads": 8, "key": 128, "value": 128},
}
DECAYS = ("none", "scalar", "vector")
