"""The stack of residual blocks between a model's input and its head, run as a scan over layers.

The mixers of the blocks follow a pattern of file names. The shortest period, of mixers and of what
else differs between blocks, is one scanned unit, so that the program holds each distinct block once
however deep the network is; blocks left over by the last incomplete period follow unrolled.

What all layers of a mixer share, such as a parameter of the whole network, is a module that the
mixer's class names `Shared`: `Shared(width, layers=L)`, L the layers of this mixer. Called once per
forward pass, it returns arrays with a leading axis of L, and layer l of the mixer is called with
`shared=` their entries l."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import models
from models.blocks.block import Block, BlockOptions, Context
from models.parts.options import check_choice, check_options
from ops.framework import segments
from ops.framework.sequence_parallel import CARRIED
from ops.framework.sharding import constrain

# What came from other devices is small and took a collective: it is kept by every policy.
_CARRIED = jax.checkpoint_policies.save_only_these_names(CARRIED)
# What the backward pass keeps of a block: everything, its input alone, or its matrix products too.
REMAT_POLICIES = {
    "none": None,
    "full": _CARRIED,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _CARRIED
    ),
}


@functools.cache
def available_mixers() -> tuple[str, ...]:
    """Names of the files and packages in models/ that define a `Mixer`: all papers."""
    names = (module.name for module in pkgutil.iter_modules(models.__path__))
    return tuple(sorted(set(names) - {"blocks", "networks", "parts", "weights"}))


def find_mixer(name: str) -> Any:
    """The `Mixer` of models/<name>.py; raises ValueError with the available names if there is
    none."""
    check_choice(
        "a mixer of model.pattern or model.mixers (a file in models/)", name, available_mixers()
    )
    return importlib.import_module(f"models.{name}").Mixer


def shortest_period(names: Sequence[Any]) -> int:
    """The smallest p with names[i] == names[i - p] for all i >= p."""
    return next(
        p
        for p in range(1, len(names) + 1)
        if all(names[i] == names[i - p] for i in range(p, len(names)))
    )


class Stack(nnx.Module):
    """`depth` blocks, block i with the mixer pattern[i % len(pattern)]; x_BTD float32 -> float32.

    The state is {"period": a tuple over the blocks of one period, every array with a leading axis
    of repeats, "remainder": a tuple over the blocks after the last whole period}. Parameters are
    stacked like the states, with or without `scan_layers`, which chooses a loop or straight-line
    code for the same computation. `before` and `after` are the blocks of a network's other stacks,
    among which these are layer `before` and following."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        pattern: Sequence[str],
        mixers: Mapping[str, Mapping[str, Any]],
        block: BlockOptions,
        scan_layers: bool,
        remat: str,
        before: int = 0,
        after: int = 0,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        check_choice("remat", remat, tuple(REMAT_POLICIES))
        check_pattern(pattern, depth)
        classes = {name: find_mixer(name) for name in dict.fromkeys((*pattern, *mixers))}
        for name, mixer in classes.items():
            check_options(f"mixer {name}", f"model.mixers.{name}", mixers.get(name, {}), mixer)
        names = tuple(pattern[i % len(pattern)] for i in range(depth))
        own = tuple(block.of_layer(before + i, name) for i, name in enumerate(names))
        period = shortest_period(tuple(zip(names, own, strict=True)))
        self.scan_layers, self.remat = scan_layers, remat
        self.names, self.repeats = names, depth // period
        self.conditioned = block.condition_width > 0
        self.shared = nnx.Dict(
            {
                name: classes[name].Shared(width, layers=names.count(name))
                for name in dict.fromkeys(names)
                if hasattr(classes[name], "Shared")
            }
        )

        def blocks(place: slice, first_layer: jax.Array | int, rngs: nnx.Rngs) -> nnx.List[Block]:
            return nnx.List(
                Block(
                    classes[name],
                    width,
                    depth=before + depth + after,
                    layer=before + first_layer + i,
                    mixer_options=mixers.get(name, {}),
                    options=options,
                    rngs=rngs,
                    param_dtype=param_dtype,
                    compute_dtype=compute_dtype,
                )
                for i, (name, options) in enumerate(zip(names[place], own[place], strict=True))
            )

        @nnx.split_rngs(splits=self.repeats)
        @nnx.vmap(in_axes=(0, 0), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked(rngs: nnx.Rngs, first_layer: jax.Array) -> nnx.List[Block]:
            return blocks(slice(period), first_layer, rngs)

        scanned = self.repeats * period
        self.period = stacked(rngs, jnp.arange(0, scanned, period))
        self.remainder = blocks(slice(scanned, None), scanned, rngs)
        # Asked of the mixers, not of their classes: it may be an option.
        causal = {name: b.mixer.causal for name, b in zip(names[:period], self.period, strict=True)}
        self.without_state = tuple(name for name in causal if not causal[name])

    def __call__(
        self,
        x_BTD: jax.Array,
        state: Mapping[str, Any] | None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        condition: jax.Array | None = None,
        grid: tuple[int, ...] | None = None,
        mask: jax.Array | None = None,
        keeps: str = "nothing",
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The stream after the last block and the state after the last token, where
        `keeps` something a `Kept` for each block.

        `state` None is the state before the first token; `Context` explains the other arguments.
        Raises ValueError for a missing or superfluous condition, and for another `keeps`."""
        check_choice("keeps", keeps, ("nothing", "outputs", "attention"))
        if self.conditioned != (condition is not None):
            raise ValueError(
                "condition must be [B, C] for a stack with condition_width=C and None without; got"
                f" {None if condition is None else condition.shape} for a stack"
                f" {'with' if self.conditioned else 'without'} a condition"
            )
        apart = segment_ids if mask is None else padding_apart(segment_ids, mask)
        context = Context(positions, segment_ids, condition, grid, mask, apart, keeps)

        def run(
            x_BTD: jax.Array, blocks: nnx.List[Block], states: Any, shared: Any
        ) -> tuple[jax.Array, tuple[Any, ...]]:
            finals = []
            for block, block_state, block_shared in zip(
                blocks, states or [None] * len(blocks), shared, strict=True
            ):
                x_BTD, final = block(constrain(x_BTD, "BTD"), block_state, block_shared, context)
                finals.append(final)
            return x_BTD, tuple(finals)

        def checkpointed(prevent_cse: bool) -> Any:
            if self.remat == "none":
                return run
            return nnx.remat(
                run, policy=REMAT_POLICIES[self.remat], prevent_cse=prevent_cse, graph=False
            )

        state = state or {"period": None, "remainder": None}
        period_shared, remainder_shared = self.shared_by_block()
        # In a loop nothing can be merged with the forward pass, and the barrier against that only
        # costs time. graph=False: the blocks are scanned as plain pytrees, of which only changed
        # variables come back, not a copy of every parameter.
        x_BTD, period_states = nnx.scan(
            checkpointed(prevent_cse=not self.scan_layers),
            in_axes=(nnx.Carry, 0, 0, 0),
            out_axes=(nnx.Carry, 0),
            unroll=1 if self.scan_layers else True,
            graph=False,
        )(x_BTD, self.period, state["period"], period_shared)
        x_BTD, remainder_states = checkpointed(prevent_cse=True)(
            x_BTD, self.remainder, state["remainder"], remainder_shared
        )
        return x_BTD, {"period": period_states, "remainder": remainder_states}

    def shared_by_block(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What each block of the period is given of `shared`, with a leading axis of repeats, and
        of the remainder.

        None for a mixer that shares nothing.
        """
        # By name: nnx.capture adds entries of its own to the dictionary.
        shared = [name for name in dict.fromkeys(self.names) if name in self.shared]
        values = {name: self.shared[name]() for name in shared}
        period, depth = len(self.period), len(self.names)
        scanned = self.repeats * period

        def entries(i: int) -> Any:
            name = self.names[i]
            first, step = (self.names[:end].count(name) for end in (i, period))
            place = slice(first, self.repeats * step, step) if i < period else first
            return jax.tree.map(lambda leaf: leaf[place], values.get(name))

        return (
            tuple(entries(i) for i in range(period)),
            tuple(entries(i) for i in range(scanned, depth)),
        )

    @property
    def causal(self) -> bool:
        """Whether every mixer is causal, so that the stack has a state."""
        return not self.without_state

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token of `batch` sequences.

        Raises ValueError for mixers that are not causal, and names them."""
        if self.without_state:
            raise ValueError(
                f"a stack with {', '.join(self.without_state)} has no state to decode from: the"
                " mixer is not causal, a token's output depends on later tokens"
            )

        def repeated(leaf: jax.Array) -> jax.Array:
            return jnp.broadcast_to(leaf[None], (self.repeats, *leaf.shape))

        period = tuple(block.mixer.init_state(batch) for block in self.period)
        return {
            "period": jax.tree.map(repeated, period),
            "remainder": tuple(block.mixer.init_state(batch) for block in self.remainder),
        }


def padding_apart(segment_ids: jax.Array | None, mask_BT: jax.Array) -> jax.Array:
    """Segment ids [B, T] int32 that change where the given ones do and where padding begins or
    ends."""
    number_BT = 0 if segment_ids is None else segments.numbers(segment_ids)
    return 2 * number_BT + mask_BT.astype(jnp.int32)


def check_pattern(pattern: Sequence[str], depth: int) -> None:
    """Raises ValueError unless `pattern` is a sequence of 1 to `depth` names."""
    if isinstance(pattern, str):
        raise ValueError(
            f"pattern must be a tuple of mixer names; got the string {pattern!r}:"
            f" write ({pattern!r},)"
        )
    if not 1 <= len(pattern) <= depth:
        raise ValueError(
            f"pattern must name between 1 and depth={depth} mixers, so that each"
            f" occurs; got {pattern!r}"
        )


def state_bytes(module: Any) -> int | None:
    """Bytes of state per sequence that a network or a mixer carries from token to token; None if it
    is not causal and has none."""
    if not module.causal:
        return None
    state = jax.eval_shape(lambda: module.init_state(1))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
