"""Selective scan on NVIDIA GPUs: a program walks over time with the states of its channels in
registers. (`ops/gpu/__init__.py` explains the words.)

    h_t = a_t h_{t-1} + B_t u_t         u_t = delta_t x_t                             (1)
    a_t = e_t or 2 e_t - 1              e_t = exp(delta_t A)                          (2)
    y_t = sum_n h_t C_t + D x_t                                                       (3)

A program is a warp with a tile of 16 channels (8, where 16 give too few programs or N > 32) by N
states. The lowering puts four consecutive states of a channel into a thread. So loads of A and of
states are whole, a token's B_t and C_t are one short vector each, and the sum over n is a few
additions and, for N = 16, two exchanges between threads.

One token follows another. A scan over tokens inside a block, as in the authors' CUDA kernel, fills
a GPU where channels are few, at two to three times the multiplications and with a transposition of
x, whose channels lie together in memory. Here tiles of fewer channels and then parts of time do
that. Exponentials bind forward: one for each token, channel and state, 16 in a clock of a
multiprocessor, which at N = 16 is one token of one channel, for which memory has 20 bytes then and
needs 6 to 12.

Backward, with g_t the gradient of h_t, keep_t zero where a segment starts, and h_{t-1} standing for
keep_t h_{t-1}:

    g_t = C_t dy_t + keep_{t+1} a_{t+1} g_{t+1}                                       (4)
    dw_t = g_t h_{t-1} e_t, twice that for a = 2 e - 1, of w = delta A                (5)
    dC_t = sum over channels of h_t dy_t                                              (6)
    dB_t = sum over channels of g_t u_t                                               (7)
    du_t = sum_n B_t g_t                                                              (8)
    dA = sum_bt delta_t dw_t                                                          (9)
    dx_t = delta_t du_t + D dy_t                                                      (10)
    ddelta_t = x_t du_t + sum_n A dw_t                                                (11)
    dD = sum_bt dy_t x_t                                                              (12)

The states at the starts of chunks of 64 tokens are those that the forward rule kept (`gating.py`),
or a first kernel computes them. A program takes chunk after chunk from the last to the first. It
walks through a chunk and writes the state before every fourth token to memory of its own (the
second-level cache holds that of all running programs); then it goes back over the chunk four tokens
at a time, with the states before each in registers. It takes three exponentials for each token and
state (a first kernel one more), and is bound nevertheless by its 25 or so other instructions.

With a gate, out = y silu(z), there is a first kernel in any case: it has the registers to spare for
y, which it recomputes, for dz, and writes dy = silu(z) dout for the second.

dB and dC are sums over channels. A program has two tiles, 32 channels; it adds up those of a thread
first and writes float32 sums of its channels, [B, D / 32, T, N] each, which plain JAX adds up. Thus
there are no atomics and results are deterministic; at N = 16 these are 4 bytes for each token and
channel, less than the inputs have.

Not measured: all times, and from how many programs on a GPU is filled.
"""

import jax
import jax.numpy as jnp

from ...gpu import tiles as gpu
from ...gpu.channels import LANES, MAX_BATCH, lanes, pad_last
from .. import gating
from . import program
from .gradients import TILES, GradientInputs, walk_back
from .program import KernelInputs, Sizes
from .walks import WalkInputs, backward_preparation, forward_outputs, part_starts, states_at_parts

WALKS_BACKWARDS = True  # the rules take `reverse`
MAX_STATES = 64  # what fits registers
SUPPORTED = f"float32 or bfloat16, N up to {MAX_STATES}, and B up to {MAX_BATCH}"


def supports(x, delta, A, B, C, D, z, *_, **static) -> bool:
    """Whether the kernels take these arrays: what SUPPORTED says, where jax has the lowering."""
    del D, static
    arrays = (x, delta, A, B, C, *([] if z is None else [z]))
    return (
        gpu.available()
        and A.shape[1] <= MAX_STATES
        and x.shape[0] <= MAX_BATCH
        and all(array.dtype in (jnp.float32, jnp.bfloat16) for array in arrays)
    )


def forward(
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial_state,
    segment_ids,
    *,
    delta_softplus,
    eigenvalue_range,
    with_chunk_states=False,
    reverse=False,
    interpret=False,
):
    """y in x's dtype, the final state in float32, and the states at the starts of chunks
    (`gating.py`) or None; shapes as in `api.py`."""
    delta = gating.step_sizes(delta, bias, delta_softplus)
    (batch, _, channels), states = x.shape, A.shape[1]
    sizes = program.make_sizes(
        x,
        A,
        eigenvalue_range,
        tiles=1,
        lanes=lanes(batch, channels, states),
        reverse=reverse,
        interpret=interpret,
    )
    inputs = program.make_inputs(sizes, x, delta, A, B, C, D, segment_ids)
    state = program.pad_state(initial_state, sizes)[:, None]
    starts = part_starts(sizes, inputs, state, back=False)
    gate = None if z is None else (pad_last(z, sizes.width),)
    keep_chunk_states = with_chunk_states and gating.keeps_chunk_states(x, A)
    y, ends, chunk_states = forward_outputs(
        sizes, WalkInputs(inputs, starts, gate), x.dtype, keep_chunk_states
    )
    if chunk_states is not None:
        chunk_states = chunk_states[:, :, :states, :channels]
    return sizes.tokens_of(y)[..., :channels], ends[:, -1, :channels, :states], chunk_states


def backward(
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial_state,
    segment_ids,
    chunk_states,
    dout,
    dfinal_state,
    *,
    delta_softplus,
    eigenvalue_range,
    reverse=False,
    interpret=False,
):
    """Gradients of x, delta, A, B, C, D, z, bias (of these three None where they are) and
    initial_state; chunk_states: what `forward` left, or None."""
    delta, pull_delta = gating.step_sizes_vjp(delta, bias, delta_softplus)
    channels, states = x.shape[2], A.shape[1]
    sizes = program.make_sizes(
        x, A, eigenvalue_range, tiles=TILES, lanes=LANES, reverse=reverse, interpret=interpret
    )
    inputs = program.make_inputs(sizes, x, delta, A, B, C, D, segment_ids, dout)
    chunk_states, dz, dy = _preparation(sizes, inputs, z, initial_state, chunk_states)
    inputs = inputs._replace(dy=dy)
    state = program.pad_state(dfinal_state, sizes)[:, None]
    ends = part_starts(sizes, inputs, state, back=True)
    gradients = walk_back(sizes, GradientInputs(inputs, chunk_states, ends))
    dx, ddelta = (sizes.tokens_of(x)[..., :channels] for x in (gradients.dx, gradients.ddelta))
    dB, dC = (sizes.tokens_of(x.sum(1))[..., :states] for x in (gradients.dB, gradients.dC))
    dD = None if D is None else gradients.dD.sum((0, 1))[:channels]
    ddelta, dbias = pull_delta(ddelta)
    return (
        dx,
        ddelta,
        gradients.dA.sum((0, 1))[:channels, :states],
        dB,
        dC,
        dD,
        dz,
        dbias,
        gradients.starts[:, 0, :channels, :states],
    )


def _preparation(
    sizes: Sizes,
    inputs: KernelInputs,
    z: jax.Array | None,
    initial_state: jax.Array,
    chunk_states: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """The states before the chunks [B, G, N, width], dz [B, T, D] or None, and dy.

    inputs.dy: the gradient of the gated output."""
    if chunk_states is None and sizes.chunks == 1:
        chunk_states = jnp.swapaxes(initial_state, 1, 2)[:, None]
    if chunk_states is not None:
        chunk_states = program.pad_chunk_states(chunk_states, sizes)
        starts = states_at_parts(sizes, chunk_states)
        if z is None:
            return chunk_states, None, inputs.dy
    else:
        state = program.pad_state(initial_state, sizes)[:, None]
        starts = part_starts(sizes, inputs, state, back=False)
    gate = None if z is None else (pad_last(z, sizes.width), inputs.dy)
    outputs, computed_starts = backward_preparation(
        sizes, WalkInputs(inputs, starts, gate), keep_chunk_states=chunk_states is None
    )
    chunk_states = computed_starts if chunk_states is None else chunk_states
    assert chunk_states is not None
    if z is None:
        return chunk_states, None, inputs.dy
    dz, dy = (sizes.tokens_of(x) for x in outputs)
    return chunk_states, dz[..., : z.shape[2]], dy
