"""HyperZ.Z.W against a float64 transcription of its equations; its identities; what a batch is."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from models.blocks import hyper_kernels
from models.blocks.hyper_block import HyperBlock, HyperOptions, global_product
from models.networks.hyper_zzw import build, earlier_blocks, slow_loss
from tests.support.layers import FLOAT32, array, randomised, sigmoid, weight

SMALL = {"lift": 4, "factors": (1, 2), "kernel_sizes": (3,), "slow_width": 4, "groups": 2}
RNG = np.random.default_rng(0)


def network(side: int = 4, **model: Any) -> Any:
    sizes = {"classes": 3, "channels": 1, "height": side, "width": side}
    return build({**SMALL, **model}, rngs=nnx.Rngs(0, dropout=1), **sizes, **FLOAT32)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# --- The equations, for images x [B, Y, X, C] or sequences [B, T, C]


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def over_places(x):
    return tuple(range(1, x.ndim - 1))


def standard(x, axes):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


def instance(x):
    return standard(x, over_places(x))


def batch(x):
    return standard(x, (0, *over_places(x)))


def dense(x, linear):
    return x @ weight(linear) + array(linear.bias)


def generated(network, shape, context=None):
    """The kernel of a slow network place by place, with the factors of a context."""
    grid = [np.linspace(-1, 1, side) for side in shape]
    points = np.array(list(itertools.product(*grid)))
    g = [
        np.sin(points @ F + phi)
        for F, phi in zip(array(network.frequency_IDH), array(network.phase_IH), strict=True)
    ]
    h = g[0]
    for i, step in enumerate(network.steps):
        h = g[i + 1] * dense(h, step) + array(network.place_N1)
        if context is not None:
            scaled = h + 0.1 * h / np.sqrt((h**2).sum(0))
            h = scaled * dense(context[1], context[0][i])
    return dense(h, network.output).reshape(*shape, -1)


def local_kernel(kernel, u):
    """K_l of contexts u."""
    size, sides = kernel.network.shape[0], u.shape[1:-1]
    pooled = np.zeros((*kernel.network.shape, u.shape[-1]))
    for place in np.ndindex(*kernel.network.shape):
        cell = tuple(
            slice(i * side // size, math.ceil((i + 1) * side / size))
            for i, side in zip(place, sides, strict=True)
        )
        part = u[(slice(None), *cell)]
        pooled[place] = part.mean(tuple(range(part.ndim - 1)))
    s = gelu(dense(dense(pooled, kernel.read), kernel.mix)).reshape(size ** len(sides), -1)
    return generated(kernel.network, kernel.network.shape, (kernel.factors, s))


def local(operator, u, x):
    w = local_kernel(operator.kernel, u)
    half, y = w.shape[0] // 2, np.zeros_like(x)
    around = [(0, 0), *((half, half) for _ in over_places(x)), (0, 0)]
    padded = np.pad(x, around)
    for tap in np.ndindex(*w.shape[:-1]):
        moved = tuple(slice(i, i + side) for i, side in zip(tap, x.shape[1:-1], strict=True))
        y += w[tap] * padded[(slice(None), *moved)]
    return gelu(batch(dense(y, operator.mix))) + array(operator.shift)


def multiplied(a, b):
    if a.ndim == 4:
        return np.einsum("byqc,bqxc->byxc", a, b)
    length, y = a.shape[1], np.zeros_like(a)
    for t in range(length):
        for s in range(length):
            y[:, t] += a[:, s] * b[:, (t - s) % length]
    return y


def unit(u, module):
    h = gelu(instance(dense(u, module.key) * dense(dense(u, module.value), module.query)))
    return dense(h + array(module.place_T1).reshape(*u.shape[1:-1], 1), module.output)


def transcribed(block, x, earlier, groups):
    sides = x.shape[1:-1]
    G = generated(block.kernel, sides) * x
    f = instance(unit(G, block.slow_unit) + unit(x, block.fast_unit))
    m = instance(dense(x, block.mlp))
    p = x.mean(over_places(x), keepdims=True)
    k_c = generated(block.channels, (x.shape[-1],))[:, 0]
    c = instance(x * sigmoid(k_c * p * p))
    o, o_m, o_c = (multiplied(G, by) for by in (f, m, c))
    q, n = o.mean(over_places(o), keepdims=True), o.mean(-1, keepdims=True)
    of_channels = generated(block.interaction.of_channels, (x.shape[-1],))[:, 0]
    of_places = generated(block.interaction.of_places, sides)
    hi = x * sigmoid((of_channels * q * q) * (of_places * n * n))
    l1, l2, l3, l4 = (
        local(op, u, z)
        for op, (u, z) in zip(block.local, ((x, c), (c, x), (m, x), (x, m)), strict=True)
    )
    before, still = (np.concatenate([e] * (x.shape[-1] // e.shape[-1]), -1) for e in earlier)
    maps = (o, l2, before, f, o_m, l1, sigmoid(o) * o, l3, o_c, l4, still, hi)
    y = dense(np.concatenate(maps, -1), block.bottleneck)
    parts = np.split(y, groups, axis=-1)
    y = np.concatenate([(batch, instance)[i % 2](part) for i, part in enumerate(parts)], -1)
    return gelu(y) + array(block.shift)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 4), (6,)])
def test_a_block_computes_the_equations_of_the_rows_that_are_there(shape):
    options = HyperOptions(kernel_sizes=(3, 5, 1, 3), slow_width=8, groups=4, frequency=0.1)
    block: Any = randomised(
        lambda: HyperBlock(
            4,
            8,
            shape=shape,
            earlier=(2, 4),
            steps=3,
            dropout=0.0,
            options=options,
            rngs=nnx.Rngs(0),
            **FLOAT32,
        )
    )
    x, first, second = (normal(4, *shape, channels) for channels in (4, 2, 4))
    there = np.array([True, False, True, True])
    want = transcribed(
        block,
        *(a[there].astype(np.float64) for a in (x,)),
        [a[there].astype(np.float64) for a in (first, second)],
        groups=4,
    )
    flat = [jnp.asarray(a.reshape(4, -1, a.shape[-1])) for a in (x, first, second)]
    got, kernel = jax.jit(lambda m, x, e, r: m(x, e, r))(block, flat[0], tuple(flat[1:]), there)
    got = np.asarray(got).reshape(4, *shape, 8)[there]
    np.testing.assert_allclose(got, want, atol=2e-4)
    np.testing.assert_allclose(kernel, generated(block.kernel, shape).reshape(-1, 4), atol=2e-5)


# --- Identities


def test_the_global_product_of_ones_is_a_power_and_of_degree_two():
    x = jnp.asarray(normal(2, 9, 3))
    for shape in ((3, 3), (9,)):
        kernel = jnp.asarray(normal(1, 9, 3))
        got = global_product(kernel * x, x, shape)
        twice = global_product(kernel * 2 * x, 2 * x, shape)
        np.testing.assert_allclose(twice, 4 * got, rtol=1e-5, atol=1e-5)
        assert not np.asarray(global_product(0 * x, x, shape)).any()
        squared = multiplied(*(np.asarray(x, np.float64).reshape(2, *shape, 3),) * 2)
        np.testing.assert_allclose(
            global_product(x, x, shape), squared.reshape(2, 9, 3), rtol=1e-4, atol=1e-5
        )


def test_no_slow_loss_is_left_where_kernels_are_each_other_repeated():
    shallow = jnp.asarray(normal(9, 2))
    deep = jnp.tile(shallow, (1, 3))
    assert slow_loss([shallow, deep, jnp.tile(deep, (1, 2))], tiled=True) == 0
    # Sums over channels differ by the factor 3.
    want = float(np.mean((2 * np.asarray(shallow).sum(1)) ** 2))
    np.testing.assert_allclose(slow_loss([shallow, deep], tiled=False), want, rtol=1e-5)
    kernels = [jnp.full((4, 1), value) for value in (0.0, 1.0, 3.0)]
    assert slow_loss(kernels, tiled=False) == 1 + 9 + 4  # over all pairs


@pytest.mark.slow
def test_blocks_read_ten_maps_and_those_of_earlier_blocks():
    assert [earlier_blocks(i) for i in range(5)] == [(), (), (0,), (1,), (2, 1)]
    sizes = {"classes": 10, "channels": 3, "height": 32, "width": 32}
    model = nnx.eval_shape(lambda: build({}, rngs=nnx.Rngs(0), **sizes, **FLOAT32))
    inputs = [block.bottleneck.kernel.shape for block in model.blocks]
    widths = (3, 12, 36, 72, 144, 288)
    earlier = (0, 0, 1, 1, 2)
    assert inputs == [
        (c * (10 + e), after) for c, e, after in zip(widths, earlier, widths[1:], strict=False)
    ]
    assert model.head.kernel.shape == (288, 10)


def test_a_local_kernel_depends_on_the_mean_of_the_rows_that_are_there_alone():
    kernel: Any = randomised(
        lambda: hyper_kernels.LocalKernel(
            3,
            2,
            (4, 4),
            hidden=4,
            steps=2,
            frequency=1.0,
            context=True,
            running=False,
            rngs=nnx.Rngs(0),
            param_dtype=jnp.float32,
        )
    )
    x, there = jnp.asarray(normal(4, 16, 2)), np.array([True, True, False, True])
    call = jax.jit(lambda m, x, there: m(x, there))
    of_rows = call(kernel, x, there)
    turned = call(kernel, x[::-1], there[::-1])
    np.testing.assert_allclose(turned, of_rows, atol=1e-6)
    mean = jnp.broadcast_to(x[there].mean(0), x.shape)
    np.testing.assert_allclose(call(kernel, mean, there), of_rows, atol=1e-6)
    assert np.abs(np.asarray(call(kernel, x, ~there) - of_rows)).max() > 1e-3


def test_without_beta_no_gradient_passes_the_renormalisation():
    h = jnp.asarray(normal(5, 3))

    def passed(beta):
        return jax.grad(lambda h: jnp.sum(hyper_kernels.renormalised(h, beta) ** 3))(h)

    assert not np.asarray(passed(0.0)).any()
    assert np.asarray(passed(0.1)).any()
    zero = jax.grad(lambda h: jnp.sum(hyper_kernels.renormalised(h)))(jnp.zeros((5, 3)))
    assert np.isfinite(zero).all()


def test_means_over_cells_are_those_of_the_same_number_of_places_and_of_one():
    x = jnp.asarray(normal(2, 12, 3))
    np.testing.assert_allclose(hyper_kernels.adaptive_means(x, (3, 4), (3, 4)), x, atol=1e-6)
    one = hyper_kernels.adaptive_means(x, (3, 4), (1, 1))
    np.testing.assert_allclose(one[:, 0], x.mean(1), atol=1e-6)


def test_frequencies_start_as_published():
    network = hyper_kernels.SlowNetwork(
        (4, 4), 2, hidden=400, steps=1, frequency=3.0, rngs=nnx.Rngs(0), param_dtype=jnp.float32
    )
    # E |U(-1/sqrt 2, 1/sqrt 2)| = 1 / (2 sqrt 2), E Gamma(k, 1) = k.
    size = np.abs(array(network.frequency_IDH)).mean((1, 2))
    want = 2 * math.pi * 3 * np.array([6, 3]) / (2 * math.sqrt(2))
    np.testing.assert_allclose(size, want, rtol=0.1)
    assert np.abs(weight(network.output)).max() <= math.sqrt(3 / 400) / 4


# --- Batches

PREDICT = jax.jit(lambda model, image, there: model(image, there))


@pytest.mark.slow
def test_rows_that_are_not_there_change_nothing():
    model = network(factors=(2,))
    image, there = jnp.asarray(normal(5, 4, 4, 1)), np.array([1, 1, 0, 1, 0], bool)
    alone = PREDICT(model, image[there], np.ones(3, bool))
    filled = jnp.where(there[:, None, None, None], image, jnp.nan)

    @jax.jit
    def gradient(model, image):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            logits = nnx.merge(graphdef, params, rest)(image, there)
            return jnp.sum(jnp.where(there[:, None], logits, 0.0) ** 2), logits

        return jax.grad(loss, has_aux=True)(params)

    (grads, logits), (other, _) = gradient(model, filled), gradient(model, image)
    np.testing.assert_allclose(logits[there], alone, atol=2e-5)
    for (path, one), two in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(one, two, err_msg=jax.tree_util.keystr(path))
    # And those that are there do.
    others = PREDICT(model, image, np.ones(5, bool))
    assert np.abs(np.asarray(others[there] - alone)).max() > 1e-3


@pytest.mark.slow
def test_with_running_statistics_a_prediction_is_of_the_image_alone():
    model = network(factors=(1,), norm="batch", statistics="running", sequence=True)
    image, there = jnp.asarray(normal(6, 4, 4, 1)), np.ones(6, bool)

    @jax.jit
    def trained(model, image):
        model(image, there)
        return nnx.state(model, nnx.BatchStat)

    before = nnx.state(model, nnx.BatchStat)
    moved = trained(model, image)
    leaves = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(moved), strict=True)
    for (path, old), new in leaves:
        assert (np.asarray(old) != np.asarray(new)).any(), jax.tree_util.keystr(path)
    model.eval()
    together, alone = PREDICT(model, image, there), PREDICT(model, image[:1], there[:1])
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: network()(normal(1, 4, 5, 1)), r"images must be \[B, 4, 4, 1\] .*; got \(1, 4, 5"),
        (lambda: network(factors=()), "factors must have one for each block"),
        (lambda: network(groups=3), "groups must divide .* got groups=3 for 4 channels"),
        (lambda: network(slow_width=6), "slow_width must be a multiple of 4; got 6"),
        (lambda: network(kernel_sizes=(2,)), "kernel_sizes must be at most four odd sizes"),
        (lambda: network(norm="layer"), "norm must be one of 'g_ibs', 'batch'; got 'layer'"),
        (lambda: network(slow_loss="none"), "slow_loss must be one of 'summed', 'tiled'"),
        (lambda: network(statistics="no"), "statistics must be one of 'batch', 'running'"),
        (lambda: network(width=3), "model hyper_zzw has no option 'width'; known options"),
        (
            lambda: build(
                SMALL, classes=3, channels=1, height=4, width=6, rngs=nnx.Rngs(0), **FLOAT32
            ),
            "sequence must be True for images of unequal sides.*; got 4 x 6",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(attempt, message):
    with pytest.raises(ValueError, match=message) as raised:
        nnx.eval_shape(attempt)
    assert "\n" not in str(raised.value)


def test_every_ablation_has_a_forward_pass_and_parameters_can_be_laid_over_a_mesh():
    for model in (
        {},
        {"hyper_kernels": False},
        {"global_branch": False, "sequence": True},
        {"kernel_sizes": ()},
        {"context": False, "slow_loss_weight": 0.0},
    ):
        made = nnx.eval_shape(lambda model=model: network(**model))
        assert nnx.eval_shape(lambda m: m(jnp.ones((2, 4, 4, 1))), made).shape == (2, 3)
        for path, param in nnx.to_flat_state(nnx.state(made, nnx.Param)):
            assert len(param.get_metadata()["out_sharding"]) == len(param.shape), path
