"""A forecaster over a pattern of mixers: all rows of the horizon at once.

    mu, sigma = mean, sqrt(variance + 1e-5) of each variate over the history;  x <- (x - mu) / sigma
    tokens="variates":  E_v = x_v W + b,  x_v in R^L the history of variate v;  calendar features
                        are further tokens, embedded by the same W
                        y_v = norm(stack(E))_v W_out + b_out in R^S
    tokens="time":      E_t = [x_t, calendar_t] W + b,  x_t in R^V row t
                        y = norm(stack(E))_L W_out + b_out in R^(S V), read at the last row
    forecast = y sigma + mu

The first is the inverted embedding of iTransformer (Liu et al., ICLR 2024, arXiv 2310.06625), for
mixers that are not causal: its weights know neither how many variates there are nor, but for the
mixers, their order. The second is for causal mixers along time. Calendar features are not
normalised. mu, sigma: after Kim et al., "Reversible Instance Normalization", ICLR 2022, without the
learned scale; no gradient goes through mu. W and W_out start as U(+-fan_in^-1/2), as in the
released code of both papers.

There is no state: a forecast is made of a whole history."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.backbone import Backbone, build_network
from models.blocks.block import BlockOptions
from models.parts.options import Epsilon, check_choice
from models.parts.projections import FAN_IN_UNIFORM, fan_in_bias, projection

VARIANCE_EPS = 1e-5


def standardised(history_BLV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x - mu) / sigma, mu and sigma [B, 1, V] of each history, float32."""
    x_BLV = jnp.asarray(history_BLV, jnp.float32)
    mean_B1V = jax.lax.stop_gradient(jnp.mean(x_BLV, axis=1, keepdims=True))
    x_BLV = x_BLV - mean_B1V
    sigma_B1V = jnp.sqrt(jnp.var(x_BLV, axis=1, keepdims=True) + VARIANCE_EPS)
    return x_BLV / sigma_B1V, mean_B1V, sigma_B1V


def check_inputs(
    history_BLV: jax.Array, calendar_BLC: jax.Array | None, context: int, calendar: int
) -> None:
    """Raises ValueError unless the history has `context` rows and its calendar `calendar` features
    in each."""
    if history_BLV.ndim != 3 or history_BLV.shape[1] != context:
        raise ValueError(f"history must be [B, {context}, V]; got {history_BLV.shape}")
    got = None if calendar_BLC is None else calendar_BLC.shape
    if got != ((*history_BLV.shape[:2], calendar) if calendar else None):
        expected = f"[B, {context}, {calendar}] beside the history" if calendar else "None"
        raise ValueError(f"calendar must be {expected}; got {got} for {history_BLV.shape}")


class Forecaster(Backbone):
    """Histories of any number of variates (tokens="time": of the task's) to forecasts; see `build`
    for the options."""

    causal = False

    def __init__(
        self,
        *,
        variates: int,
        context: int,
        horizon: int,
        calendar: int,
        width: int,
        tokens: str = "variates",
        instance_norm: bool = True,
        norm: str = "layer",
        norm_eps: Epsilon = 1e-5,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        **backbone: Any,
    ):
        check_choice("tokens", tokens, ("variates", "time"))
        self.tokens, self.instance_norm = tokens, instance_norm
        self.context, self.horizon, self.calendar = context, horizon, calendar
        inverted = tokens == "variates"
        inputs = context if inverted else variates + calendar
        outputs = horizon if inverted else horizon * variates
        dense: dict[str, Any] = {
            "init": FAN_IN_UNIFORM,
            "bias": True,
            "rngs": rngs,
            "param_dtype": param_dtype,
            "compute_dtype": jnp.float32,
        }
        start = fan_in_bias(inputs)
        super().__init__(
            projection(inputs, width, (None, "embed"), bias_init=start, **dense),
            width=width,
            norm=norm,
            norm_eps=norm_eps,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            **backbone,
        )
        # Also behind blocks that end with a norm: so have both papers.
        last = BlockOptions(norm=norm, norm_eps=norm_eps)
        self.norm = last.make_norm(width, rngs=rngs, param_dtype=param_dtype)
        start = fan_in_bias(width)
        self.head = projection(width, outputs, ("embed", None), bias_init=start, **dense)

    def __call__(self, history_BLV: jax.Array, calendar_BLC: jax.Array | None = None) -> jax.Array:
        """Forecasts [B, S, V], float32, of histories [B, L, V] with their calendar [B, L, C] (None
        for a task without one). Raises ValueError for other shapes."""
        check_inputs(history_BLV, calendar_BLC, self.context, self.calendar)
        batch, _, variates = history_BLV.shape
        x_BLV, mean_B1V, sigma_B1V = jnp.asarray(history_BLV, jnp.float32), 0.0, 1.0
        if self.instance_norm:
            x_BLV, mean_B1V, sigma_B1V = standardised(history_BLV)
        if calendar_BLC is not None:
            x_BLV = jnp.concatenate((x_BLV, calendar_BLC.astype(jnp.float32)), axis=-1)
        if self.tokens == "variates":
            x_BND, _ = self.hidden(jnp.swapaxes(x_BLV, 1, 2))
            y_BVS = self.head(self.norm(x_BND[:, :variates]))
            y_BSV = jnp.swapaxes(y_BVS, 1, 2)
        else:
            x_BLD, _ = self.hidden(x_BLV)
            y_BSV = self.head(self.norm(x_BLD[:, -1])).reshape(batch, self.horizon, variates)
        return y_BSV * sigma_B1V + mean_B1V


def build(
    model_config: Mapping[str, Any],
    *,
    variates: int,
    context: int,
    horizon: int,
    calendar: int,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
) -> Forecaster:
    """The model of a config's `model` section (without its name), with the options of
    models/blocks/backbone.py and

    tokens           "variates": a token is the whole history of a variate; "time": a token is a row
    instance_norm    whether histories are standardised, each by its own mean and variance

    Raises ValueError for unknown, missing or impossible options, with what is possible."""
    return build_network(
        Forecaster,
        "forecaster",
        model_config,
        variates=variates,
        context=context,
        horizon=horizon,
        calendar=calendar,
        rngs=rngs,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )
