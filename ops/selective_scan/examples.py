"""Sizes of published models, for benchmarks and compiled tests: width (inner channels) and state
size per channel."""

SHAPES = {
    "test": {"batch": 2, "length": 129, "width": 6, "state": 4},
    "parity": {"batch": 64, "length": 40, "width": 64, "state": 8},
    "cpu": {"batch": 4, "length": 1024, "width": 128, "state": 16},
    "mamba_130m": {"batch": 8, "length": 2048, "width": 1536, "state": 16},
    "mamba_2_8b": {"batch": 2, "length": 2048, "width": 5120, "state": 16},
    "decode": {"batch": 128, "length": 1, "width": 1536, "state": 16},
}
