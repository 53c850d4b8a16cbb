"""Examples of every op are arguments that the op takes, in every variant and at every shape."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import ops
from ops.framework.examples import MEASURED, abstract_inputs, segment_ids
from ops.gated_linear_attention import examples as attention
from tests.contracts.ops import assert_close

OPS = sorted(file.parent.name for file in Path(ops.__path__[0]).glob("*/examples.py"))
OPS.remove("framework")


@pytest.mark.parametrize("op", OPS)
def test_an_op_takes_its_examples_at_every_shape_in_every_variant(op):
    examples = importlib.import_module(f"ops.{op}.examples")
    assert {"test", "cpu", "ragged"} <= set(examples.SHAPES)
    assert examples.GPU_SHAPES and set(examples.GPU_SHAPES) <= set(examples.SHAPES)
    for shape in examples.SHAPES.values():
        for variant in examples.VARIANTS:
            inputs = abstract_inputs(examples.inputs, shape, variant, "bfloat16")

            def call(inputs, shape=shape, variant=variant):
                options = examples.options(shape, variant)
                return getattr(ops, op)(**inputs, **options, implementation="xla")

            outputs = jax.tree.leaves(jax.eval_shape(call, inputs))
            assert outputs[0].shape[:2] == (shape["batch"], shape["length"])


@pytest.mark.parametrize("op", OPS)
def test_examples_have_the_dtype_that_is_asked_for_and_depend_on_the_key(op):
    examples = importlib.import_module(f"ops.{op}.examples")
    shape = {**examples.SHAPES["cpu"], "batch": 1, "length": 8}
    for variant in examples.VARIANTS:
        first, second = (
            examples.inputs(shape, variant, "bfloat16", jax.random.key(seed)) for seed in range(2)
        )
        leaves = jax.tree.leaves(first)
        assert {x.dtype for x in leaves} <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}
        assert any(x.dtype == jnp.bfloat16 for x in leaves)
        other = jax.tree.leaves(second)
        assert any((a != b).any() for a, b in zip(leaves, other, strict=True))


# The others are those of a contract, which takes them.
WITHOUT_CONTRACT = {"gaussian_attention", "long_convolution", "state_passing", "window_attention"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=() if op in WITHOUT_CONTRACT else pytest.mark.full) for op in OPS]
)
def test_values_and_gradients_of_examples_equal_the_reference(op):
    examples = importlib.import_module(f"ops.{op}.examples")
    shape = {**examples.SHAPES["cpu"], "batch": 1, "length": 70}
    for variant in examples.VARIANTS:
        inputs = examples.inputs(shape, variant, "float32", jax.random.key(3))
        results = {}
        for implementation in ("reference", "xla"):

            def loss(inputs, variant=variant, implementation=implementation):
                options = examples.options(shape, variant)
                outputs = getattr(ops, op)(**inputs, **options, implementation=implementation)
                return sum(map(_of_order_one, jax.tree.leaves(outputs))), outputs

            results[implementation] = jax.jit(jax.grad(loss, has_aux=True))(inputs)
        names = jax.tree.leaves_with_path(results["reference"])
        for (name, expected), got in zip(names, jax.tree.leaves(results["xla"]), strict=True):
            assert_close(f"{variant} {jax.tree_util.keystr(name)}", got, expected)


def _of_order_one(x):
    """A loss of x. A state may be a sum over all tokens: the sine of a large number has few
    digits."""
    size = jnp.maximum(1.0, jnp.abs(jax.lax.stop_gradient(x)).max())
    return jnp.sum(jnp.sin(x / size))


@pytest.mark.parametrize("op", OPS)
def test_flops_grow_with_the_tokens_and_are_more_backward(op):
    examples = importlib.import_module(f"ops.{op}.examples")
    shape = examples.SHAPES["cpu"]
    forward, backward = (examples.matmul_flops(shape, x) for x in ("forward", "backward"))
    twice = examples.matmul_flops({**shape, "length": 2 * shape["length"]}, "forward")
    tokens = {"kronecker_attention": 3}.get(op, 1)  # that a product is of
    assert twice == 2**tokens * forward and (backward > forward or backward == forward == 0)


def test_flops_are_those_of_the_chunked_matmuls():
    """One chunk of C tokens: q k^T and its product with v, the write k^T v and the read q S."""
    C, K, V = 64, 16, 32
    shape = {"batch": 1, "length": C, "heads": 1, "key": K, "value": V}
    counted = 2 * (C * C * K + C * C * V + C * K * V + C * K * V)
    assert attention.matmul_flops(shape, "forward", chunk=C) == counted


def test_packed_documents_are_several_and_numbered_in_order():
    shape = MEASURED["4x2048_16x128"]
    ids = segment_ids(shape, jax.random.key(0))
    assert ids.shape == (4, 2048) and (jnp.diff(ids, axis=1) >= 0).all()
    assert (ids[:, -1] > 10).all()
