"""Heads that do not fit the fast memory of a TPU as they are: padded, or their values in parts."""

import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

import ops
from experiments.benchmarks.ahead_of_time import tpu_programs
from experiments.training.checkout import RESULTS
from ops.delta_rule import pallas_tpu as delta_kernels
from ops.delta_rule import reference as delta_reference
from ops.gated_linear_attention import pallas_tpu as gla_kernels
from ops.gated_linear_attention import reference as gla_reference
from ops.tpu import fit
from ops.tpu.fit import Fit
from tests.contracts.ops import assert_close
from tests.ops import delta_rule_test, gated_linear_attention_test
from tests.ops.gated_linear_attention_test import KEY, VALUE

PADDED = Fit(key_size=32, value_size=32, parts=1)
IN_PARTS = Fit(key_size=KEY, value_size=VALUE // 2, parts=2)
BOTH = Fit(key_size=32, value_size=16, parts=2)
GLA = (
    gated_linear_attention_test.TestGatedLinearAttention,
    gla_kernels,
    gla_reference.gated_linear_attention,
)
DELTA = delta_rule_test.TestDeltaRule, delta_kernels, delta_reference.delta_rule
CASES = {
    "gla, padded": (GLA, "none", PADDED),
    "gla, in parts": (GLA, "vector", IN_PARTS),
    "delta rule, both": (DELTA, "scalar", BOTH),
}


@pytest.mark.parametrize("interpreted", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("case", CASES)
def test_padded_heads_and_parts_of_heads_give_what_whole_heads_give(case, interpreted):
    (contract, kernels, reference), variant, chosen = CASES[case]
    inputs, state, ids = contract().data(variant, 37)
    args = (*inputs.values(), *([None] if variant == "none" else []), state, ids)

    def forward(*args):
        *inputs, state, ids = args
        return reference(*inputs, 0.3, state, ids)

    def backward(*args):
        *args, ids, do, dstate = args
        return jax.vjp(lambda *args: forward(*args, ids), *args)[1]((do, dstate))

    def both(forward, backward):
        return jax.jit(
            lambda *args: (forward(*args), backward(*args, jnp.cos(inputs["v"]), jnp.sin(state)))
        )(*args)

    expected = both(forward, backward)
    with mock.patch.object(fit, "choose", return_value=chosen):
        if interpreted:
            options = {"scale": 0.3, "interpret": True}
            rules = (functools.partial(x, **options) for x in (kernels.forward, kernels.backward))
            got = both(*rules)
        else:
            got = both(kernels.fits_forward(forward), kernels.fits_backward(backward))
    for (path, wanted), value in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True
    ):
        assert_close(f"{case}: {jax.tree_util.keystr(path)}", value, wanted)


def like(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_heads_stay_as_they_are_where_they_fit_and_are_changed_no_more_than_they_need():
    def chosen(heads, key, value, decay_log=None, dtype="float32"):
        q, v = (like(4, 2048, heads, size, dtype=dtype) for size in (key, value))
        return fit.choose(q, v, decay_log, gla_kernels.TUNING)

    assert chosen(4, 128, 128) == Fit(128, 128, 1)
    assert chosen(4, 153, 129) == Fit(153, 129, 1)  # all heads in one step
    assert chosen(16, 153, 129) == Fit(192, 192, 1)  # two heads are whole lanes
    decay_log = like(4, 2048, 4, 1024, dtype="bfloat16")
    assert chosen(4, 1024, 2048, decay_log, "bfloat16") == Fit(1024, 1024, 2)
    assert chosen(1, 1 << 16, 128) is None


def test_what_never_fits_runs_in_plain_jax_with_a_warning_and_is_refused_by_name():
    q, v = like(1, 40, 1, 1 << 16), like(1, 40, 1, 8)

    def lower(platform, implementation=None):
        function = jax.jit(
            lambda q, v: ops.gated_linear_attention(q, q, v, implementation=implementation)
        )
        return function.trace(q, v).lower(lowering_platforms=(platform,)).as_text()

    lower("cpu")  # without a warning, which would be an error
    with pytest.warns(UserWarning, match=r"plain JAX in the place of a kernel: .*fits 64 MiB"):
        assert "tpu_custom_call" not in lower("tpu")
    with pytest.raises(ValueError, match="'pallas_tpu' takes heads"):
        lower("tpu", "pallas_tpu")


def test_no_compiled_kernel_took_more_than_it_was_said_to_need():
    rows = json.loads((RESULTS / "tpu_aot.json").read_text())["rows"]
    taken = {row["name"]: row["vmem_bytes"] for row in rows if row.get("vmem_bytes")}
    count = 0
    for program in tpu_programs():
        kernels = {"gla": gla_kernels, "delta": delta_kernels}.get(program.name.split("_")[0])
        if kernels is None or program.name not in taken:
            continue
        q, _, v, *rest = program.arguments(256)
        decay_log, tuning = rest[kernels is delta_kernels], kernels.TUNING
        chosen = fit.choose(q, v, decay_log, tuning)
        assert chosen is not None
        grid = fit.grid_of(q, v, chosen, tuning)
        assert taken[program.name] <= fit.needed_bytes(grid, q, v, decay_log, tuning), program.name
        count += 1
    assert count > 80
