"""CLEAR. Liu, Tan, Wang, "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers
Up", NeurIPS 2025, arXiv 2412.16112: softmax attention of a diffusion Transformer, of which each
token of the image keeps those around it (`experiments/configs/clear.py`).

    q = x W_q + b_q,   k = x W_k + b_k,   v = x W_v + b_v
    o_i = sum_j softmax_j(s q_i k_j) v_j,   y = o W_o + b_o

    of text i:     over all tokens j
    of the image:  over all text and those j of the image with |position j - position i| < radius

    q, k, v    q_BTHK, k_BTHK, v_BTHK    K = width / H
    s          K^-1/2; with trained_tokens = m times (ln n / ln m)^1/2 for n tokens

`grid` says how many tokens the image has; those before them are text. Not causal, so there is no
state; cost per token: O(radius^2 K H), and of text O(T K H). All weights are those of `vit`, in the
same places: a model with softmax attention becomes this one and learns nothing anew.

pool=f adds keys that all of the image sees: the means of k and of v over patches of f x f, weighted
by weight_YX [f, f], which starts at f^-2. It needs the image's rows and columns as multiples of f.
The temperature then has ln(10 n) for ln n.

Departures: positions are those that the network adds to its tokens, not rotations of q and k; text
passes the same maps as the image, as in the paper's single-stream blocks; first values are
Xavier-uniform, as DiT's.

Authors' code: https://github.com/Huage001/CLEAR
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Count, Factor, Size
from models.parts.projections import XAVIER, head_size, merge_heads, projection, split_heads
from ops.neighbourhood_attention.api import neighbourhood_attention


class Clear(nnx.Module):
    """x_BTD -> y_BTD; there is no state."""

    causal = False
    reads_input = ("query", "key", "value")

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 4,
        radius: Factor = 16.0,
        pool: Count = 0,
        trained_tokens: Count = 0,
    ):
        del depth
        if trained_tokens == 1:
            raise ValueError(
                "trained_tokens must be 0 for no change of scale, or at least 2; got 1"
            )
        self.scale = head_size(width, heads) ** -0.5
        self.heads, self.radius, self.pool = heads, radius, pool
        self.trained_tokens = trained_tokens
        dense = functools.partial(
            projection,
            *(width, width),
            init=XAVIER,
            bias=True,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        self.query = dense(("embed", "heads"))
        self.key = dense(("embed", "heads"))
        self.value = dense(("embed", "heads"))
        self.output = dense(("heads", "embed"))
        mean_YX = jnp.full((pool, pool), 1 / max(pool, 1) ** 2, param_dtype)
        self.weight_YX = (
            nnx.Param(mean_YX, group="no_decay", out_sharding=(None, None)) if pool else None
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> tuple[jax.Array, None]:
        return self.output(self.attended(x_BTD, segment_ids=segment_ids, grid=grid)), None

    def attended(
        self,
        x_BTD: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """o_BTD, what W_o reads. Raises ValueError for a grid of more tokens than there are, and
        for segments together with text or with pooled keys, which all would see."""
        length = x_BTD.shape[1]
        grid = (length,) if grid is None else grid
        text = length - math.prod(grid)
        if text < 0:
            raise ValueError(
                f"grid must have at most the {length} tokens that there are; got {grid}"
            )
        if segment_ids is not None and (text or self.pool):
            raise ValueError("segment_ids must be None with text or pooled keys, which all see")
        q_BTHK, k_BTHK, v_BTHK = (
            split_heads(dense(x_BTD), self.heads) for dense in (self.query, self.key, self.value)
        )
        of_text, of_image = (
            [x[:, part] for x in (q_BTHK, k_BTHK, v_BTHK)]
            for part in (slice(0, text), slice(text, None))
        )
        context = of_text[1:]
        if self.pool:
            pooled = [self.pooled(x, grid) for x in of_image[1:]]
            context = [
                jnp.concatenate(parts, axis=1) for parts in zip(context, pooled, strict=True)
            ]
        scale = self.scale * self.temperature(length)
        o_BTHK = neighbourhood_attention(
            *of_image,
            grid=grid,
            radius=self.radius,
            context_k=context[0] if text or self.pool else None,
            context_v=context[1] if text or self.pool else None,
            scale=scale,
            segment_ids=segment_ids,
        )
        if text:
            o_text_BTHK = neighbourhood_attention(
                *of_text,
                grid=(text,),
                radius=text,  # all of it
                context_k=of_image[1],
                context_v=of_image[2],
                scale=scale,
            )
            o_BTHK = jnp.concatenate((o_text_BTHK, o_BTHK), axis=1)
        return merge_heads(o_BTHK)

    def temperature(self, length: int) -> float:
        """What logits are multiplied by for as many tokens."""
        if not self.trained_tokens:
            return 1.0
        seen = 10 * length if self.pool else length
        return (math.log(seen) / math.log(self.trained_tokens)) ** 0.5

    def pooled(self, x_BTHK: jax.Array, grid: tuple[int, ...]) -> jax.Array:
        """Weighted means over patches, [B, T / pool^2, H, K]."""
        assert self.weight_YX is not None
        side = self.pool
        if len(grid) != 2 or grid[0] % side or grid[1] % side:
            raise ValueError(f"grid must be (rows, columns), multiples of pool={side}; got {grid}")
        batch, _, *rest = x_BTHK.shape
        patches = x_BTHK.reshape(batch, grid[0] // side, side, grid[1] // side, side, *rest)
        weight_YX = self.weight_YX[...].astype(jnp.float32)
        means = jnp.einsum(
            "brycxhk,yx->brchk",
            patches.astype(jnp.float32),
            weight_YX,
            precision=jax.lax.Precision.HIGHEST,
        )
        return means.astype(x_BTHK.dtype).reshape(batch, -1, *rest)


def attention_flops(width: int, grid: tuple[int, int], radius: float, text: int = 0) -> int:
    """4 width for each pair of a query and a key that it sees: the two products of attention in one
    layer, without pooled keys."""
    tokens, reach = math.prod(grid), math.ceil(radius) - 1
    offsets = [range(-min(reach, extent - 1), min(reach, extent - 1) + 1) for extent in grid]
    of_image = sum(
        (grid[0] - abs(y)) * (grid[1] - abs(x))
        for y in offsets[0]
        for x in offsets[1]
        if y * y + x * x < radius * radius
    )
    return 4 * width * (text * (text + tokens) + tokens * text + of_image)


Mixer = Clear
