"""Strict numerics for every test (no silent rank promotion), and the parametrisation of the op contract."""

import jax

from tests.op_contract import pytest_generate_tests

__all__ = ["pytest_generate_tests"]

jax.config.update("jax_numpy_rank_promotion", "raise")
