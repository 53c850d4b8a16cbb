"""Continues prompts with a trained model, one token at a time with its recurrent state.

    python -m experiments.generate --workdir=runs/gla --prompt="def main" --prompt="import " \
        --tokens=200

The prompts run through the model together, in parallel over their tokens; then every new token
costs the same, however long the text has become. For tasks other than text a prompt is token
numbers, as --prompt="3 14 15"."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments.training import command_line
from experiments.training.prompts import find_prompt_coder
from experiments.training.run_loading import load_run
from experiments.training.state import Blueprint

# All are made in one call and held in memory: printed when the last is there, after hours.
MOST_TOKENS = 1_000_000


def generate(
    blueprint: Blueprint,
    params: Any,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """New tokens int [prompts, tokens] after prompts of any lengths, from one replica's parameters.

    Shorter prompts are padded on the left; the padding is a segment of its own, from which no state
    passes on. The logits are divided by `temperature` (0: the most probable token) after all but
    the `top_k` largest are dropped (0: none). Raises ValueError for an empty prompt, for impossible
    options, and for models without a state."""
    if blueprint.state_bytes is None:
        raise ValueError(
            "this model keeps no recurrent state, so it cannot generate; use a run with"
            " config.model.name=lm"
        )
    if not prompts or not all(len(prompt) > 0 for prompt in prompts):
        raise ValueError(
            "every prompt must have at least one token; got lengths"
            f" {[len(prompt) for prompt in prompts]}"
        )
    if not 1 <= tokens <= MOST_TOKENS or top_k < 0 or not 0 <= temperature < math.inf:
        raise ValueError(
            f"tokens must be 1 to {MOST_TOKENS}, temperature a finite number of at least 0, top_k"
            f" at least 0; got tokens={tokens}, temperature={temperature}, top_k={top_k}"
        )
    width = max(len(prompt) for prompt in prompts)
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    real_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = prompt
        real_BT[row, width - len(prompt) :] = 1
    positions_BT = np.maximum(np.cumsum(real_BT, axis=1, dtype=np.int32) - 1, 0)
    sampled = _generate(
        blueprint.graphdef,
        (params, variables),
        (tokens_BT, real_BT, positions_BT),
        jax.random.key(seed),
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
    )
    return np.asarray(sampled)


@functools.partial(jax.jit, static_argnames=("graphdef", "tokens", "temperature", "top_k"))
def _generate(
    graphdef: Any,
    weights: Any,
    prompt: Any,
    key: jax.Array,
    *,
    tokens: int,
    temperature: float,
    top_k: int,
) -> jax.Array:
    model: Any = nnx.merge(graphdef, *weights)
    model.eval()
    tokens_BT, segment_ids_BT, positions_BT = prompt
    last_B1 = jnp.full((tokens_BT.shape[0], 1), tokens_BT.shape[1] - 1)
    logits_B1W, state = model(
        tokens_BT, positions=positions_BT, segment_ids=segment_ids_BT, readout_positions=last_B1
    )
    first_key, key = jax.random.split(key)
    first_B = sample(first_key, logits_B1W[:, 0], temperature=temperature, top_k=top_k)

    def decode(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        token_B, position_B, state = carry
        logits_B1W, state = model(token_B[:, None], state, positions=position_B[:, None])
        token_B = sample(key, logits_B1W[:, 0], temperature=temperature, top_k=top_k)
        return (token_B, position_B + 1, state), token_B

    carry = (first_B, positions_BT[:, -1] + 1, state)
    _, rest_NB = jax.lax.scan(decode, carry, jax.random.split(key, tokens - 1))
    return jnp.concatenate([first_B[:, None], rest_NB.T], axis=1)


def sample(key: jax.Array, logits_BW: jax.Array, *, temperature: float, top_k: int) -> jax.Array:
    """Tokens int32 [B] drawn from the softmax of logits / temperature over the top_k largest (0:
    all)."""
    if temperature == 0:
        return jnp.argmax(logits_BW, axis=-1).astype(jnp.int32)
    if 0 < top_k < logits_BW.shape[-1]:
        smallest_B1 = jax.lax.top_k(logits_BW, top_k)[0][:, -1:]
        logits_BW = jnp.where(logits_BW < smallest_B1, -jnp.inf, logits_BW)
    return jax.random.categorical(key, logits_BW / temperature).astype(jnp.int32)


def main() -> None:
    options = flags.FLAGS
    run = load_run(Path(options.workdir), options.step, averaged=options.averaged, reads_data=False)
    if not 0 <= options.replica < len(run.seeds):
        raise ValueError(
            f"--replica must be in 0..{len(run.seeds) - 1} (seeds {run.seeds}); got"
            f" {options.replica}"
        )
    coder = find_prompt_coder(run.config, run.task)
    continuations = generate(
        run.blueprint,
        *run.replica(options.replica),
        [coder.encode(prompt) for prompt in options.prompt],
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    separator = "" if run.config.task.name == "text" else " "
    for prompt, continuation in zip(options.prompt, continuations, strict=True):
        print(f"{prompt}{separator}{coder.decode(continuation.tolist())}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a run of experiments.train.", required=True)
    flags.DEFINE_multi_string(
        "prompt", None, "Text to continue; may be given several times.", required=True
    )
    flags.DEFINE_string("step", "latest", "Step of the checkpoint: a number, latest or best.")
    flags.DEFINE_bool("averaged", False, "The average of the parameters (config.ema_decay).")
    flags.DEFINE_integer("tokens", 200, "New tokens per prompt.")
    flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 takes the most probable token.")
    flags.DEFINE_integer(
        "top_k", 0, "Samples among this many of the most probable tokens; 0: among all."
    )
    flags.DEFINE_integer("seed", 0, "Of the sampling.")
    flags.DEFINE_integer("replica", 0, "Which of config.seeds, counted from 0.")
    command_line.run(main)
