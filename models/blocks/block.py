"""One residual block of the stack.

    x <- x + mixer(norm(x));   x <- x + mlp(norm(x))       the second half only with an MLP
    x <- norm(x + mixer(x));   x <- norm(x + mlp(x))       with pre_norm=False
    x <- x + norm(mixer(x));   x <- x + norm(mlp(x))       with branch_norm=True
    x <- h + mixer(h), h = norm(x);   the MLP likewise     with normed_residual=True

With a condition c, a vector per sequence, each half becomes (adaLN-Zero; Peebles and Xie, "Scalable
Diffusion Models with Transformers", ICCV 2023, arXiv 2212.09748):

    [shift, scale, gate] = silu(c) W + b,   x <- x + gate * f(norm(x) * (1 + scale) + shift)

W and b start at 0, so that a fresh block is the identity. The residual stream is float32; norms,
modulation and sums are computed in float32; mixers and MLPs see the compute dtype."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.batch_norm import BatchNorm, ProgressiveBatchNorm, RepBatchNorm, masked_norm
from models.blocks.experts import Experts
from models.blocks.low_rank import KINDS as LORA_KINDS
from models.blocks.low_rank import adapt
from models.blocks.mlp import INITS, MLPS, inner_width
from models.parts.norms import Identity, PlainLayerNorm, ZeroCentredRMSNorm, layer_norm, rms_norm
from models.parts.options import (
    Count,
    Epsilon,
    Factor,
    Probability,
    Weight,
    check_choice,
    check_value,
)
from models.parts.projections import projection
from models.parts.variables import LayerConstant

EXPERT_WEIGHTS = ("normalised", "softmax", "sigmoid_normalised", "sigmoid")
NORMS = (
    *("rms", "rms_zero", "layer", "layer_plain", "batch", "rep_batch", "progressive_batch"),
    "none",
)


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What all blocks of a stack have in common.

    mlp                "swiglu", "gelu", "gelu_tanh" (the same by GELU's approximation), "experts"
                       (models/blocks/experts.py) or "none"
    mlp_ratio          inner width: ratio * width for "gelu", about 2/3 of that for "swiglu"
    mlp_width          inner width itself; 0: by mlp_ratio
    mlp_bias           biases in "swiglu"; "gelu" has them
    mlp_init           "normal": N(0, 0.02^2), the last map's divided by sqrt(2 depth), biases 0;
                       "fan_in": all U(+-fan_in^-1/2); "xavier": Xavier-uniform, biases 0
    experts            of "experts", whose inner width is that of "swiglu"; each token passes
                       `experts_per_token` of them
    expert_weights     "normalised": their weights add up to 1; "softmax": they are as the softmax
                       over all experts has them; "sigmoid_normalised", "sigmoid": likewise with
                       sigmoids and a bias that takes part in the choice (models/parts/router.py)
    expert_scale       a factor of the weights
    shared_width       inner width of an expert that all tokens pass; 0: there is none
    shared_gate        whether it is behind a gate
    dense_layers       indices of layers that have "swiglu" in place of experts, of inner width
                       `dense_width`
    balance_weight     of the load-balancing loss
    mlp_scale          what a learned factor per channel of what the MLP adds starts from (CaiT:
                       Touvron et al., ICCV 2021, arXiv 2103.17239); 0: there is none
    mlp_dropout        of the MLP's inner activations and of what it returns, as `dropout`
    lora_rank          rank of what is added to linear maps of the mixers
                       (models/blocks/low_rank.py); 0: nothing is
    lora_alpha         added with the factor lora_alpha / lora_rank
    lora_kind          "lora", "rslora" or "dora"
    lora_targets       the names of the maps
    norm, norm_eps     "rms", "rms_zero" (whose scales are 1 + w), "layer", "layer_plain" (which
                       learns nothing, for what a condition modulates), or of
                       models/blocks/batch_norm.py "batch" (BN), "rep_batch" (RepBN) or
                       "progressive_batch" (PRepBN): the blocks' norms and the last one. "none":
                       mixers have their own.
                       Padding, of which a mask tells, is in no statistics of a batch.
    norm_steps         of "progressive_batch": the steps in which lam falls from 1 to 0
    norm_warmup_steps  of the same: the steps with LN alone, before
    norm_eta           what eta of "rep_batch" and "progressive_batch" starts from
    pre_norm           the norm in front of a half, or behind its sum. There is then no last norm
    branch_norm        the norm behind what a half adds, instead of in front of it
    branch_norm_mixers mixers whose blocks have branch_norm where others have not
    normed_residual    the stream goes on as its norm, to which a half adds
    stream_factors     (name, a, b): a half of a mixer of this name, or of "mlp", makes a x + b f(x)
                       of x, and not x + f(x)
    dropout            of what each half adds to the stream; off under `model.eval()`
    tied_dropout       one draw for all tokens of a sequence
    drop_path          stochastic depth (Huang et al., arXiv 1603.09382): what a half adds is
                       dropped for a whole sequence with a probability that rises linearly from 0
                       in the first block to `drop_path` in the last; off under `model.eval()`
    condition_width    size of the condition; 0: there is none

    Raises ValueError for a value that is not possible."""

    mlp: str = "swiglu"
    mlp_ratio: Factor = 4.0
    mlp_width: Count = 0
    mlp_bias: bool = False
    mlp_init: str = "normal"
    mlp_scale: Weight = 0.0
    mlp_dropout: Probability = 0.0
    experts: Count = 0
    experts_per_token: Count = 0
    expert_weights: str = "normalised"
    expert_scale: Factor = 1.0
    shared_width: Count = 0
    shared_gate: bool = True
    dense_layers: tuple[Count, ...] = ()
    dense_width: Count = 0
    balance_weight: Weight = 0.01
    lora_rank: Count = 0
    lora_alpha: Factor = 8.0
    lora_kind: str = "lora"
    lora_targets: tuple[str, ...] = ("query", "key", "value")
    norm: str = "rms"
    norm_eps: Epsilon = 1e-5
    norm_steps: Count = 60_000
    norm_warmup_steps: Count = 0
    norm_eta: Weight = 1.0
    pre_norm: bool = True
    branch_norm: bool = False
    branch_norm_mixers: tuple[str, ...] = ()
    normed_residual: bool = False
    stream_factors: tuple[tuple[str, Factor, Factor], ...] = ()
    dropout: Probability = 0.0
    tied_dropout: bool = False
    drop_path: Probability = 0.0
    condition_width: Count = 0

    def __post_init__(self):
        check_choice("mlp", self.mlp, (*MLPS, "experts", "none"))
        check_choice("expert_weights", self.expert_weights, EXPERT_WEIGHTS)
        check_choice("lora_kind", self.lora_kind, LORA_KINDS)
        check_choice("mlp_init", self.mlp_init, INITS)
        check_choice("norm", self.norm, NORMS)
        for field in fields(self):
            check_value(field.name, field.type, getattr(self, field.name))
        if self.mlp_bias and self.mlp != "swiglu":
            raise ValueError(f"mlp_bias is for mlp='swiglu'; got mlp={self.mlp!r}")
        self._check_experts()
        if self.condition_width and not self.pre_norm:
            raise ValueError("pre_norm must be True with a condition, which modulates the norm")
        if self.branch_norm and (self.condition_width or not self.pre_norm):
            raise ValueError("branch_norm must be False with a condition or with pre_norm=False")
        if self.normed_residual and (self.branch_norm or self.condition_width or not self.pre_norm):
            raise ValueError(
                "normed_residual must be False with a condition, branch_norm or pre_norm=False"
            )

    def _check_experts(self) -> None:
        has = self.mlp == "experts"
        for name in ("experts", "experts_per_token", "shared_width", "dense_layers"):
            if getattr(self, name) and not has:
                raise ValueError(f"{name} is for mlp='experts'; got mlp={self.mlp!r}")
        if has and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token must be in 1..experts={self.experts}; got"
                f" {self.experts_per_token}"
            )
        if has and (self.mlp_init != "normal" or self.mlp_dropout):
            raise ValueError("mlp='experts' has mlp_init='normal' and mlp_dropout=0")
        if bool(self.dense_layers) != bool(self.dense_width):
            raise ValueError(
                "dense_layers and dense_width must be given both or neither; got"
                f" {self.dense_layers} and {self.dense_width}"
            )

    def of_layer(self, layer: int, mixer: str) -> "BlockOptions":
        """The options of a layer by itself: none that names layers or mixers is left, but its
        `stream_factors`."""
        dense: dict[str, Any] = {}
        if layer in self.dense_layers:
            dense = {"mlp": "swiglu", "mlp_width": self.dense_width}
            dense |= {"experts": 0, "experts_per_token": 0, "shared_width": 0}
        return replace(
            self,
            dense_layers=(),
            dense_width=0,
            branch_norm=self.branch_norm or mixer in self.branch_norm_mixers,
            branch_norm_mixers=(),
            stream_factors=tuple(
                ("mlp" if name == "mlp" else "mixer", a, b)
                for name, a, b in self.stream_factors
                if name in (mixer, "mlp")
            ),
            **dense,
        )

    def factors(self, half: str) -> tuple[float, float]:
        """a and b of the half "mixer" or "mlp" of a layer's own options."""
        return next(((a, b) for name, a, b in self.stream_factors if name == half), (1.0, 1.0))

    def make_norm(self, width: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> Any:
        """A new norm of the stream: x_BTD -> float32."""
        common: dict[str, Any] = {"eps": self.norm_eps, "axis": "embed", "param_dtype": param_dtype}
        if self.norm == "none":
            return Identity()
        if self.norm == "rms":
            return rms_norm(width, rngs=rngs, **common)
        if self.norm == "rms_zero":
            return ZeroCentredRMSNorm(width, rngs=rngs, **common)
        if self.norm == "layer":
            return layer_norm(width, rngs=rngs, **common)
        if self.norm == "layer_plain":
            return PlainLayerNorm(self.norm_eps)
        if self.norm == "batch":
            return BatchNorm(width, **common)
        if self.norm == "rep_batch":
            return RepBatchNorm(width, eta=self.norm_eta, **common)
        return ProgressiveBatchNorm(
            width,
            eta=self.norm_eta,
            steps=self.norm_steps,
            warmup_steps=self.norm_warmup_steps,
            rngs=rngs,
            **common,
        )


class Context(NamedTuple):
    """What every block of one call is given beside the stream; None: there is none.

    positions [B, T] and segment_ids [B, T] int; condition [B, C] float; grid: the static extents of
    the grid whose places the tokens are, in row-major order: (height, width) for an image; mask
    [B, T] bool: the tokens that there are, the others being padding; separate_ids [B, T] int:
    segment_ids in which padding is a segment of its own, for mixers that take no mask; keeps: what
    is kept of a mixer beside its state, as `Kept`: "nothing", its "outputs", or "attention", what
    its output map reads, of mixers with a method `attended`."""

    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    condition: jax.Array | None = None
    grid: tuple[int, ...] | None = None
    mask: jax.Array | None = None
    separate_ids: jax.Array | None = None
    keeps: str = "nothing"


class Kept(NamedTuple):
    """What stands in the place of a mixer's state where something of it is kept."""

    state: Any
    output: jax.Array


class DropPath(nnx.Module):
    """y, or 0 for a whole sequence with probability `rate`; y / (1 - rate) keeps the mean."""

    def __init__(self, rate: jax.Array | float, *, rngs: nnx.Rngs):
        self.rate = LayerConstant(jnp.asarray(rate, jnp.float32))
        self.rngs = rngs.dropout.fork()
        self.deterministic = False

    def __call__(self, y_BTD: jax.Array) -> jax.Array:
        if self.deterministic:
            return y_BTD
        share_kept = 1.0 - self.rate[...]
        kept_B11 = jax.random.bernoulli(self.rngs(), share_kept, (y_BTD.shape[0], 1, 1))
        return jnp.where(kept_B11, y_BTD / share_kept, 0.0)

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls."""
        if deterministic is not None:
            self.deterministic = deterministic


def _mlp(width: int, options: BlockOptions, common: Mapping[str, Any]) -> Any:
    if options.mlp == "experts":
        return Experts(
            width,
            experts=options.experts,
            experts_per_token=options.experts_per_token,
            weights=options.expert_weights,
            scale=options.expert_scale,
            inner=options.mlp_width or inner_width(width, options.mlp_ratio),
            shared=options.shared_width,
            shared_gate=options.shared_gate,
            balance_weight=options.balance_weight,
            **common,
        )
    biases = {"bias": True} if options.mlp_bias else {}
    return MLPS[options.mlp](
        width,
        ratio=options.mlp_ratio,
        inner=options.mlp_width,
        init=options.mlp_init,
        dropout=options.mlp_dropout,
        **biases,
        **common,
    )


class Block(nnx.Module):
    """One residual block: a mixer and, unless mlp is "none", an MLP, each behind its norm.

    `mixer` is a class, `options` are its layer's. A mixer whose equations depend on its place in
    the network names `layer` in its constructor's signature; one that uses `grid`, `shared` or
    `mask` names them in its call's. Of padding, another mixer is told by segments."""

    def __init__(
        self,
        mixer: Any,
        width: int,
        *,
        depth: int,
        layer: jax.Array | int,
        mixer_options: Mapping[str, Any],
        options: BlockOptions,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        norm = functools.partial(options.make_norm, width, rngs=rngs, param_dtype=param_dtype)
        common: dict[str, Any] = {
            "depth": depth,
            "rngs": rngs,
            "param_dtype": param_dtype,
            "compute_dtype": compute_dtype,
        }
        place = {"layer": layer} if "layer" in inspect.signature(mixer.__init__).parameters else {}
        self.compute_dtype, self.pre_norm = compute_dtype, options.pre_norm
        self.branch_norm, self.normed_residual = options.branch_norm, options.normed_residual
        self.mixer_factors, self.mlp_factors = options.factors("mixer"), options.factors("mlp")
        self.mixer_norm = norm()
        self.mixer = mixer(width, **common, **place, **mixer_options)
        if options.lora_rank:
            sizes: Any = {"rank": options.lora_rank, "alpha": options.lora_alpha}
            sizes["kind"] = options.lora_kind
            adapt(self.mixer, options.lora_targets, rngs=rngs, **sizes)
        mlp = options.mlp != "none"
        self.mlp_norm = norm() if mlp else None
        self.mlp = _mlp(width, options, common) if mlp else None
        scale_D = jnp.full(width, options.mlp_scale, param_dtype)
        self.mlp_scale = (
            nnx.Param(scale_D, out_sharding=("embed",)) if mlp and options.mlp_scale else None
        )

        # None unless asked for: they are parameters and random states that a checkpoint would hold.
        tied = (1,) if options.tied_dropout else ()
        self.dropout = (
            nnx.Dropout(options.dropout, broadcast_dims=tied, rngs=rngs)
            if options.dropout
            else None
        )
        rate = options.drop_path * layer / max(depth - 1, 1)
        self.drop_path = DropPath(rate, rngs=rngs) if options.drop_path else None
        modulation = functools.partial(
            projection,
            options.condition_width,
            (2 if mlp else 1) * 3 * width,
            (None, "embed"),
            init=nnx.initializers.zeros_init(),
            bias=True,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=jnp.float32,
        )
        self.modulation = modulation() if options.condition_width else None

    def __call__(
        self, x_BTD: jax.Array, state: Any, shared: Any, context: Context
    ) -> tuple[jax.Array, Any]:
        modulations = self.modulations(context.condition, x_BTD.shape[-1])

        def mix(h_BTD: jax.Array) -> tuple[jax.Array, Any]:
            if context.keeps == "attention":
                return self.mapped_attention(h_BTD, context)
            named = inspect.signature(type(self.mixer).__call__).parameters
            offered = {"grid": context.grid, "shared": shared, "mask": context.mask}
            apart = context.segment_ids if "mask" in named else context.separate_ids
            y_BTD, after = self.mixer(
                h_BTD,
                state,
                positions=context.positions,
                segment_ids=apart,
                **{name: value for name, value in offered.items() if name in named},
            )
            return y_BTD, Kept(after, y_BTD) if context.keeps == "outputs" else after

        def half(
            f: Callable[[jax.Array], tuple[jax.Array, Any]],
            norm: Any,
            x_BTD: jax.Array,
            modulation: Any,
            factors: tuple[float, float],
        ) -> tuple[jax.Array, Any]:
            kept, added = factors

            def total(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
                if added != 1.0:
                    y_BTD = added * y_BTD
                return (x_BTD if kept == 1.0 else kept * x_BTD) + y_BTD

            if self.branch_norm:
                y_BTD, after = f(x_BTD.astype(self.compute_dtype))
                y_BTD = self.added(masked_norm(norm, y_BTD, context.mask), None)
                return total(x_BTD, y_BTD), after
            if self.normed_residual:
                x_BTD = masked_norm(norm, x_BTD, context.mask)
                y_BTD, after = f(x_BTD.astype(self.compute_dtype))
                return total(x_BTD, self.added(y_BTD, None)), after
            if self.pre_norm:
                h_BTD, gate = self.normalised(norm, x_BTD, modulation, context.mask)
                y_BTD, after = f(h_BTD)
                return total(x_BTD, self.added(y_BTD, gate)), after
            y_BTD, after = f(x_BTD.astype(self.compute_dtype))
            y_BTD = total(x_BTD, self.added(y_BTD, None))
            return masked_norm(norm, y_BTD, context.mask), after

        x_BTD, state = half(mix, self.mixer_norm, x_BTD, modulations[0], self.mixer_factors)
        if self.mlp is not None:
            mlp = self.mlp if self.mlp_scale is None else self.scaled_mlp
            x_BTD, _ = half(
                lambda h: (mlp(h), None), self.mlp_norm, x_BTD, modulations[1], self.mlp_factors
            )
        return x_BTD, state

    def mapped_attention(self, h_BTD: jax.Array, context: Context) -> tuple[jax.Array, Kept]:
        """What the mixer returns and what its output map read for it. Raises ValueError for a mixer
        that has no such map."""
        attended = getattr(type(self.mixer), "attended", None)
        if attended is None:
            raise ValueError(
                f"{type(self.mixer).__name__} has no attention to keep: its class needs a method"
                " attended, what its map output reads"
            )
        offered = {"segment_ids": context.separate_ids, "grid": context.grid}
        named = inspect.signature(attended).parameters
        given = {name: value for name, value in offered.items() if name in named}
        o_BTD = attended(self.mixer, h_BTD, **given)
        return self.mixer.output(o_BTD), Kept(None, o_BTD)

    def scaled_mlp(self, h_BTD: jax.Array) -> jax.Array:
        """What the MLP returns times `mlp_scale`."""
        assert self.mlp is not None and self.mlp_scale is not None
        return self.mlp(h_BTD) * self.mlp_scale[...].astype(self.compute_dtype)[None, None]

    def modulations(self, condition_BC: jax.Array | None, width: int) -> list[Any]:
        """[shift, scale, gate], each [B, 1, D], of each half; None for both without a condition."""
        if self.modulation is None:
            return [None, None]
        c_BC = jax.nn.silu(jnp.asarray(condition_BC, jnp.float32))
        modulation_B1M = self.modulation(c_BC)[:, None, :]
        pieces = jnp.split(modulation_B1M, modulation_B1M.shape[-1] // width, axis=-1)
        return [pieces[:3], pieces[3:]]

    def normalised(
        self, norm: Any, x_BTD: jax.Array, modulation: Any, mask_BT: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The input of a half in the compute dtype, and the gate of its output."""
        h_BTD, gate = masked_norm(norm, x_BTD, mask_BT), None
        if modulation is not None:
            shift, scale, gate = modulation
            h_BTD = h_BTD * (1 + scale) + shift
        return h_BTD.astype(self.compute_dtype), gate

    def added(self, y_BTD: jax.Array, gate: jax.Array | None) -> jax.Array:
        """What a half with the output y adds to the stream, float32."""
        y_BTD = y_BTD.astype(jnp.float32)
        if gate is not None:
            y_BTD = gate * y_BTD
        if self.dropout is not None:
            y_BTD = self.dropout(y_BTD)
        return y_BTD if self.drop_path is None else self.drop_path(y_BTD)
