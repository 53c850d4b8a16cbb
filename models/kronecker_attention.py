"""Kronecker attention. Alman and Song, "How to Capture Higher-order Correlations? Generalizing
Matrix Softmax Attention to Kronecker Computation", ICLR 2024, arXiv 2310.04064.

    o_i = sum_jk p(A_ijk) (v1_j * v2_k) / sum_jk p(A_ijk),    A_ijk = sum_l q_il k1_jl k2_kl / K
    y_i = o_i W_o

Attention of a token to pairs of tokens, which sees what three tokens have in common and no two of
them. p is the exponential with form="exact", in the time of T^3, and with form="polynomial" its
Taylor polynomial, for which two running sums are enough:

    S1_t = S1_{t-1} + u(k1_t)^T (v1_t, 1),    S2_t likewise of k2 and v2
    (n_t, m_t) = w u(q_t) (S1_t * S2_t),    o_t = n_t / m_t,    u(x) = (prod_l x_l^a_l)_a,
                                                               |a| <= degree

    q, k1, k2   q_BTHK, ...         tanh(x W) * bound, K = key_size
    v1, v2      v1_BTHV, ...        x W, heads * V = d
    S1, S2      "memory" [B,H,2,R,V+1]  float32, R = C(K + degree, degree) features

The sums over j and k are over i and the tokens before it, or with causal=False over all.

The polynomial is near the exponential where entries are bounded: the theory has a time of n^(1 +
o(1)) for entries below (log n)^(1/3) and K = O(log n), and none better than cubic above. An even
degree keeps the denominator positive whatever they are.

State: 2 H R (V + 1) floats, R = 15 of K = 4 and degree 2; none with form="exact", which is not
causal. Cost per token: O(H R V).

Departures: the paper has no model. The bound by tanh is ours; initialisation: N(0, 0.02^2), of W_q
and the keys N(0, 1 / d), as products of three small numbers would be none; W_o divided by sqrt(2
depth).

Authors' code: none.
"""

import functools
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.bidirectional import no_state
from models.parts.options import Factor, Range, Size, check_choice
from models.parts.projections import (
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from ops.kronecker_attention.api import kronecker_attention
from ops.polynomial_kronecker_attention.api import polynomial_kronecker_attention

# Features are C(key_size + degree, degree).
Degree = Annotated[int, Range(1, 12)]
KeySize = Annotated[int, Range(1, 64)]


class KroneckerAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B,H,2,R,V+1]}, float32, None with causal=False."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 4,
        key_size: KeySize = 4,
        form: str = "polynomial",
        degree: Degree = 2,
        bound: Factor = 1.0,
        causal: bool = True,
    ):
        check_choice("form", form, ("polynomial", "exact"))
        if form == "exact" and causal:
            raise ValueError(
                'form="exact" needs causal=False: it has no state of a fixed size to decode from'
            )
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.key_size, self.value_size = heads, key_size, head_size(width, heads)
        self.exact, self.degree, self.bound = form == "exact", degree, bound
        self.causal, self.compute_dtype = causal, compute_dtype

        bounded = functools.partial(
            dense,
            width,
            heads * key_size,
            ("embed", "heads"),
            init=nnx.initializers.normal(1 / math.sqrt(width)),
        )
        self.query, self.key_1, self.key_2 = bounded(), bounded(), bounded()
        self.value_1, self.value_2 = (dense(width, width, ("embed", "heads")) for _ in range(2))
        self.output = dense(width, width, ("heads", "embed"), init=residual_normal(depth))

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        reverse: bool = False,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        # float32: a sum of values must not be rounded before it is divided.
        bounded = (
            self.bound * jnp.tanh(split_heads(dense(x_BTD), self.heads).astype(jnp.float32))
            for dense in (self.query, self.key_1, self.key_2)
        )
        values = (
            split_heads(dense(x_BTD), self.heads).astype(jnp.float32)
            for dense in (self.value_1, self.value_2)
        )
        if self.exact:
            o_BTHV = kronecker_attention(*bounded, *values, segment_ids=segment_ids)
            after = None
        else:
            o_BTHV, memory = polynomial_kronecker_attention(
                *bounded,
                *values,
                degree=self.degree,
                causal=self.causal,
                initial_state=(state or {}).get("memory"),
                segment_ids=segment_ids,
                reverse=reverse and self.causal,
            )
            after = {"memory": memory} if self.causal else None
        return self.output(merge_heads(o_BTHV).astype(self.compute_dtype)), after

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros. ValueError with causal=False."""
        if not self.causal:
            raise no_state("kronecker_attention")
        features = math.comb(self.key_size + self.degree, self.degree)
        sizes = (batch, self.heads, 2, features, self.value_size + 1)
        return {"memory": jnp.zeros(sizes, jnp.float32)}


Mixer = KroneckerAttention
