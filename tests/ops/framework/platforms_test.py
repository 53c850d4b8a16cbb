"""Choosing a form by the platform that a program is lowered for."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.compiled.kernels import kernel_calls
from ops.framework import platforms
from ops.framework.platforms import by_platform


def choice(traced):
    """A function with one form for CPU and one for TPU, which notes in `traced` what is traced."""

    def form(name, factor):
        def run(x, y):
            traced.append(name)
            return {"sum": x + factor * y, "x": x}

        return run

    forms = {"cpu": form("cpu", 2.0), "tpu": form("tpu", 3.0)}
    return lambda x, y: by_platform(forms, x, y, default=form("default", 5.0))


def test_only_the_form_of_the_lowering_platform_runs_and_others_are_not_traced():
    traced = []
    function = choice(traced)
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(jax.jit(function)(x, x)["sum"], 3 * x)
    assert "tpu" not in traced and "cpu" in traced
    lowered = jax.jit(function).trace(x, x).lower(lowering_platforms=("tpu",))
    assert "tpu" in traced and "3.0" in lowered.as_text()


def test_a_platform_without_a_form_takes_the_default_or_is_refused():
    x = jnp.arange(3.0)
    lowered = jax.jit(choice([])).trace(x, x).lower(lowering_platforms=("cuda",))
    assert "5.0" in lowered.as_text()
    with pytest.raises(ValueError, match=r"has forms for tpu.*lowered for cpu"):
        jax.jit(lambda x: by_platform({"tpu": jnp.sin}, x))(x)


def test_a_batch_is_one_program_with_unmapped_inputs_left_alone():
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.arange(3.0)
    got = jax.jit(jax.vmap(choice([]), (0, None)))(x, y)
    np.testing.assert_array_equal(got["sum"], x + 2 * y[None])
    nested = jax.vmap(jax.vmap(choice([]), (0, None)), (1, 0))(x, y)
    np.testing.assert_array_equal(nested["sum"], x.T + 2 * y[:, None])


def test_a_jaxpr_shows_the_kernels_of_a_platform():
    from jax.experimental import pallas as pl

    def kernel(x, o):
        o[...] = x[...]

    def copy(x):
        return pl.pallas_call(kernel, out_shape=x)(x)

    function = jax.jit(lambda x: by_platform({"tpu": copy}, x, default=jnp.sin))
    jaxpr = jax.make_jaxpr(function)(jnp.ones((8, 128)))
    assert len(list(kernel_calls(jaxpr, "tpu"))) == 1
    assert not list(kernel_calls(jaxpr, "cuda"))


def kernel_module():
    """An implementation whose results say whether it was interpreted."""

    def forward(x, *, interpret):
        return ((3.0 if interpret else 5.0) * x,)

    return types.SimpleNamespace(forward=forward, SUPPORTED="vectors", supports=is_vector)


def is_vector(x):
    return x.ndim == 1


def call(names, x):
    plain = types.SimpleNamespace(forward=lambda x: (7.0 * x,))
    modules = {name: plain if name == "xla" else kernel_module() for name in names}
    rules = {name: module.forward for name, module in modules.items()}
    return platforms.call(modules, rules, x, named=len(names) == 1, plain=plain.forward)[0]


def lowered(names, x, platform):
    function = jax.jit(lambda x: call(names, x))
    return function.trace(x).lower(lowering_platforms=(platform,)).as_text()


def test_a_named_kernel_is_compiled_at_home_interpreted_on_a_cpu_and_refused_elsewhere():
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(call(["pallas_tpu"], x), 3 * x)
    assert "5.0" in lowered(["pallas_tpu"], x, "tpu")
    with pytest.raises(ValueError, match=r"has forms for tpu, cpu.*lowered for cuda"):
        lowered(["pallas_tpu"], x, "cuda")
    with pytest.raises(ValueError, match=r"'pallas_tpu' takes vectors; got float32\(2, 2\)"):
        call(["pallas_tpu"], jnp.ones((2, 2)))


def test_the_derivatives_of_a_kernel_are_those_of_the_plain_form():
    x = jnp.arange(4.0)
    for names, factor in ((["pallas_tpu"], 3), (["xla", "pallas_tpu"], 7)):
        value, tangent = jax.jvp(lambda x, names=names: call(names, x), (x,), (2 * x,))
        np.testing.assert_array_equal(value, factor * x)
        np.testing.assert_array_equal(tangent, 14 * x)


def test_without_a_name_kernels_run_at_home_where_they_can_and_xla_everywhere_else():
    names, x = ["xla", "pallas_tpu", "pallas_gpu"], jnp.arange(4.0)
    np.testing.assert_array_equal(call(names, x), 7 * x)
    assert "5.0" in lowered(names, x, "tpu") and "5.0" in lowered(names, x, "cuda")
    assert "7.0" in lowered(names, jnp.ones((2, 2)), "tpu")
