"""Sizes of published models, for tests and benchmarks: width (systems) and modes of each (complex
ones)."""

SHAPES = {
    "test": {"batch": 2, "length": 129, "width": 3, "modes": 4},
    "cpu": {"batch": 4, "length": 1024, "width": 32, "modes": 32},
    "s4d_image": {"batch": 50, "length": 1024, "width": 512, "modes": 32},
    "s4d_path_x": {"batch": 16, "length": 16384, "width": 256, "modes": 32},
}
