"""Sizes of models, for benchmarks and compiled tests: query and key heads, key and value size per
head and window."""

SHAPES = {
    "test": {
        "batch": 2,
        "length": 129,
        "heads": 4,
        "key_heads": 2,
        "key": 8,
        "value": 12,
        "window": 37,
    },
    "cpu": {
        "batch": 4,
        "length": 512,
        "heads": 4,
        "key_heads": 4,
        "key": 32,
        "value": 32,
        "window": 64,
    },
    "based_1_3b": {
        "batch": 4,
        "length": 2048,
        "heads": 16,
        "key_heads": 16,
        "key": 112,
        "value": 112,
        "window": 128,
    },
    "long_window": {
        "batch": 1,
        "length": 8192,
        "heads": 32,
        "key_heads": 8,
        "key": 64,
        "value": 64,
        "window": 2048,
    },
    "decode": {
        "batch": 128,
        "length": 1,
        "heads": 16,
        "key_heads": 16,
        "key": 112,
        "value": 112,
        "window": 128,
    },
}
