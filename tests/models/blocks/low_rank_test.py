"""Low-rank adaptation starts as nothing, is a product, and is one kernel in the end."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.blocks.low_rank import KINDS, LowRank, merged
from models.networks.lm import LM
from models.parts.projections import projection
from tests.support.layers import FLOAT32


def test_a_fresh_one_adds_nothing_and_a_trained_one_its_product() -> None:
    linear: Any = projection(6, 4, ("embed", "heads"), bias=True, rngs=nnx.Rngs(0), **FLOAT32)
    linear.bias[...] = jnp.arange(4.0)
    adapted = LowRank(linear, rank=2, alpha=6.0, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(2), (3, 5, 6))
    np.testing.assert_allclose(adapted(x), linear(x), atol=1e-6)
    assert float(jnp.abs(adapted.lora_a[...]).max()) <= 6**-0.5
    adapted.lora_b[...] = jax.random.normal(jax.random.key(3), (2, 4))
    expected = linear(x) + 3.0 * x @ adapted.lora_a[...] @ adapted.lora_b[...]
    np.testing.assert_allclose(adapted(x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_one_kernel_in_the_end(kind: str) -> None:
    """DoRA's columns have the lengths of W's, times 1 + g, and a gain that learns."""
    linear = projection(6, 4, ("embed", "heads"), rngs=nnx.Rngs(0), **FLOAT32)
    adapted = LowRank(linear, rank=4, alpha=6.0, kind=kind, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(2), (3, 5, 6))
    np.testing.assert_allclose(adapted(x), linear(x), atol=1e-6)
    adapted.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(3), (4, 4))
    gain: Any = jnp.asarray([0.0, 0.5, -0.5, 1.0]) if kind == "dora" else None
    if adapted.lora_gain is not None:
        adapted.lora_gain[...] = gain
    parts = (adapted.kernel[...], adapted.lora_a[...], adapted.lora_b[...], gain)
    whole = merged(*parts, kind=kind, alpha=6.0)
    np.testing.assert_allclose(adapted(x), x @ whole, atol=1e-5)
    added = adapted.lora_a[...] @ adapted.lora_b[...] * {"rslora": 3.0}.get(kind, 1.5)
    if kind == "dora":
        lengths = jnp.linalg.norm(linear.kernel[...], axis=0) * (1 + gain)
        np.testing.assert_allclose(jnp.linalg.norm(whole, axis=0), lengths, rtol=1e-5)
        moved = nnx.grad(lambda model: jnp.sum(model(x) ** 2))(adapted)
        assert float(jnp.abs(moved.lora_gain[...]).min()) > 0
    else:
        np.testing.assert_allclose(whole, linear.kernel[...] + added, atol=1e-6)


def model(**options: Any) -> LM:
    given: dict[str, Any] = {"pattern": ("gla",), "mixers": {"gla": {"heads": 1}}, **FLOAT32}
    return LM(vocabulary=5, width=8, depth=2, rngs=nnx.Rngs(0), **given, **options)


@pytest.mark.slow
def test_kernels_keep_their_names_and_what_is_no_map_is_refused() -> None:
    plain, adapted = (
        {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(one, nnx.Param))}
        for one in (model(), model(lora_rank=2, lora_targets=("query", "output")))
    )
    where = "stack/period/0/mixer"
    added = {f"{where}/{m}/lora_{end}" for m in ("query", "output") for end in ("a", "b")}
    assert adapted == plain | added
    with pytest.raises(ValueError, match=r"lora_targets must be linear maps of .*: gate_in, .*'q'"):
        model(lora_rank=2, lora_targets=("q",))
