"""Mixers that are no paper's, for tests of what networks promise to mixers to come."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import gla
from models.blocks import stack
from models.parts.bidirectional import Bidirectional
from models.parts.projections import projection
from ops.framework.segments import numbers


class SegmentMean(nnx.Module):
    """y_t = W times the mean of x over all tokens in the segment of t, plus x_t: not causal."""

    causal = False

    def __init__(self, width: int, *, depth: int, rngs: nnx.Rngs, **dtypes: Any):
        self.output = projection(width, width, ("embed", "heads"), rngs=rngs, **dtypes)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        segment_ids = jnp.zeros(x_BTD.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        number_BT = numbers(segment_ids)
        same_BTT = (number_BT[:, :, None] == number_BT[:, None, :]).astype(x_BTD.dtype)
        sum_BTD = jnp.einsum("bts,bsd->btd", same_BTT, x_BTD)
        return self.output(sum_BTD / same_BTT.sum(axis=-1, keepdims=True) + x_BTD), None


class BidirectionalGLA(Bidirectional):
    """GLA in both directions."""

    def __init__(self, width: int, *, combine: str = "sum", **given: Any):
        super().__init__(
            lambda: gla.Mixer(width, heads=2, conv_width=2, **given),
            width,
            combine=combine,
            **given,
        )


TOYS: dict[str, Any] = {"segment_mean": SegmentMean, "bidirectional_gla": BidirectionalGLA}


def add_mixers(monkeypatch: pytest.MonkeyPatch, **mixers: Any) -> None:
    """Lets patterns of networks name these classes, as if they were files in models/."""
    find: Callable[[str], Any] = stack.find_mixer
    monkeypatch.setattr(stack, "find_mixer", lambda name: mixers.get(name) or find(name))
