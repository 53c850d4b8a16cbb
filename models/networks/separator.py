"""A separator of sounds over a pattern of mixers: the sources of a mixture, as waveforms.

    X = relu(frames(mixture) W_e)                   frames of `kernel` samples, every `stride`
    h = GN(X) W + c P                               P: sines and cosines of positions, c learned
    z = PReLU(GN(LN(stack(h))) + h) W_s + b_s       of each frame one z for each source
    M = relu((tanh(z W_t + b_t) sigmoid(z W_g + b_g)) W_m)
    source = overlap_add((M X) W_d)                 cut, or filled with zeros, to the mixture's
    length

The separator of MossFormer and MossFormer2 (models/mossformer2), which in turn is that of
Conv-TasNet (Luo and Mesgarani, 2019, arXiv 1809.07454) and SepFormer (Subakan et al., ICASSP 2021,
arXiv 2010.13154) with another stack. `width` is the number of filters of W_e, [kernel, width], and
of the model. GN normalises all numbers of a sequence together, with a scale and a shift for each
channel. A mixture that is a times as loud has sources that are a times as loud, but for the eps of
GN.

There is no state: a source is separated from a whole mixture."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.backbone import Backbone, build_network
from models.parts.norms import Identity, layer_norm
from models.parts.options import Size
from models.parts.projections import FAN_IN_UNIFORM, fan_in_bias, projection
from models.parts.rotary import frequencies

GROUP_EPS, LAYER_EPS = 1e-8, 1e-6
SLOPE = 0.25  # what that of PReLU starts from


class GroupNorm(nnx.Module):
    """(x - mean) / sqrt(var + 1e-8) over all frames and channels of a sequence, times a scale and
    plus a shift for each channel: x [B, S, N] -> float32. `mask` [B, S]: the frames that count."""

    def __init__(self, width: int, *, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(width, param_dtype), out_sharding=("embed",))
        self.shift = nnx.Param(jnp.zeros(width, param_dtype), out_sharding=("embed",))

    def __call__(self, x_BSN: jax.Array, mask_BS: jax.Array | None) -> jax.Array:
        x_BSN = x_BSN.astype(jnp.float32)

        def mean(x_BSN: jax.Array) -> jax.Array:
            if mask_BS is None:
                return jnp.mean(x_BSN, axis=(1, 2), keepdims=True)
            total = jnp.sum(jnp.where(mask_BS[..., None], x_BSN, 0.0), axis=(1, 2))
            count = jnp.maximum(jnp.sum(mask_BS, axis=1), 1) * x_BSN.shape[-1]
            return (total / count.astype(jnp.float32))[:, None, None]

        x_BSN = x_BSN - mean(x_BSN)
        x_BSN = x_BSN * jax.lax.rsqrt(mean(jnp.square(x_BSN)) + GROUP_EPS)
        scale_N, shift_N = (p[...].astype(jnp.float32) for p in (self.scale, self.shift))
        return x_BSN * scale_N[None, None] + shift_N[None, None]


class Separator(Backbone):
    """Mixtures [B, T] to sources [B, Q, T]; see `build` for the options."""

    causal = False

    def __init__(
        self,
        *,
        sources: int,
        width: int,
        kernel: Size = 16,
        stride: Size = 8,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        **backbone: Any,
    ):
        if kernel % stride:
            raise ValueError(f"stride must divide kernel={kernel}; got {stride}")
        if width % 2:
            raise ValueError(f"width must be even: positions are sines and cosines; got {width}")
        self.sources, self.kernel, self.stride = sources, kernel, stride
        dtypes: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        super().__init__(Identity(), width=width, compute_dtype=compute_dtype, **dtypes, **backbone)

        def dense(inputs: int, outputs: int, *, bias: bool, sides: tuple[Any, Any]) -> nnx.Linear:
            given: dict[str, Any] = {"init": FAN_IN_UNIFORM, "bias_init": fan_in_bias(inputs)}
            given |= {"bias": bias, "compute_dtype": jnp.float32}
            return projection(inputs, outputs, sides, **given, **dtypes)

        inside = ("embed", None)
        self.encoder = dense(kernel, width, bias=False, sides=(None, "embed"))
        self.input_norm = GroupNorm(width, param_dtype=param_dtype)
        self.input = dense(width, width, bias=False, sides=inside)
        self.position_scale = nnx.Param(jnp.ones((), param_dtype), out_sharding=())
        # Also behind blocks that end with a norm.
        self.norm = layer_norm(width, eps=LAYER_EPS, axis="embed", **dtypes)
        self.output_norm = GroupNorm(width, param_dtype=param_dtype)
        self.slope = nnx.Param(jnp.full((), SLOPE, param_dtype), out_sharding=())
        self.split = dense(width, sources * width, bias=True, sides=inside)
        self.tanh = dense(width, width, bias=True, sides=inside)
        self.gate = dense(width, width, bias=True, sides=inside)
        self.mask = dense(width, width, bias=False, sides=inside)
        self.decoder = dense(width, kernel, bias=False, sides=inside)

    def __call__(self, mixture_BT: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
        """Sources [B, Q, T], float32, of mixtures [B, T], whose first `lengths_B` [B] samples are
        sound, the others padding, of which nothing is read and whose sources are zeros; None: all
        are sound. Raises ValueError for other shapes and for fewer samples than a frame has."""
        if mixture_BT.ndim != 2 or mixture_BT.shape[1] < self.kernel:
            raise ValueError(
                f"mixture must be [B, T] with the {self.kernel} samples of a frame or more; got"
                f" {mixture_BT.shape}"
            )
        if lengths_B is not None and lengths_B.shape != mixture_BT.shape[:1]:
            raise ValueError(
                f"lengths must be [{mixture_BT.shape[0]}] for mixtures {mixture_BT.shape}; got"
                f" {lengths_B.shape}"
            )
        length = mixture_BT.shape[1]
        frames_BSK = cut(mixture_BT.astype(jnp.float32), self.kernel, self.stride)
        mask_BS = None
        if lengths_B is not None:
            whole_B = (lengths_B - self.kernel) // self.stride + 1
            mask_BS = jnp.arange(frames_BSK.shape[1])[None] < whole_B[:, None]
            frames_BSK = jnp.where(mask_BS[..., None], frames_BSK, 0.0)
        x_BSN = jax.nn.relu(self.encoder(frames_BSK))
        masks_BQSN = self.masks(x_BSN, mask_BS)
        if mask_BS is not None:
            masks_BQSN = jnp.where(mask_BS[:, None, :, None], masks_BQSN, 0.0)
        samples_BQSK = self.decoder(masks_BQSN * x_BSN[:, None])
        sound_BQT = overlap_add(samples_BQSK, self.stride)
        return jnp.pad(sound_BQT, ((0, 0), (0, 0), (0, length - sound_BQT.shape[-1])))

    def masks(self, x_BSN: jax.Array, mask_BS: jax.Array | None) -> jax.Array:
        """What each source keeps of the encoded frames: [B, Q, S, N], >= 0."""
        batch, length, width = x_BSN.shape
        scale = self.position_scale[...].astype(jnp.float32)
        h_BSN = self.input(self.input_norm(x_BSN, mask_BS))
        h_BSN = h_BSN + scale * sinusoids(length, width)[None]
        y_BSN, _ = self.hidden(h_BSN, mask=mask_BS)
        y_BSN = self.output_norm(self.norm(y_BSN), mask_BS) + h_BSN
        slope = self.slope[...].astype(jnp.float32)
        z_BSM = self.split(jnp.where(y_BSN >= 0, y_BSN, slope * y_BSN))
        z_BQSN = jnp.swapaxes(z_BSM.reshape(batch, length, self.sources, width), 1, 2)
        return jax.nn.relu(
            self.mask(jnp.tanh(self.tanh(z_BQSN)) * jax.nn.sigmoid(self.gate(z_BQSN)))
        )


def sinusoids(length: int, width: int) -> jax.Array:
    """[sin(t f_i) | cos(t f_i)] for t = 0, 1, ... and f_i = 10000^(-2i/width): [length, width]."""
    angle_SN = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies(width, 10000.0)[None]
    return jnp.concatenate((jnp.sin(angle_SN), jnp.cos(angle_SN)), axis=-1)


def cut(x_BT: jax.Array, kernel: int, stride: int) -> jax.Array:
    """The frames [B, S, kernel] that begin at every `stride` samples, S = (T - kernel) // stride +
    1; what is left at the end is in none. stride divides kernel."""
    batch, length = x_BT.shape
    frames, parts = (length - kernel) // stride + 1, kernel // stride
    pieces = x_BT[:, : (frames + parts - 1) * stride].reshape(batch, -1, stride)
    return jnp.concatenate([pieces[:, i : i + frames] for i in range(parts)], axis=-1)


def overlap_add(frames_BQSK: jax.Array, stride: int) -> jax.Array:
    """The sum of frames that begin at every `stride` samples, [B, Q, (S - 1) stride + kernel]."""
    *lead, frames, kernel = frames_BQSK.shape
    parts = kernel // stride
    pieces = frames_BQSK.reshape(*lead, frames, parts, stride)
    total = sum(
        jnp.pad(pieces[:, :, :, i], ((0, 0), (0, 0), (i, parts - 1 - i), (0, 0)))
        for i in range(parts)
    )
    return jnp.asarray(total).reshape(*lead, -1)


def build(
    model_config: Mapping[str, Any],
    *,
    sources: int,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
) -> Separator:
    """The model of a config's `model` section (without its name), with the options of
    models/blocks/backbone.py and

    kernel, stride   samples of a frame, and from the beginning of one to that of the next

    Raises ValueError for unknown, missing or impossible options, with what is possible."""
    return build_network(
        Separator,
        "separator",
        model_config,
        sources=sources,
        rngs=rngs,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )
