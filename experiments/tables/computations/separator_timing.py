"""Time of a separator's step by the length of a sound, for tables."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.tables.computations.rounds import fastest
from models.networks import separator as separators

RATE = 8_000
MOSSFORMER: dict[str, Any] = {
    "group": 128,
    "qk_size": 32,
    "rotary_size": 16,
    "recurrent_width": 32,
    "order": 10,
    "dropout": 0.0,
}
# separator -> pattern, options of its mixer, of its blocks
SEPARATORS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{
        kind: ("mossformer2", MOSSFORMER | {"recurrent": kind}, {"norm": "none", "mlp": "none"})
        for kind in ("none", "dense")
    },
    "vit": ("vit", {"heads": 4}, {"norm": "layer", "mlp": "gelu"}),
}


def measure(*, seed: int, separator: str, seconds: float) -> dict[str, dict[str, float]]:
    """{"step": {"ms", "audio_seconds_per_second"}} of the mean square of the sources of one mixture
    with its gradients: two blocks of width 64, float32. The fastest of a few rounds, for what else
    a machine does only adds time."""
    mixer, options, block = SEPARATORS[separator]
    model = separators.build(
        {"width": 64, "depth": 2, "pattern": (mixer,), "mixers": {mixer: options}, **block},
        sources=2,
        rngs=nnx.Rngs(seed),
        param_dtype="float32",
        compute_dtype="float32",
    )
    graphdef, params, others = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params: Any, mixture_BT: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(nnx.merge(graphdef, params, others)(mixture_BT)))

    mixture_BT = jax.random.normal(jax.random.key(seed), (1, round(seconds * RATE)))
    taken = fastest(lambda: gradient(params, mixture_BT))
    return {"step": {"ms": 1e3 * taken, "audio_seconds_per_second": seconds / taken}}
