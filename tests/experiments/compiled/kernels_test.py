"""Kernels of a program, found in its jaxpr, and their flops."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from experiments.compiled.cost import Flops
from experiments.compiled.kernels import kernel_flops


def test_a_kernel_counts_its_grid_times_its_matmuls_and_its_precision():
    def kernel(x, w, o):
        o[...] = jax.lax.dot(x[...], w[...], precision=jax.lax.Precision.HIGHEST)

    def function(x, w):
        return pl.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[
                pl.BlockSpec((8, 128), lambda i: (i, 0)),
                pl.BlockSpec((128, 128), lambda i: (0, 0)),
            ],
            out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32),
            name="product",
        )(x, w)

    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((32, 128), (128, 128)))
    flops = 2 * 32 * 128 * 128
    assert kernel_flops(jax.make_jaxpr(jax.jit(function))(x, w)) == {
        "product": Flops(flops, 6 * flops)
    }
