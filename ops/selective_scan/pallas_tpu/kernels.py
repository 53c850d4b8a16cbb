"""The kernels of the selective scan on TPU, whose equations are in `__init__.py`: one grid step is
one chunk of one block of channels.

Letters: C tokens of a chunk, L channels of a block, of which 128 at a time make a tile of lanes; N
states of a channel, up to a multiple of 8. Values of a tile are [N, 128], of all channels and
states of one token."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...tpu.channels import ChannelGrid
from ...tpu.kernel import LANES, SUBLANES, Ref
from .. import gating


@dataclass(frozen=True)
class Scan:
    """What is static.

    states: N up to a multiple of 8.
    negative: a = 2 e - 1. gate, bias, softplus: which there are."""

    grid: ChannelGrid
    states: int
    negative: bool
    gate: bool
    bias: bool
    softplus: bool

    @property
    def columns(self) -> int:
        """Of B and of C."""
        return 2 * self.states

    def factor(self, e: jax.Array) -> jax.Array:
        return e + e - 1 if self.negative else e

    def sum_states(self, terms: jax.Array) -> jax.Array:
        """[N, 128] -> [8, 128]."""
        total = terms[:SUBLANES]
        for i in range(SUBLANES, self.states, SUBLANES):
            total = total + terms[i : i + SUBLANES]
        return total


# --- One chunk in fast memory


class ChunkRefs(NamedTuple):
    """Scratch of a `Chunk`."""

    delta: Any  # [C / 8, 8, L]
    u: Any  # [C / 8, 8, L]
    columns: Any  # B and C, repeated over lanes [C, 2 N, 128]


def chunk_scratch(scan: Scan) -> ChunkRefs:
    rows = scan.grid.group_scratch()
    columns = pltpu.VMEM((scan.grid.chunk, scan.columns, LANES), jnp.float32)
    return ChunkRefs(rows, rows, columns)


class Chunk:
    """One chunk in fast memory: rows of delta and u = delta x, columns of B and C repeated over
    lanes.

    x, delta: [C, L]; columns: of B and C [1, 1, C / 8, 8, 2 N]; keep: [1, 1, 1, C] or None."""

    def __init__(
        self, scan: Scan, x: jax.Array, delta: jax.Array, columns: Ref, keep: Ref, refs: ChunkRefs
    ):
        self.scan, self.keep, self.refs = scan, keep, refs
        grid = scan.grid
        refs.delta[...] = grid.grouped(delta)
        refs.u[...] = grid.grouped(delta * x)

        @pl.when(pl.program_id(2) == 0)
        def _():
            def spread(g, _):
                of_group = columns[0, 0, g][:, :, None]  # [8, 2 N, 1]
                refs.columns[pl.ds(g * SUBLANES, SUBLANES)] = jnp.broadcast_to(
                    of_group, (SUBLANES, scan.columns, LANES)
                )

            grid.repeat(spread, None, grid.groups, stretch=8)

    def columns(self, g: Any, row: Any) -> tuple[Any, Any]:
        """B_t and C_t [N, 128]."""
        N, t = self.scan.states, g * SUBLANES + row
        return self.refs.columns[t, :N], self.refs.columns[t, N:]

    def kept(self, g: Any, row: Any) -> Any:
        """Whether the state before a token is kept; None: always."""
        if self.keep is None:
            return None
        return self.keep[0, 0, 0, g * SUBLANES + row] != 0

    def rows(self, g: Any, row: Any, tile: slice) -> tuple[jax.Array, jax.Array]:
        """delta_t and u_t [1, 128]."""
        row = pl.ds(row, 1)
        return self.refs.delta[g, row, tile], self.refs.u[g, row, tile]

    def advance(
        self, h: Any, A_log2: list[jax.Array], g: Any, row: Any
    ) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """Of each tile e_t, the state before the token (zero where a segment starts), and the one
        after [N, 128]."""
        (B_t, _), kept = self.columns(g, row), self.kept(g, row)
        for i, tile in enumerate(self.scan.grid.tiles):
            delta_t, u_t = self.rows(g, row, tile)
            e, before = jnp.exp2(delta_t * A_log2[i]), _where_kept(h[i], kept)
            yield e, before, self.scan.factor(e) * before + u_t * B_t  # Eq. 1


def _where_kept(x: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Chosen, not multiplied: a state may be infinite."""
    return x if kept is None else jnp.where(kept, x, 0.0)


def _projected_steps(scan: Scan, delta_ref: Ref, bias_ref: Ref, chunk_index: Any) -> jax.Array:
    """What the step sizes of a chunk are made of [C, L]; past T: anything."""
    delta = scan.grid.read(delta_ref, chunk_index)
    if bias_ref is None:
        return delta
    here, _ = scan.grid.places(pl.program_id(2))
    return delta + bias_ref[:, here]


def _step_sizes(scan: Scan, projected: jax.Array, chunk_index: Any) -> jax.Array:
    """[C, L], zero past T: a token with a step of zero changes nothing."""
    if scan.softplus:
        projected = jax.nn.softplus(projected)
    changed = scan.softplus or scan.bias
    return scan.grid.masked(projected, chunk_index) if changed else projected


# --- Sums over the states of a channel, of 8 tokens at once


def terms_scratch(grid: ChannelGrid) -> Any:
    """What is to be added up over 8 sublanes: per tile 8 tokens of 8 rows."""
    return pltpu.VMEM((len(grid.tiles) * SUBLANES**2, LANES), jnp.float32)


def _terms_of(tile: int, row: Any) -> Any:
    """Where `terms_scratch` has those of a token."""
    start = SUBLANES * (SUBLANES * tile + row)
    return pl.ds(pl.multiple_of(start, SUBLANES), SUBLANES)


def _sum_terms(terms: Ref, tile: int) -> jax.Array:
    """[8 tokens, 128]: sums over the 8 rows of each token."""
    first = SUBLANES**2 * tile
    # NOTE: a load with a stride of 8 rows takes one row of each token: one addition per register.
    rows = [pl.ds(first + s, SUBLANES, stride=SUBLANES) for s in range(SUBLANES)]
    total = terms[rows[0]]
    for row in rows[1:]:
        total = total + terms[row]
    return total


def _write_sums(grid: ChannelGrid, g: Any, terms: Ref, rows: Ref) -> None:
    """Writes the sums of a group's terms to its rows [C / 8, 8, L]."""
    for i, tile in enumerate(grid.tiles):
        rows[g, :, tile] = _sum_terms(terms, i)


# --- Forward


class ForwardRefs(NamedTuple):
    x: Any  # [1, C, L]
    delta: Any  # [1, C, L]
    columns: Any  # B and C [1, 1, C / 8, 8, 2 N]
    A_log2: Any  # A log2(e) [N, width]
    D: Any  # [1, width]
    initial_state: Any  # [1, N, width]
    z: Any  # [1, C, L], None without a gate
    bias: Any  # [1, width] or None
    keep: Any  # [1, 1, 1, C], None without segments
    y: Any  # [1, C, L]
    h: Any  # carry and final state [1, N, width]
    starts: Any  # states at the starts of the chunk's parts [1, parts, N, L], None if not kept
    y_rows: Any  # [C / 8, 8, L]
    y_terms: Any  # as `terms_scratch`
    chunk: ChunkRefs


def selective_forward(refs: ForwardRefs, *, scan: Scan) -> None:
    grid, t, block = scan.grid, pl.program_id(1), pl.program_id(2)
    here, places = grid.places(block)

    @pl.when(t == 0)
    def _():
        refs.h[0, :, here] = refs.initial_state[0, :, here]

    chunk_index = grid.chunk_index(t)
    x = grid.read(refs.x, chunk_index)  # [C, L]
    projected = _projected_steps(scan, refs.delta, refs.bias, chunk_index)
    delta = _step_sizes(scan, projected, chunk_index)  # [C, L]
    chunk = Chunk(scan, x, delta, refs.columns, refs.keep, refs.chunk)
    A = [refs.A_log2[:, place] for place in places]

    def token(g, row, h):
        _, C_t = chunk.columns(g, row)  # [N, 128]
        after = []
        for i, (_, _, h_i) in enumerate(chunk.advance(h, A, g, row)):
            refs.y_terms[_terms_of(i, row)] = scan.sum_states(h_i * C_t)
            after.append(h_i)
        return after

    parts = 1 if refs.starts is None else refs.starts.shape[1]
    groups = grid.groups // parts

    def part(i, h):
        i = parts - 1 - i if grid.reverse else i
        if refs.starts is not None:
            for tile, h_i in zip(grid.tiles, h, strict=True):
                refs.starts[0, i, :, tile] = h_i
        return grid.loop(
            token,
            h,
            end=lambda g: _write_sums(grid, g, refs.y_terms, refs.y_rows),
            stretch=2,
            part=(i * groups, groups),
        )

    h = [refs.h[0, :, place] for place in places]
    h = lax.fori_loop(0, parts, part, h, unroll=parts == 1)
    for place, h_i in zip(places, h, strict=True):
        refs.h[0, :, place] = h_i
    y = refs.y_rows[...].reshape(x.shape) + refs.D[:, here] * x  # [C, L], Eq. 2
    y = gating.gate(y, grid.read(refs.z, chunk_index)) if scan.gate else y
    refs.y[0] = y.astype(refs.y.dtype)


# --- The states at the starts of chunks


class StatesRefs(NamedTuple):
    x: Any  # [1, C, L]
    delta: Any  # [1, C, L]
    columns: Any  # B and C [1, 1, C / 8, 8, 2 N]
    A_log2: Any  # A log2(e) [N, width]
    initial_state: Any  # [1, N, width]
    bias: Any  # [1, width] or None
    keep: Any  # [1, 1, 1, C], None without segments
    starts: Any  # [1, 1, N, L]
    h: Any  # carry [N, width]
    chunk: ChunkRefs


def states_scratch(scan: Scan) -> Any:
    return pltpu.VMEM((scan.states, scan.grid.width), jnp.float32)


def selective_states(refs: StatesRefs, *, scan: Scan) -> None:
    grid, t, block = scan.grid, pl.program_id(1), pl.program_id(2)
    here, places = grid.places(block)

    @pl.when(t == 0)
    def _():
        refs.h[:, here] = refs.initial_state[0, :, here]

    chunk_index = grid.chunk_index(t)
    x = grid.read(refs.x, chunk_index)  # [C, L]
    projected = _projected_steps(scan, refs.delta, refs.bias, chunk_index)
    delta = _step_sizes(scan, projected, chunk_index)  # [C, L]
    chunk = Chunk(scan, x, delta, refs.columns, refs.keep, refs.chunk)
    A = [refs.A_log2[:, place] for place in places]
    refs.starts[0, 0] = refs.h[:, here]

    def token(g, row, h):
        return [h_i for _, _, h_i in chunk.advance(h, A, g, row)]

    h = [refs.h[:, place] for place in places]
    h = grid.loop(token, h, stretch=2)
    for place, h_i in zip(places, h, strict=True):
        refs.h[:, place] = h_i


# --- Backward


class BackwardRefs(NamedTuple):
    x: Any  # [1, C, L]
    delta: Any  # [1, C, L]
    dout: Any  # [1, C, L]
    columns: Any  # B and C [1, 1, C / 8, 8, 2 N]
    starts: Any  # the state before the chunk [1, 1, N, L]
    A: Any  # [N, width]
    A_log2: Any  # A log2(e) [N, width]
    D: Any  # [1, width]
    dfinal_state: Any  # [1, N, width]
    z: Any  # [1, C, L], None without a gate
    bias: Any  # [1, width] or None
    keep: Any  # [1, 1, 1, C], None without segments
    dx: Any  # [1, C, L]
    ddelta: Any  # [1, C, L]
    dcolumns: Any  # dB and dC of the chunk's tokens, in rows of 128 [1, 1, 2 N C / 128, 1, 128]
    dA: Any  # carry, sum over time [1, N, width]
    dD: Any  # carry, 8 partial sums over time [1, 8, width]
    ag: Any  # carry a_{t+1} g_{t+1}, and gradient of the initial state [1, N, width]
    dz: Any  # [1, C, L], None without a gate
    dbias: Any  # carry, 8 partial sums over time [1, 8, width], None without bias
    dy_rows: Any  # [C / 8, 8, L]
    du_rows: Any  # [C / 8, 8, L]
    dw_rows: Any  # sum_n A dw [C / 8, 8, L]
    du_terms: Any  # as `terms_scratch`
    dw_terms: Any  # as `terms_scratch`
    sums: Any  # dB and dC of each token, not yet added up over lanes [2 N C, 128]
    before: Any  # states before the tokens [C, N, L]
    e: Any  # [C, N, L]
    chunk: ChunkRefs
    y_rows: Any  # [C / 8, 8, L], None without a gate
    y_terms: Any  # as `terms_scratch`, None without a gate


def backward_scratch(scan: Scan) -> dict[str, Any]:
    """The scratch of `BackwardRefs`, by field."""
    grid, N = scan.grid, scan.states
    rows, terms = grid.group_scratch(), terms_scratch(grid)
    tokens = pltpu.VMEM((grid.chunk, N, grid.lanes), jnp.float32)
    return {
        "dy_rows": rows,
        "du_rows": rows,
        "dw_rows": rows,
        "du_terms": terms,
        "dw_terms": terms,
        "sums": pltpu.VMEM((grid.chunk * 2 * N, LANES), jnp.float32),
        "before": tokens,
        "e": tokens,
        "chunk": chunk_scratch(scan),
        "y_rows": rows if scan.gate else None,
        "y_terms": terms if scan.gate else None,
    }


def selective_backward(refs: BackwardRefs, *, scan: Scan) -> None:
    grid, t, block = scan.grid, pl.program_id(1), pl.program_id(2)
    here, places = grid.places(block)
    _clear_sums(refs, scan, t, block, here)
    chunk_index = grid.chunk_index(t, backward=True)
    x, dy = (grid.read(ref, chunk_index) for ref in (refs.x, refs.dout))  # [C, L]

    def projected():
        return _projected_steps(scan, refs.delta, refs.bias, chunk_index)

    delta = _step_sizes(scan, projected(), chunk_index)  # [C, L]
    if scan.gate:
        dy = gating.gate_gradients(grid.read(refs.z, chunk_index), dy)[0]
    chunk = Chunk(scan, x, delta, refs.columns, refs.keep, refs.chunk)
    refs.dy_rows[...] = grid.grouped(dy)
    refs.dD[0, :, here] += grid.grouped(dy * x).sum(0)  # Eq. 8
    A, A_log2 = ([ref[:, place] for place in places] for ref in (refs.A, refs.A_log2))

    _recompute_states(refs, scan, chunk, A_log2)
    _walk_back(refs, scan, chunk, A, places)

    du, dw = (ref[...].reshape(x.shape) for ref in (refs.du_rows, refs.dw_rows))  # [C, L]
    refs.dx[0] = (delta * du + refs.D[:, here] * dy).astype(refs.dx.dtype)  # Eq. 7
    ddelta = x * du + dw  # [C, L], Eq. 7
    if scan.softplus:
        ddelta = ddelta * jax.nn.sigmoid(projected())
    if scan.bias:
        refs.dbias[0, :, here] += grid.grouped(grid.masked(ddelta, chunk_index)).sum(0)
    refs.ddelta[0] = ddelta.astype(refs.ddelta.dtype)
    if scan.gate:
        y = refs.y_rows[...].reshape(x.shape) + refs.D[:, here] * x  # [C, L], Eq. 2
        z, dout = (grid.read(ref, chunk_index) for ref in (refs.z, refs.dout))
        per_y = gating.gate_gradients(z, dout)[1]
        refs.dz[0] = (per_y * y).astype(refs.dz.dtype)
    _add_up_lanes(refs, scan, block)


def _clear_sums(refs: BackwardRefs, scan: Scan, t: Any, block: Any, here: Any) -> None:
    """Loads the carry and zeros the sums over time at the first chunk, and zeros those over
    channels at the first block of each chunk."""
    grid = scan.grid

    @pl.when(t == 0)
    def _():
        refs.ag[0, :, here] = refs.dfinal_state[0, :, here]
        refs.dA[0, :, here] = jnp.zeros((scan.states, grid.lanes), jnp.float32)
        refs.dD[0, :, here] = jnp.zeros((SUBLANES, grid.lanes), jnp.float32)
        if scan.bias:
            refs.dbias[0, :, here] = jnp.zeros((SUBLANES, grid.lanes), jnp.float32)

    @pl.when(block == 0)
    def _():
        refs.sums[...] = jnp.zeros(refs.sums.shape, jnp.float32)


def _recompute_states(
    refs: BackwardRefs, scan: Scan, chunk: Chunk, A_log2: list[jax.Array]
) -> None:
    """Writes the states before all tokens of a chunk and e, adds to the sums of dC, and writes y
    without its skip where there is a gate."""
    grid, N = scan.grid, scan.states

    def token(g, row, h):
        now, after = g * SUBLANES + row, []
        of_C = pl.ds(pl.multiple_of(2 * N * now + N, SUBLANES), N)
        dC_t = refs.sums[of_C]  # [N, 128]
        for i, (e, before, h_i) in enumerate(chunk.advance(h, A_log2, g, row)):
            tile = grid.tiles[i]
            refs.before[now, :, tile], refs.e[now, :, tile] = before, e
            dC_t = dC_t + h_i * refs.dy_rows[g, pl.ds(row, 1), tile]  # Eq. 5
            if scan.gate:
                _, C_t = chunk.columns(g, row)
                refs.y_terms[_terms_of(i, row)] = scan.sum_states(h_i * C_t)
            after.append(h_i)
        refs.sums[of_C] = dC_t
        return after

    def end(g):
        if scan.gate:
            _write_sums(grid, g, refs.y_terms, refs.y_rows)

    grid.loop(token, [refs.starts[0, 0, :, tile] for tile in grid.tiles], end=end)


def _walk_back(
    refs: BackwardRefs, scan: Scan, chunk: Chunk, A: list[jax.Array], places: list[Any]
) -> None:
    """Takes the carry against the recurrence through a chunk; writes du and sum_n A dw, adds to dA
    and to the sums of dB."""
    grid, N = scan.grid, scan.states

    def token(g, row, carry):
        now, (ag, dA) = g * SUBLANES + row, map(list, carry)  # ag: a_{t+1} g_{t+1}
        (B_t, C_t), kept = chunk.columns(g, row), chunk.kept(g, row)
        of_B = pl.ds(pl.multiple_of(2 * N * now, SUBLANES), N)
        dB_t = refs.sums[of_B]  # [N, 128]
        for i, tile in enumerate(grid.tiles):
            delta_t, u_t = chunk.rows(g, row, tile)  # [1, 128]
            g_t = ag[i] + C_t * refs.dy_rows[g, pl.ds(row, 1), tile]  # [N, 128], Eq. 3
            eg = refs.e[now, :, tile] * g_t
            eg = eg + eg if scan.negative else eg
            dw = eg * refs.before[now, :, tile]  # [N, 128], Eq. 4
            ag[i] = _where_kept(eg - g_t if scan.negative else eg, kept)
            dA[i] = dA[i] + delta_t * dw  # Eq. 6
            dB_t = dB_t + u_t * g_t  # Eq. 5
            refs.du_terms[_terms_of(i, row)] = scan.sum_states(B_t * g_t)  # Eq. 6
            refs.dw_terms[_terms_of(i, row)] = scan.sum_states(A[i] * dw)  # Eq. 7
        refs.sums[of_B] = dB_t
        return ag, dA

    def end(g):
        for i, tile in enumerate(grid.tiles):
            refs.du_rows[g, :, tile] = _sum_terms(refs.du_terms, i)
            refs.dw_rows[g, :, tile] = _sum_terms(refs.dw_terms, i)

    carry = tuple([ref[0, :, place] for place in places] for ref in (refs.ag, refs.dA))
    ag, dA = grid.loop(token, carry, end=end, backward=True)
    for i, place in enumerate(places):
        refs.ag[0, :, place], refs.dA[0, :, place] = ag[i], dA[i]


def _add_up_lanes(refs: BackwardRefs, scan: Scan, block: Any) -> None:
    """Writes dB and dC of the chunk's tokens after its last block of channels."""

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        def add_lanes(i, _):
            square = refs.sums[pl.ds(pl.multiple_of(i * LANES, LANES), LANES)]  # [128, 128]
            refs.dcolumns[0, 0, i] = square.T.sum(0, keepdims=True)

        squares = refs.sums.shape[0] // LANES
        scan.grid.repeat(add_lanes, None, squares, stretch=8)
