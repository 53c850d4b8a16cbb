"""Recurrences whose time is cut over devices: device r holds tokens r n .. (r + 1) n - 1 and
exchanges states with the others, whose size does not depend on n.

The state after the tokens of a device, and the outputs of these tokens, are affine functions of the
state before them:

    S_{r+1} = A_r S_r + M_r        o_r = o_r(0) + E_r S_r                                      (1)

where M_r and o_r(0) are computed from a zero state. Two such maps compose to a third,
(A', M') o (A, M) = (A' A, A' M + M'), so that the states before the devices are a prefix over
(A_r, M_r). With lambda_r the gradient of S_r, the gradients are a suffix over devices:

    lambda_r = A_r^T lambda_{r+1} + E_r^T do_r                                                 (2)

Device r then runs the ordinary backward rule from S_r and lambda_{r+1}. Where a segment starts with
the first token of a device, no state comes in: A_r and E_r^T do_r are zero for the other devices.

A walk from the last token to the first visits the devices, and the tokens of each, in the opposite
order, which is what first, last, before and after then mean. Arrays stay as they are.

The ways in which states travel (`method`), forward and backward alike:

    all_gather   LASP-2 (Sun et al., 2025, arXiv 2502.07563): one all-gather of (A_r, M_r), the
                 prefix on every device
    ring         LASP (Sun et al., 2024, arXiv 2404.02882): R - 1 sends, each device waits for the
                 one before
    pipelined    ring with states in blocks of columns, which travel one behind the other (ZeCO,
                 2025, arXiv 2507.01004)

With ring and pipelined the state after the last token, and the gradient of the one before the
first, are known to one device, which sends them to all."""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .sharding import SEQUENCE

# The name, for a policy of `jax.checkpoint`, of what came from other devices: kept, it does not
# travel again when a forward pass is repeated.
CARRIED = "carried_state"

METHODS = ("all_gather", "ring", "pipelined")
# States travel in this many blocks at most; each adds a send and shortens the wait.
PIPELINE_BLOCKS = 8

_method = contextvars.ContextVar("sequence_method", default="all_gather")


@contextlib.contextmanager
def sequence_method(name: str) -> Iterator[None]:
    """A context in which the states of ops that are traced travel as `name` says, one of METHODS. A
    program that was traced before keeps its own. Raises ValueError for another name."""
    if name not in METHODS:
        raise ValueError(f"sequence_method must be one of {', '.join(METHODS)}; got {name!r}")
    token = _method.set(name)
    try:
        yield
    finally:
        _method.reset(token)


def current_method() -> str:
    """The method of the context."""
    return _method.get()


class TimeAxis(NamedTuple):
    """The devices along time, ranked in the order in which a walk over time visits them; every
    method is for the inside of a shard_map.

    size: R, the number of devices; method: how states travel; reverse: the walk begins at the last
    token, so that ranks count from the other end."""

    size: int
    method: str
    reverse: bool = False

    @property
    def rank(self) -> jax.Array:
        """r of this device."""
        device = lax.axis_index(SEQUENCE)
        return self.size - 1 - device if self.reverse else device

    def shift(self, values: Any, *, by: int = 1) -> Any:
        """What the device of rank r - `by` holds; zeros where there is none."""
        pairs = [(r, r + by) for r in range(self.size) if 0 <= r + by < self.size]
        if self.reverse:
            pairs = [(self.size - 1 - source, self.size - 1 - target) for source, target in pairs]
        return jax.tree.map(lambda x: lax.ppermute(x, SEQUENCE, pairs), values)

    def gather(self, array: jax.Array) -> jax.Array:
        """What all devices hold, on all, by rank: [R, ...]."""
        gathered = lax.all_gather(array, SEQUENCE)
        return gathered[::-1] if self.reverse else gathered

    def from_device(self, values: Any, rank: int) -> Any:
        """What one device holds, on all."""
        mine = self.rank == rank
        return jax.tree.map(
            lambda x: lax.psum(jnp.where(mine, x, jnp.zeros_like(x)), SEQUENCE), values
        )

    def entered(self, segment_ids: jax.Array | None) -> jax.Array | None:
        """[B] bool: whether the first token's segment began before this device; None: all did."""
        if segment_ids is None:
            return None
        first, last = (-1, 0) if self.reverse else (0, -1)
        return (self.rank == 0) | (self.shift(segment_ids[:, last]) == segment_ids[:, first])

    def prefix(
        self,
        act: Callable[[Any, Any], Any],
        A: Any,
        M: Any,
        first: Any,
        split: bool,
        common: Any = None,
    ) -> tuple[Any, Any]:
        """S_r, and S_R on all devices, of S_{r+1} = A_r S_r + M_r with S_0 = first.

        act: (A, S) -> A S, or ((common, A), S) -> A S with `common`, the part of A that all devices
          know and that is not sent.
        split: whether each entry of A acts on one column (last axis) of S."""
        return self._travel(act, A, M, first, split, common, reverse=False)

    def suffix(
        self,
        act: Callable[[Any, Any], Any],
        A: Any,
        M: Any,
        last: Any,
        split: bool,
        common: Any = None,
    ) -> tuple[Any, Any]:
        """lambda_{r+1}, and lambda_0 on all devices, of lambda_r = A_r lambda_{r+1} + M_r with
        lambda_R = last; arguments as in `prefix`."""
        return self._travel(act, A, M, last, split, common, reverse=True)

    def _travel(self, act, A, M, first, split, common, *, reverse):
        """`prefix`, or `suffix` in reverse, in float32."""
        M = jax.tree.map(lambda x: x.astype(jnp.float32), M)
        first = jax.tree.map(lambda x: x.astype(jnp.float32), first)
        if self.method == "all_gather":
            whole = act if common is None else lambda A, S: act((common, A), S)
            return self._gathered(whole, A, M, first, reverse)
        A = A if common is None else (common, A)
        # Devices in the order in which the state visits them.
        place = self.size - 1 - self.rank if reverse else self.rank
        step = -1 if reverse else 1
        columns = jax.tree.leaves(M)[0].shape[-1]
        count = 1 if self.method == "ring" else math.gcd(columns, PIPELINE_BLOCKS)
        blocks = _in_blocks(A, M, first, split, count)
        return self._passed_on(act, blocks, count, place, step)

    def _gathered(self, act, A, M, first, reverse):
        """`_travel` by one all-gather, of A and M side by side; the recurrence over devices runs on
        each of them."""
        leaves, tree = jax.tree.flatten((A, M))
        batch = leaves[0].shape[0]
        flat = jnp.concatenate([leaf.reshape(batch, -1) for leaf in leaves], axis=1)
        flat_RBX = self.gather(flat)
        ends = itertools.accumulate(leaf.size // batch for leaf in leaves)
        parts = jnp.split(flat_RBX, list(ends)[:-1], axis=2)
        gathered = jax.tree.unflatten(
            tree,
            [
                part.reshape(self.size, *leaf.shape)
                for part, leaf in zip(parts, leaves, strict=True)
            ],
        )

        def step(carry: Any, device: Any) -> tuple[Any, None]:
            S, mine = carry
            number, A, M = device
            mine = _where(number == self.rank, S, mine)
            return (_add(act(A, S), M), mine), None

        numbers = jnp.arange(self.size)
        (last, mine), _ = lax.scan(step, (first, first), (numbers, *gathered), reverse=reverse)
        return mine, last

    def _passed_on(self, act, blocks, count, place, step):
        """`_travel` from device to device: the p-th that the state visits (`place`) advances block
        j of `count` blocks [count, ...] at time p + j."""
        A, M, first = blocks
        S = _where(place == 0, first, jax.tree.map(jnp.zeros_like, first))

        def after(block: jax.Array) -> Any:
            a, m, s = jax.tree.map(
                lambda x: lax.dynamic_index_in_dim(x, block, keepdims=False), (A, M, S)
            )
            return _add(act(a, s), m)

        for time in range(self.size + count - 2):
            sent = after(jnp.clip(time - place, 0, count - 1))
            received = self.shift(sent, by=step)
            block = time - (place - 1)
            here = (block >= 0) & (block < count) & (place > 0)
            block = jnp.clip(block, 0, count - 1)
            S = jax.tree.map(
                lambda old, new, block=block, here=here: jnp.where(
                    here, lax.dynamic_update_index_in_dim(old, new, block, 0), old
                ),
                S,
                received,
            )
        last = jax.vmap(lambda a, m, s: _add(act(a, s), m))(A, M, S)
        mine, last = (_from_blocks(x, count) for x in (S, last))
        return mine, self.from_device(last, self.size - 1 if step == 1 else 0)


@dataclass(frozen=True)
class Affine:
    """The rules of an op whose state is an affine function of the state before, Eq. 1 and 2. The
    last two inputs of the op are the initial state and the segment ids.

    summary: (rules, *tokens, segment_ids) -> A, M, read, of the tokens of one device; read(S) gives
      their outputs from state S and, where the backward rule takes them, the states at the starts
      of chunks (`op.py`), else None.
    adjoint: (rules, *residuals, S, segment_ids, do) -> A, E^T do; residuals of the tokens.
    act: (A, S) -> A S.
    act_transposed: (A, lambda) -> A^T lambda.
    split: whether each entry of A acts on one column (last axis) of the state.
    every_segment: whether each segment has a state of its own, which goes on wherever the segment
      does, on any device."""

    summary: Callable[..., tuple[Any, Any, Callable[[Any], Any]]]
    adjoint: Callable[..., tuple[Any, Any]]
    act: Callable[[Any, Any], Any]
    act_transposed: Callable[[Any, Any], Any]
    split: bool
    every_segment: bool = False

    def forward(self, rules: Any, axis: TimeAxis, *inputs: Any) -> tuple[Any, Any]:
        """The output and the final state, and what `backward` takes."""
        *tokens, initial_state, segment_ids = inputs
        entered = None if self.every_segment else axis.entered(segment_ids)
        A, M, read = self.summary(rules, *tokens, segment_ids)
        S, final = axis.prefix(self.act, _kept(entered, A), M, initial_state, self.split)
        S, entered = checkpoint_name((_kept(entered, S), entered), CARRIED)
        output, chunk_states = read(S)
        return (output, final), (S, entered, chunk_states)

    def backward(
        self, rules: Any, axis: TimeAxis, carried: Any, inputs: Any, cotangents: Any
    ) -> tuple[Any, ...]:
        """Gradients of the tokens' inputs and of the initial state."""
        *tokens, initial_state, segment_ids = inputs
        (S, entered, chunk_states), (do, dfinal) = carried, cotangents
        rules = rules._replace(chunk_states=chunk_states)
        A, dM = self.adjoint(rules, *tokens, S, segment_ids, do)
        # What is sent comes first: then a kernel that recomputes the states within this part, where
        # the op has one, runs while it travels, because nothing needs to arrive for it.
        *tokens, S, A, dM = lax.optimization_barrier((*tokens, S, A, dM))
        dS, dinitial = axis.suffix(
            self.act_transposed, _kept(entered, A), _kept(entered, dM), dfinal, self.split
        )
        gradients = rules.backward((*tokens, S, segment_ids), (do, dS))
        return *gradients[:-1], jax.tree.map(
            lambda gradient, x: gradient.astype(x.dtype), dinitial, initial_state
        )


def segment_states(
    transition: Callable[..., Any],
    act: Callable[[Any, Any], Any],
    act_transposed: Callable[[Any, Any], Any],
) -> Affine:
    """The rules of an op with a matrix state per segment (`num_segments`).

    transition: (rules, *tokens, segment_ids) -> A of each segment. Its tokens may lie far apart, so
    that no E is formed: the op runs again from the states that came in."""

    def summary(rules: Any, *inputs: Any) -> tuple[Any, Any, Callable[[Any], Any]]:
        *tokens, segment_ids = inputs
        _, k, v = tokens[:3]
        batch, _, heads, value_size = v.shape
        state = (rules.static["num_segments"], heads, k.shape[-1], value_size)
        zero = jnp.zeros((batch, *state), jnp.float32)
        _, M = rules.forward(*tokens, zero, segment_ids)

        def read(S: jax.Array) -> tuple[jax.Array, None]:
            return rules.forward(*tokens, S, segment_ids)[0], None

        return transition(rules, *tokens, segment_ids), M, read

    def adjoint(rules: Any, *inputs: Any) -> tuple[Any, Any]:
        *tokens, S, segment_ids, do = inputs
        gradients = rules.backward((*tokens, S, segment_ids), (do, jnp.zeros_like(S)))
        return transition(rules, *tokens, segment_ids), gradients[len(tokens)]

    return Affine(summary, adjoint, act, act_transposed, split=False, every_segment=True)


def _kept(keep_B: jax.Array | None, values: Any) -> Any:
    """Arrays [B, ...], zeros where `keep_B` is false; None keeps all."""
    if keep_B is None:
        return values
    return jax.tree.map(lambda x: jnp.where(keep_B.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), values)


def _where(condition: jax.Array, values: Any, others: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), values, others)


def _add(values: Any, others: Any) -> Any:
    return jax.tree.map(jnp.add, values, others)


def _in_blocks(A: Any, M: Any, first: Any, split: bool, count: int) -> Any:
    """A, M and the first state with their columns in blocks [count, ...]."""

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:-1], count, -1), -2, 0)

    def repeat(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[None], (count, *x.shape))

    cut_all = functools.partial(jax.tree.map, cut)
    A = cut_all(A) if split else jax.tree.map(repeat, A)
    return A, cut_all(M), cut_all(first)


def _from_blocks(values: Any, count: int) -> Any:
    """Arrays whose columns were in blocks [count, ...]."""

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, -2)
        return x.reshape(*x.shape[:-2], count * x.shape[-1])

    return jax.tree.map(join, values)
