"""Sizes of published models, for tests and benchmarks: width (systems), state_size and outputs of
each system."""

SHAPES = {
    "test": {"batch": 2, "length": 129, "width": 3, "state_size": 4, "outputs": 2},
    "cpu": {"batch": 4, "length": 1024, "width": 32, "state_size": 16, "outputs": 1},
    "lssl_image": {"batch": 50, "length": 784, "width": 128, "state_size": 128, "outputs": 1},
    "s4_image": {"batch": 50, "length": 1024, "width": 512, "state_size": 64, "outputs": 1},
    "decode": {"batch": 128, "length": 1, "width": 512, "state_size": 64, "outputs": 1},
}
