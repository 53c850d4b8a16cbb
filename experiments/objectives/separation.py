"""Scale-invariant signal-to-distortion ratio of separated sources, whatever their order.

    SI-SDR(e, s) = 10 log10(|a s|^2 / (|e - a s|^2 + eps) + eps),   a = <e, s> / (|s|^2 + eps)

of signals without their means, eps = 1e-8 (Le Roux et al., ICASSP 2019, arXiv 1811.02508). Which
estimate is of which source is chosen for each mixture so that the mean is largest (permutation
invariant training: Kolbaek et al., 2017, arXiv 1703.06284); all permutations are tried."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.objectives.objective import Batch, Sums, Work, array_of, weighted_mean

EPS = 1e-8
# A source whose mean square is not above this (-100 dB of full scale) is silent: there is nothing
# that an estimate could be compared with.
SILENT = 1e-10


def si_sdr(estimate_T: jax.Array, source_T: jax.Array) -> jax.Array:
    """Decibels over the last axis, float32; the other axes broadcast. -80 where the estimate has
    nothing of the source, or where that is zero."""
    e_T, s_T = _centred(estimate_T), _centred(source_T)
    # A product and a sum, not a matrix product, which accelerators may take at lower precision.
    scale = _sum(e_T * s_T) / (_sum(s_T * s_T) + EPS)
    target_T = scale * s_T
    ratio = _sum(target_T * target_T) / (_sum(jnp.square(e_T - target_T)) + EPS)
    return 10 * jnp.log10(ratio + EPS)[..., 0]


def assigned(
    estimates_BQT: jax.Array, sources_BQT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best assignment: the number of the estimate that is each source's [B, Q] int32, its
    SI-SDR [B, Q], and which sources are heard [B, Q] bool. Sources that are not count for nothing,
    and their SI-SDR is 0. Of equal assignments the first in lexicographic order."""
    count = sources_BQT.shape[1]
    heard_BQ = jnp.mean(jnp.square(_centred(sources_BQT)), axis=-1) > SILENT
    pairs_BQE = si_sdr(estimates_BQT[:, None], sources_BQT[:, :, None])
    pairs_BQE = jnp.where(heard_BQ[..., None], pairs_BQE, 0.0)
    orders_PQ = np.array(list(itertools.permutations(range(count))), np.int32)
    totals_BP = sum(pairs_BQE[:, q, orders_PQ[:, q]] for q in range(count))
    order_BQ = jnp.asarray(orders_PQ)[jnp.argmax(jnp.asarray(totals_BP), axis=-1)]
    found_BQ = jnp.take_along_axis(pairs_BQE, order_BQ[..., None], axis=-1)[..., 0]
    return order_BQ, found_BQ, heard_BQ


@dataclass(frozen=True)
class Separation:
    """The mean over mixtures of the mean SI-SDR of their sources, negative.

    Batch: mixture float [B, T]; sources [B, Q, T]; weights [B]. `sample_rate` samples are a second.
    Sums over mixtures, each the mean over the sources that are heard; a mixture without one does
    not count: loss_sum, improvement_sum (over the SI-SDR of the mixture itself), weight_sum.
    Metrics: loss, si_sdr and its improvement si_sdri, in dB."""

    sample_rate: int

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        del key
        mixture_BT, sources_BQT = array_of(batch, "mixture", "Separation"), batch["sources"]
        given_B = batch["weights"].astype(jnp.float32)
        # A choice, not a product with zero: what fills up a batch is to reach neither the loss nor
        # its gradient.
        estimates_BQT = jnp.where(given_B[:, None, None] > 0, model(mixture_BT), 0.0)
        _, found_BQ, heard_BQ = assigned(estimates_BQT, sources_BQT)
        before_BQ = si_sdr(mixture_BT[:, None], sources_BQT)
        heard_B = jnp.sum(heard_BQ, axis=1)
        weights_B = given_B * (heard_B > 0)

        def mean(values_BQ: jax.Array) -> jax.Array:
            values_BQ = jnp.where(heard_BQ, values_BQ, 0.0)
            value_B = jnp.sum(values_BQ, axis=1) / jnp.maximum(heard_B, 1)
            return jnp.sum(weights_B * jnp.where(weights_B > 0, value_B, 0.0))

        sums = {
            "loss_sum": -mean(found_BQ),
            "improvement_sum": mean(found_BQ - before_BQ),
            "weight_sum": jnp.sum(weights_B),
        }
        return weighted_mean(sums["loss_sum"], sums["weight_sum"]), sums

    def work(self, batch: Batch) -> Work:
        mixtures, length = array_of(batch, "mixture", "Separation").shape
        # How many frames meet the weights is the model's affair, and no part of a sound is whole.
        return Work(unit="audio_seconds", count=mixtures * length / self.sample_rate)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = float(sums["loss_sum"] / sums["weight_sum"])
        improvement = float(sums["improvement_sum"] / sums["weight_sum"])
        return {"loss": loss, "si_sdr": -loss, "si_sdri": improvement}


def _centred(x_T: jax.Array) -> jax.Array:
    x_T = jnp.asarray(x_T, jnp.float32)
    return x_T - jnp.mean(x_T, axis=-1, keepdims=True)


def _sum(x_T: jax.Array) -> jax.Array:
    return jnp.sum(x_T, axis=-1, keepdims=True)
