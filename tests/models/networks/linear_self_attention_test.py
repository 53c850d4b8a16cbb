"""Linear self-attention on prompts of a regression: its definition, and the steps of gradient
descent that it makes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.networks import linear_self_attention as lsa
from tests.support.layers import array


def prompts(
    batch: int = 3, examples: int = 7, dimension: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, examples + 1, dimension))
    y = rng.standard_normal((batch, examples + 1))
    tokens = np.concatenate((x, y[..., None]), axis=-1).astype(np.float32)
    tokens[:, -1, -1] = 0
    return tokens, x, y[:, :-1]


def build_lsa(**model: Any) -> Any:
    config = {"dimension": 4, **model}
    return lsa.build(config, param_dtype="float32", compute_dtype="float32", rngs=nnx.Rngs(0))


def test_linear_self_attention_computes_its_definition():
    model = build_lsa(init_scale=0.5)
    tokens, _, _ = prompts()
    W_PV, W_KQ = array(model.w_pv_LEE)[0], array(model.w_kq_LEE)[0]
    for got, tokens_NE in zip(model(tokens), tokens.astype(np.float64), strict=True):
        E = tokens_NE.T
        f = E + W_PV @ E @ (E.T @ W_KQ @ E) / (E.shape[1] - 1)
        assert float(got) == pytest.approx(f[-1, -1], abs=1e-5)


def test_linear_self_attention_with_constructed_weights_is_one_step_of_gradient_descent():
    model = build_lsa()
    P = np.random.default_rng(1).standard_normal((4, 4))
    model.set_gradient_step(P)
    tokens, x, y = prompts()
    h = np.einsum("bn,bnd->bd", y, x[:, :-1]) / y.shape[1]
    np.testing.assert_allclose(model(tokens), np.einsum("bd,de,be->b", x[:, -1], P, h), atol=1e-5)

    def loss(w):
        return jnp.sum((y[0] - x[0, :-1] @ w) ** 2) / (2 * y.shape[1])

    step = -P @ np.asarray(jax.grad(loss)(jnp.zeros(4)))
    assert float(model(tokens)[0]) == pytest.approx(float(x[0, -1] @ step), abs=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_masked_linear_self_attention_layers_are_steps_of_gradient_descent(depth):
    model = build_lsa(depth=depth, mask_query=True)
    rng = np.random.default_rng(2)
    preconditioners = 0.3 * rng.standard_normal((depth, 4, 4))
    model.set_gradient_steps(list(preconditioners))
    tokens, x, y = prompts()
    for b, got in enumerate(model(tokens)):
        w = np.zeros(4)
        for P in preconditioners:
            w = w + P @ (x[b, :-1].T @ (y[b] - x[b, :-1] @ w)) / y.shape[1]
        assert float(got) == pytest.approx(w @ x[b, -1], abs=1e-4)


def test_linear_self_attention_ignores_the_order_of_examples_and_is_odd_in_the_labels():
    model = build_lsa(init="guaranteed", init_scale=0.5)
    tokens, _, _ = prompts()
    shuffled = np.concatenate((tokens[:, [3, 0, 6, 1, 2, 5, 4]], tokens[:, -1:]), axis=1)
    np.testing.assert_allclose(model(shuffled), model(tokens), atol=1e-6)
    flipped = tokens * np.array([1, 1, 1, 1, -1], np.float32)
    np.testing.assert_allclose(model(flipped), -model(tokens), atol=1e-6)


def test_guaranteed_initialisation_has_the_blocks_of_the_theorem():
    model = build_lsa(init="guaranteed", init_scale=0.25)
    W_PV, W_KQ = array(model.w_pv_LEE)[0], array(model.w_kq_LEE)[0]
    want = np.zeros((5, 5))
    want[-1, -1] = 0.25
    np.testing.assert_allclose(W_PV, want)
    assert np.linalg.norm(W_KQ) == pytest.approx(0.25, rel=1e-5)
    np.testing.assert_allclose(W_KQ, W_KQ.T, atol=1e-7)
    assert np.linalg.eigvalsh(W_KQ).min() > -1e-6 and not W_KQ[-1].any()


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: build_lsa(init="zero"), "init must be one of 'gaussian', 'guaranteed'"),
        (lambda: build_lsa(layers=2), "has no option 'layers'; known options in model: depth"),
        (lambda: build_lsa()(jnp.zeros((2, 5, 4))), r"examples must be \[B, N\+1, 5\]"),
        (
            lambda: build_lsa(mask_query=True).set_gradient_step(np.eye(4)),
            "needs depth=1 and mask_query=False",
        ),
        (
            lambda: build_lsa(mask_query=True).set_gradient_steps([np.eye(4)] * 2),
            "one matrix per layer",
        ),
        (
            lambda: build_lsa().set_gradient_step(np.eye(3)),
            r"a preconditioner must be \[4, 4\]; got \(3, 3\)",
        ),
    ],
)
def test_linear_self_attention_rejects_what_it_cannot_do(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()
