"""The kernels of `pallas_tpu.py`, which has the equations: one grid step is one chunk of one block
of channels.

Order of the arguments: inputs, outputs, then what the kernel keeps in fast memory, as `*_scratch`
lists it."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...tpu.blocks import LANES
from ...tpu.channels import SUBLANES, Blocks, repeat
from .. import gating


@dataclass(frozen=True)
class Scan:
    """What is static. states: N up to a multiple of 8; columns: of B and of C."""

    blocks: Blocks
    states: int
    segments: bool
    negative: bool
    gate: bool
    bias: bool
    softplus: bool

    @property
    def columns(self) -> int:
        return 2 * self.states

    def factor(self, e: jax.Array) -> jax.Array:
        return e + e - 1 if self.negative else e

    def sum_states(self, terms: jax.Array) -> jax.Array:
        """[N, 128] -> [8, 128]."""
        total = terms[:SUBLANES]
        for i in range(SUBLANES, self.states, SUBLANES):
            total = total + terms[i : i + SUBLANES]
        return total


def forward_scratch(scan: Scan) -> list[Any]:
    return [scan.blocks.group_scratch(), _terms(scan.blocks), *_staged(scan)]


def states_scratch(scan: Scan) -> list[Any]:
    states = pltpu.VMEM((scan.states, scan.blocks.width), jnp.float32)
    return [states, *_staged(scan)]


def backward_scratch(scan: Scan) -> list[Any]:
    blocks, N = scan.blocks, scan.states
    tokens = pltpu.VMEM((blocks.chunk, N, blocks.lanes), jnp.float32)
    return [
        *[blocks.group_scratch()] * 3,
        *[_terms(blocks)] * 2,
        pltpu.VMEM((blocks.chunk * 2 * N, LANES), jnp.float32),
        *[tokens] * 2,
        *_staged(scan),
        *([blocks.group_scratch(), _terms(blocks)] if scan.gate else []),
    ]


def _staged(scan: Scan) -> list[Any]:
    """What a `_Chunk` keeps in fast memory."""
    rows = scan.blocks.group_scratch()
    repeated = pltpu.VMEM((scan.blocks.chunk, scan.columns, LANES), jnp.float32)
    return [rows, rows, repeated]


def _terms(blocks: Blocks) -> Any:
    """What is to be added up over 8 sublanes: per tile 8 tokens of 8 rows."""
    return pltpu.VMEM((len(blocks.tiles) * SUBLANES**2, LANES), jnp.float32)


def _present(present: bool, refs: Any, count: int = 1) -> tuple[Any, Any]:
    """The first `count` refs, which are there only if `present`, and those that follow."""
    return (refs[:count], refs[count:]) if present else ((None,) * count, refs)


def _projected(scan: Scan, delta_ref: Any, bias_ref: Any, at: Any) -> jax.Array:
    """What the step sizes of a chunk are made of [C, L]; past T: anything."""
    delta = scan.blocks.read(delta_ref, at)
    if bias_ref is None:
        return delta
    here, _ = scan.blocks.places(pl.program_id(2))
    return delta + bias_ref[:, here]


def _step_sizes(scan: Scan, projected: jax.Array, at: Any) -> jax.Array:
    """[C, L], zero past T: a token with a step of zero changes nothing."""
    if scan.softplus:
        projected = jax.nn.softplus(projected)
    made = scan.softplus or scan.bias
    return scan.blocks.of_tokens(projected, at) if made else projected


class _Chunk:
    """One chunk in fast memory: rows of delta and u = delta x, columns of B and C repeated over
    lanes."""

    def __init__(self, scan, x, delta, columns_ref, keep_ref, refs, compiled):
        self.scan, self.keep_ref = scan, keep_ref
        self.delta_ref, self.u_ref, self.columns_ref = refs
        self.delta_ref[...] = scan.blocks.groups(delta)
        self.u_ref[...] = scan.blocks.groups(delta * x)

        @pl.when(pl.program_id(2) == 0)
        def _():
            def spread(g, _):
                columns = columns_ref[0, 0, g][:, :, None]
                self.columns_ref[pl.ds(g * SUBLANES, SUBLANES)] = jnp.broadcast_to(
                    columns, (SUBLANES, scan.columns, LANES)
                )

            groups = scan.blocks.chunk // SUBLANES
            repeat(spread, None, groups, stretch=8, compiled=compiled)

    def columns(self, g: Any, row: Any) -> tuple[Any, Any]:
        """B_t and C_t [N, 128]."""
        N, t = self.scan.states, g * SUBLANES + row
        return self.columns_ref[t, :N], self.columns_ref[t, N:]

    def keep(self, g: Any, row: Any) -> Any:
        """Whether the state before a token is kept; None: always."""
        if self.keep_ref is None:
            return None
        return self.keep_ref[0, 0, 0, g * SUBLANES + row] != 0

    def rows(self, g: Any, row: Any, tile: slice) -> tuple[jax.Array, jax.Array]:
        """delta_t and u_t [1, 128]."""
        row = pl.ds(row, 1)
        return self.delta_ref[g, row, tile], self.u_ref[g, row, tile]

    def advance(
        self, h: Any, A_log2: list[jax.Array], g: Any, row: Any
    ) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """Of each tile e_t, the state before the token (zero where a segment starts), and the one
        after."""
        (B_t, _), keep = self.columns(g, row), self.keep(g, row)
        for i, tile in enumerate(self.scan.blocks.tiles):
            delta_t, u_t = self.rows(g, row, tile)
            e, before = jnp.exp2(delta_t * A_log2[i]), _kept(h[i], keep)
            yield e, before, self.scan.factor(e) * before + u_t * B_t


def _kept(x: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Chosen, not multiplied: a state may be infinite."""
    return x if keep is None else jnp.where(keep, x, 0.0)


def _terms_of(tile: int, row: Any) -> Any:
    """Where `_terms` has those of a token."""
    start = SUBLANES * (SUBLANES * tile + row)
    return pl.ds(pl.multiple_of(start, SUBLANES), SUBLANES)


def _sum_terms(ref: Any, tile: int) -> jax.Array:
    """[8 tokens, 128]: sums over the 8 rows of each token."""
    first = SUBLANES**2 * tile
    rows = [pl.ds(first + s, SUBLANES, stride=SUBLANES) for s in range(SUBLANES)]
    total = ref[rows[0]]
    for row in rows[1:]:
        total = total + ref[row]
    return total


def selective_forward(
    x_ref, delta_ref, columns_ref, A_ref, D_ref, initial_ref, *refs, scan, keeps, compiled
):
    (z_ref,), refs = _present(scan.gate, refs)
    (bias_ref,), refs = _present(scan.bias, refs)
    (keep_ref,), refs = _present(scan.segments, refs)
    (y_ref, h_ref), refs = refs[:2], refs[2:]
    (starts_ref,), refs = _present(keeps, refs)
    ys_ref, terms_ref, *staged = refs
    blocks, t, block = scan.blocks, pl.program_id(1), pl.program_id(2)
    here, places = blocks.places(block)

    @pl.when(t == 0)
    def _():
        h_ref[0, :, here] = initial_ref[0, :, here]

    x = blocks.read(x_ref, t)
    delta = _step_sizes(scan, _projected(scan, delta_ref, bias_ref, t), t)
    chunk = _Chunk(scan, x, delta, columns_ref, keep_ref, staged, compiled)
    A = [A_ref[:, place] for place in places]

    def token(g, row, h):
        _, C_t = chunk.columns(g, row)
        after = []
        for i, (_, _, h_i) in enumerate(chunk.advance(h, A, g, row)):
            terms_ref[_terms_of(i, row)] = scan.sum_states(h_i * C_t)
            after.append(h_i)
        return after

    def end(g):
        for i, tile in enumerate(blocks.tiles):
            ys_ref[g, :, tile] = _sum_terms(terms_ref, i)

    parts = starts_ref.shape[1] if keeps else 1
    groups = blocks.chunk // SUBLANES // parts

    def part(i, h):
        if keeps:
            for tile, h_i in zip(blocks.tiles, h, strict=True):
                starts_ref[0, i, :, tile] = h_i
        tokens = i * groups, groups
        return blocks.loop(token, h, end=end, stretch=2, part=tokens, compiled=compiled)

    h = [h_ref[0, :, place] for place in places]
    h = lax.fori_loop(0, parts, part, h, unroll=parts == 1)
    for place, h_i in zip(places, h, strict=True):
        h_ref[0, :, place] = h_i
    y = ys_ref[...].reshape(x.shape) + D_ref[:, here] * x
    y = gating.gate(y, blocks.read(z_ref, t)) if scan.gate else y
    y_ref[0] = y.astype(y_ref.dtype)


def selective_states(x_ref, delta_ref, columns_ref, A_ref, initial_ref, *refs, scan, compiled):
    (bias_ref,), refs = _present(scan.bias, refs)
    (keep_ref,), refs = _present(scan.segments, refs)
    starts_ref, h_ref, *staged = refs
    blocks, t, block = scan.blocks, pl.program_id(1), pl.program_id(2)
    here, places = blocks.places(block)

    @pl.when(t == 0)
    def _():
        h_ref[:, here] = initial_ref[0, :, here]

    x = blocks.read(x_ref, t)
    delta = _step_sizes(scan, _projected(scan, delta_ref, bias_ref, t), t)
    chunk = _Chunk(scan, x, delta, columns_ref, keep_ref, staged, compiled)
    A = [A_ref[:, place] for place in places]
    starts_ref[0, 0] = h_ref[:, here]

    def token(g, row, h):
        return [h_i for _, _, h_i in chunk.advance(h, A, g, row)]

    h = [h_ref[:, place] for place in places]
    h = blocks.loop(token, h, stretch=2, compiled=compiled)
    for place, h_i in zip(places, h, strict=True):
        h_ref[:, place] = h_i


def selective_backward(*refs, scan, compiled):
    (x_ref, delta_ref, dout_ref, columns_ref, starts_ref), refs = refs[:5], refs[5:]
    (A_ref, A_log2_ref, D_ref, dfinal_ref), refs = refs[:4], refs[4:]
    (z_ref,), refs = _present(scan.gate, refs)
    (bias_ref,), refs = _present(scan.bias, refs)
    (keep_ref,), refs = _present(scan.segments, refs)
    (dx_ref, ddelta_ref, dcolumns_ref, dA_ref, dD_ref, dh_ref), refs = (refs[:6], refs[6:])
    (dz_ref,), refs = _present(scan.gate, refs)
    (dbias_ref,), refs = _present(scan.bias, refs)
    (dys_ref, dus_ref, dws_ref, du_terms_ref, dw_terms_ref), refs = refs[:5], refs[5:]
    (sums_ref, before_ref, e_ref), staged, refs = refs[:3], refs[3:6], refs[6:]
    (ys_ref, y_terms_ref), _ = _present(scan.gate, refs, 2)
    blocks, N = scan.blocks, scan.states
    t, block = pl.program_id(1), pl.program_id(2)
    here, places = blocks.places(block)

    @pl.when(t == 0)
    def _():
        dh_ref[0, :, here] = dfinal_ref[0, :, here]
        dA_ref[0, :, here] = jnp.zeros((N, blocks.lanes), jnp.float32)
        dD_ref[0, :, here] = jnp.zeros((SUBLANES, blocks.lanes), jnp.float32)
        if scan.bias:
            dbias_ref[0, :, here] = jnp.zeros((SUBLANES, blocks.lanes), jnp.float32)

    @pl.when(block == 0)
    def _():
        sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

    at = blocks.chunks - 1 - t
    x, dy = (blocks.read(ref, at) for ref in (x_ref, dout_ref))
    projected = functools.partial(_projected, scan, delta_ref, bias_ref, at)
    delta = _step_sizes(scan, projected(), at)
    if scan.gate:
        dy = gating.gate_gradients(blocks.read(z_ref, at), dy)[0]
    chunk = _Chunk(scan, x, delta, columns_ref, keep_ref, staged, compiled)
    dys_ref[...] = blocks.groups(dy)
    dD_ref[0, :, here] += blocks.groups(dy * x).sum(0)
    A, A_log2 = ([ref[:, place] for place in places] for ref in (A_ref, A_log2_ref))

    def recompute(g, row, h):
        now, after = g * SUBLANES + row, []
        of_C = pl.ds(pl.multiple_of(2 * N * now + N, SUBLANES), N)
        dC_t = sums_ref[of_C]
        for i, (e, before, h_i) in enumerate(chunk.advance(h, A_log2, g, row)):
            tile = blocks.tiles[i]
            before_ref[now, :, tile], e_ref[now, :, tile] = before, e
            dC_t = dC_t + h_i * dys_ref[g, pl.ds(row, 1), tile]
            if scan.gate:
                _, C_t = chunk.columns(g, row)
                y_terms_ref[_terms_of(i, row)] = scan.sum_states(h_i * C_t)
            after.append(h_i)
        sums_ref[of_C] = dC_t
        return after

    def retreat(g, row, carry):
        now, (ag, dA) = g * SUBLANES + row, map(list, carry)  # ag: a_{t+1} g_{t+1}
        (B_t, C_t), keep = chunk.columns(g, row), chunk.keep(g, row)
        of_B = pl.ds(pl.multiple_of(2 * N * now, SUBLANES), N)
        dB_t = sums_ref[of_B]
        for i, tile in enumerate(blocks.tiles):
            delta_t, u_t = chunk.rows(g, row, tile)
            g_t = ag[i] + C_t * dys_ref[g, pl.ds(row, 1), tile]
            eg = e_ref[now, :, tile] * g_t
            eg = eg + eg if scan.negative else eg
            dw = eg * before_ref[now, :, tile]
            ag[i] = _kept(eg - g_t if scan.negative else eg, keep)
            dA[i] = dA[i] + delta_t * dw
            dB_t = dB_t + u_t * g_t
            du_terms_ref[_terms_of(i, row)] = scan.sum_states(B_t * g_t)
            dw_terms_ref[_terms_of(i, row)] = scan.sum_states(A[i] * dw)
        sums_ref[of_B] = dB_t
        return ag, dA

    def end(g):
        for i, tile in enumerate(blocks.tiles):
            dus_ref[g, :, tile] = _sum_terms(du_terms_ref, i)
            dws_ref[g, :, tile] = _sum_terms(dw_terms_ref, i)

    def end_of_y(g):
        if scan.gate:
            for i, tile in enumerate(blocks.tiles):
                ys_ref[g, :, tile] = _sum_terms(y_terms_ref, i)

    start = [starts_ref[0, 0, :, tile] for tile in blocks.tiles]
    blocks.loop(recompute, start, end=end_of_y, compiled=compiled)
    carry = tuple([ref[0, :, place] for place in places] for ref in (dh_ref, dA_ref))
    dh, dA = blocks.loop(retreat, carry, end=end, reverse=True, compiled=compiled)
    for i, place in enumerate(places):
        dh_ref[0, :, place], dA_ref[0, :, place] = dh[i], dA[i]
    du, dw = (ref[...].reshape(x.shape) for ref in (dus_ref, dws_ref))
    dx_ref[0] = (delta * du + D_ref[:, here] * dy).astype(dx_ref.dtype)
    ddelta = x * du + dw
    if scan.softplus:
        ddelta = ddelta * jax.nn.sigmoid(projected())
    if scan.bias:
        dbias_ref[0, :, here] += blocks.groups(blocks.of_tokens(ddelta, at)).sum(0)
    ddelta_ref[0] = ddelta.astype(ddelta_ref.dtype)
    if scan.gate:
        y = ys_ref[...].reshape(x.shape) + D_ref[:, here] * x
        z, dout = (blocks.read(ref, at) for ref in (z_ref, dout_ref))
        per_y = gating.gate_gradients(z, dout)[1]
        dz_ref[0] = (per_y * y).astype(dz_ref.dtype)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        def add_lanes(i, _):
            square = sums_ref[pl.ds(pl.multiple_of(i * LANES, LANES), LANES)]
            dcolumns_ref[0, 0, i] = square.T.sum(0, keepdims=True)

        squares = sums_ref.shape[0] // LANES
        repeat(add_lanes, None, squares, stretch=8, compiled=compiled)
