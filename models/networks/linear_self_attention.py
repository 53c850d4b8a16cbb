"""Linear self-attention on in-context regression prompts. Zhang, Frei, Bartlett, "Trained
Transformers Learn Linear Models In-Context", JMLR 2024, arXiv 2306.09927; the gradient-descent
constructions are those of von Oswald et al., ICML 2023, arXiv 2212.07677, and Ahn, Cheng,
Daneshmand, Sra, NeurIPS 2023, arXiv 2306.00297.

    f(E) = E + W_PV E (E^T W_KQ E) / N,     prediction = f(E)[d+1, N+1]

with E in R^{(d+1) x (N+1)}: columns (x_i; y_i) for the N examples and (x_query; 0) for the query.
No softmax, no norm, no MLP.

    E           examples_BNE        transposed: one row per token, [B, N+1, d+1]
    W_PV        w_pv_LEE            rows are outputs: values are W_PV e_m
    W_KQ        w_kq_LEE            token m answers query t with the score e_m^T W_KQ e_t
    L           depth               layers, each with weights of its own

It is linear attention with keys e_m, values W_PV e_m, queries W_KQ e_t and the scale 1/N. Causality
changes nothing at the last token, which sees all, so the prediction is the last output of the
causal recurrence; a layer before the last lets every token read the recurrence's *final* state,
which is the unmasked sum.

With mask_query=True the query token is masked out of the keys and the prediction is *minus* its
label entry: the form in which L layers perform L steps of gradient descent (`set_gradient_steps`).
The examples' label entries then hold the residuals y_i - w x_i and the query's entry -w x_query.

State: (d+1)^2 floats per layer. Cost: O(N d^2) per prompt and layer.

Departures: none known. The pair (W_PV, W_KQ) is identified up to a scale that moves between its
members.

Authors' code: none was consulted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from models.parts.options import Depth, Factor, Size, check_choice, check_options
from ops.gated_linear_attention.api import gated_linear_attention


class LinearSelfAttention(nnx.Module):
    """Prompts of any length to predictions of the query's label."""

    causal = False

    def __init__(
        self,
        *,
        dimension: Size,
        depth: Depth = 1,
        mask_query: bool = False,
        init: str = "gaussian",
        init_scale: Factor = 0.1,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        check_choice("init", init, ("gaussian", "guaranteed"))
        if dimension < 1 or depth < 1:
            raise ValueError(
                f"dimension and depth must be at least 1; got dimension={dimension}, depth={depth}"
            )
        self.dimension, self.depth, self.mask_query, self.compute_dtype = (
            dimension,
            depth,
            mask_query,
            compute_dtype,
        )
        size = dimension + 1
        if init == "gaussian":
            w_pv_LEE = init_scale * jax.random.normal(
                rngs.params(), (depth, size, size), param_dtype
            )
            w_kq_LEE = init_scale * jax.random.normal(
                rngs.params(), (depth, size, size), param_dtype
            )
        else:
            # Theorem 4.1's assumption: sigma [[0, 0], [0, 1]] and sigma [[M M^T, 0], [0, 0]] with
            # ||M M^T||_F = 1. Gradient flow converges for sigma^2 < 2 / (sqrt(d) ||Gamma||_op),
            # Gamma = (1 + 1/N) Lambda + tr(Lambda) I / N.
            m_LDD = jax.random.normal(rngs.params(), (depth, dimension, dimension), param_dtype)
            square_LDD = jnp.einsum("lij,lkj->lik", m_LDD, m_LDD)
            square_LDD = square_LDD / jnp.linalg.norm(square_LDD, axis=(1, 2), keepdims=True)
            w_kq_LEE = init_scale * jnp.pad(square_LDD, ((0, 0), (0, 1), (0, 1)))
            w_pv_LEE = jnp.zeros((depth, size, size), param_dtype).at[:, -1, -1].set(init_scale)
        self.w_pv_LEE = nnx.Param(w_pv_LEE, out_sharding=("layers", None, None))
        self.w_kq_LEE = nnx.Param(w_kq_LEE, out_sharding=("layers", None, None))

    def __call__(self, examples_BNE: jax.Array) -> jax.Array:
        """Predictions [B] float32 for prompts [B, N+1, d+1], the query last, its label entry
        zero."""
        if (
            examples_BNE.ndim != 3
            or examples_BNE.shape[1] < 2
            or examples_BNE.shape[2] != self.dimension + 1
        ):
            raise ValueError(
                f"examples must be [B, N+1, {self.dimension + 1}], N >= 1, for"
                f" dimension={self.dimension}; got {examples_BNE.shape}"
            )
        e_BNE = jnp.asarray(examples_BNE, jnp.float32)
        for layer in range(self.depth):
            update_BNE, read_BNE = self._attend(e_BNE, layer)
            # Only the query's entry is read after the last layer, and there the causal output is
            # the whole sum.
            e_BNE = e_BNE + (update_BNE if layer == self.depth - 1 else read_BNE)
        entry_B = e_BNE[:, -1, -1]
        return -entry_B if self.mask_query else entry_B

    def _attend(self, e_BNE: jax.Array, layer: int) -> tuple[jax.Array, jax.Array]:
        """The causal output, and every token's read of the full sum; equal at the last token."""
        examples = e_BNE.shape[1] - 1
        w_pv_EE = self.w_pv_LEE[...][layer].astype(self.compute_dtype)
        w_kq_EE = self.w_kq_LEE[...][layer].astype(self.compute_dtype)
        key_BNE = e_BNE.astype(self.compute_dtype)
        query_BNE = jnp.einsum("ij,bnj->bni", w_kq_EE, key_BNE)
        value_BNE = jnp.einsum("ij,bnj->bni", w_pv_EE, key_BNE)
        if self.mask_query:
            key_BNE = key_BNE.at[:, -1].set(0)  # a zero key writes nothing
        o_BNHE, state_BHEE = gated_linear_attention(
            query_BNE[:, :, None], key_BNE[:, :, None], value_BNE[:, :, None], scale=1 / examples
        )
        read_BNE = (
            jnp.einsum("bnk,bkv->bnv", query_BNE.astype(jnp.float32), state_BHEE[:, 0]) / examples
        )
        return o_BNHE[:, :, 0].astype(jnp.float32), read_BNE

    def set_gradient_step(self, preconditioner_DD: ArrayLike) -> None:
        """Sets one layer to one step: prediction = x_query^T P h, h = sum_i y_i x_i / N, P =
        `preconditioner_DD` [d, d].

        That is the prediction of w = P h, a step of preconditioned gradient descent from 0 on sum_i
        (y_i - w x_i)^2 / 2N."""
        if self.depth != 1 or self.mask_query:
            raise ValueError(
                "set_gradient_step needs depth=1 and mask_query=False (set_gradient_steps serves"
                f" the masked form); got depth={self.depth}, mask_query={self.mask_query}"
            )
        self._set([preconditioner_DD], label_weight=1.0)

    def set_gradient_steps(self, preconditioners_LDD: Sequence[ArrayLike]) -> None:
        """Sets layer l to the step w <- w + P_l sum_i x_i (y_i - w x_i) / N, from w = 0; prediction
        = w x_query."""
        if not self.mask_query or len(preconditioners_LDD) != self.depth:
            raise ValueError(
                "set_gradient_steps needs mask_query=True and one matrix per layer;"
                f" got mask_query={self.mask_query}, {len(preconditioners_LDD)}"
                f" matrices for depth={self.depth}"
            )
        self._set(preconditioners_LDD, label_weight=-1.0)

    def _set(self, preconditioners_LDD: Sequence[ArrayLike], label_weight: float) -> None:
        """W_PV = [[0, 0], [0, label_weight]] and W_KQ = [[P^T, 0], [0, 0]] in every layer."""
        p_LDD = jnp.stack([jnp.asarray(p_DD, self.w_kq_LEE.dtype) for p_DD in preconditioners_LDD])
        if p_LDD.shape != (self.depth, self.dimension, self.dimension):
            raise ValueError(
                f"a preconditioner must be [{self.dimension}, {self.dimension}]; got"
                f" {p_LDD.shape[1:]}"
            )
        # x_i^T W_KQ x_query summed with weights y_i is h^T W_KQ x_query, so P stands transposed.
        self.w_kq_LEE[...] = jnp.pad(jnp.swapaxes(p_LDD, 1, 2), ((0, 0), (0, 1), (0, 1)))
        self.w_pv_LEE[...] = jnp.zeros_like(self.w_pv_LEE[...]).at[:, -1, -1].set(label_weight)


def build(
    model_config: Mapping[str, Any],
    *,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
) -> LinearSelfAttention:
    """The model of a config's `model` section (without its name); it reads vectors, no tokens.

    dimension     d, the number of regressors
    depth         layers
    mask_query    mask the query token out of the keys, and predict minus its label entry
    init          "gaussian": N(0, init_scale^2); "guaranteed": Theorem 4.1's, sigma = init_scale

    Raises ValueError for unknown or missing options."""
    supplied = ("rngs", "param_dtype", "compute_dtype")  # here depth is an option
    check_options(
        "model linear_self_attention", "model", model_config, LinearSelfAttention, supplied=supplied
    )
    dtypes: dict[str, Any] = {
        "param_dtype": jnp.dtype(param_dtype),
        "compute_dtype": jnp.dtype(compute_dtype),
    }
    return LinearSelfAttention(rngs=rngs, **dtypes, **model_config)
