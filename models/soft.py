"""SOFT. Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", NeurIPS 2021, arXiv
2110.11945; normalised: Lu et al., "Softmax-free Linear Transformers", IJCV 2024, arXiv 2207.03341.

    S(x, y)_ij = exp(-|x_i - y_j|^2 / (2 sqrt(K)))          q = x W_q + b_q serves as the keys too
    A = S(l, l),   P = S(l, q)                              l: m landmarks, of windows of q
    o = P^T A^+ (P v)                                       with normalise  P^T D A^+ D (P v),
                                                            D = diag(A 1)^(-1/2)
    y = (o + depthwise convolution of v) W_o + b_o

    q, v       q_BTHK, v_BTHK    K = size_per_head
    l          BmHK              sampling="average": means of window x window tokens;
                                 "convolution": gelu(LN(a convolution of that size and stride))
    filters    weight_YXH        one per head, for all of its channels

A^+ comes from `iterations` of Newton's method, A + jitter I in the place of A as in the authors'
code; what is left of |A Y A - A| / |A| is reported as newton_residual, the mean over a batch. Not
causal, so there is no state; cost per token: O(H m K), and O(H iterations m^3) for all.

Segments stay apart: a document has landmarks of its own. Without a grid the tokens are a line and a
window is window^2 of them, the last perhaps fewer.

The authors' layer has its norms behind the sums: `model.pre_norm=False`; and dropout where one
expects stochastic depth. In the last stage of their pyramids is softmax attention (`vit`).

Departures: the MLP's GELU is exact, theirs the approximation by tanh; with `normalise` the
iteration, its start and its gradient are those of the plain form.

Authors' code: https://github.com/fudan-zvg/SOFT
"""

import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.grid_convolution import grid_convolution
from models.parts.norms import layer_norm
from models.parts.options import Range, Size, Weight, check_choice
from models.parts.projections import FAN_IN_UNIFORM, merge_heads, projection, split_heads
from models.parts.variables import report
from ops.framework import segments
from ops.gaussian_attention.api import gaussian_attention

TRUNCATED = nnx.initializers.truncated_normal(0.02)
KernelSize = Annotated[int, Range(0, 31)]
Iterations = Annotated[int, Range(1, 1000)]


class SoftmaxFreeAttention(nnx.Module):
    """x_BTD -> y_BTD; there is no state."""

    causal = False
    reads_input = ("query", "value")

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        size_per_head: Size = 32,
        window: Size = 8,
        sampling: str = "average",
        normalise: bool = False,
        iterations: Iterations = 20,
        jitter: Weight = 0.01,
        kernel_size: KernelSize = 0,
    ):
        check_choice("sampling", sampling, ("average", "convolution"))
        if width % size_per_head:
            raise ValueError(f"size_per_head must divide the width {width}; got {size_per_head}")
        if kernel_size and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, or 0 for none; got {kernel_size}")
        dense = functools.partial(
            projection,
            *(width, width),
            init=TRUNCATED,
            bias=True,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        self.heads, self.window, self.compute_dtype = width // size_per_head, window, compute_dtype
        self.options: dict[str, Any] = {
            "normalise": normalise,
            "iterations": iterations,
            "jitter": jitter,
        }
        self.query = dense(("embed", "heads"))
        self.value = dense(("embed", "heads"))
        self.output = dense(("heads", "embed"))

        def sampler() -> nnx.Param:
            shape = (window, window, size_per_head, size_per_head)
            weight = FAN_IN_UNIFORM(rngs.params(), shape, param_dtype)
            return nnx.Param(weight, out_sharding=(None, None, None, None))

        def filters() -> nnx.Param:
            shape = (kernel_size, kernel_size, 1, self.heads)
            weight = FAN_IN_UNIFORM(rngs.params(), shape, param_dtype)[:, :, 0]
            return nnx.Param(weight, out_sharding=(None, None, "heads"))

        learned = sampling == "convolution"
        self.sampler_YXKL = sampler() if learned else None
        norm = functools.partial(layer_norm, size_per_head, eps=1e-5, rngs=rngs)
        self.sampler_norm = norm(param_dtype=param_dtype) if learned else None
        self.weight_YXH = filters() if kernel_size else None

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> tuple[jax.Array, None]:
        v_BTD = self.value(x_BTD)
        q_BTHK = split_heads(self.query(x_BTD), self.heads).astype(jnp.float32)
        documents: dict[str, Any] = {}
        if grid is not None and segment_ids is None:
            landmarks_BmHK = self.on_a_grid(q_BTHK, grid)
        else:
            if self.sampler_YXKL is not None:
                raise ValueError("sampling='convolution' needs a grid of tokens in one document")
            landmarks_BmHK, documents = self.on_a_line(q_BTHK, segment_ids)
        o_BTHK, residual_BH = gaussian_attention(
            q_BTHK,
            landmarks_BmHK,
            split_heads(v_BTD, self.heads).astype(jnp.float32),
            **documents,
            **self.options,
        )
        report(self, newton_residual=jnp.mean(residual_BH))
        o_BTD = merge_heads(o_BTHK)
        if self.weight_YXH is not None:
            size = v_BTD.shape[-1] // self.heads
            weight_YXD = jnp.repeat(self.weight_YXH[...], size, axis=-1)
            local_BTD = grid_convolution(v_BTD, weight_YXD, grid, segment_ids)
            o_BTD = o_BTD + local_BTD.astype(jnp.float32)
        return self.output(o_BTD.astype(self.compute_dtype)), None

    def on_a_grid(self, q_BTHK: jax.Array, grid: tuple[int, ...]) -> jax.Array:
        """Landmarks [B, m, H, K], one for each window of the grid. Raises ValueError for a grid
        that does not divide."""
        window = self.window
        if len(grid) != 2 or grid[0] % window or grid[1] % window:
            raise ValueError(
                f"window must divide the grid (rows, columns) of tokens; got {window} for {grid}"
            )
        batch, _, heads, size = q_BTHK.shape
        rows, columns = grid[0] // window, grid[1] // window
        q_BrYcXHK = q_BTHK.reshape(batch, rows, window, columns, window, heads, size)
        if self.sampler_YXKL is None or self.sampler_norm is None:
            landmarks = jnp.mean(q_BrYcXHK, axis=(2, 4))
        else:
            weight_YXKL = self.sampler_YXKL[...].astype(jnp.float32)
            landmarks = jnp.einsum("brycxhk,yxkl->brchl", q_BrYcXHK, weight_YXKL)
            landmarks = jax.nn.gelu(self.sampler_norm(landmarks), approximate=False)
        return landmarks.reshape(batch, rows * columns, heads, size)

    def on_a_line(
        self, q_BTHK: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Means over every window^2 tokens of a document, [B, m, H, K], and whose they are.

        There is room for a landmark of each token, as documents may be as short."""
        batch, length, heads, size = q_BTHK.shape
        tokens = self.window**2
        if segment_ids is None:
            missing = -length % tokens
            q = jnp.pad(q_BTHK, ((0, 0), (0, missing), (0, 0), (0, 0)))
            sums_BmHK = q.reshape(batch, -1, tokens, heads, size).sum(axis=2)
            count_m = jnp.minimum(tokens, length - tokens * jnp.arange(sums_BmHK.shape[1]))
            return sums_BmHK / count_m[None, :, None, None], {}
        number_BT = segments.numbers(segment_ids)
        place_T = jnp.arange(length)
        begins_BT = jnp.diff(number_BT, axis=1, prepend=-1) != 0
        begin_BT = jax.lax.cummax(jnp.where(begins_BT, place_T[None], 0), axis=1)
        opens_BT = (place_T[None] - begin_BT) % tokens == 0
        slot_BT = jnp.cumsum(opens_BT, axis=1) - 1

        def summed(values_BT: jax.Array) -> jax.Array:
            row_B1 = jnp.arange(batch)[:, None]
            return jnp.zeros_like(values_BT).at[row_B1, slot_BT].add(values_BT)

        count_Bm = summed(jnp.ones((batch, length), jnp.float32))
        landmarks_BmHK = summed(q_BTHK) / jnp.maximum(count_Bm, 1.0)[:, :, None, None]
        number_Bm = summed(number_BT * opens_BT)
        return landmarks_BmHK, {
            "documents": number_BT,
            "landmark_documents": jnp.where(count_Bm > 0, number_Bm, -1),
        }


Mixer = SoftmaxFreeAttention
