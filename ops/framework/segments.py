"""Where the documents of a packed sequence begin and go on."""

import jax
import jax.numpy as jnp


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """[B, T] bool: the id differs from the previous token's. The first token goes on with what came
    before."""
    same_B1 = jnp.zeros_like(segment_ids[:, :1], bool)
    return jnp.concatenate((same_B1, segment_ids[:, 1:] != segment_ids[:, :-1]), axis=1)
