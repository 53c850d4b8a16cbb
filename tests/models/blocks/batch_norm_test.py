"""Norms of batches against float64 sums, their running statistics, and the schedule of PRepBN."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.blocks.batch_norm import BatchNorm, ProgressiveBatchNorm, RepBatchNorm
from models.parts.variables import StepsBefore, set_steps_before
from tests.support.layers import array

X = np.random.default_rng(0).normal(1.0, 2.0, (3, 5, 4)).astype(np.float32)
MASK = np.random.default_rng(1).random((3, 5)) < 0.6
FLOAT32: Any = jnp.float32


def random_numbers(norm: Any) -> Any:
    """The norm with other parameters than ones and zeros."""
    rng = np.random.default_rng(2)
    for _, param in nnx.to_flat_state(nnx.state(norm, nnx.Param)):
        param[...] = jnp.asarray(rng.normal(1.0, 0.5, param.shape), FLOAT32)
    return norm


def progressive(steps: int = 4, warmup_steps: int = 2) -> Any:
    options: Any = {"eta": 1.0, "steps": steps, "warmup_steps": warmup_steps, "rngs": nnx.Rngs(0)}
    return random_numbers(ProgressiveBatchNorm(4, eps=1e-5, param_dtype=FLOAT32, **options))


def batch_norm(norm: Any, x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    mean, var = tokens.mean(0), tokens.var(0)
    return (x - mean) / np.sqrt(var + norm.eps) * array(norm.scale) + array(norm.bias)


def layer_norm(norm: Any, x: np.ndarray) -> np.ndarray:
    apart = x - x.mean(-1, keepdims=True)
    return apart / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * array(norm.scale) + array(norm.bias)


@pytest.mark.parametrize("mask", [None, MASK])
def test_statistics_are_those_of_the_tokens_that_are_there(mask):
    norm: Any = random_numbers(BatchNorm(4, eps=1e-5, param_dtype=FLOAT32))
    tokens = X.reshape(-1, 4).astype(np.float64) if mask is None else X[mask].astype(np.float64)
    filled = X if mask is None else np.where(mask[..., None], X, np.nan).astype(np.float32)
    got = np.asarray(norm(jnp.asarray(filled), mask))
    there = slice(None) if mask is None else mask
    np.testing.assert_allclose(got[there], batch_norm(norm, X, tokens)[there], atol=2e-6)
    np.testing.assert_allclose(norm.mean[...], 0.1 * tokens.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * tokens.var(0, ddof=1), rtol=1e-5)

    norm.eval()
    g, shift = norm.affine()
    want = np.asarray(g) * X + np.asarray(shift)
    np.testing.assert_allclose(norm(jnp.asarray(X)), want, atol=3e-6)


def test_a_mask_that_hides_everything_changes_no_statistics():
    norm: Any = BatchNorm(4, eps=1e-5, param_dtype=FLOAT32)
    assert np.isfinite(norm(jnp.asarray(X), np.zeros((3, 5), bool))).all()
    assert (array(norm.mean) == 0).all() and (array(norm.var) == 1).all()


def test_rep_batch_norm_adds_eta_x_and_is_batch_norm_with_other_numbers():
    norm: Any = random_numbers(RepBatchNorm(4, eps=1e-5, eta=1.0, param_dtype=FLOAT32))
    got, eta = np.asarray(norm(jnp.asarray(X), MASK)), array(norm.eta)
    want = batch_norm(norm.batch, X, X[MASK].astype(np.float64)) + eta * X
    np.testing.assert_allclose(got[MASK], want[MASK], atol=3e-6)
    np.testing.assert_allclose(got[~MASK], (1 + eta) * X[~MASK], rtol=1e-6)

    # RepBN(x) = BN(x; gamma + eta s, beta + eta mu), s the standard deviation.
    norm.eval()
    got, s = norm(jnp.asarray(X)), np.sqrt(array(norm.batch.var) + 1e-5)
    other: Any = norm.batch
    other.scale[...] = jnp.asarray(array(other.scale) + eta * s, FLOAT32)
    other.bias[...] = jnp.asarray(array(other.bias) + eta * array(other.mean), FLOAT32)
    np.testing.assert_allclose(got, other(jnp.asarray(X)), atol=3e-6)


def test_progressive_batch_norm_goes_from_layer_norm_to_rep_batch_norm_in_steps():
    # Two steps of LN alone, then lam = 1, 3/4, 1/2, 1/4, 0, 0.
    for step, lam in enumerate((1, 1, 1, 0.75, 0.5, 0.25, 0, 0)):
        norm = progressive()
        set_steps_before(norm, jnp.int32(step))
        x, batch, eta = X.astype(np.float64), norm.rep.batch, array(norm.rep.eta)
        rep = batch_norm(batch, x, x.reshape(-1, 4)) + eta * x
        want = lam * layer_norm(norm.layer, x) + (1 - lam) * rep
        np.testing.assert_allclose(norm(jnp.asarray(X)), want, atol=4e-6)
        # In the warm-up BN is not touched; while lam is 1 after it, its statistics move.
        assert (array(batch.mean) != 0).any() == (step >= 2)
    norm = progressive()
    norm.eval()
    np.testing.assert_array_equal(norm(jnp.asarray(X)), norm.rep(jnp.asarray(X)))


def test_without_steps_it_is_rep_batch_norm_at_once():
    norm = progressive(steps=0, warmup_steps=0)
    np.testing.assert_array_equal(norm(jnp.asarray(X)), norm.rep(jnp.asarray(X)))


def test_the_step_reaches_every_scanned_layer():
    counters = StepsBefore(jnp.zeros(3, jnp.int32))
    module = nnx.Dict({"a": nnx.Dict({"b": counters})})
    jax.jit(lambda step: set_steps_before(module, step))  # traceable
    set_steps_before(module, jnp.int32(7))
    np.testing.assert_array_equal(counters[...], [7, 7, 7])
