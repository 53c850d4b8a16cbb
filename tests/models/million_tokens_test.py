"""A million tokens: the GPU kernels, interpreted, beside the chunked forms in float32: errors do
not grow with time."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.gpu import relative_l2
from ops import delta_rule, gated_linear_attention, selective_scan
from ops.gpu import pieces

LENGTH = 1 << 20
# Interpreted, a step of a kernel costs as much as the arrays are long.
PIECE = 1 << 12


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def attention_inputs():
    q, k, v, do = (normal(seed, 1, LENGTH, 1, 16) for seed in range(4))
    return q, k / jnp.linalg.norm(k, axis=-1, keepdims=True), v, do


def gla():
    q, k, v, do = attention_inputs()
    decay_log = -jnp.exp(normal(4, 1, LENGTH, 1, 16) - 5)
    return gated_linear_attention, {"q": q, "k": k, "v": v, "decay_log": decay_log}, do


def delta():
    q, k, v, do = attention_inputs()
    beta = jax.nn.sigmoid(normal(5, 1, LENGTH, 1))
    return delta_rule, {"q": q, "k": k, "v": v, "beta": beta}, do


def mamba():
    x, do = (normal(seed, 1, LENGTH, 8) for seed in (0, 1))
    b, c = (normal(seed, 1, LENGTH, 16) for seed in (2, 3))
    inputs = {
        "x": x,
        "delta": jax.nn.softplus(normal(4, *x.shape) - 3),
        "A": -jnp.broadcast_to(jnp.arange(1.0, 17), (8, 16)),
        "B": b,
        "C": c,
    }
    return selective_scan, inputs, do


@pytest.mark.full
@pytest.mark.parametrize("case", [gla, delta, mamba], ids=lambda case: case.__name__)
def test_a_million_tokens_forward_and_backward(case):
    op, inputs, do = case()

    def results(implementation):
        def loss(inputs):
            o, _ = op(**inputs, implementation=implementation)
            return jnp.sum(jnp.sin(o) * do), o

        gradients, o = jax.jit(jax.grad(loss, has_aux=True))(inputs)
        return {"output": o, **gradients}

    with mock.patch.object(pieces, "MAX_TOKENS", PIECE):
        got = results("pallas_gpu")
    wanted = results("xla")
    errors = {name: relative_l2(got[name], wanted[name]) for name in wanted}
    assert errors.pop("output") <= 1e-5
    assert max(errors.values()) <= 5e-5, errors
