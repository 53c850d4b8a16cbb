"""The slow networks of HyperZ.Z.W (arXiv 2401.17948): kernels that are generated from the
coordinates of their places.

A multiplicative filter network on coordinates c in [-1, 1]^d, a regular grid:

    h_0 = g_0(c),   h_i = g_i(c) * (h_{i-1} W_i + b_i) + p,   i = 1 .. n,   K = h_n W_o + b_o
    g_i(c) = sin(c F_i + phi_i)

    F_i     frequency_IDH     starts as U(-1/sqrt(d), 1/sqrt(d)) 2 pi omega_0 gamma,
                              gamma ~ Gamma(6 / (i + 1), 1)
    phi_i   phase_IH          0
    W_i     steps             U(-sqrt(3/H), sqrt(3/H)), b_i = 1
    p       place_N1          one number for each place, the same for all channels and steps; 0
    W_o     output            likewise, over the square root of the number of places; b_o = 0

A local kernel (`LocalKernel`) also depends on the batch: with s the batch's mean of a context,
pooled to the kernel's places, every step is followed by

    h_i <- (alpha stop_gradient(h_i) + beta h_i / ||h_i||) * (s' U_i + 1),   s' = gelu(s W_r W_c)

the norm for each hidden channel over the places, alpha = 1 and beta = 0.1 constants, 1 what the
bias starts from.

Letters: N places of a kernel, d dimensions of their coordinates, H hidden channels, C channels."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.standardisation import OfBatch
from models.parts.projections import FAN_IN_UNIFORM, fan_in_bias, projection

KAIMING_UNIFORM = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")
ALPHA, BETA = 1.0, 0.1


class SlowNetwork(nnx.Module):
    """() -> a kernel [N, outputs], float32, of the places of a grid of this shape."""

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int,
        *,
        hidden: int,
        steps: int,
        frequency: float,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ):
        self.shape = shape
        dimensions, places = len(shape), math.prod(shape)
        key_sign, key_gamma = jax.random.split(rngs.params())
        # Gamma(6 / (i + 1)) for i = 0 .. n.
        order_I11 = 6.0 / jnp.arange(1, steps + 2, dtype=jnp.float32)[:, None, None]
        filters = (steps + 1, dimensions, hidden)
        uniform_IDH = jax.random.uniform(key_sign, filters, jnp.float32, -1, 1) / dimensions**0.5
        gamma_IDH = jax.random.gamma(key_gamma, jnp.broadcast_to(order_I11, filters))
        frequency_IDH = 2 * math.pi * frequency * gamma_IDH * uniform_IDH
        kept = {"out_sharding": (None, None, None), "group": "no_decay"}
        self.frequency_IDH = nnx.Param(frequency_IDH.astype(param_dtype), **kept)
        self.phase_IH = nnx.Param(
            jnp.zeros((steps + 1, hidden), param_dtype), out_sharding=(None, None), group="no_decay"
        )
        dense = functools.partial(
            projection,
            axes=(None, None),
            init=KAIMING_UNIFORM,
            bias=True,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=jnp.float32,
        )
        ones = nnx.initializers.ones_init()
        self.steps = nnx.List(dense(hidden, hidden, bias_init=ones) for _ in range(steps))
        self.place_N1 = nnx.Param(
            jnp.zeros((places, 1), param_dtype), out_sharding=(None, None), group="no_decay"
        )
        scaled = nnx.initializers.variance_scaling(1.0 / places, "fan_in", "uniform")
        self.output = dense(hidden, outputs, init=scaled)

    def __call__(self) -> jax.Array:
        return self.generated(lambda number, h_NH: h_NH)

    def generated(self, after: Callable[[int, jax.Array], jax.Array]) -> jax.Array:
        """The kernel of a network in which h_i becomes after(i - 1, h_i)."""
        c_ND = coordinates(self.shape)
        frequency_IDH, phase_IH, place_N1 = (
            p[...].astype(jnp.float32) for p in (self.frequency_IDH, self.phase_IH, self.place_N1)
        )
        # Of thousands of turns, of which no digit may be lost.
        angle_INH = jnp.einsum(
            "nd,idh->inh", c_ND, frequency_IDH, precision=jax.lax.Precision.HIGHEST
        )
        g_INH = jnp.sin(angle_INH + phase_IH[:, None])
        h_NH = g_INH[0]
        for number, step in enumerate(self.steps):
            h_NH = after(number, g_INH[number + 1] * step(h_NH) + place_N1)
        return self.output(h_NH)


class LocalKernel(nnx.Module):
    """Contexts [B, T, C] -> the kernel [N, C] of a depthwise convolution, float32.

    `there` bool [B]: the rows of the batch that count, None for all. With context=False the kernel
    is that of the coordinates alone; running: as of `BatchStandardisation`."""

    def __init__(
        self,
        size: int,
        channels: int,
        shape: tuple[int, ...],
        *,
        hidden: int,
        steps: int,
        frequency: float,
        context: bool,
        running: bool,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ):
        self.shape, places = shape, (size,) * len(shape)
        common: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        self.network = SlowNetwork(
            places, channels, hidden=hidden, steps=steps, frequency=frequency, **common
        )
        self.has_context = context
        if not context:
            return
        dense = functools.partial(
            projection, axes=(None, None), bias=True, compute_dtype=jnp.float32, **common
        )
        self.mean = OfBatch((math.prod(places), channels), 0.0, kept=running)
        self.read, self.mix = (
            dense(size, hidden, init=FAN_IN_UNIFORM, bias_init=fan_in_bias(size))
            for size in (channels, hidden)
        )
        ones = nnx.initializers.ones_init()
        self.factors = nnx.List(
            dense(hidden, hidden, init=KAIMING_UNIFORM, bias_init=ones) for _ in range(steps)
        )

    def __call__(self, context_BTC: jax.Array, there_B: jax.Array | None) -> jax.Array:
        if not self.has_context:
            return self.network()
        # The mean over the batch of a linear map is the map of the mean.
        pooled_BNC = adaptive_means(context_BTC, self.shape, self.network.shape)
        if there_B is None:
            mean_NC, count = jnp.mean(pooled_BNC, axis=0), len(pooled_BNC)
        else:
            count = jnp.sum(there_B, dtype=jnp.float32)
            kept_BNC = jnp.where(there_B[:, None, None], pooled_BNC, 0.0)
            mean_NC = jnp.sum(kept_BNC, axis=0) / jnp.maximum(count, 1.0)
        mean_NC = self.mean(mean_NC, count)
        s_NH = jax.nn.gelu(self.mix(self.read(mean_NC)), approximate=False)
        return self.network.generated(
            lambda number, h_NH: renormalised(h_NH) * self.factors[number](s_NH)
        )


def renormalised(h_NH: jax.Array, beta: float = BETA) -> jax.Array:
    """alpha stop_gradient(h) + beta h / ||h||, the norm over the places; zeros of zeros."""
    square_1H = jnp.sum(jnp.square(h_NH), axis=0, keepdims=True)
    norm_1H = jnp.sqrt(jnp.where(square_1H > 0, square_1H, 1.0))
    return ALPHA * jax.lax.stop_gradient(h_NH) + beta * h_NH / norm_1H


def coordinates(shape: tuple[int, ...]) -> jax.Array:
    """[N, d]: a regular grid on [-1, 1]^d, the first axis slowest; a single place is at -1."""
    axes = [np.linspace(-1, 1, size) for size in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return jnp.asarray(grid.reshape(-1, len(shape)), jnp.float32)


def adaptive_means(x_BTC: jax.Array, shape: tuple[int, ...], places: tuple[int, ...]) -> jax.Array:
    """[B, N, C]: means over the cells that another grid, `places`, cuts x [B, T, C] into, T being
    the places of the grid `shape`: along an axis of S places, cell i of k has those from
    floor(i S / k) to ceil((i + 1) S / k)."""
    x = x_BTC.reshape(len(x_BTC), *shape, -1).astype(jnp.float32)
    for axis, (size, cells) in enumerate(zip(shape, places, strict=True), start=1):
        x = jnp.moveaxis(jnp.tensordot(x, _cells(size, cells), axes=((axis,), (1,))), -1, axis)
    return x.reshape(len(x_BTC), math.prod(places), -1)


def _cells(size: int, cells: int) -> np.ndarray:
    """[cells, size]: the share of each place in the mean of a cell."""
    share = np.zeros((cells, size), np.float32)
    for i in range(cells):
        first, end = i * size // cells, -((i + 1) * size // -cells)
        share[i, first:end] = 1 / (end - first)
    return share
