"""The GPU kernels pass Pallas' lowering, which no interpreter takes part in: every decay, with
documents and without.

Their compilation is that of tests/experiments/benchmarks/gpu_aot_test.py, for which the compilers
must be there; for this jax is enough."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from tests.ops import (
    delta_rule_test,
    diagonal_scan_test,
    gated_linear_attention_test,
    selective_scan_test,
)

CONTRACTS = {
    "gated_linear_attention": gated_linear_attention_test.TestGatedLinearAttention,
    "delta_rule": delta_rule_test.TestDeltaRule,
    "selective_scan": selective_scan_test.TestSelectiveScan,
    "diagonal_scan": diagonal_scan_test.TestDiagonalScan,
}
IN_MAKE_TEST = {("gated_linear_attention", "none", True), ("delta_rule", "none", True)}
GPU = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", None, "cuda"))


def cases() -> Iterator[object]:
    for op, contract in CONTRACTS.items():
        for variant in contract.variants:
            variant = getattr(variant, "values", (variant,))[0]
            for packed in (True, False):
                short = (op, variant, packed) in IN_MAKE_TEST
                marks = pytest.mark.slow if short else pytest.mark.full
                name = f"{op}-{variant}-{'packed' if packed else 'one'}"
                yield pytest.param(op, variant, packed, marks=marks, id=name)


@pytest.mark.parametrize(("op", "variant", "packed"), list(cases()))
def test_kernels_are_lowered_for_a_gpu(op, variant, packed):
    contract = CONTRACTS[op]()
    inputs, state, ids = contract.data(variant, 70)
    ids = ids if packed else None

    def loss(inputs, state):
        o, final = contract.call(inputs, state, ids, "pallas_gpu")
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(final))

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    with use_abstract_mesh(GPU):
        program = gradients.trace(inputs, state).lower(lowering_platforms=("cuda",))
    assert "triton" in program.as_text()
