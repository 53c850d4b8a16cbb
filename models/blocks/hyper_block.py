"""The block of HyperZ.Z.W (arXiv 2401.17948): products of activations with generated kernels, and
of what comes out with activations again, in place of residual connections and attention.

With K_g, K_c, K_s kernels of slow networks for places and channels, K_l those of depthwise
convolutions, IS and G-IBS of models/blocks/standardisation.py, and x @ y the global operator:

    G = K_g * x;   f = IS(unit(G) + unit(x));   m = IS(x W);   c = IS(x * sigmoid(K_c * p * p))
    o, o_m, o_c = G @ f, G @ m, G @ c;   glu = sigmoid(o) * o
    hi = x * sigmoid((K_c' * q * q)(K_s * n * n))
    l_1 = local(x, c), l_2 = local(c, x), l_3 = local(m, x), l_4 = local(x, m)
    y = [o, l_2, earlier, f, o_m, l_1, glu, l_3, o_c, l_4, earlier still, hi] W_b
    x <- drop(gelu(G-IBS(y)) + b)

    unit(u)        gelu(IS((u W_k) * (u W_v W_q))) plus p for each place, times W_y
    local(u, x)    gelu(BS(convolution(x; K_l(u)) W)) + b: K_l(u) depends on the mean of u in the
                   batch
    p, q           means of x and of o over the places;  n: of o over the channels
    earlier        outputs of the block before the last and of the one before it, their channels
                   repeated to those of x

The global operator is, of images, the matrix product of rows and columns for each channel, and, of
sequences, the circular convolution (`global_product`). K_c has no effect on c but by the eps of IS,
which takes a positive factor of a channel out again; so it is published.

Letters: T places, C channels, N places of a kernel."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.batch_norm import BatchNorm
from models.blocks.hyper_kernels import LocalKernel, SlowNetwork
from models.blocks.standardisation import (
    EPS,
    BatchStandardisation,
    GroupedStandardisation,
    standardised,
)
from models.parts.grid_convolution import grid_convolution
from models.parts.options import Range, Size, check_choice, check_value
from models.parts.projections import FAN_IN_UNIFORM, fan_in_bias, projection, tied_dropout
from ops.long_convolution.api import long_convolution

KAIMING_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
LOCAL_STEPS = 2  # of all slow networks but the first block's of its global kernel
KernelSize = Annotated[int, Range(1, 31)]
Frequency = Annotated[float, Range(0, 1e5, ("low",))]


@dataclass(frozen=True, kw_only=True)
class HyperOptions:
    """What all blocks have in common.

    slow_width       hidden channels of the slow networks of global kernels; those of local and of
                     channel kernels have half of them, the channel kernel of hi a quarter
    frequency        omega_0, what frequencies start from
    kernel_sizes     of the local operators l_1 .. l_4, or of the first of them; (): none
    global_branch    whether o, o_m, o_c, glu and hi are there
    hyper_kernels    False: kernels of places and channels are 1, local ones the identity
    context          whether local kernels depend on the batch
    norm             of a block's output: "g_ibs", or "batch": with scale, shift and running
                     averages
    groups           of G-IBS
    statistics       of G-IBS, BS and contexts under `model.eval()`: "batch" or "running" averages

    Raises ValueError for a value that is not possible."""

    slow_width: Size = 64
    frequency: Frequency = 2000.0
    kernel_sizes: tuple[KernelSize, ...] = (3, 9, 5, 7)
    global_branch: bool = True
    hyper_kernels: bool = True
    context: bool = True
    norm: str = "g_ibs"
    groups: Size = 12
    statistics: str = "batch"

    def __post_init__(self):
        for field in fields(self):
            check_value(field.name, field.type, getattr(self, field.name))
        check_choice("norm", self.norm, ("g_ibs", "batch"))
        check_choice("statistics", self.statistics, ("batch", "running"))
        if len(self.kernel_sizes) > 4 or any(size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(
                f"kernel_sizes must be at most four odd sizes; got {self.kernel_sizes!r}"
            )
        if self.slow_width % 4:
            raise ValueError(f"slow_width must be a multiple of 4; got {self.slow_width}")

    @property
    def running(self) -> bool:
        return self.statistics == "running"

    def slow(self, shape: tuple[int, ...], outputs: int, **given: Any) -> Any:
        """A slow network, or what is always 1."""
        if not self.hyper_kernels:
            return Ones()
        return SlowNetwork(shape, outputs, frequency=self.frequency, **given)


class Ones(nnx.Module):
    """The kernel [1, 1] that changes nothing."""

    def __call__(self) -> jax.Array:
        return jnp.ones((1, 1))


class Unit(nnx.Module):
    """unit(u), u [B, T, C] of T `places` -> float32."""

    def __init__(self, places: int, channels: int, **given: Any):
        def dense() -> nnx.Linear:
            return linear(channels, channels, **given)

        self.key, self.value, self.query, self.output = (dense() for _ in range(4))
        self.place_T1 = nnx.Param(
            jnp.zeros((places, 1), given["param_dtype"]),
            out_sharding=(None, None),
            group="no_decay",
        )

    def __call__(self, u_BTC: jax.Array) -> jax.Array:
        product_BTC = self.key(u_BTC) * self.query(self.value(u_BTC))
        h_BTC = jax.nn.gelu(standardised(product_BTC), approximate=False)
        return self.output(h_BTC + self.place_T1[...].astype(jnp.float32)[None])


class LocalOperator(nnx.Module):
    """local(u, x), u and x [B, T, C] -> float32."""

    def __init__(
        self, size: int, channels: int, shape: tuple[int, ...], options: HyperOptions, **given: Any
    ):
        self.shape = shape
        self.kernel = (
            LocalKernel(
                size,
                channels,
                shape,
                hidden=options.slow_width // 2,
                steps=LOCAL_STEPS,
                frequency=options.frequency,
                context=options.context,
                running=options.running,
                rngs=given["rngs"],
                param_dtype=given["param_dtype"],
            )
            if options.hyper_kernels
            else None
        )
        self.size = (1,) * (2 - len(shape)) + (size,) * len(shape)
        self.mix = linear(channels, channels, **given)
        self.norm = BatchStandardisation(channels, running=options.running)
        self.shift = scalar(given["param_dtype"])

    def __call__(self, u_BTC: jax.Array, x_BTC: jax.Array, there_B: jax.Array | None) -> jax.Array:
        if self.kernel is not None:
            kernel_YXC = self.kernel(u_BTC, there_B).reshape(*self.size, -1)
            grid = self.shape if len(self.shape) == 2 else None
            x_BTC = grid_convolution(x_BTC, kernel_YXC, grid)
        y_BTC = jax.nn.gelu(self.norm(self.mix(x_BTC), there_B), approximate=False)
        return y_BTC + self.shift[...].astype(jnp.float32)


class Interaction(nnx.Module):
    """(o, x) -> hi, [B, T, C] each."""

    def __init__(self, channels: int, shape: tuple[int, ...], options: HyperOptions, **given: Any):
        given = {"steps": LOCAL_STEPS, **given}
        self.of_channels = options.slow((channels,), 1, hidden=options.slow_width // 4, **given)
        self.of_places = options.slow(shape, 1, hidden=options.slow_width, **given)

    def __call__(self, o_BTC: jax.Array, x_BTC: jax.Array) -> jax.Array:
        q_B1C = jnp.mean(o_BTC, axis=1, keepdims=True)
        n_BT1 = jnp.mean(o_BTC, axis=2, keepdims=True)
        channels_11C = jnp.swapaxes(self.of_channels(), 0, 1)[None]
        gate = (channels_11C * q_B1C * q_B1C) * (self.of_places()[None] * n_BT1 * n_BT1)
        return x_BTC * jax.nn.sigmoid(gate)


class HyperBlock(nnx.Module):
    """(x [B, T, C], outputs of earlier blocks) -> (x of `outputs` channels, K_g [T, C] or None),
    float32.

    shape: the grid of the T places, or (T,) of a sequence. earlier: channels of the outputs of
    earlier blocks, the later one first, at most two; they divide C. steps: of the slow network of
    the global kernel."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        shape: tuple[int, ...],
        earlier: tuple[int, ...],
        steps: int,
        dropout: float,
        options: HyperOptions,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        common: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        given: dict[str, Any] = {**common, "compute_dtype": compute_dtype}
        self.shape, places = shape, math.prod(shape)
        hidden = options.slow_width
        self.kernel = options.slow(shape, channels, hidden=hidden, steps=steps, **common)
        self.slow_unit, self.fast_unit = (Unit(places, channels, **given) for _ in range(2))
        self.mlp = linear(channels, channels, init=KAIMING_NORMAL, **given)
        self.channels = options.slow(
            (channels,), 1, hidden=hidden // 2, steps=LOCAL_STEPS, **common
        )
        self.local = nnx.List(
            LocalOperator(size, channels, shape, options, **given) for size in options.kernel_sizes
        )
        self.interaction = (
            Interaction(channels, shape, options, **common) if options.global_branch else None
        )
        maps = 1 + len(options.kernel_sizes) + 5 * options.global_branch + len(earlier)
        self.bottleneck = linear(maps * channels, outputs, init=KAIMING_NORMAL, **given)
        self.norm = (
            BatchNorm(outputs, eps=EPS, axis="embed", param_dtype=param_dtype)
            if options.norm == "batch"
            else GroupedStandardisation(outputs, groups=options.groups, running=options.running)
        )
        self.shift = scalar(param_dtype)
        self.dropout = tied_dropout(dropout, rngs)

    def __call__(
        self, x_BTC: jax.Array, earlier: tuple[jax.Array, ...], there_B: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """there bool [B]: the rows of the batch that count for its statistics; None for all."""
        kernel_TC = self.kernel()
        slow_BTC = kernel_TC[None] * x_BTC
        f_BTC = standardised(self.slow_unit(slow_BTC) + self.fast_unit(x_BTC))
        m_BTC = standardised(self.mlp(x_BTC))
        p_B1C = jnp.mean(x_BTC, axis=1, keepdims=True)
        channels_11C = jnp.swapaxes(self.channels(), 0, 1)[None]
        c_BTC = standardised(x_BTC * jax.nn.sigmoid(channels_11C * p_B1C * p_B1C))

        of_local = (x_BTC, c_BTC), (c_BTC, x_BTC), (m_BTC, x_BTC), (x_BTC, m_BTC)
        l_1, l_2, l_3, l_4, *_ = (
            *(op(*both, there_B) for op, both in zip(self.local, of_local, strict=False)),
            *(None,) * 4,
        )
        o = o_m = o_c = glu = hi = None
        if self.interaction is not None:
            o, o_m, o_c = (
                global_product(slow_BTC, by_BTC, self.shape) for by_BTC in (f_BTC, m_BTC, c_BTC)
            )
            glu, hi = jax.nn.sigmoid(o) * o, self.interaction(o, x_BTC)
        before, still = (*(repeated(e, x_BTC.shape[-1]) for e in earlier), None, None)[:2]
        maps = (o, l_2, before, f_BTC, o_m, l_1, glu, l_3, o_c, l_4, still, hi)
        y_BTC = self.bottleneck(jnp.concatenate([a for a in maps if a is not None], axis=-1))
        y_BTC = self.normalised(y_BTC, there_B)
        y_BTC = jax.nn.gelu(y_BTC, approximate=False) + self.shift[...].astype(jnp.float32)
        return (y_BTC if self.dropout is None else self.dropout(y_BTC)), kernel_TC

    def normalised(self, y_BTC: jax.Array, there_B: jax.Array | None) -> jax.Array:
        if not isinstance(self.norm, BatchNorm):
            return self.norm(y_BTC, there_B)
        mask_BT = None
        if there_B is not None:
            mask_BT = jnp.broadcast_to(there_B[:, None], y_BTC.shape[:2])
        return self.norm(y_BTC, mask_BT)


def global_product(a_BTC: jax.Array, b_BTC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """a @ b for each channel, float32.

    Of a grid of equal sides: y(r, s) = sum_q a(r, q) b(q, s), at a cost of T^(3/2). Of a sequence:
    y(t) = sum_s a(s) b((t - s) mod T), at a cost of T log T."""
    if len(shape) == 2:
        a, b = (z.reshape(len(z), *shape, -1) for z in (a_BTC, b_BTC))
        y = jnp.einsum("byzc,bzxc->byxc", a, b, preferred_element_type=jnp.float32)
        return y.reshape(a_BTC.shape)
    length = a_BTC.shape[1]
    kernel_BCT = jnp.pad(jnp.swapaxes(a_BTC, 1, 2), ((0, 0), (0, 0), (0, length)))
    # The second time around all of the first is behind.
    return long_convolution(jnp.concatenate((b_BTC, b_BTC), axis=1), kernel_BCT)[:, length:]


def repeated(x_BTC: jax.Array, channels: int) -> jax.Array:
    """The channels over and over until there are so many."""
    return jnp.tile(x_BTC, (1, 1, channels // x_BTC.shape[-1]))


def linear(inputs: int, outputs: int, *, init: Any = None, **given: Any) -> nnx.Linear:
    """A linear map of channels with a bias: PyTorch's start, or `init` and a bias of 0."""
    start = {"init": FAN_IN_UNIFORM, "bias_init": fan_in_bias(inputs)}
    return projection(
        inputs, outputs, (None, "embed"), bias=True, **({"init": init} if init else start), **given
    )


def scalar(param_dtype: DTypeLike) -> nnx.Param:
    """One learned number that is added to everything; 0 at first."""
    return nnx.Param(jnp.zeros((), param_dtype), out_sharding=(), group="no_decay")
