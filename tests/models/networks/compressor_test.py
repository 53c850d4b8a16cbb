"""The autoencoder of the compression task: only the last state reaches the decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from jax.sharding import AbstractMesh

from experiments.training.mesh import named, parameter_specs
from models.networks.compressor import build, sinusoids
from tests.support.layers import randomised

OPTIONS = {"width": 8, "depth": 2, "pattern": ("gla",), "mixers": {"gla": {"heads": 2}}}


def make(**options):
    return build(
        OPTIONS | options,
        vocabulary=11,
        rngs=nnx.Rngs(0),
        param_dtype=jnp.float32,
        compute_dtype=jnp.float32,
    )


def test_every_token_is_decoded_from_the_last_hidden_state():
    model = randomised(make)
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)
    logits, state = model(tokens)
    assert logits.shape == (2, 6, 11) and state is None
    x, _ = model.stack(model.embedding(tokens), None, positions=None, segment_ids=None)
    h = np.asarray(model.norm(x[:, -1]), np.float64)
    W1, b1 = (np.asarray(p[...]) for p in (model.decoder.kernel, model.decoder.bias))
    W2, b2 = (np.asarray(p[...]) for p in (model.head.kernel, model.head.bias))
    places = np.zeros((6, 8))
    for t in range(6):
        for i in range(4):
            places[t, 2 * i : 2 * i + 2] = (
                np.sin(t / 10_000 ** (2 * i / 8)),
                np.cos(t / 10_000 ** (2 * i / 8)),
            )
    np.testing.assert_allclose(sinusoids(6, 8), places, atol=1e-6)
    inner = np.asarray(jax.nn.gelu((h[:, None] + places) @ W1 + b1))
    np.testing.assert_allclose(logits, inner @ W2 + b2, atol=2e-5)


def test_every_parameter_can_be_laid_over_a_mesh():
    mesh = AbstractMesh((1, 1, 1, 1), ("data", "fsdp", "sequence", "tensor"))
    params = nnx.state(nnx.eval_shape(make), nnx.Param)
    specs = parameter_specs(mesh, params, replicated_axis=False)
    shardings = named(mesh, specs)  # refuses a parameter that one axis cuts twice
    assert shardings["head"]["kernel"].spec == P("tensor", None)


def test_options_of_a_language_model_are_refused():
    with pytest.raises(ValueError, match="model compressor has no tie_embeddings"):
        make(tie_embeddings=True)
    with pytest.raises(ValueError, match="model compressor has no option 'heads'"):
        make(heads=3)
