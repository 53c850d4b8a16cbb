"""Time and memory of classifiers of images, for tables."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.tables.computations.rounds import fastest
from models.blocks.folding import fold_norms
from models.networks import image_classifier

MIXERS: dict[str, dict[str, Any]] = {
    "vit": {"heads": 3},
    "vig": {},
    "soft": {"window": 1, "size_per_head": 64},
    "flowformer": {"heads": 3, "causal": False},
    "slab": {"heads": 3},
}


def by_tokens(*, seed: int, mixer: str, side: int) -> dict[str, dict[str, float]]:
    """{"image": {"ms", "mib"}} of the logits of one image of side x side tokens, with two layers of
    width 192 in float32: the fastest of a few rounds, and the memory for what is computed on the
    way."""
    options = dict(MIXERS[mixer])
    if mixer == "soft":  # 49 landmarks, whatever the size
        options["window"] = side // 7
    model = _classifier(seed, side, {"pattern": (mixer,), "mixers": {mixer: options}})
    milliseconds, compiled = _timed(model, side, batch=1)
    return {
        "image": {"ms": milliseconds, "mib": compiled.memory_analysis().temp_size_in_bytes / 2**20}
    }


def folded(*, seed: int, norm: str) -> dict[str, dict[str, float]]:
    """{"batch": {"ms", "folded_ms", "difference"}} of the logits of 16 images of 14 x 14 tokens
    with SLAB's attention, two layers of width 192, before and after the norms are folded;
    difference is the largest of all logits over the largest logit, 0 where nothing folds."""
    options = {"pattern": ("slab",), "mixers": {"slab": MIXERS["slab"]}, "norm": norm}
    model = _classifier(seed, 14, options)
    key = jax.random.key(seed)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
        variable[...] += jax.random.uniform(key, variable.shape)
    images = jax.random.normal(key, (16, 14, 14, 3))
    before, want = _timed(model, 14, batch=16)[0], model(images)
    if norm == "layer":
        return {"batch": {"ms": before, "folded_ms": before, "difference": 0.0}}
    fold_norms(model)
    difference = jnp.max(jnp.abs(model(images) - want)) / jnp.max(jnp.abs(want))
    after = _timed(model, 14, batch=16)[0]
    return {"batch": {"ms": before, "folded_ms": after, "difference": float(difference)}}


def _classifier(seed: int, side: int, options: dict[str, Any]) -> Any:
    config = {"width": 192, "depth": 2, "patch": 1, "mlp": "gelu", "norm": "layer"}
    sizes = {"classes": 10, "channels": 3, "height": side, "width": side}
    model = image_classifier.build(
        config | options,
        rngs=nnx.Rngs(seed),
        param_dtype="float32",
        compute_dtype="float32",
        **sizes,
    )
    model.eval()
    return model


def _timed(model: Any, side: int, batch: int) -> tuple[float, Any]:
    """Milliseconds of the logits of a batch, and the compiled program."""
    graphdef, state = nnx.split(model)

    def logits(state: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(images)

    images = jnp.ones((batch, side, side, 3))
    compiled: Callable[..., Any] = jax.jit(logits).lower(state, images).compile()
    return 1e3 * fastest(lambda: compiled(state, images)), compiled
