"""Time of a forecaster's step by the number of variates, for tables."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.tables.computations.rounds import fastest
from models.networks import forecaster

CONTEXT, HORIZON, WIDTH = 96, 96, 128
ENCODERS: dict[str, dict[str, Any]] = {
    "s_mamba": {"state_size": 16},
    "s_mamba, one direction": {"state_size": 16, "bidirectional": False},
    "itransformer": {"dropout": 0.0},
}


def measure(*, seed: int, encoder: str, variates: int) -> dict[str, dict[str, float]]:
    """{"step": {"ms", "windows_per_second"}} of one window's squared error with its gradients: two
    layers of width 128, 96 rows read and forecast, float32. The fastest of a few rounds, for what
    else a machine does only adds time."""
    mixer = encoder.partition(",")[0]
    model = forecaster.build(
        {
            "width": WIDTH,
            "depth": 2,
            "pre_norm": False,
            "mlp": "gelu",
            "mlp_width": WIDTH,
            "pattern": (mixer,),
            "mixers": {mixer: ENCODERS[encoder]},
        },
        variates=variates,
        context=CONTEXT,
        horizon=HORIZON,
        calendar=0,
        rngs=nnx.Rngs(seed),
        param_dtype="float32",
        compute_dtype="float32",
    )
    graphdef, params, others = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params: Any, history_BLV: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(nnx.merge(graphdef, params, others)(history_BLV)))

    history_BLV = jax.random.normal(jax.random.key(seed), (1, CONTEXT, variates))
    seconds = fastest(lambda: gradient(params, history_BLV))
    return {"step": {"ms": 1e3 * seconds, "windows_per_second": 1 / seconds}}
