"""Sizes of published models, for benchmarks and compiled tests: channels (complex ones) of the
state."""

SHAPES = {
    "test": {"batch": 2, "length": 129, "channels": 6},
    "parity": {"batch": 64, "length": 40, "channels": 64},
    "cpu": {"batch": 4, "length": 1024, "channels": 128},
    "s5_image": {"batch": 50, "length": 1024, "channels": 192},
    "s5_path_x": {"batch": 32, "length": 16384, "channels": 128},
    "decode": {"batch": 128, "length": 1, "channels": 128},
}
