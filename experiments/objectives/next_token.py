"""Cross-entropy of tokens: language modelling, and every task whose answer is a token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.objectives.objective import REPORTED, Batch, Sums, Work, array_of, weighted_mean

# What a batch may tell the model besides its tokens.
MODEL_INPUTS = ("positions", "segment_ids", "readout_positions")


def asks_for_next_tokens(batch: Batch) -> bool:
    """Whether every target of a batch of arrays, before the last token, is the token that follows:
    an answer that a model reads unless it is causal."""
    tokens, targets = batch["tokens"], batch["targets"]
    if targets.shape != tokens.shape:  # answers at positions for reading out, which no token has
        return False
    asked = batch["weights"][..., :-1] > 0
    return bool(np.any(asked) and np.all((targets[..., :-1] == tokens[..., 1:])[asked]))


def token_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """loss (nats per target), accuracy (per target) and sequence_accuracy, from the sums of
    `NextToken`."""
    return {
        "loss": float(sums["loss_sum"] / sums["weight_sum"]),
        "accuracy": float(sums["correct_sum"] / sums["weight_sum"]),
        "sequence_accuracy": float(sums["sequence_correct_sum"] / sums["sequence_sum"]),
    }


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy in nats per weighted target, and z_loss times log^2 Z, Z the sum of the
    exponentials of logits.

    A model that has a `teacher` learns from it instead, and the targets are only counted: what is
    minimised is the divergence KL(p_teacher || p) per weighted target.

    z_loss keeps logits from drifting (Chowdhery et al., PaLM, 2022, arXiv 2204.02311). It is in
    the scalar alone.

    Batch: tokens int [B, T]; targets int and weights float, [B, T], or [B, N] when
    `readout_positions` [B, N] is there, where alone the model then computes logits; optional
    positions, segment_ids [B, T], and bytes [B], the bytes that the weighted targets of a sequence
    stand for. A target counts with its weight, and not at all with weight 0.
    Sums: loss_sum, weight_sum, correct_sum over targets; sequence_sum, sequence_correct_sum over
    the sequences that have a weighted target (correct: all of them predicted); bytes_sum where the
    batch has bytes. The divergence is reported, as by a layer."""

    z_loss: float = 0.0
    derive: Callable[[Mapping[str, float]], dict[str, float]] = token_metrics

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        del key
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        logits_BNW, _ = model(array_of(batch, "tokens", "NextToken"), **inputs)
        targets_BN, weights_BN = batch["targets"], batch["weights"].astype(jnp.float32)
        counted_BN = weights_BN > 0
        loss_BN = optax.softmax_cross_entropy_with_integer_labels(
            logits_BNW.astype(jnp.float32), targets_BN
        )
        # A choice, not a product with zero: whatever the model says where nothing is asked must not
        # reach the loss.
        loss_sum = jnp.sum(jnp.where(counted_BN, weights_BN * loss_BN, 0.0))
        correct_BN = jnp.argmax(logits_BNW, axis=-1) == targets_BN
        sequence_B = jnp.any(counted_BN, axis=-1)
        sums = {
            "loss_sum": loss_sum,
            "weight_sum": jnp.sum(weights_BN),
            "correct_sum": jnp.sum(weights_BN * correct_BN.astype(jnp.float32)),
            "sequence_correct_sum": jnp.sum(
                sequence_B & jnp.all(correct_BN | ~counted_BN, axis=-1), dtype=jnp.float32
            ),
            "sequence_sum": jnp.sum(sequence_B, dtype=jnp.float32),
        }
        teacher = getattr(model, "teacher", None)
        if teacher is not None:
            there_BNW, _ = jax.lax.stop_gradient(teacher(batch["tokens"], **inputs))
            divergence_BN = optax.losses.kl_divergence_with_log_targets(
                jax.nn.log_softmax(logits_BNW), jax.nn.log_softmax(there_BNW)
            )
            loss_sum = jnp.sum(jnp.where(counted_BN, weights_BN * divergence_BN, 0.0))
            sums["divergence" + REPORTED] = loss_sum
        if "bytes" in batch:
            sums["bytes_sum"] = jnp.sum(batch["bytes"].astype(jnp.float32))
        if self.z_loss:
            log_z_BN = jax.nn.logsumexp(logits_BNW.astype(jnp.float32), axis=-1)
            square_BN = jnp.where(counted_BN, weights_BN * jnp.square(log_z_BN), 0.0)
            loss_sum = loss_sum + self.z_loss * jnp.sum(square_BN)
        return weighted_mean(loss_sum, sums["weight_sum"]), sums

    def work(self, batch: Batch) -> Work:
        tokens = array_of(batch, "tokens", "NextToken")
        return Work(
            unit="tokens",
            count=tokens.size,
            places=tokens.size,
            outputs=batch["targets"].size,
            length=tokens.shape[1],
        )

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return self.derive(sums)
