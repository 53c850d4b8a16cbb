"""MoM, mixture of memories. Du, Sun, Lan, Hu, Cheng, "MoM: Linear Sequence Modeling with
Mixture-of-Memories", ICLR 2026, arXiv 2502.13685.

    p_t = softmax(x_t W_r),   I_t = the k largest,   w_t^m = p_t^m / sum_{j in I_t} p_t^j   (router)
    S_t^m = rule(S_{t-1}^m; k_t^m, v_t^m, gates_t^m)   for m in I_t                       (memories)
    S_t^m = S_{t-1}^m                                  otherwise
    o_t = sum_{m in I_t} w_t^m q_t^m S_t^m + q_t^s S_t^s
    y_t = (norm(o_t) * silu(x_t W_g)) W_o

with s a shared memory that every token writes to and reads, with weight 1. Rules: "gated_delta_net"
and "gla", as in models/gated_delta_net.py and models/gla.py; a memory that a token is not routed to
does not even decay.

    k^m, v^m, gates^m   kernel_EDX              projections of each memory's own; E = M + shared
    q^m                 x W_q                   one projection. q, k and v are convolved over the
                                                tokens of their memory, and activated by SiLU: 4
                                                taps for "gated_delta_net", which has the SiLU
                                                without a convolution, too; none of both for "gla"
    I, w                memory_BTJ, weight_BTJ  J = k + shared; models/parts/router.py has the
                                                load-balancing loss
    S                   "memory" [B,E,H,K,V]    float32

State: E H K V floats, and E (W - 1) (2 H K + H V) for the convolutions. With execution="gathered"
a token costs what its J copies do: sorted by memory they are one stream whose segments keep a state
each (models/mom/dispatch.py), and no other memory's projections of it are computed where they cost
something (models/mom/projections.py). execution="padded" projects all tokens for all memories and
runs a whole sequence per memory: E in the place of J. Both are exact and drop nothing. A single
token is padded always.

Of the products of k, v, gates and recurrence, forward and backward, gathered has 3.2 times those
of a layer with one memory at T = 2048 and 3.1 at 8192, padded 5.0 (the compiled programs for a CPU,
E = 5, J = 3, width 512, "gated_delta_net"). In ms of processor time on two cores with others at
work, jax 0.10.2, forward and backward, float32, the least of four:

    B x T, width        one memory   gathered   padded
    1 x 2048, 256           126         317       391
    1 x 8192, 256           548        1211      1648
    16 x 64, 128             18         116        91

so that short sequences, whose memories have less than a chunk each, are better padded.

Departures: convolutions respect the boundaries of memories, sequences and documents (the released
training code runs one over the concatenated stream, so that three tokens of a memory see
another's); the load-balancing loss is averaged over layers, not pooled. With k = 1 every weight is
1, and only the load-balancing loss trains the router. Initialisation: Xavier-uniform with gain
2^-2.5.

Authors' code: https://github.com/OpenSparseLLMs/MoM"""

import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.mom.dispatch import Dispatch, dispatch
from models.mom.projections import AllMemories, MemoryProjection, RoutedMemories
from models.mom.rules import RULES
from models.parts.norms import rms_norm
from models.parts.options import Epsilon, Factor, Range, Size, Weight, check_choice
from models.parts.projections import XAVIER_SMALL, head_size, merge_heads, projection, split_heads
from models.parts.router import Router
from models.parts.short_convolution import ConvWidth, ShortConvolution
from ops.framework.sharding import parts_as_batch

# A decay of exp(-1e4) is 0 in float32, and the ops multiply decays: exactly nothing passes from
# document to document.
FORGET_LOG = -1e4


class MixtureOfMemories(nnx.Module):
    """x_BTD -> y_BTD; the state is {"conv_q", "conv_k", "conv_v", "memory"}, all float32.

    "conv_." [B,E,W-1,X] are the last inputs of each memory's convolutions, "memory" is
    [B,E,H,K,V]."""

    causal = True

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        memories: Annotated[int, Range(1, 1024)] = 4,
        top_k: Size = 2,
        shared_memory: bool = True,
        rule: str = "gated_delta_net",
        execution: str = "gathered",
        load_balancing: str = "global_batch",
        micro_batch_size: Size = 1,
        balance_weight: Weight = 0.01,
        heads: Size = 4,
        expand_k: Factor = 1.0,
        expand_v: Factor = 1.0,
        conv_width: ConvWidth | None = None,
        dt_min: Factor = 1e-3,
        dt_max: Factor = 1e-1,
        gate_rank: Size = 16,
        gate_temperature: Factor = 16.0,
        norm_eps: Epsilon = 1e-5,
    ):
        check_choice("rule", rule, tuple(RULES))
        check_choice("execution", execution, ("padded", "gathered"))
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        dense = functools.partial(projection, init=XAVIER_SMALL, rngs=rngs, **dtypes)
        self.heads, self.compute_dtype = heads, compute_dtype
        self.key_size = head_size(width, heads, expand_k)
        self.value_size = head_size(width, heads, expand_v)
        key_width, value_width = heads * self.key_size, heads * self.value_size
        self.shared_memory, self.one_stream = shared_memory, execution == "gathered"
        self.memories = memories + shared_memory

        self.router = Router(
            width,
            choices=memories,
            top_k=top_k,
            load_balancing=load_balancing,
            micro_batch_size=micro_batch_size,
            balance_weight=balance_weight,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        own = functools.partial(MemoryProjection, self.memories, width, rngs=rngs, **dtypes)
        self.query = dense(width, key_width, ("embed", "heads"))
        self.key, self.value = own(key_width), own(value_width)
        gates = {
            "dt_min": dt_min,
            "dt_max": dt_max,
            "gate_rank": gate_rank,
            "gate_temperature": gate_temperature,
        }
        self.rule = RULES[rule](
            width, self.memories, heads, self.key_size, options=gates, rngs=rngs, **dtypes
        )
        # None: as published.
        conv_width = self.rule.conv_width if conv_width is None else conv_width
        self.conv_q = ShortConvolution(key_width, conv_width, rngs=rngs, **dtypes)
        self.conv_k = ShortConvolution(key_width, conv_width, rngs=rngs, **dtypes)
        self.conv_v = ShortConvolution(value_width, conv_width, rngs=rngs, **dtypes)
        self.norm = rms_norm(self.value_size, eps=norm_eps, rngs=rngs, param_dtype=param_dtype)
        self.output_gate = dense(width, value_width, ("embed", "heads"))
        self.output = dense(value_width, width, ("heads", "embed"))

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        state = self.init_state(len(x_BTD)) if state is None else state
        memory_BTJ, weight_BTJ = self.route(x_BTD)
        # One token is in order already, and reads every matrix once whatever copies it has.
        one_stream = self.one_stream and x_BTD.shape[1] > 1
        plan = dispatch(
            memory_BTJ,
            segment_ids,
            memories=self.memories,
            history=max(self.conv_q.width - 1, 0),
            one_stream=one_stream,
        )
        projected = RoutedMemories(memory_BTJ, self.shared_memory) if one_stream else AllMemories()
        key, value = projected(x_BTD, self.key, self.value)
        q_BT1X = self.query(x_BTD)[:, :, None]
        q, conv_q = self.convolved(self.conv_q, q_BT1X, state["conv_q"], plan)
        k, conv_k = self.convolved(self.conv_k, key, state["conv_k"], plan)
        v, conv_v = self.convolved(self.conv_v, value, state["conv_v"], plan)
        gates = jax.tree.map(plan.sorted, self.rule.gates(projected, x_BTD))
        o, memory = self.recurrence(q, k, v, gates, state["memory"], plan)
        o_BTJX = plan.copies(merge_heads(o)).astype(jnp.float32)
        o_BTX = jnp.einsum("btj,btjx->btx", weight_BTJ, o_BTJX)  # sum_m w^m q^m S^m
        o_BTX = merge_heads(self.norm(split_heads(o_BTX, self.heads)))
        gate_BTX = jax.nn.silu(self.output_gate(x_BTD))
        return self.output(o_BTX.astype(self.compute_dtype) * gate_BTX), {
            "conv_q": conv_q,
            "conv_k": conv_k,
            "conv_v": conv_v,
            "memory": memory,
        }

    def convolved(
        self,
        convolution: ShortConvolution,
        x_BTSX: jax.Array,
        tail_BEWX: jax.Array | None,
        plan: Dispatch,
    ) -> tuple[jax.Array, jax.Array | None]:
        """silu(conv(x)) over the tokens of each memory, and the inputs that it remembers next; the
        SiLU beside a convolution, or where the rule has it always.

        The first as sorted entries, split into heads; the second None without a convolution."""
        if tail_BEWX is None:
            x_RNX = plan.sorted(x_BTSX)
        else:
            x_RNX, tail_BEWX = plan.sorted_after(x_BTSX, tail_BEWX)
        with parts_as_batch():
            y_RNX, _ = convolution(x_RNX, None, plan.segment_ids)
        if convolution.width or self.rule.activated:
            y_RNX = jax.nn.silu(y_RNX)
        return split_heads(y_RNX, self.heads), tail_BEWX

    def recurrence(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: dict[str, jax.Array],
        memory: jax.Array,
        plan: Dispatch,
    ) -> tuple[jax.Array, jax.Array]:
        """The outputs of all entries [B R, N, H, V] and the memories [B, E, H, K, V]."""
        decay_log = jnp.where(plan.writes[..., None], gates["decay_log"], 0.0)
        decay_log = jnp.where(plan.resets[..., None], FORGET_LOG, decay_log)
        gates = {**gates, "decay_log": decay_log}
        entries = jax.tree.map(plan.streams, (q, k, v, gates, plan.writes))
        rule = functools.partial(self.rule, *entries)
        if plan.one_stream:
            o, after = rule(
                initial_state=memory,
                segment_ids=plan.streams(plan.memory),
                num_segments=self.memories,
            )
        else:
            o, after = rule(initial_state=memory.reshape(-1, *memory.shape[2:]))
            after = after.reshape(memory.shape)
        return o, jnp.where(plan.outdated[..., None, None, None], 0.0, after)

    def route(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Memories and weights of each token's copies [B, T, J].

        The shared memory comes last, with weight 1."""
        memory_BTJ, weight_BTJ = self.router(x_BTD)
        if not self.shared_memory:
            return memory_BTJ, weight_BTJ
        last = ((0, 0), (0, 0), (0, 1))
        return (
            jnp.pad(memory_BTJ, last, constant_values=self.memories - 1),
            jnp.pad(weight_BTJ, last, constant_values=1.0),
        )

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""

        def tails(conv: ShortConvolution) -> jax.Array | None:
            tail_BWX = conv.init_state(batch)
            if tail_BWX is None:
                return None
            return jnp.zeros((batch, self.memories, *tail_BWX.shape[1:]), jnp.float32)

        return {
            "conv_q": tails(self.conv_q),
            "conv_k": tails(self.conv_k),
            "conv_v": tails(self.conv_v),
            "memory": jnp.zeros(
                (batch, self.memories, self.heads, self.key_size, self.value_size), jnp.float32
            ),
        }


Mixer = MixtureOfMemories
