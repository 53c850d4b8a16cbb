"""Realistic arguments of ops: what `ops/<op>/examples.py` has, and what several of them share.

Benchmarks on a CPU or a GPU, programs that are compiled ahead of time, and tests take sizes and
arguments of an op from its examples.py, which has

    SHAPES          sizes by name, by name of the shape: "test" (those of the op's contract), "cpu",
                    "ragged" (no multiple of a chunk, at the widths of models), sizes of published
                    models, and others
    GPU_SHAPES      the names that are measured on a GPU, the most important first
    VARIANTS        the kinds of arguments, such as the kinds of decay; ("",) if there is one
    inputs(shape, variant, dtype, key)
                    the arguments that have gradients, by name, as models make them; activations are
                    of `dtype`, all others float32
    options(shape, variant)
                    the other arguments, by name, but for those that all ops have
    matmul_flops(shape, direction, chunk=CHUNK)
                    2 per multiply-add of the recurrence in chunks of so many tokens, forward or
                    backward, without what decays and masks add; 0.0 where there are no matmuls

`inputs` under jax.eval_shape, as `abstract_inputs` has it, gives shapes and dtypes alone, which is
enough to compile for any length.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Shape = Mapping[str, int]
CHUNK = 64  # tokens, of the forms whose matmuls are counted

# Batch, tokens, heads and size per head of layers at which kernels of such recurrences are usually
# timed, from 1K to 256K tokens.
MEASURED = {
    f"{B}x{T}_{H}x{D}": {"batch": B, "length": T, "key_heads": H, "heads": H, "key": D, "value": D}
    for B, T, H, D in (
        (4, 2048, 16, 128),
        (1, 8192, 96, 128),
        (2, 16384, 16, 128),
        (4, 4096, 64, 128),
        (8, 1024, 8, 64),
        (8, 2048, 32, 256),
        (64, 1024, 8, 128),
        (16, 4096, 8, 128),
        (4, 16384, 8, 128),
        (1, 65536, 8, 128),
        (1, 262144, 8, 128),
    )
}
RAGGED_HEADS = {"batch": 2, "length": 333, "key_heads": 4, "heads": 4, "key": 128, "value": 128}


def queries_keys_values(shape: Shape, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q and k [B, T, HK, K], keys of norm one, and v [B, T, H, V]."""
    B, T, HK, H, K, V = (
        shape[name] for name in ("batch", "length", "key_heads", "heads", "key", "value")
    )
    keys = jax.random.split(key, 3)
    q, k = (jax.random.normal(key, (B, T, HK, K)) for key in keys[:2])
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = jax.random.normal(keys[2], (B, T, H, V))
    return {name: x.astype(dtype) for name, x in (("q", q), ("k", k), ("v", v))}


def queries_of_shared_keys(shape: Shape, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q [B, T, H, K], k [B, T, HK, K] and v [B, T, HK, V]: values are shared as keys are."""
    key_q, key_rest = jax.random.split(key)
    keys_and_values = queries_keys_values({**shape, "heads": shape["key_heads"]}, dtype, key_rest)
    sizes = (shape["batch"], shape["length"], shape["heads"], shape["key"])
    return keys_and_values | {"q": jax.random.normal(key_q, sizes).astype(dtype)}


def grid_of(length: int) -> tuple[int, int]:
    """The most equal two extents that there are for so many tokens."""
    rows = max(x for x in range(1, int(length**0.5) + 1) if length % x == 0)
    return rows, length // rows


def decays(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """decay_log as a projection makes it, or nothing for the variant "none".

    "constant": [H]; "scalar": [B, T, H]; "vector": [B, T, H, K], which is as large as k and of
    `dtype`, the others float32.
    """
    B, T, H, K = (shape[name] for name in ("batch", "length", "heads", "key"))
    sizes = {"none": None, "constant": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}[variant]
    if sizes is None:
        return {}
    decay_log = -jnp.exp(jax.random.normal(key, sizes) - 3)
    return {"decay_log": decay_log.astype(dtype if variant == "vector" else "float32")}


def segment_ids(shape: Shape, key: jax.Array) -> jax.Array:
    """Documents of about 50 tokens, packed: [B, T]."""
    starts = jax.random.uniform(key, (shape["batch"], shape["length"])) < 0.02
    return jnp.cumsum(starts, 1, dtype=jnp.int32)


def abstract_inputs(
    inputs: Callable[..., dict[str, Any]], shape: Shape, variant: str, dtype: str
) -> dict[str, Any]:
    """Shapes and dtypes of `inputs(shape, variant, dtype, key)`, of which nothing is allocated."""
    make = functools.partial(inputs, shape, variant, dtype)
    return jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))
