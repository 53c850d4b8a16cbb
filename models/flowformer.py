"""Flowformer. Wu, Wu, Xu, Wang, Long, "Flowformer: Linearizing Transformers with Conservation
Flows", ICML 2022, arXiv 2202.06258.

    I_i = q_i sum_j k_j                       O_j = k_j sum_i q_i              (Eq. 4)
    Ihat_i = q_i sum_j k_j / O_j              Ohat_j = k_j sum_i q_i / I_i     (Eq. 6, 7)
    c_j = S softmax_j(clip(Ohat))             competition of the sources
    A_i = (q_i / I_i) sum_j k_j^T c_j v_j     aggregation
    R_i = sigmoid(Ihat_i L / S) A_i           allocation to the sinks          (Eq. 8)
    y = R W_o + b_o

    q, k    q_BTHK, k_BTHK      phi(x W + b), phi = sigmoid: capacities, positive
    v       v_BTHV              x W_v + b_v, as wide as q and k
    I, Ihat, L                  of the sinks, the queries: what comes in, and their number
    O, Ohat, S                  of the sources, the keys: what goes out, their number; L = S here

With causal=True each sum is over the tokens up to t, t of them (Eq. 9 and the released code):

    I_t = q_t sum_{j<=t} k_j,                 O_t = k_t sum_{i<=t} q_i
    Ihat_t = q_t sum_{j<=t} k_j j / O_j / t,  Ohat_t = k_t sum_{i<=t} q_i i / I_i / t
    c_t = t exp(clip(Ohat_t)) / sum_{j<=t} exp(clip(Ohat_j))
    R_t = sigmoid(Ihat_t) (q_t / I_t) sum_{j<=t} k_j^T c_j v_j

What a source sends out and its c are those of its own time, so that the last token is not that of
causal=False. The first is sigmoid(1) v_1, whatever q and k are.

State: {"flow": FlowState}, per head K x V + 4 K + 1 floats, and a counter; none with causal=False,
where any token reads all of its document. Cost per token: O(H K V).

clip: 1 in the authors' vision code, 5 in their language model, none in their Long Range Arena,
whose phi is relu + 1e-6 (feature_map="relu"). competition=False and allocation=False are the
paper's ablations; without both this is linear attention with a denominator.

As in the authors' code, 1e-6 is added to each component of both factors of I, O, Ihat and Ohat.

Departures: the released code of the Long Range Arena takes the softmax over heads, not over
sources; this one does not. The dropout after W_o is that of the block (`model.dropout`). The paper
adds positions to the embedding; the backbone has none, and attention itself sees no order beyond
what is causal. Biases start at 0, and W_q, W_k, W_v and W_o as in the authors' language model.

Authors' code: https://github.com/thuml/Flowformer
"""

import functools
from typing import Annotated, Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Factor, Range, Size, check_choice
from models.parts.projections import XAVIER_MEDIUM, head_size, merge_heads, projection, split_heads
from ops.causal_flow_attention.api import LARGEST_CLIP, causal_flow_attention, init_flow_state
from ops.flow_attention.api import flow_attention

XAVIER = nnx.initializers.xavier_uniform()
Clip = Annotated[float, Range(0, LARGEST_CLIP, ("low",))]


class FlowAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"flow": FlowState}, float32, and None with causal=False."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        causal: bool = True,
        heads: Size = 4,
        expand: Factor = 1.0,
        feature_map: str = "sigmoid",
        competition: bool = True,
        allocation: bool = True,
        clip: Clip | None = 1.0,
    ):
        check_choice("feature_map", feature_map, ("sigmoid", "relu"))
        if causal and clip is None:
            raise ValueError(
                f"clip must be a number in (0, {LARGEST_CLIP:g}] with causal=True, whose sums of"
                " exponentials are kept for later tokens; got None"
            )
        dense = functools.partial(
            projection, bias=True, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.causal, self.heads, self.compute_dtype = causal, heads, compute_dtype
        self.head_size = head_size(width, heads, expand)
        self.feature_map, self.clip = feature_map, clip
        self.competition, self.allocation = competition, allocation
        inner = heads * self.head_size

        self.query = dense(width, inner, ("embed", "heads"), init=XAVIER_MEDIUM)
        self.key = dense(width, inner, ("embed", "heads"), init=XAVIER_MEDIUM)
        self.value = dense(width, inner, ("embed", "heads"), init=XAVIER_MEDIUM)
        self.output = dense(inner, width, ("heads", "embed"), init=XAVIER)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        reverse: bool = False,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        q_BTHK, k_BTHK, v_BTHV = (
            split_heads(dense(x_BTD), self.heads) for dense in (self.query, self.key, self.value)
        )
        options: dict[str, Any] = {
            "feature_map": self.feature_map,
            "competition": self.competition,
            "allocation": self.allocation,
            "clip": self.clip,
            "segment_ids": segment_ids,
        }
        if self.causal:
            R_BTHV, flow = causal_flow_attention(
                *(q_BTHK, k_BTHK, v_BTHV),
                initial_state=state["flow"] if state else None,
                reverse=reverse,
                **options,
            )
            after = {"flow": flow}
        else:  # `reverse` changes nothing: the tokens have no order
            R_BTHV, after = flow_attention(q_BTHK, k_BTHK, v_BTHV, **options), None
        return self.output(merge_heads(R_BTHV.astype(self.compute_dtype))), after

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros. ValueError with causal=False."""
        if not self.causal:
            raise ValueError("flowformer with causal=False has no state: a token reads later ones")
        return {"flow": init_flow_state(batch, self.heads, self.head_size, self.head_size)}


Mixer = FlowAttention
