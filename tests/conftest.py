"""Strict numerics for every test: no silent rank promotion; a persistent compilation cache only if the caller set one."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
