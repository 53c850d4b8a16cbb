"""Monarch Mixer (M2). Fu, Arora, Grogan, Johnson, Eyuboglu, Thomas, Spector, Poli, Rudra,
Ré, "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture", NeurIPS 2023, arXiv 2310.12109.

    [x1, x2, v] = conv3(u W_in + b_in),    z = v x1                     short convolution, width 3
    s = (K z + beta z) x2 + (K' u + beta' u),    h = s W_out + b_out    along the sequence
    y = h + W_2 (gelu(g) a),    [g, a] = W_1 h                          along the channels

    (K z)_t = sum_{s <= t} k_{t-s} z_s;   + sum_{s > t} kr_{s-t-1} z_s with causal=False, where kr
                                          are filters of their own; the short convolution is causal

    K, K'       kernels_EL      convolutions with filters as long as the context: Toeplitz matrices,
                                applied by Monarch products
    k_c(l)      filters         MLP(t_l) exp(-t_l delta_c), t_l = l / (L - 1); three layers of 128
                                sin(omega x); of kr backward_filter, backward_residual_filter
    W_1, W_2    BlockDiagonal   D -> 2 r D and r D -> D with `blocks` blocks, no bias: each is one
                                factor of a Monarch matrix
    L           context_length  a token sees that many, itself included

A convolution is F^-1 (F k . F z); transform="monarch" computes F as the Monarch matrix that it is,
in matrix products of size sqrt(2T), transform="fft" by the backend's fast Fourier transform. Cost
per token: O(D T^1/2) or O(D log T), and O(D^2) for W_in and W_out.

State: none with causal=False; else no fixed one: the last L - 1 numbers of z and u, float32, O(L D)
per token of decoding, beside the filters, which are computed in every call. Packed documents cost
log T convolutions (ops/long_convolution/documents.py).

Departures: with causal=True, where the paper's causal models learn the Monarch factors of K under a
degree constraint, K has the filter of the released bidirectional models. The backbone puts a
residual and a norm around the whole, where those have the norm behind the channels alone: use it
with mlp="none". Positional features are not trained. Biases start at 0, other weights as N(0,
0.02^2), those of filters and blocks as U(-fan_in^-1/2, fan_in^-1/2); beta ~ N(0, 1).

Authors' code: https://github.com/HazyResearch/m2
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.monarch_mixer.monarch import monarch_convolution
from models.parts.bidirectional import following, no_state, reversed_tokens, without_padding
from models.parts.options import Reach, Size, check_choice
from models.parts.projections import FAN_IN_UNIFORM, projection
from models.parts.short_convolution import ConvWidth, ShortConvolution
from ops.framework import segments
from ops.framework.sharding import by_device
from ops.long_convolution.api import long_convolution

TRANSFORMS = {"fft": long_convolution, "monarch": monarch_convolution}
STACKED_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))


class BlockDiagonal(nnx.Module):
    """[..., inputs] -> [..., outputs]: `blocks` matrices side by side."""

    def __init__(
        self,
        blocks: int,
        inputs: int,
        outputs: int,
        axes: tuple[str, str],
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        if blocks < 1 or inputs % blocks or outputs % blocks:
            raise ValueError(f"blocks must divide {inputs} and {outputs} channels; got {blocks}")
        shape = (blocks, inputs // blocks, outputs // blocks)
        kernel_GIO = STACKED_UNIFORM(rngs.params(), shape, param_dtype)
        self.kernel_GIO = nnx.Param(kernel_GIO, out_sharding=(None, *axes))
        self.compute_dtype = compute_dtype

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        kernel_GIO = self.kernel_GIO[...].astype(self.compute_dtype)
        x_BTGI = x_BTD.reshape(*x_BTD.shape[:-1], *kernel_GIO.shape[:2])
        y_BTGO = jnp.einsum("btgi,gio->btgo", x_BTGI, kernel_GIO)
        return y_BTGO.reshape(*x_BTD.shape[:-1], -1)


class Filter(nnx.Module):
    """A filter per channel over the lags 0..L-1: an MLP of the lag times an exponential window."""

    def __init__(
        self, channels: int, length: int, hidden: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike
    ):
        dense = functools.partial(
            projection,
            init=FAN_IN_UNIFORM,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=jnp.float32,
        )
        self.channels, self.length = channels, length
        sizes = (5, hidden, hidden, hidden)
        self.layers = nnx.List(
            [
                dense(inputs, outputs, (None, None), bias=True)
                for inputs, outputs in itertools.pairwise(sizes)
            ]
        )
        self.output = dense(hidden, channels, (None, "embed"))
        omega_F = jnp.full((hidden,), 10.0)
        self.omega_F = nnx.Param(omega_F, group="no_decay", out_sharding=(None,))

    def rates(self) -> jax.Array:
        """Of the windows [D], float32."""
        return jnp.linspace(math.log(100) / 1.5, math.log(100) / 0.3, self.channels)

    def __call__(self, lags: int, rate_D: jax.Array) -> jax.Array:
        """[D, lags], float32; zero beyond L, so that what a token sees does not depend on how the
        sequence is cut. D: the channels at hand, whose `rates` are given."""
        lag_T = jnp.arange(min(lags, self.length), dtype=jnp.float32)
        t_T1 = (lag_T / max(self.length - 1, 1))[:, None]
        angle_T2 = (2 * math.pi / self.length) * lag_T[:, None] * jnp.array([[1e-4, 1]])
        x = jnp.concatenate([t_T1, jnp.cos(angle_T2), -jnp.sin(angle_T2)], axis=1)
        for layer in self.layers:
            x = jnp.sin(self.omega_F[...][None] * layer(x))
        k_DT = (self.output(x) * jnp.exp(-t_T1 * rate_D[None])).T
        return jnp.pad(k_DT, ((0, 0), (0, lags - k_DT.shape[1])))


class MonarchMixer(nnx.Module):
    """x_BTD -> y_BTD; the state is {"conv" [B,2,3D], "past" [B,L-1,2D]: the last z and u},
    float32, and None with causal=False."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        context_length: Reach,
        transform: str = "fft",
        filter_hidden: Size = 128,
        conv_width: ConvWidth = 3,
        blocks: Size = 4,
        expand: Size = 4,
        causal: bool = True,
    ):
        check_choice("transform", transform, tuple(TRANSFORMS))
        if context_length < 1:
            raise ValueError(
                f"context_length must be at least 1 (the token itself); got {context_length}"
            )
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        dense = functools.partial(projection, bias=True, rngs=rngs, **dtypes)
        self.width, self.context_length = width, context_length
        self.transform, self.compute_dtype, self.causal = transform, compute_dtype, causal
        self.input = dense(width, 3 * width, ("embed", "heads"))
        self.conv = ShortConvolution(3 * width, conv_width, bias=True, rngs=rngs, **dtypes)
        of_lags = functools.partial(
            Filter, width, context_length, filter_hidden, rngs=rngs, param_dtype=param_dtype
        )
        self.filter, self.residual_filter = of_lags(), of_lags()
        beta_2D = jax.random.normal(rngs.params(), (2, width), jnp.float32)
        self.beta_2D = nnx.Param(beta_2D, group="no_decay", out_sharding=(None, "embed"))
        self.output = dense(width, width, ("heads", "embed"))
        block_diagonal = functools.partial(BlockDiagonal, blocks, rngs=rngs, **dtypes)
        self.channels_in = block_diagonal(width, 2 * expand * width, ("embed", "mlp"))
        self.channels_out = block_diagonal(expand * width, width, ("mlp", "embed"))
        self.backward_filter = None if causal else of_lags()
        self.backward_residual_filter = None if causal else of_lags()

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        state = state or {}
        inner_BTE = without_padding(self.input(x_BTD), mask)
        parts, conv = self.conv(inner_BTE, state.get("conv"), segment_ids)
        x1_BTD, x2_BTD, v_BTD = jnp.split(parts.astype(jnp.float32), 3, axis=-1)
        both_BTE = jnp.concatenate([v_BTD * x1_BTD, x_BTD.astype(jnp.float32)], axis=-1)
        both_BTE = without_padding(both_BTE, mask)
        y_BTE, past = self.long_memory(both_BTE, state.get("past"), segment_ids)
        if not self.causal:
            y_BTE = y_BTE + self.long_future(both_BTE, segment_ids)
        y_BTE = y_BTE + self.beta_2D[...].reshape(1, 1, -1) * both_BTE
        y_BTD, residual_BTD = jnp.split(y_BTE, 2, axis=-1)
        s_BTD = y_BTD * x2_BTD + residual_BTD
        h_BTD = self.output(s_BTD.astype(self.compute_dtype))
        g_BTI, a_BTI = jnp.split(self.channels_in(h_BTD), 2, axis=-1)
        y_BTD = h_BTD + self.channels_out(jax.nn.gelu(g_BTI) * a_BTI)
        return y_BTD, {"conv": conv, "past": past} if self.causal else None

    def long_future(self, x_BTE: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """Both convolutions [B, T, 2D] with the tokens that follow, float32."""
        filters = [
            f for f in (self.backward_filter, self.backward_residual_filter) if f is not None
        ]
        x_BTED = reversed_tokens(x_BTE).reshape(*x_BTE.shape[:2], 2, self.width)
        y_BTED = self.convolved(x_BTED, filters, reversed_tokens(segment_ids))
        return following(reversed_tokens(y_BTED.reshape(x_BTE.shape)), segment_ids)

    def long_memory(
        self, x_BTE: jax.Array, past_BLE: jax.Array | None, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Both long convolutions [B, T, 2D], and the last L - 1 inputs; float32."""
        batch, length, _ = x_BTE.shape
        document_BT = jnp.zeros((batch, length), jnp.int32)
        if segment_ids is not None:
            starts_BT = segments.starts(segment_ids)
            document_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
        kept = self.context_length - 1
        seen_BTE = x_BTE
        if past_BLE is not None:
            seen_BTE = jnp.concatenate([past_BLE, x_BTE], axis=1)
            # What is remembered belongs to the first document.
            document_BT = jnp.pad(document_BT, ((0, 0), (kept, 0)))
        lags = seen_BTE.shape[1]
        both_BTED = seen_BTE.reshape(batch, lags, 2, self.width)
        ids_BT = None if segment_ids is None else document_BT
        filters, last = [self.filter, self.residual_filter], past_BLE is not None and length == 1
        y_BTED = self.convolved(both_BTED, filters, ids_BT, last=last)
        y_BTE = y_BTED.reshape(*y_BTED.shape[:2], -1)
        of_last_BT1 = (document_BT == document_BT[:, -1:])[..., None]
        past_BLE = jnp.where(of_last_BT1, seen_BTE, 0.0)
        past_BLE = jnp.pad(past_BLE, ((0, 0), (kept, 0), (0, 0)))[:, lags:]
        return y_BTE[:, -length:], past_BLE

    def convolved(
        self,
        x_BTED: jax.Array,
        filters: Sequence[Filter],
        document_BT: jax.Array | None,
        *,
        last: bool = False,
    ) -> jax.Array:
        """Each of the two signals convolved with its filters [B, T, 2, D], or with `last` the last
        token of it alone [B, 1, 2, D]."""
        leaves, tree = jax.tree.flatten(list(filters))
        lags = x_BTED.shape[1]

        def of_channels(
            x_BTED: jax.Array, ids_BT: jax.Array | None, rate_D: jax.Array, *leaves: jax.Array
        ) -> tuple[jax.Array]:
            made = jax.tree.unflatten(tree, leaves)
            kernel_EDT = jnp.stack([of_lags(lags, rate_D) for of_lags in made])
            if last:
                y_BED = jnp.einsum(
                    "bled,edl->bed", x_BTED[:, ::-1], kernel_EDT, precision="highest"
                )
                return (y_BED[:, None],)
            x_BTX = x_BTED.reshape(*x_BTED.shape[:2], -1)
            y_BTX = TRANSFORMS[self.transform](
                x_BTX, kernel_EDT.reshape(-1, lags), segment_ids=ids_BT
            )
            return (y_BTX.reshape(x_BTED.shape),)

        # A filter has few parameters beside its values, which so stay where they are used.
        by_channel = [of_lags.output.kernel.get_value() for of_lags in filters]
        layouts = [
            "FC" if any(leaf is kernel for kernel in by_channel) else "F" * leaf.ndim
            for leaf in leaves
        ]
        over_devices = by_device(
            "monarch_mixer", of_channels, ("BLEC", "BL", "C", *layouts), ("BLEC",)
        )
        (y_BTED,) = over_devices(x_BTED, document_BT, filters[0].rates(), *leaves)
        return y_BTED

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros. ValueError with causal=False."""
        if not self.causal:
            raise no_state("monarch_mixer")
        shape = (batch, self.context_length - 1, 2 * self.width)
        return {"conv": self.conv.init_state(batch), "past": jnp.zeros(shape, jnp.float32)}


Mixer = MonarchMixer
