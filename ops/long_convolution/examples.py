"""Sizes of published models, for benchmarks and compiled tests: width (channels)."""

SHAPES = {
    "test": {"batch": 2, "length": 129, "width": 6},
    "cpu": {"batch": 4, "length": 1024, "width": 32},
    "s4_image": {"batch": 50, "length": 1024, "width": 512},
    "s4_path_x": {"batch": 16, "length": 16384, "width": 256},
}
