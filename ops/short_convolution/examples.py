"""Sizes of published models, for benchmarks and compiled tests: width (channels) and taps."""

SHAPES = {
    "test": {"batch": 2, "length": 129, "width": 6, "taps": 4},
    "parity": {"batch": 64, "length": 40, "width": 64, "taps": 4},
    "cpu": {"batch": 4, "length": 1024, "width": 128, "taps": 4},
    "mamba_130m": {"batch": 8, "length": 2048, "width": 1536, "taps": 4},
    "delta_net_1_3b": {"batch": 4, "length": 2048, "width": 2048, "taps": 4},
    "decode": {"batch": 128, "length": 1, "width": 1536, "taps": 4},
}
