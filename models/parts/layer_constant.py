"""Numbers that a paper fixes per layer."""

from flax import nnx


class LayerConstant(nnx.Variable):
    """An array that follows from a layer's index and is never trained: the optimizer takes
    `nnx.Param` alone.

    A variable and not a Python number, because the layers of a scan are one program: what differs
    between them is data, stacked like their parameters."""
