"""The stack of residual blocks between a model's input and its head, run as a scan over layers.

    x <- x + mixer(norm(x));   x <- x + mlp(norm(x))            per block; the second half only with
    an MLP

The mixers of the blocks follow a pattern of file names. Its shortest period is one scanned unit, so
that the program holds each distinct block once however deep the network is; blocks left over by the
last incomplete period follow unrolled. The residual stream is float32; norms are computed in
float32; mixers and MLPs see the compute dtype.

What all layers of a mixer share, such as a parameter of the whole network, is a module that the
mixer's class names `Shared`: `Shared(width, layers=L)`, L the layers of this mixer. Called once per
forward pass, it returns arrays with a leading axis of L, and layer l of the mixer is called with
`shared=` their entries l."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import models
from models.parts.mlp import SwiGLU
from models.parts.norms import rms_norm
from models.parts.options import check_choice, check_options
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
    return tuple(sorted(set(names) - {"networks", "parts"}))


def find_mixer(name: str) -> Any:
    """The `Mixer` of models/<name>.py; raises ValueError with the available names if there is
    none."""
    check_choice(
        "a mixer of model.pattern or model.mixers (a file in models/)", name, available_mixers()
    )
    return importlib.import_module(f"models.{name}").Mixer


def shortest_period(names: Sequence[str]) -> int:
    """The smallest p with names[i] == names[i - p] for all i >= p."""
    return next(
        p
        for p in range(1, len(names) + 1)
        if all(names[i] == names[i - p] for i in range(p, len(names)))
    )


class Block(nnx.Module):
    """One residual block: a mixer and, unless mlp is "none", an MLP, each behind its norm."""

    def __init__(
        self,
        name: str,
        width: int,
        *,
        depth: int,
        layer: jax.Array | int,
        options: Mapping[str, Any],
        mlp: str,
        mlp_ratio: float,
        norm_eps: float,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        norm = functools.partial(
            rms_norm, width, eps=norm_eps, axis="embed", rngs=rngs, param_dtype=param_dtype
        )
        common: dict[str, Any] = {
            "depth": depth,
            "rngs": rngs,
            "param_dtype": param_dtype,
            "compute_dtype": compute_dtype,
        }
        mixer = find_mixer(name)
        # Only a mixer whose equations depend on its place in the network asks for it.
        place = {"layer": layer} if "layer" in inspect.signature(mixer.__init__).parameters else {}
        self.compute_dtype = compute_dtype
        self.mixer_norm = norm()
        self.mixer = mixer(width, **common, **place, **options)
        self.mlp_norm = norm() if mlp == "swiglu" else None
        self.mlp = SwiGLU(width, ratio=mlp_ratio, **common) if mlp == "swiglu" else None

    def __call__(
        self,
        x_BTD: jax.Array,
        state: Any,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        shared: Any,
    ) -> tuple[jax.Array, Any]:
        h_BTD = self.mixer_norm(x_BTD).astype(self.compute_dtype)
        given = {} if shared is None else {"shared": shared}
        y_BTD, state = self.mixer(
            h_BTD, state, positions=positions, segment_ids=segment_ids, **given
        )
        x_BTD = x_BTD + y_BTD.astype(jnp.float32)
        if self.mlp is not None and self.mlp_norm is not None:
            x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD).astype(self.compute_dtype)).astype(
                jnp.float32
            )
        return x_BTD, state


class Stack(nnx.Module):
    """`depth` blocks, block i with the mixer pattern[i % len(pattern)]; x_BTD float32 -> float32.

    The state is {"period": a tuple over the blocks of one period, every array with a leading axis
    of repeats, "remainder": a tuple over the blocks after the last whole period}. Parameters are
    stacked like the states, with or without `scan_layers`, which chooses a loop or straight-line
    code for the same computation."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        pattern: Sequence[str],
        mixers: Mapping[str, Mapping[str, Any]],
        mlp: str,
        mlp_ratio: float,
        norm_eps: float,
        scan_layers: bool,
        remat: str,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
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
        check_choice("mlp", mlp, ("swiglu", "none"))
        check_choice("remat", remat, tuple(REMAT_POLICIES))
        for name in dict.fromkeys((*pattern, *mixers)):
            check_options(
                f"mixer {name}", f"model.mixers.{name}", mixers.get(name, {}), find_mixer(name)
            )
        self.scan_layers, self.remat = scan_layers, remat

        names = tuple(pattern[i % len(pattern)] for i in range(depth))
        period = shortest_period(names)
        self.names, self.repeats = names, depth // period
        self.shared = nnx.Dict(
            {
                name: find_mixer(name).Shared(width, layers=names.count(name))
                for name in dict.fromkeys(names)
                if hasattr(find_mixer(name), "Shared")
            }
        )

        def blocks(
            names: Sequence[str], first_layer: jax.Array | int, rngs: nnx.Rngs
        ) -> nnx.List[Block]:
            make = functools.partial(
                Block,
                width=width,
                depth=depth,
                mlp=mlp,
                mlp_ratio=mlp_ratio,
                norm_eps=norm_eps,
                rngs=rngs,
                param_dtype=param_dtype,
                compute_dtype=compute_dtype,
            )
            return nnx.List(
                [
                    make(name, layer=first_layer + i, options=mixers.get(name, {}))
                    for i, name in enumerate(names)
                ]
            )

        @nnx.split_rngs(splits=self.repeats)
        @nnx.vmap(in_axes=(0, 0), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked(rngs: nnx.Rngs, first_layer: jax.Array) -> nnx.List[Block]:
            return blocks(names[:period], first_layer, rngs)

        scanned = self.repeats * period
        self.period = stacked(rngs, jnp.arange(0, scanned, period))
        self.remainder = blocks(names[scanned:], scanned, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: Mapping[str, Any] | None,
        *,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        def run(
            x_BTD: jax.Array, blocks: nnx.List[Block], states: Any, shared: Any
        ) -> tuple[jax.Array, tuple[Any, ...]]:
            finals = []
            for block, block_state, block_shared in zip(
                blocks, states or [None] * len(blocks), shared, strict=True
            ):
                x_BTD, final = block(
                    constrain(x_BTD, "BTD"), block_state, positions, segment_ids, block_shared
                )
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

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token of `batch` sequences."""

        def repeated(leaf: jax.Array) -> jax.Array:
            return jnp.broadcast_to(leaf[None], (self.repeats, *leaf.shape))

        period = tuple(block.mixer.init_state(batch) for block in self.period)
        return {
            "period": jax.tree.map(repeated, period),
            "remainder": tuple(block.mixer.init_state(batch) for block in self.remainder),
        }

    @property
    def state_bytes(self) -> int:
        """Bytes of state per sequence, all layers together."""
        period = sum(block.mixer.state_bytes for block in self.period)
        return self.repeats * period + sum(block.mixer.state_bytes for block in self.remainder)
