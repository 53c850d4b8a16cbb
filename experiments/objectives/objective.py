"""Losses of the tasks, and the metrics that follow from their sums.

A loss maps (model, batch) to (scalar, sums). The scalar is the mean over the batch that training
minimises. The sums add up over batches, replicated or sharded, and become metrics at the end, so
that a metric never depends on the batch size."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models.parts.variables import AUXILIARY_LOSS, Report, mean_over_layers

# Sums of what layers report: the value times the batch's weight.
REPORTED = "_reported"

# What a batch may tell the model besides its tokens.
MODEL_INPUTS = ("positions", "segment_ids", "readout_positions")


def next_token_loss(
    model: Any, batch: Mapping[str, jax.Array], *, z_loss: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy in nats per weighted target, and z_loss times log^2 Z, Z the sum of the
    exponentials of logits.

    The latter keeps logits from drifting (Chowdhery et al., PaLM, 2022, arXiv 2204.02311). It is in
    the scalar alone.

    batch: tokens int [B, T]; targets int and weights float, [B, T], or [B, N] when
    `readout_positions` [B, N] is there, where alone the model then computes logits; optional
    positions, segment_ids [B, T], and bytes [B], the bytes that the weighted targets of a sequence
    stand for. A target counts with its weight, and not at all with weight 0. Sums: loss_sum,
    weight_sum, correct_sum over targets; sequence_sum, sequence_correct_sum over the sequences that
    have a weighted target (correct: all of them predicted); bytes_sum where the batch has bytes.
    """
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    logits_BNW, _ = model(batch["tokens"], **inputs)
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
    if "bytes" in batch:
        sums["bytes_sum"] = jnp.sum(batch["bytes"].astype(jnp.float32))
    if z_loss:
        log_z_BN = jax.nn.logsumexp(logits_BNW.astype(jnp.float32), axis=-1)
        square_BN = jnp.where(counted_BN, weights_BN * jnp.square(log_z_BN), 0.0)
        loss_sum = loss_sum + z_loss * jnp.sum(square_BN)
    return _mean(loss_sum, sums["weight_sum"]), sums


def squared_error_loss(
    model: Any, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of the prediction for a prompt, without the factor 1/2 that some papers write.

    batch: examples float [B, N+1, d+1]; target and weights float [B].
    Sums over prompts: loss_sum, weight_sum, and target_square_sum, the loss of the prediction 0.
    """
    prediction_B = model(batch["examples"])
    target_B, weights_B = batch["target"], batch["weights"].astype(jnp.float32)
    error_B = jnp.where(weights_B > 0, prediction_B.astype(jnp.float32) - target_B, 0.0)
    sums = {
        "loss_sum": jnp.sum(weights_B * jnp.square(error_B)),
        "weight_sum": jnp.sum(weights_B),
        "target_square_sum": jnp.sum(weights_B * jnp.square(target_B)),
    }
    return _mean(sums["loss_sum"], sums["weight_sum"]), sums


def objective(
    loss: Callable[..., Any], model: Any, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What training minimises, the task's loss and the auxiliary loss of the layers (mean over
    those that have one), and the sums of the loss with one more per name that layers report; see
    models/parts/variables.py."""

    def run(model: Any) -> Any:
        return loss(model, batch)

    (value, sums), reports = nnx.capture(run, Report)(model)
    values = mean_over_layers(reports)
    reported = {name + REPORTED: value * sums["weight_sum"] for name, value in values.items()}
    return value + values.get(AUXILIARY_LOSS, 0.0), sums | reported


def report_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """What layers report, by name: means over batches by their weight."""
    return {
        name.removesuffix(REPORTED): total / sums["weight_sum"]
        for name, total in sums.items()
        if name.endswith(REPORTED)
    }


def token_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """loss (nats per target), accuracy (per target) and sequence_accuracy, from the sums of
    `next_token_loss`."""
    return {
        "loss": float(sums["loss_sum"] / sums["weight_sum"]),
        "accuracy": float(sums["correct_sum"] / sums["weight_sum"]),
        "sequence_accuracy": float(sums["sequence_correct_sum"] / sums["sequence_sum"]),
    }


def squared_error_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """loss (the risk) and normalised_loss (that of the zero predictor is 1), from the sums of
    `squared_error_loss`."""
    return {
        "loss": float(sums["loss_sum"] / sums["weight_sum"]),
        "normalised_loss": float(sums["loss_sum"] / sums["target_square_sum"]),
    }


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total / jnp.where(weight == 0, 1.0, weight)
