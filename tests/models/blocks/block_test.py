"""Options of a block: norm, MLP, what is dropped, condition; and what mixers ask for."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.blocks.block import BlockOptions, DropPath
from models.blocks.stack import Stack
from models.parts.options import check_options
from tests.support.layers import FLOAT32, array, randomised, rms, tiny_lm
from tests.support.mixers import SegmentMean, add_mixers

TOKENS = jnp.arange(12).reshape(2, 6) % 11


def stack_of(
    *names: str, depth: int = 2, scan_layers: bool = True, remat: str = "none", **options: Any
) -> Stack:
    """A stack of width 8 with the mixers `names`."""
    return Stack(
        8,
        depth=depth,
        pattern=names,
        mixers={},
        block=BlockOptions(**{"mlp": "gelu", "mlp_ratio": 2.0, **options}),
        scan_layers=scan_layers,
        remat=remat,
        rngs=nnx.Rngs(0, dropout=1),
        **FLOAT32,
    )


@pytest.fixture
def stream() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (3, 5, 8))


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    add_mixers(monkeypatch, segment_mean=SegmentMean)


def normalised(x, axes, eps=1e-5):
    x = np.asarray(x, np.float64)
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(var + eps)


def block_of(stack: Any, i: int) -> Any:
    """The i-th block of a stack whose period is one block, with arrays of its own."""
    graphdef, state = nnx.split(stack.period[0])
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], state))


@pytest.mark.parametrize(("norm", "axes"), [("layer", -1), ("batch", (0, 1))])
def test_a_block_computes_its_two_halves(stream, norm, axes):
    stack: Any = randomised(lambda: stack_of("segment_mean", norm=norm))
    want = np.asarray(stream, np.float64)
    for i in range(2):
        block = block_of(stack, i)
        h = normalised(want, axes) * array(block.mixer_norm.scale) + array(block.mixer_norm.bias)
        h = h + h.mean(axis=1, keepdims=True)
        want = want + h @ array(block.mixer.output.kernel)
        h = normalised(want, axes) * array(block.mlp_norm.scale) + array(block.mlp_norm.bias)
        h = h @ array(block.mlp.up.kernel) + array(block.mlp.up.bias)
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        want = want + h @ array(block.mlp.down.kernel) + array(block.mlp.down.bias)
    got, _ = jax.jit(lambda stack, x: stack(x, None))(stack, stream)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_a_norm_behind_a_half_normalises_the_sum(stream):
    stack: Any = randomised(lambda: stack_of("segment_mean", norm="layer", pre_norm=False))
    want = np.asarray(stream, np.float64)
    for i in range(2):
        block = block_of(stack, i)
        h = want + (want + want.mean(axis=1, keepdims=True)) @ array(block.mixer.output.kernel)
        want = normalised(h, -1) * array(block.mixer_norm.scale) + array(block.mixer_norm.bias)
        h = want @ array(block.mlp.up.kernel) + array(block.mlp.up.bias)
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        h = want + h @ array(block.mlp.down.kernel) + array(block.mlp.down.bias)
        want = normalised(h, -1) * array(block.mlp_norm.scale) + array(block.mlp_norm.bias)
    got, _ = jax.jit(lambda stack, x: stack(x, None))(stack, stream)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("pre_norm", [True, False])
def test_padding_is_in_no_statistics_and_is_not_read(stream, pre_norm):
    stack: Any = randomised(lambda: stack_of("segment_mean", norm="batch", pre_norm=pre_norm))
    call = jax.jit(lambda stack, x, mask: stack(x, None, mask=mask)[0])
    mask = jnp.arange(5)[None, :] < jnp.array([[3], [3], [3]])
    padded = call(stack, jnp.where(mask[..., None], stream, 100.0), mask)
    alone = call(stack, stream[:, :3], jnp.ones((3, 3), bool))
    np.testing.assert_allclose(padded[:, :3], alone, atol=2e-5 * np.abs(alone).max())


def test_tied_dropout_draws_once_for_all_tokens(stream):
    stack: Any = stack_of("segment_mean", depth=1, mlp="none", dropout=0.5, tied_dropout=True)
    x = jnp.broadcast_to(stream[:, :1], stream.shape)
    added = np.asarray(jax.jit(lambda stack: stack(x, None)[0])(stack) - x)
    assert (added == added[:, :1]).all() and 0 < (added == 0).mean() < 1


def test_batch_norms_running_statistics_move_in_training_and_serve_evaluation(stream):
    stack: Any = stack_of("segment_mean", norm="batch")
    call = nnx.jit(lambda stack, x: stack(x, None)[0])
    trained = call(stack, stream)
    norm = block_of(stack, 0).mixer_norm
    np.testing.assert_allclose(norm.mean[...], 0.1 * stream.mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * stream.var((0, 1)) * 15 / 14, rtol=1e-4)
    for _ in range(100):
        call(stack, stream)
    stack.eval()
    before = nnx.to_pure_dict(nnx.state(stack, nnx.BatchStat))
    # The stream is the same in each call, so that the running statistics have become its own, but
    # for the 15 / 14 of the unbiased variance.
    np.testing.assert_allclose(call(stack, stream), trained, atol=0.1)
    one, other = call(stack, stream[:1]), call(stack, stream)
    np.testing.assert_allclose(one, other[:1], atol=1e-6)
    after = nnx.to_pure_dict(nnx.state(stack, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_batch_norms_statistics_come_back_from_a_step_of_the_trainer(stream, remat):
    stack = stack_of("segment_mean", norm="batch", remat=remat)
    graphdef, params, variables = nnx.split(stack, nnx.Param, ...)
    variables = nnx.to_pure_dict(variables)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        model = nnx.merge(graphdef, params, variables)
        value = jnp.sum(jnp.square(model(stream, None)[0]))
        return value, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    gradients, after = gradient(params)
    for path, leaf in nnx.to_flat_state(gradients):
        assert np.isfinite(np.asarray(leaf[...])).all(), path
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), after, variables)
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("scan_layers", [True, False])
def test_dropout_and_drop_path_draw_anew_in_training_and_never_in_evaluation(scan_layers):
    options = {"dropout": 0.3, "drop_path": 0.4, "scan_layers": scan_layers}
    model, plain = (randomised(lambda o=o: tiny_lm(**o)) for o in (options, {}))
    call = nnx.jit(lambda model: model(TOKENS)[0])
    first, second = call(model), call(model)
    assert np.abs(np.asarray(first - second)).max() > 1e-3
    model.eval()
    np.testing.assert_allclose(call(model), call(plain), atol=1e-6)
    model.train()
    assert np.abs(np.asarray(call(model) - call(plain))).max() > 1e-3


def test_drop_path_drops_whole_sequences_more_often_in_later_layers():
    stack: Any = stack_of("segment_mean", depth=5, drop_path=0.5)
    rates = stack.period[0].drop_path.rate[...]
    np.testing.assert_allclose(rates, [0, 0.125, 0.25, 0.375, 0.5])
    keys = {
        tuple(map(int, key)) for key in jax.random.key_data(stack.period[0].drop_path.rngs.key[...])
    }
    assert len(keys) == 5, "layers draw independently"
    path = DropPath(0.25, rngs=nnx.Rngs(dropout=0))
    kept = np.asarray(path(jnp.ones((4000, 2, 3))))
    assert set(np.unique(kept.round(5))) == {0.0, np.float32(4 / 3).round(5)}
    assert (kept == kept[:, :1, :1]).all(), "a sequence is kept or dropped as a whole"
    assert kept[:, 0, 0].mean() == pytest.approx(1, abs=0.05)


def test_a_condition_modulates_both_halves_and_starts_as_the_identity(stream):
    condition = jax.random.normal(jax.random.key(1), (3, 4))
    call = jax.jit(lambda stack, c: stack(stream, None, condition=c)[0])
    fresh: Any = stack_of("segment_mean", condition_width=4)
    np.testing.assert_array_equal(call(fresh, condition), stream)

    stack: Any = randomised(lambda: stack_of("segment_mean", condition_width=4))
    c = np.asarray(condition, np.float64)
    c = (c / (1 + np.exp(-c)))[:, None]
    want = np.asarray(stream, np.float64)
    for i in range(2):
        block = block_of(stack, i)
        modulation = c @ array(block.modulation.kernel) + array(block.modulation.bias)
        shift, scale, gate, *second = np.split(modulation, 6, axis=-1)
        h = rms(want) * array(block.mixer_norm.scale) * (1 + scale) + shift
        want = want + gate * ((h + h.mean(1, keepdims=True)) @ array(block.mixer.output.kernel))
        shift, scale, gate = second
        h = rms(want) * array(block.mlp_norm.scale) * (1 + scale) + shift
        want = want + gate * np.asarray(block.mlp(jnp.asarray(h, jnp.float32)))
    np.testing.assert_allclose(call(stack, condition), want, atol=2e-5 * np.abs(want).max())
    gradient = jax.jit(jax.grad(lambda c: jnp.sum(jnp.square(call(stack, c)))))(condition)
    assert np.abs(np.asarray(gradient)).min(axis=1).min() > 0


def test_a_condition_is_given_to_a_stack_that_has_one_and_to_no_other(stream):
    with pytest.raises(ValueError, match=r"condition must be \[B, C\].* got None for a stack with"):
        stack_of("segment_mean", condition_width=4)(stream, None)
    with pytest.raises(ValueError, match=r"got \(3, 4\) for a stack without"):
        stack_of("segment_mean")(stream, None, condition=jnp.ones((3, 4)))
    assert not any("modulation" in path for path, _ in nnx.to_flat_state(nnx.state(tiny_lm())))


def test_only_mixers_that_name_the_grid_are_given_it(stream, monkeypatch):
    seen = []

    class TwoDimensional(SegmentMean):
        def __call__(self, x_BTD, state=None, *, positions=None, segment_ids=None, grid=()):
            seen.append(grid)
            height, width = grid
            x_BHWD = x_BTD.reshape(len(x_BTD), height, width, -1)
            return jnp.cumsum(x_BHWD, axis=2).reshape(x_BTD.shape), None

    class Sharing(SegmentMean):
        class Shared(nnx.Module):
            def __init__(self, width: int, *, layers: int):
                self.layers = layers

            def __call__(self):
                return jnp.arange(1.0, self.layers + 1)

        def __call__(self, x_BTD, state=None, *, positions=None, segment_ids=None, shared=0.0):
            return shared * x_BTD, None

    add_mixers(monkeypatch, two_dimensional=TwoDimensional, sharing=Sharing)
    stack: Any = stack_of("two_dimensional", "segment_mean", "sharing", depth=3, mlp="none")
    got, _ = jax.jit(lambda stack, x: stack(x, None, grid=(1, 5)))(stack, stream)
    assert set(seen) == {(1, 5)} and np.isfinite(np.asarray(got)).all()
    double: Any = stack_of("sharing", depth=2, mlp="none")
    want = stream + rms(stream)
    np.testing.assert_allclose(double(stream, None)[0], want + 2 * rms(want), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "group"}, "norm must be one of 'rms', .*'layer', .*'batch', .*; got 'group'"),
        ({"mlp": "relu"}, "mlp must be one of 'swiglu', 'gelu', .*'none'; got 'relu'"),
        ({"drop_path": 1.0}, r"drop_path must be a finite number in \[0, 1\); got 1.0"),
        ({"dropout": -0.1}, r"dropout must be a finite number in \[0, 1\); got -0.1"),
    ],
)
def test_impossible_options_of_blocks_raise(options, message):
    with pytest.raises(ValueError, match=message):
        BlockOptions(**options)
    with pytest.raises(ValueError, match=message):
        tiny_lm(**options)


def test_a_config_cannot_set_the_width_of_a_condition():
    with pytest.raises(ValueError, match="model lm has no option 'condition_width'"):
        tiny_lm(condition_width=3)
    with pytest.raises(ValueError, match=r"blocks has no option 'norms'; .* dropout, .*mlp, "):
        check_options("blocks", "model", {"norms": 1}, BlockOptions)


def test_a_branch_norm_is_behind_what_a_half_adds(stream) -> None:
    stack = stack_of("segment_mean", depth=1, norm="layer", branch_norm=True)
    block, x = block_of(stack, 0), stream
    for f, norm in ((lambda h: block.mixer(h)[0], block.mixer_norm), (block.mlp, block.mlp_norm)):
        x = x + norm(f(x))
    np.testing.assert_allclose(stack(stream, None)[0], x, atol=1e-5)
    assert float(jnp.abs(x - stream).min(axis=-1).max()) > 0


def test_the_stream_goes_on_as_its_norm_and_halves_have_factors(stream) -> None:
    factors = (("segment_mean", 1.5, 0.5), ("mlp", 2.0, 1.0), ("gla", 9.0, 9.0))
    stack = stack_of("segment_mean", depth=1, normed_residual=True, stream_factors=factors)
    block: Any = block_of(stack, 0)
    h = block.mixer_norm(stream)
    h = block.mlp_norm(1.5 * h + 0.5 * block.mixer(h)[0])
    np.testing.assert_allclose(stack(stream, None)[0], 2 * h + block.mlp(h), atol=1e-5)
    with pytest.raises(ValueError, match="normed_residual must be False with a condition, branch"):
        BlockOptions(normed_residual=True, branch_norm=True)


def test_layers_differ_in_their_mlp_and_in_where_their_norm_is(monkeypatch) -> None:
    """What differs between layers makes the period longer."""

    class Other(SegmentMean):
        pass

    add_mixers(monkeypatch, other=Other)
    sizes: dict[str, Any] = {"mlp": "experts", "experts": 3, "experts_per_token": 1}
    sizes |= {"mlp_width": 4, "dense_layers": (0, 3), "dense_width": 5}
    stack: Any = stack_of("segment_mean", "other", depth=4, branch_norm_mixers=("other",), **sizes)
    assert len(stack.period) == 4
    widths = [getattr(block.mlp, "up", None) for block in stack.period]
    assert [w and w.kernel.shape[-1] for w in widths] == [5, None, None, 5]
    assert [block.branch_norm for block in stack.period] == [False, True, False, True]
    same: Any = stack_of("segment_mean", "other", depth=4, branch_norm_mixers=("other",))
    assert len(same.period) == 2
