"""The steps of a grid whose segments have states of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import gated_linear_attention
from ops.tpu.segments import segment_steps
from tests.contracts.ops import assert_close

# Tokens of each segment; chunks have 16.
COUNTS = [
    (0, 16, 33, 15, 0),  # at the start of a chunk, over two and a row of a third, none
    (64, 0, 0, 0, 0),
    (0, 0, 0, 0, 64),
    (3, 2, 1, 57, 1),
    (20, 20, 20, 0, 4),
]


@pytest.mark.parametrize("length", [64, 61])
def test_every_token_is_in_one_step_of_its_segment_and_every_segment_has_one(length):
    ids = np.stack([np.repeat(np.arange(5), row) for row in COUNTS])[:, :length]
    steps = jax.jit(segment_steps, static_argnums=(1, 2, 3))(ids, 5, 16, 4)
    chunk, start, stop, segment = (np.asarray(x) for x in steps)
    assert chunk.shape == (len(COUNTS), 4 + 5 - 1)
    assert (segment[:, [0, -1]] == -1).all()
    segment = segment[:, 1:-1]
    for row, of_row in enumerate(ids):
        tokens = [
            (s, t)
            for g, s in enumerate(segment[row])
            for t in range(16 * chunk[row, g] + start[row, g], 16 * chunk[row, g] + stop[row, g])
        ]
        assert tokens == [(s, t) for t, s in enumerate(of_row)]
        # Steps of a segment, and of a chunk, follow each other: their tiles are written back once.
        assert (np.diff(segment[row]) >= 0).all() and (np.diff(chunk[row]) >= 0).all()
        assert set(segment[row]) == set(range(5))


@pytest.mark.full
def test_replicas_have_segments_of_their_own():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 1, 64, 1, 8)) for key in keys)
    ids = jnp.asarray(np.stack([np.repeat(np.arange(5), row) for row in COUNTS[2:4]]))[:, None]

    def run(implementation):
        def loss(q, k, v, ids):
            o, state = gated_linear_attention(
                q, k, v, segment_ids=ids, num_segments=5, implementation=implementation
            )
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(state))

        return jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(q, k, v, ids)

    for name, got, expected in zip("qkv", run("pallas_tpu"), run("reference"), strict=True):
        assert_close(f"gradient of {name}", got, expected)
