"""Generation with the recurrent state is the model itself, whatever stands beside a prompt."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from experiments.evaluate import decode_difference
from experiments.generate import generate, sample
from experiments.training.prompts import find_prompt_coder
from experiments.training.state import Blueprint, initial_model, make_blueprint, seed_array
from experiments.training.task import Examples, Task

VOCABULARY = 11
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3]]


Model = tuple[Blueprint, Any, Any]


def task() -> Task:
    nothing = Examples(lambda indices: {})
    return Task({"vocabulary": VOCABULARY}, lambda seed: nothing, {"test": nothing})


@pytest.fixture(scope="module")
def model() -> Model:
    mixers = {
        "linear_attention": {"heads": 2, "conv_width": 3},
        "window_attention": {"heads": 2, "window": 3},
    }
    sizes = {
        "name": "lm",
        "width": 16,
        "depth": 2,
        "pattern": tuple(mixers),
        "mixers": mixers,
        "mlp": "none",
    }
    config = ConfigDict({"model": sizes, "param_dtype": "float32", "compute_dtype": "float32"})
    blueprint = make_blueprint(config, task())
    params, variables = jax.jit(lambda: initial_model(blueprint, seed_array((1,))))()
    # Weights larger than at the start of training: logits that differ, and a state that matters.

    def noise(leaf):
        return leaf + 0.5 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    return blueprint, jax.tree.map(noise, params), variables


def test_padding_a_prompt_changes_nothing(model: Model):
    together = generate(*model, PROMPTS, tokens=6, temperature=0.0)
    assert together.shape == (2, 6)
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        np.testing.assert_array_equal(
            generate(*model, [prompt], tokens=6, temperature=0.0)[0], tokens
        )


def test_every_token_is_the_most_probable_one_after_the_whole_text(model: Model):
    blueprint, params, variables = model
    lm: Any = nnx.merge(blueprint.graphdef, params, variables)
    [tokens] = generate(*model, PROMPTS[:1], tokens=6, temperature=0.0)
    text = np.concatenate([PROMPTS[0], tokens])
    logits_BTW, _ = lm(jnp.asarray(text[None, :]))
    np.testing.assert_array_equal(np.argmax(logits_BTW[0, 2:-1], axis=-1), tokens)
    assert len(set(tokens.tolist())) > 1


def test_decoding_is_the_parallel_form_up_to_rounding(model: Model):
    tokens_BT = jax.random.randint(jax.random.key(0), (2, 19), 0, VOCABULARY)
    assert decode_difference(*model, tokens_BT) < 1e-4


def test_a_decode_path_that_differs_is_reported():
    class Echo(nnx.Module):
        causal = True

        def __call__(self, tokens_BT: jax.Array, state: Any = None, *, positions: jax.Array) -> Any:
            logits_BTW = jax.nn.one_hot(tokens_BT, 3)
            return (
                (logits_BTW, 0)
                if state is None
                else (logits_BTW + 0.25 * (positions == 4)[..., None], state)
            )

        def init_state(self, batch: int) -> jax.Array:
            return jnp.zeros(())

    graphdef, params = nnx.split(Echo())
    blueprint = Blueprint(lambda seed: Echo(), graphdef, params, 4)
    assert decode_difference(blueprint, {}, {}, jnp.zeros((2, 6), jnp.int32)) == 0.25
    assert decode_difference(blueprint, {}, {}, jnp.zeros((2, 4), jnp.int32)) == 0.0


def test_a_seed_repeats_and_another_differs(model: Model):
    first, again, other = (generate(*model, PROMPTS, tokens=6, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_samples_follow_the_softmax_at_a_temperature():
    logits = jnp.log(jnp.asarray([0.1, 0.2, 0.3, 0.4]))
    drawn = sample(
        jax.random.key(0), jnp.broadcast_to(logits, (20_000, 4)), temperature=0.5, top_k=0
    )
    expected = np.array([0.01, 0.04, 0.09, 0.16]) / 0.30
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20_000, expected, atol=0.015)


def test_top_k_keeps_the_k_most_probable_tokens_and_their_ratios():
    logits = jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3]))
    drawn = sample(
        jax.random.key(0), jnp.broadcast_to(logits, (20_000, 4)), temperature=1.0, top_k=2
    )
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=4) / 20_000, [0, 4 / 7, 0, 3 / 7], atol=0.015
    )


def test_impossible_requests_are_refused(model: Model):
    with pytest.raises(
        ValueError, match=r"every prompt must have at least one token; got lengths \[3, 0\]"
    ):
        generate(*model, [[1, 2, 3], []], tokens=5)
    for tokens in (0, 10**9):
        with pytest.raises(
            ValueError, match=rf"tokens must be 1 to 1000000, .* got tokens={tokens}, temperature"
        ):
            generate(*model, PROMPTS, tokens=tokens)
    for temperature in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=r"temperature a finite number of at least 0, .* got"):
            generate(*model, PROMPTS, tokens=2, temperature=temperature)
    blueprint, params, variables = model
    stateless = Blueprint(blueprint.build, blueprint.graphdef, blueprint.params, None)
    with pytest.raises(ValueError, match="keeps no recurrent state"):
        generate(stateless, params, variables, PROMPTS, tokens=5)


def test_prompts_of_text_are_bytes_and_other_prompts_are_numbers():
    text = find_prompt_coder(ConfigDict({"task": {"name": "text", "tokenizer": "bytes"}}), task())
    assert text.encode("é!") == [0xC3, 0xA9, 0x21] and text.decode([0xC3, 0xA9, 0x21]) == "é!"
    assert text.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"
    numbers = find_prompt_coder(ConfigDict({"task": {"name": "mqar"}}), task())
    assert numbers.encode("3 10 0") == [3, 10, 0] and numbers.decode([3, 10, 0]) == "3 10 0"
    with pytest.raises(ValueError, match=r"tokens 0..10 separated by spaces; got '3 11'"):
        numbers.encode("3 11")
