"""What attention within discs costs, by the paper's formula and as the op computes it, for
tables."""

import jax
import jax.numpy as jnp
import numpy as np

from models.clear import attention_flops
from ops import neighbourhood_attention


def of_layer(
    *, seed: int, side: int, radius: float, width: int, text: int = 0
) -> dict[str, dict[str, float]]:
    """{"layer": {"formula", "counted"}}: GFLOPs of the two products of attention in a layer of
    side x side tokens. counted: of the pairs that the op weighs. With logits of 0 and one token of
    context that alone has the value 1, o = 1 / (1 + the keys of the image that a query sees)."""
    del seed
    tokens = side * side
    x, one = jnp.zeros((1, tokens, 1, 1)), jnp.ones((1, 1, 1, 1))
    o = jax.jit(
        lambda x: neighbourhood_attention(
            *(x, x, x), grid=(side, side), radius=radius, context_k=0 * one, context_v=one
        )
    )(x)
    pairs = np.rint(1 / np.asarray(o, np.float64) - 1).sum()
    pairs += text * (text + tokens) + tokens * text
    formula = attention_flops(width, (side, side), radius, text)
    return {"layer": {"formula": formula / 1e9, "counted": 4 * width * pairs / 1e9}}
