"""What every op without a causal order must satisfy, written once.

A test file subclasses `NonCausalContract` and names the op, its examples and its options. All
outputs of an op have a row for each query; packed documents, masks and gradients are asked of all
of them alike."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts.ops import TOLERANCE, assert_close

BATCH = 2
FEW = 5


class NonCausalContract:
    """Subclasses set these.

    examples: of the op, whose shape "test" the contract takes. options: keyword arguments of each
    variant. sizes: numbers of tokens that the contract asks about. documents: numbers of tokens of
    packed documents. masks: the names of the masks of tokens."""

    op: ClassVar[Callable[..., Any]]
    examples: ClassVar[ModuleType]
    variants: ClassVar[tuple[Any, ...]]
    implementations: ClassVar[tuple[str, ...]] = ("xla",)
    sizes: ClassVar[tuple[int, ...]] = (1, 33, 130)
    documents: ClassVar[tuple[int, ...]] = (43, 1, 70, 16)
    masks: ClassVar[tuple[str, ...]] = ("key_mask",)

    def inputs(self, key: jax.Array, variant: str, length: int, dtype: str) -> dict[str, jax.Array]:
        """Arguments with gradients by name, of batch BATCH."""
        return self.examples.inputs(
            self.shape(variant, length), self.examples.VARIANTS[0], dtype, key
        )

    def shape(self, variant: str, length: int) -> dict[str, int]:
        return {**self.examples.SHAPES["test"], "batch": BATCH, "length": length}

    def options(self, variant: str, length: int) -> dict[str, Any]:
        """The other arguments, static."""
        raise NotImplementedError

    def data(self, variant: str, length: int, dtype: str = "float32", seed: int = 0):
        return self.inputs(jax.random.key(seed), variant, length, dtype)

    def values_and_gradients(self, implementation, inputs, options, **arrays):
        """The output and the gradients of all inputs for a random cotangent. arrays: masks and
        segment ids."""
        return _values_and_gradients(
            type(self), implementation, tuple(sorted(options.items())), inputs, arrays
        )

    def check(self, implementation, inputs, options, **arrays):
        expected = self.values_and_gradients("reference", inputs, options, **arrays)
        got = self.values_and_gradients(implementation, inputs, options, **arrays)
        assert got.keys() == expected.keys()
        for name in expected:
            assert got[name].dtype == expected[name].dtype, name
            assert_close(name, got[name], expected[name], TOLERANCE[str(got[name].dtype)])
        return got

    def ids(self, length: int) -> jax.Array:
        """Documents of different lengths; ids come back."""
        starts = np.random.default_rng(3).random((BATCH, length)) < 0.06
        return jnp.asarray(np.cumsum(starts, axis=1) % 3)

    def mask(self, length: int, seed: int = 4) -> jax.Array:
        """Tokens that are there; of the first sequence only the first FEW. (Of one alone, gradients
        of normalised weights are what is left of terms that cancel: rounding.)"""
        mask = np.random.default_rng(seed).random((BATCH, length)) < 0.7
        mask[0] = np.arange(length) < FEW
        return jnp.asarray(mask)

    # --- the contract -----------------------------------------------------------------------------

    def test_values_and_gradients_equal_the_reference(self, variant, implementation):
        for length in self.sizes:
            self.check(implementation, self.data(variant, length), self.options(variant, length))

    @pytest.mark.one_variant
    def test_masked_ones_too(self, variant, implementation):
        length = self.sizes[-1]
        for name in self.masks:
            self.check(
                implementation,
                self.data(variant, length),
                self.options(variant, length),
                **{name: self.mask(length)},
            )

    def test_packed_and_masked_ones_too(self, variant, implementation):
        length = self.sizes[-1]
        arrays = {name: self.mask(length) for name in self.masks}
        self.check(
            implementation,
            self.data(variant, length),
            self.options(variant, length),
            segment_ids=self.ids(length),
            **arrays,
        )

    @pytest.mark.one_variant
    def test_bfloat16_inputs_are_exact_in_float32(self, variant, implementation):
        length = self.sizes[-1]
        self.check(
            implementation,
            self.data(variant, length, "bfloat16"),
            self.options(variant, length),
            segment_ids=self.ids(length),
        )

    def test_what_a_mask_hides_changes_nothing(self, variant, implementation):
        length = self.sizes[-1]
        inputs, options = self.data(variant, length), self.options(variant, length)
        for name in self.masks:
            mask = self.mask(length)
            hidden = dict(inputs)
            for key in self.hides(name):
                hide = mask.reshape(*mask.shape, *(1,) * (inputs[key].ndim - 2))
                hidden[key] = jnp.where(hide, inputs[key], jnp.nan)
            got = self.values_and_gradients(implementation, hidden, options, **{name: mask})
            want = self.values_and_gradients(implementation, inputs, options, **{name: mask})
            for tensor in want:
                np.testing.assert_array_equal(got[tensor], want[tensor], err_msg=tensor)
            for key in self.hides(name):
                np.testing.assert_array_equal(got[f"gradient of {key}"][0, FEW:], 0.0)

    def hides(self, mask: str) -> tuple[str, ...]:
        """The inputs whose tokens a mask hides."""
        return {"key_mask": ("k", "v"), "query_mask": ("q",)}[mask]

    def test_where_a_mask_hides_all_are_zeros(self, variant, implementation):
        length = self.sizes[-1]
        inputs, options = self.data(variant, length), self.options(variant, length)
        for name in self.masks:
            nothing = jnp.zeros((BATCH, length), bool)
            got = self.values_and_gradients(implementation, inputs, options, **{name: nothing})
            for tensor, value in got.items():
                np.testing.assert_array_equal(value, 0.0, err_msg=f"{tensor}, {name}")

    def test_packed_documents_equal_separate_ones(self, variant, implementation):
        length = sum(self.documents)
        ids = np.repeat(np.arange(len(self.documents)) % 2 * 5, self.documents)
        inputs, options = self.data(variant, length, seed=1), self.options(variant, length)
        ids = jnp.broadcast_to(jnp.asarray(ids), (BATCH, length))
        o = self.op(**inputs, **options, segment_ids=ids, implementation=implementation)
        start = 0
        for size in self.documents:
            part = {
                name: x[:, start : start + size] if x.shape[:2] == (BATCH, length) else x
                for name, x in inputs.items()
            }
            alone = self.op(**part, **self.options(variant, size), implementation=implementation)
            assert_close(f"o from {start}", o[:, start : start + size], alone)
            start += size

    @pytest.mark.full
    def test_an_empty_batch_has_empty_outputs(self, variant, implementation):
        length = self.sizes[-1]
        inputs = {
            name: x[:0] if x.shape[:2] == (BATCH, length) else x
            for name, x in self.data(variant, length).items()
        }
        arrays = {"segment_ids": jnp.zeros((0, length), jnp.int32)}
        for given in ({}, arrays):
            got = self.values_and_gradients(
                implementation, inputs, self.options(variant, length), **given
            )
            assert got["o"].shape[:2] == (0, length)

    @pytest.mark.full
    def test_vmap_and_remat_change_nothing(self, variant, implementation):
        length = self.sizes[-2]
        inputs, options = self.data(variant, length), self.options(variant, length)

        def loss(inputs):
            o = self.op(**inputs, **options, implementation=implementation)
            return jnp.sum(jnp.sin(o))

        gradient = jax.grad(loss)
        expected = jax.jit(gradient)(inputs)
        again = jax.jit(jax.grad(jax.checkpoint(loss)))(inputs)
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), inputs)
        mapped = jax.jit(jax.vmap(gradient))(twice)
        for name in expected:
            assert_close(name, again[name], expected[name])
            assert_close(name, mapped[name][1], expected[name])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _values_and_gradients(contract, implementation, options, inputs, arrays):
    def call(inputs):
        return contract.op(**inputs, **dict(options), **arrays, implementation=implementation)

    o, pullback = jax.vjp(call, inputs)
    cotangent = jax.random.normal(jax.random.key(7), o.shape, o.dtype)
    (gradients,) = pullback(cotangent)
    return {"o": o, **{f"gradient of {name}": g for name, g in gradients.items()}}
