"""Strict numerics for every test (no silent rank promotion), and the parametrisation of the op
contract."""

import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.contracts.ops import pytest_generate_tests

__all__ = ["pytest_generate_tests"]

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiled programs hold mappings of memory, of which Linux grants a process 65,530; the next
# program is a crash.
MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = 30_000


@pytest.fixture(autouse=True)
def _forget_programs_before_they_are_too_many() -> Iterator[None]:
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()
