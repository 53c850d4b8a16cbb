"""A mixture of experts equals a loop over tokens and experts, and drops nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.objectives.objective import Report
from models.blocks.block import BlockOptions
from models.blocks.experts import Experts
from tests.support.layers import FLOAT32

EXPERTS, WIDTH = 5, 6


def made(**options: Any) -> Experts:
    given: dict[str, Any] = {"experts_per_token": 2, "weights": "normalised", "shared": 3}
    given |= {"scale": 1.0, "shared_gate": True}
    given |= {"balance_weight": 0.5, "inner": 4, "depth": 1, **FLOAT32} | options
    return Experts(WIDTH, experts=EXPERTS, rngs=nnx.Rngs(0), **given)


def enlarged(experts: Experts) -> Experts:
    """Weights of about 1, so that no part is lost in another."""
    params = nnx.state(experts, nnx.Param)
    nnx.update(experts, jax.tree.map(lambda leaf: 20 * leaf, params))
    return experts


def loop(experts: Any, x_ND: jax.Array, weights: str) -> jax.Array:
    """Token by token."""
    found = []
    for x_D in x_ND:
        logits_E = x_D @ experts.router.logits.kernel[...]
        ranked_E = p_E = jax.nn.softmax(logits_E)
        if weights.startswith("sigmoid"):
            p_E = 1 / (1 + jnp.exp(-logits_E))
            ranked_E = p_E + experts.router.bias_M[...]
        chosen = jnp.argsort(-ranked_E)[:2]
        total = sum(p_E[e] for e in chosen) if weights.endswith("normalised") else 1.0
        total /= experts.router.scale
        y_D = jnp.zeros(WIDTH)
        for e in chosen:
            gate, up, down = (
                k[...][e] for k in (experts.gate_EDM, experts.up_EDM, experts.down_EMD)
            )
            y_D += p_E[e] / total * ((jax.nn.silu(x_D @ gate) * (x_D @ up)) @ down)
        shared = experts.shared
        h_M = jax.nn.silu(x_D @ shared.gate.kernel[...]) * (x_D @ shared.up.kernel[...])
        weight = 1.0
        if experts.shared_gate is not None:
            weight = jax.nn.sigmoid(x_D @ experts.shared_gate.kernel[...])
        found.append(y_D + weight * (h_M @ shared.down.kernel[...]))
    return jnp.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("normalised", {}),
        ("sigmoid_normalised", {"scale": 1.5, "shared_gate": False}),
        pytest.param("softmax", {}, marks=pytest.mark.full),
    ],
)
def test_output_and_gradients_are_those_of_a_loop(weights: str, options: dict[str, Any]) -> None:
    x_BTD = jax.random.normal(jax.random.key(1), (2, 3, WIDTH))
    cotangent = jax.random.normal(jax.random.key(2), x_BTD.shape)
    experts: Any = enlarged(made(weights=weights, **options))
    if weights.startswith("sigmoid"):  # enough of a bias to change the choice
        experts.router.bias_M[...] = jnp.linspace(0, 0.5, EXPERTS)
    graphdef, params = nnx.split(experts)

    def whole(params: Any, x_BTD: jax.Array) -> jax.Array:
        return jnp.vdot(cotangent, nnx.merge(graphdef, params)(x_BTD))

    def one_by_one(params: Any, x_BTD: jax.Array) -> jax.Array:
        found = loop(nnx.merge(graphdef, params), x_BTD.reshape(-1, WIDTH), weights)
        return jnp.vdot(cotangent, found.reshape(x_BTD.shape))

    found, expected = (
        jax.value_and_grad(f, argnums=(0, 1))(params, x_BTD) for f in (whole, one_by_one)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


def test_balance_is_that_of_the_router_and_no_token_is_dropped() -> None:
    """A router that is indifferent has the loss k; all tokens to one expert are all computed."""
    experts: Any = made(shared=0, experts_per_token=1)
    experts.router.logits.kernel[...] = jnp.zeros((WIDTH, EXPERTS)).at[:, 3].set(100.0)
    x_BTD = jnp.abs(jax.random.normal(jax.random.key(1), (1, 40, WIDTH))) + 0.1
    y_BTD, reports = nnx.capture(lambda model: model(x_BTD), Report)(experts)
    values = {path[-1]: variable[...] for path, variable in nnx.to_flat_state(reports)}
    assert values["auxiliary_loss"] == pytest.approx(0.5 * EXPERTS)
    assert values["routing_entropy"] == 0
    gate, up, down = (k[...][3] for k in (experts.gate_EDM, experts.up_EDM, experts.down_EMD))
    expected = (jax.nn.silu(x_BTD @ gate) * (x_BTD @ up)) @ down
    np.testing.assert_allclose(y_BTD, expected, rtol=1e-4, atol=1e-7)
    experts.router.logits.kernel[...] = jnp.zeros((WIDTH, EXPERTS))
    _, reports = nnx.capture(lambda model: model(x_BTD), Report)(experts)
    values = {path[-1]: variable[...] for path, variable in nnx.to_flat_state(reports)}
    assert values["auxiliary_loss"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp": "experts"}, "experts_per_token must be in 1..experts=0; got 0"),
        ({"mlp": "experts", "experts": 2, "experts_per_token": 3}, "in 1..experts=2; got 3"),
        (
            {"mlp": "experts", "experts": 2, "experts_per_token": 1, "dense_layers": (0,)},
            r"dense_layers and dense_width must be given both or neither; got \(0,\) and 0",
        ),
        ({"experts": 2}, "experts is for mlp='experts'; got mlp='swiglu'"),
    ],
)
def test_impossible_experts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockOptions(**options)
