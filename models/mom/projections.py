"""Projections by a matrix per memory, for all memories or for the copies of tokens alone.

`AllMemories` multiplies every token by the matrices of all E memories. `RoutedMemories` multiplies
its J copies by those of their memories. Copies are put in blocks of rows of which each belongs to
one memory, the last of a memory's blocks filled up with zeros; one loop over blocks then multiplies
each by its memory's matrix. How many copies a memory has is known when the program runs, how many
blocks there can be at most when it is traced:

    copies of memory    a b b a b b b         blocks of 2 rows    [a a] [b b] [b b] [b 0] [0 0]

Nothing is dropped, and at most a block per memory is computed in vain. The shared memory, which all
tokens go to, needs no blocks. `jax.lax.ragged_dot`, made for such products, multiplies every row by
the matrices of all memories on CPUs, and does so for the gradient of the matrices on TPUs (jax
0.10.2).

A block costs a turn of the loop, too. Where its product is small, as those of gates and of small
models are, all memories' are faster (`LEAST_FLOPS`).

Letters: E memories, M of them routed to, k choices of a token, J = k + shared copies, D inputs, X
outputs, N blocks, R rows of a block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from ops.framework.sharding import by_device, parts_as_batch, time_parts
from ops.framework.time_parts import to_parts, to_whole

# Of the product of a block.
LEAST_FLOPS = 1 << 23
# Each memory's matrix by itself: the fans of a stack are those of its matrices.
STACKED_XAVIER_SMALL = nnx.initializers.variance_scaling(
    (2**-2.5) ** 2, "fan_avg", "uniform", batch_axis=(0,)
)


class MemoryProjection(nnx.Module):
    """The matrices [E, D, X] of the memories."""

    def __init__(
        self,
        memories: int,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None] = ("embed", "heads"),
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        shape, self.compute_dtype = (memories, inputs, outputs), compute_dtype
        kernel_EDX = STACKED_XAVIER_SMALL(rngs.params(), shape, param_dtype)
        self.kernel_EDX = nnx.Param(kernel_EDX, out_sharding=(None, *axes))
        # Whether devices along the mesh's tensor axis have columns of their own.
        self.of_heads = axes[1] == "heads"

    def kernel(self) -> jax.Array:
        return self.kernel_EDX[...].astype(self.compute_dtype)


class AllMemories(NamedTuple):
    """Of every token what all memories make of it."""

    def __call__(self, x: jax.Array, *projections: MemoryProjection) -> list[jax.Array]:
        """[B, T, E, X] of each, of x [B, T, D], the same for all memories, or [B, T, E, D]."""
        layout = "btd" if x.ndim == 3 else "bted"
        return [jnp.einsum(f"{layout},edx->btex", x, one.kernel()) for one in projections]

    def of_each(self, x_EX: jax.Array, y: jax.Array) -> jax.Array:
        """What each memory has, to be added to a result y."""
        del y
        return x_EX[None, None]


class RoutedMemories(NamedTuple):
    """Of every token what the memories that it is routed to make of it, the shared one last; of
    all memories where that is faster."""

    memory_BTJ: jax.Array
    shared_memory: bool

    def __call__(self, x: jax.Array, *projections: MemoryProjection) -> list[jax.Array]:
        """[B, T, J, X] or [B, T, E, X] of each, of x [B, T, D], the same for all memories, or of a
        result."""
        if not self._pays(x, *projections):
            return AllMemories()(x, *projections)
        routed = self.memory_BTJ.shape[2] - self.shared_memory
        of_routed = x if x.ndim == 3 else x[:, :, :routed]
        made = _on_devices(of_routed, self.memory_BTJ[:, :, :routed], projections)
        if not self.shared_memory:
            return made
        of_shared = x if x.ndim == 3 else x[:, :, -1]
        shared = [(of_shared @ one.kernel()[-1])[:, :, None] for one in projections]
        return [jnp.concatenate(pair, axis=2) for pair in zip(made, shared, strict=True)]

    def of_each(self, x_EX: jax.Array, y: jax.Array) -> jax.Array:
        return x_EX[None, None] if y.shape[2] == len(x_EX) else x_EX[self.memory_BTJ]

    def _pays(self, x: jax.Array, *projections: MemoryProjection) -> bool:
        (memories, *_), copies = projections[0].kernel_EDX.shape, self.memory_BTJ.shape[2]
        if copies == memories or x.ndim == 4:
            return copies != memories and x.shape[2] == copies
        routed = self.memory_BTJ.size * (copies - self.shared_memory) // copies
        numbers = sum(one.kernel_EDX[0].size for one in projections)
        return 2 * block_rows(routed, memories) * numbers >= LEAST_FLOPS


Memories = AllMemories | RoutedMemories


def _on_devices(
    x: jax.Array, memory_BTk: jax.Array, projections: Sequence[MemoryProjection]
) -> list[jax.Array]:
    """`routed_products`, of the copies that each device has; tokens of a part of time are there."""
    parts = time_parts()
    x, memory = (to_parts(value, parts) for value in (x, memory_BTk))
    columns = ["H" if one.of_heads else "n" for one in projections]
    layouts = ["B" + "n" * (x.ndim - 1), "Bnn", *(f"nn{letter}" for letter in columns)]

    def products(x: jax.Array, memory: jax.Array, *kernels: jax.Array) -> tuple[jax.Array, ...]:
        return routed_products(x, memory, kernels)

    with parts_as_batch():
        run = by_device(
            "the projections of memories", products, layouts, [f"Bnn{letter}" for letter in columns]
        )
        made = run(x, memory, *(one.kernel() for one in projections))
    return [to_whole(y, parts) for y in made]


@jax.custom_vjp
def routed_products(
    x: jax.Array, memory_BTk: jax.Array, kernels: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """y_btj = x_bt W_m, m = memory_btj: [B, T, k, X] for each W [E, D, X] of `kernels`.

    x: [B, T, D], or [B, T, k, D]. The choices of a token are distinct, and below the number of
    matrices."""
    return _products(x, in_blocks(memory_BTk, kernels[0].shape[0]), kernels)


def _products(x: jax.Array, blocks: "Blocks", kernels: Sequence[jax.Array]) -> Any:
    def step(_: None, block: Any) -> Any:
        x_RD, owner = block
        return None, tuple(x_RD @ kernel[owner] for kernel in kernels)

    _, made = lax.scan(step, None, (blocks.rows(x), blocks.owner_N))
    return tuple(blocks.copies(y_NRX) for y_NRX in made)


def _forward(x: jax.Array, memory_BTk: jax.Array, kernels: Sequence[jax.Array]) -> Any:
    blocks = in_blocks(memory_BTk, kernels[0].shape[0])
    return _products(x, blocks, kernels), (x, blocks, kernels)


def _gradients(residuals: Any, cotangents: Sequence[jax.Array]) -> Any:
    """Gradients of x and the kernels. Backwards, too, rows are gathered and never scattered."""
    x, blocks, kernels = residuals

    def step(dkernels: Any, block: Any) -> Any:
        x_RD, owner, dys = block
        added = [
            dkernel.at[owner].add(jnp.dot(x_RD.T, dy, preferred_element_type=jnp.float32))
            for dkernel, dy in zip(dkernels, dys, strict=True)
        ]
        dx_RD = sum(
            jnp.dot(dy, kernel[owner].T, preferred_element_type=jnp.float32)
            for dy, kernel in zip(dys, kernels, strict=True)
        )
        return added, dx_RD

    zeros = [jnp.zeros(kernel.shape, jnp.float32) for kernel in kernels]
    dys = tuple(blocks.rows(dy) for dy in cotangents)
    dkernels, dx_NRD = lax.scan(step, zeros, (blocks.rows(x), blocks.owner_N, dys))
    dx = blocks.copies(dx_NRD)
    dx = dx if x.ndim == 4 else dx.sum(2)
    dkernels = [dk.astype(kernel.dtype) for dk, kernel in zip(dkernels, kernels, strict=True)]
    return dx.astype(x.dtype), None, tuple(dkernels)


routed_products.defvjp(_forward, _gradients)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """Copies of tokens in blocks of rows of one memory each."""

    owner_N: jax.Array  # the memory of each block
    copy_NR: jax.Array  # which copy of the flat [B, T, k] a row is; B T k for none
    row_BTk: jax.Array  # which row of the flat [N, R] a copy is

    def rows(self, x: jax.Array) -> jax.Array:
        """[N, R, D] of [B, T, D], or of [B, T, k, D]; zeros where no copy is."""
        choices = self.row_BTk.shape[2]
        flat = x.reshape(-1, x.shape[-1])
        index_NR = self.copy_NR // choices if x.ndim == 3 else self.copy_NR
        return flat.at[index_NR].get(mode="fill", fill_value=0)

    def copies(self, y_NRX: jax.Array) -> jax.Array:
        """[B, T, k, X] of the rows."""
        return y_NRX.reshape(-1, y_NRX.shape[-1])[self.row_BTk]


def block_rows(copies: int, memories: int) -> int:
    """R, a power of two: a sixteenth of the copies is filled up on average, an eighth at most."""
    wanted = max(1, copies // (8 * memories))
    return min(512, max(16, 1 << (wanted.bit_length() - 1)))


def in_blocks(memory_BTk: jax.Array, memories: int) -> Blocks:
    """The blocks of copies that go to these memories."""
    memory_C = memory_BTk.reshape(-1)
    copies, rows = len(memory_C), block_rows(len(memory_C), memories)
    count = (copies + memories * (rows - 1)) // rows
    is_of_CE = memory_C[:, None] == jnp.arange(memories)[None]
    until_CE = jnp.cumsum(is_of_CE, axis=0, dtype=jnp.int32)
    blocks_E = -(-until_CE[-1] // rows)
    end_E = jnp.cumsum(blocks_E)
    row_CE = until_CE - 1 + (rows * (end_E - blocks_E))[None]
    row_C = jnp.where(is_of_CE, row_CE, 0).sum(1)
    copy_NR = jnp.full(count * rows, copies).at[row_C].set(jnp.arange(copies), unique_indices=True)
    ended_NE = end_E[None] <= jnp.arange(count)[:, None]
    return Blocks(
        owner_N=jnp.minimum(ended_NE.sum(1), memories - 1),
        copy_NR=copy_NR.reshape(count, rows),
        row_BTk=row_C.reshape(memory_BTk.shape),
    )
