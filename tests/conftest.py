"""Strict numerics for every test (no silent rank promotion), and the parametrisation of the op
contract."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.contracts.ops import pytest_generate_tests

__all__ = ["pytest_generate_tests"]

jax.config.update("jax_numpy_rank_promotion", "raise")

# Where few optimisations are asked for, most of the time goes to the newer of two emitters of
# loops; jaxlib 0.11 has no other. Children get this too: their bits are those of a run here.
if jax.config.read("jax_disable_most_optimizations") and jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1"
    )

# Compiled programs hold mappings of memory, of which Linux grants a process 65,530; the next
# program is a crash.
MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = 30_000


@pytest.fixture(autouse=True)
def _forget_programs_before_they_are_too_many() -> Iterator[None]:
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _leave_what_is_kept_to_itself() -> Iterator[None]:
    """What jax remembers grows with every test: to look through it for garbage again and again
    costs a tenth of the time."""
    yield
    gc.collect()
    gc.freeze()
