"""MoM against a slow transcription of its paper; its executions, its router and the load-balancing
loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.objectives.objective import minimised, report_metrics
from models import gated_delta_net, gla, mom
from models.mom import projections
from models.mom.dispatch import dispatch
from models.mom.projections import in_blocks, routed_products
from models.networks.lm import build
from models.parts.variables import Report, mean_over_layers, report
from tests.support.layers import (
    FLOAT32,
    WIDTH,
    array,
    build_mixer,
    call,
    check_layer,
    convolved,
    count_parameters,
    inputs,
    merge,
    randomised,
    rms,
    sigmoid,
    silu,
    softplus,
    unit,
    weight,
)

HEADS = 2
GLA = {"rule": "gla", "execution": "gathered", "gate_rank": 3, "conv_width": 4}
build_mom = functools.partial(build_mixer, mom, heads=HEADS, memories=3)


def projected(x_TD, projection, memory):
    return x_TD @ array(projection.kernel_EDX)[memory]


def delta_step(mixer, memory, S, x_TD, k, v):
    rule = mixer.rule
    dt = softplus(projected(x_TD, rule.dt, memory) + array(rule.dt_bias_H))[-1]
    beta = sigmoid(projected(x_TD, rule.beta, memory))[-1]
    for h in range(HEADS):
        alpha = np.exp(-np.exp(array(rule.a_log_H)[h]) * dt[h])
        u = unit(k[h])
        erase = np.eye(len(u)) - beta[h] * np.outer(u, u)
        S[h] = erase @ (alpha * S[h]) + beta[h] * np.outer(u, v[h])


def sum_step(mixer, memory, S, x_TD, k, v):
    rule = mixer.rule
    low = projected(x_TD, rule.gate_in, memory)
    logits = (projected(low, rule.gate_out, memory) + array(rule.bias_EX)[memory])[-1]
    alpha = sigmoid(logits).reshape(k.shape) ** (1 / 16)
    for h in range(HEADS):
        S[h] = alpha[h][:, None] * S[h] + np.outer(k[h], v[h])


def transcription(mixer, x_TD, *, top_k, shared, step):
    """Token by token: the memories of the token take it, and nothing else of the state changes."""
    logits = x_TD @ weight(mixer.router.logits)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    S = np.zeros((mixer.memories, HEADS, mixer.key_size, mixer.value_size))
    seen = [[] for _ in S]  # the tokens that each memory has taken
    o = np.zeros((len(x_TD), HEADS, mixer.value_size))
    for t in range(len(x_TD)):
        chosen = np.argsort(-p[t])[:top_k]
        weights = dict(zip(chosen, p[t, chosen] / p[t, chosen].sum(), strict=True))
        for m, w in (weights | ({mixer.memories - 1: 1.0} if shared else {})).items():
            seen[m].append(x_TD[t])
            own = np.stack(seen[m])
            q, k, v = (
                (silu if step is delta_step or convolution.width else np.array)(
                    convolved(y, convolution)
                )[-1].reshape(HEADS, -1)
                for y, convolution in (
                    (own @ weight(mixer.query), mixer.conv_q),
                    (projected(own, mixer.key, m), mixer.conv_k),
                    (projected(own, mixer.value, m), mixer.conv_v),
                )
            )
            step(mixer, m, S[m], own, k, v)
            q = unit(q) if step is delta_step else q
            o[t] += w * np.einsum("hk,hkv->hv", q, S[m]) / np.sqrt(mixer.key_size)
    normed = merge(rms(o, array(mixer.norm.scale)))
    return (normed * silu(x_TD @ weight(mixer.output_gate))) @ weight(mixer.output)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"top_k": 2}, delta_step),
        ({"top_k": 2, "conv_width": 0}, delta_step),
        ({"top_k": 2, **GLA, "conv_width": None}, sum_step),  # as published: none
        pytest.param({"top_k": 2, "shared_memory": False, **GLA}, sum_step, marks=pytest.mark.slow),
    ],
)
def test_mom_computes_its_router_memories_and_output(options, step):
    mixer = build_mom(**options)
    shared = options.get("shared_memory", True)
    check_layer(
        mixer,
        functools.partial(transcription, mixer, top_k=options["top_k"], shared=shared, step=step),
    )


A, B = 0, 1
EXAMPLE = {  # of models/mom/dispatch.py: tokens 0, 2, 3 are those of memory a, 1 and 4 of b
    "memory_BTJ": jnp.array([A, B, A, A, B]).reshape(1, 5, 1),
    "segment_ids": jnp.array([[7, 7, 3, 3, 3]]),
    "memories": 2,
    "history": 1,
}


def test_the_pictures_of_the_dispatch_are_true():
    plan = dispatch(**EXAMPLE, one_stream=True)
    names = np.array(["ra", *range(5), "rb", *range(5)])
    assert names[plan.order.source[0]].tolist() == ["ra", "0", "2", "3", "rb", "1", "4"]
    assert plan.order.place.ravel().tolist() == [1, 5, 2, 3, 6]
    assert plan.order.is_token.ravel().tolist() == [False, True, True, True, False, True, True]
    ids = plan.segments.ids.ravel()
    assert (ids[1:] != ids[:-1]).tolist() == [False, True, False, True, False, True]
    assert np.flatnonzero(plan.segments.resets).tolist() == [2, 6]
    assert plan.latest.tokens.ravel().tolist() == [3, 4]
    assert plan.latest.valid_count.ravel().tolist() == [1, 1]
    assert not plan.outdated.any()

    plan = dispatch(**EXAMPLE, one_stream=False)
    assert names[plan.order.source[0]].reshape(2, 6)[:, :4].tolist() == [
        ["ra", "0", "2", "3"],
        ["rb", "1", "4", "4"],  # from here on padding
    ]
    assert plan.order.place.ravel().tolist() == [0, 5, 1, 2, 6]
    assert plan.order.is_token.sum(axis=-1).tolist() == [[3, 2]]

    last_alone = EXAMPLE | {"segment_ids": jnp.array([[7, 7, 7, 7, 3]])}
    plan = dispatch(**last_alone, one_stream=True)
    assert plan.latest.valid_count.tolist() == [[0, 1]]
    assert plan.outdated.tolist() == [[True, False]], "a holds the document that is over"


def loss_and_gradients(mixer, x, segment_ids):
    graphdef, params, rest = nnx.split(mixer, nnx.Param, ...)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            mixer = nnx.merge(graphdef, params, rest)
            y, state = mixer(x, segment_ids=segment_ids)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in (y, *state.values())), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    return run(params, x)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gated_delta_net", pytest.param("gla", marks=pytest.mark.full)])
def test_a_stream_of_copies_equals_a_padded_sequence_per_memory(rule, monkeypatch):
    monkeypatch.setattr(projections, "LEAST_FLOPS", 0)
    ids = jnp.array([[0, 0, 0, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 4]])
    results = [
        loss_and_gradients(build_mom(rule=rule, execution=execution, conv_width=3), inputs(), ids)
        for execution in ("gathered", "padded")
    ]
    leaves = [jax.tree_util.tree_leaves_with_path(result) for result in results]
    for (path, got), (_, want) in zip(*leaves, strict=True):
        name = jax.tree_util.keystr(path)
        assert np.abs(want).max() > 0, name
        scale = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, atol=2e-5 * scale, err_msg=name)


def test_products_of_routed_copies_are_those_of_their_memories_and_so_are_gradients():
    keys = jax.random.split(jax.random.key(0), 4)
    # Memory 2 has no copy; memory 1 has 22, more than a block.
    memory = jnp.array([[0, 1]] * 3 + [[1, 3]] * 19).reshape(2, 11, 2)
    kernels = [
        jax.random.normal(key, (4, 5, size)) for key, size in zip(keys, (3, 6), strict=False)
    ]
    x = jax.random.normal(keys[2], (2, 11, 5))
    of_copies = jax.random.normal(keys[3], (2, 11, 2, 5))

    def routed(x, of_copies, kernels):
        return routed_products(x, memory, kernels), routed_products(of_copies, memory, kernels)

    def of_all(x, of_copies, kernels):
        own = [kernel[memory] for kernel in kernels]
        return (
            tuple(jnp.einsum("btd,btjdx->btjx", x, one) for one in own),
            tuple(jnp.einsum("btjd,btjdx->btjx", of_copies, one) for one in own),
        )

    def both(function):
        made, pullback = jax.vjp(function, x, of_copies, tuple(kernels))
        return made, pullback(jax.tree.map(jnp.cos, made))

    got, wanted = (jax.tree.leaves(jax.jit(both, static_argnums=0)(f)) for f in (routed, of_all))
    for value, want in zip(got, wanted, strict=True):
        np.testing.assert_allclose(value, want, atol=1e-5)


@pytest.mark.parametrize("copies", [64, 1000, 4096, 100_000])
def test_at_most_an_eighth_of_the_rows_of_blocks_is_in_vain(copies):
    memory = jax.ShapeDtypeStruct((1, copies // 2, 2), jnp.int32)
    rows = jax.eval_shape(functools.partial(in_blocks, memories=5), memory).copy_NR.shape
    assert copies <= rows[0] * rows[1] <= max(9 * copies / 8, copies + 5 * 15)


def copy_inner(inner, mixer):
    """Gives every memory the projections of the inner layer."""

    def repeat(linear):
        kernel = linear.kernel[...]
        return jnp.broadcast_to(kernel[None], (mixer.memories, *kernel.shape))

    for name in ("key", "value"):
        getattr(mixer, name).kernel_EDX[...] = repeat(getattr(inner, name))
    for name in ("query", "output_gate", "output"):
        getattr(mixer, name).kernel[...] = getattr(inner, name).kernel[...]
    for name in ("conv_q", "conv_k", "conv_v"):
        getattr(mixer, name).weight_WD[...] = getattr(inner, name).weight_WD[...]
    mixer.norm.scale[...] = inner.norm.scale[...]
    if hasattr(inner, "beta"):
        for name in ("beta", "dt"):
            getattr(mixer.rule, name).kernel_EDX[...] = repeat(getattr(inner, name))
        mixer.rule.a_log_H[...] = inner.a_log_H[...]
        mixer.rule.dt_bias_H[...] = inner.dt_bias_H[...]
    else:
        for name in ("gate_in", "gate_out"):
            getattr(mixer.rule, name).kernel_EDX[...] = repeat(getattr(inner, name))
        mixer.rule.bias_EX[...] = jnp.broadcast_to(
            inner.gate_out.bias[...][None], mixer.rule.bias_EX.shape
        )


def test_one_memory_is_gated_delta_net():
    inner = build_mixer(gated_delta_net, heads=HEADS, expand_k=1.0, expand_v=1.0)
    mixer = build_mixer(mom, heads=HEADS, memories=1, top_k=1, shared_memory=False)
    copy_inner(inner, mixer)
    np.testing.assert_allclose(call(mixer, inputs()), call(inner, inputs()), atol=2e-5)


@pytest.mark.slow
def test_equal_memories_that_all_take_every_token_are_gla():
    inner = build_mixer(gla, heads=HEADS, expand_k=1.0, gate_rank=3, conv_width=4)
    mixer = build_mom(top_k=3, shared_memory=False, **GLA)
    copy_inner(inner, mixer)
    np.testing.assert_allclose(call(mixer, inputs()), call(inner, inputs()), atol=2e-5)


@pytest.mark.slow
def test_the_order_of_the_memories_does_not_matter():
    mixer, other = build_mom(shared_memory=False), build_mom(shared_memory=False)
    order = jnp.array([2, 0, 1])
    for path in (("key",), ("value",), ("rule", "beta"), ("rule", "dt")):
        kernel = functools.reduce(getattr, path, other).kernel_EDX
        kernel[...] = kernel[...][order]
    router = other.router.logits.kernel
    router[...] = router[...][:, order]
    np.testing.assert_allclose(call(other, inputs()), call(mixer, inputs()), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [GLA, pytest.param({}, marks=pytest.mark.full)])
def test_a_memory_to_which_no_token_is_routed_stays_as_it_is_to_the_bit(options):
    mixer = build_mom(top_k=1, **options)
    # The first memory is always chosen.
    router = jnp.zeros((WIDTH, 3)).at[0].set(jnp.array([1.0, 0.0, 0.0]))
    mixer.router.logits.kernel[...] = router
    x = jnp.asarray(inputs()).at[:, :, 0].set(5.0)
    state = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), mixer.init_state(2)
    )
    _, after = jax.jit(lambda mixer, x, state: mixer(x, state))(mixer, x, state)
    for name in state:
        np.testing.assert_array_equal(after[name][:, 1:3], state[name][:, 1:3], name)
        for used in (0, 3):  # 3: the shared memory
            assert np.abs(after[name][:, used] - state[name][:, used]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, GLA])
def test_a_sequence_does_not_depend_on_its_neighbour(options):
    mixer, x = build_mom(**options), jnp.asarray(inputs())
    changed = call(mixer, x.at[1].multiply(-2.0))
    np.testing.assert_array_equal(changed[0], call(mixer, x)[0])
    assert np.abs(changed[1] - call(mixer, x)[1]).max() > 0.1


def router(**options):
    # Sown values need no parameters of order one: those of the router decide what is routed where.
    return build_mom(**options).router


def test_balanced_routing_has_a_loss_of_k_and_an_entropy_of_log_m():
    router_3 = router(balance_weight=0.5)
    # Three tokens whose largest two logits are all three pairs; probabilities average to 1/3.
    router_3.logits.kernel[...] = jnp.zeros((WIDTH, 3)).at[:3].set(jnp.eye(3))
    x = jnp.zeros((1, 3, WIDTH)).at[0, :, :3].set(2 - 2 * jnp.eye(3))
    _, reports = nnx.capture(router_3, Report)(x)
    values = mean_over_layers(reports)
    np.testing.assert_allclose(values["auxiliary_loss"], 0.5 * 2, rtol=1e-6)
    np.testing.assert_allclose(values["routing_entropy"], np.log(3), rtol=1e-6)


def test_micro_batches_balance_each_sequence_and_a_global_batch_their_union():
    x = jnp.asarray(inputs())
    values = {}
    for load_balancing in ("micro_batch", "global_batch"):
        one = router(load_balancing=load_balancing, balance_weight=1.0)

        def loss(x, one=one):
            return mean_over_layers(nnx.capture(one, Report)(x)[1])["auxiliary_loss"]

        values[load_balancing] = loss(x)
        alone = [loss(sequence[None]) for sequence in x]
        if load_balancing == "micro_batch":
            np.testing.assert_allclose(values[load_balancing], np.mean(alone), rtol=1e-6)
        union = loss(x.reshape(1, -1, WIDTH))
        if load_balancing == "global_batch":
            np.testing.assert_allclose(values[load_balancing], union, rtol=1e-6)
        same = jnp.stack([x[0], x[0]])
        np.testing.assert_allclose(loss(same), alone[0], rtol=1e-6)
    assert abs(values["micro_batch"] - values["global_batch"]) > 1e-4


def test_the_balance_loss_trains_the_router_through_probabilities_alone():
    one = router(balance_weight=1.0)
    x = jnp.asarray(inputs())
    logits = one.logits(x)
    p, k = jax.nn.softmax(logits, axis=-1), one.top_k
    chosen = jax.nn.one_hot(jax.lax.top_k(p, k)[1], 3).sum(2)
    f = chosen.mean((0, 1))
    graphdef, params = nnx.split(one)

    def loss(params):
        _, reports = nnx.capture(nnx.merge(graphdef, params), Report)(x)
        return mean_over_layers(reports)["auxiliary_loss"]

    gradient = jax.grad(loss)(params)["logits"]["kernel"][...]
    # d/dlogits of 3 sum_m f_m mean_t p_tm with f constant.
    f = f[None, None]
    inner = p * (f - jnp.sum(p * f, axis=-1, keepdims=True))
    want = jnp.einsum("btd,btm->dm", x, 3 * inner / p.shape[0] / p.shape[1])
    np.testing.assert_allclose(gradient, want, atol=1e-6)
    assert np.abs(want).max() > 1e-4


def test_with_one_memory_per_token_the_output_does_not_train_the_router():
    one, x = router(top_k=1), jnp.asarray(inputs())
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(one(x)[1])))(x)
    assert np.abs(gradient).max() < 1e-7  # p / p, rounded


@pytest.mark.slow
def test_reports_come_stacked_from_scanned_and_rematerialised_layers():
    config = {
        "width": WIDTH,
        "depth": 2,
        "pattern": ("mom",),
        "mixers": {"mom": {"heads": 1, "conv_width": 0, "rule": "gla"}},
        "mlp": "none",
        "remat": "full",
    }
    lm = randomised(lambda: build(config, vocabulary=7, rngs=nnx.Rngs(0), **FLOAT32))
    graphdef, params = nnx.split(lm)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        lm = nnx.merge(graphdef, params)
        _, reports = nnx.capture(lm, Report)(jnp.arange(14).reshape(2, 7) % 7)
        return mean_over_layers(reports)["auxiliary_loss"], reports

    gradients, reports = gradient(params)
    shapes = {path[-1]: leaf.shape for path, leaf in nnx.to_flat_state(reports)}
    assert shapes == {"auxiliary_loss": (2,), "routing_entropy": (2,)}
    routers = gradients["stack"]["period"][0]["mixer"]["router"]["logits"]["kernel"]
    assert np.abs(routers[...]).max(axis=(1, 2)).min() > 0, "every layer's router"


class Reporting(nnx.Module):
    def __call__(self, x):
        report(self, auxiliary_loss=jnp.float32(0.5), density=jnp.float32(0.25))
        return x


def test_training_minimises_the_auxiliary_loss_too_and_logs_what_layers_report():
    def task_loss(model, batch):
        weight = jnp.sum(batch)
        return jnp.sum(model(batch)) / weight, {"weight_sum": weight}

    model = nnx.List([Reporting(), Reporting()])

    def loss(model, batch, key):
        return task_loss(lambda x: model[1](model[0](x)), batch)

    value, sums = minimised(loss, model, jnp.ones(3), jax.random.key(0))
    assert value == 1.5
    assert sums == {"weight_sum": 3.0, "auxiliary_loss_reported": 1.5, "density_reported": 0.75}
    assert report_metrics(sums) == {"auxiliary_loss": 0.5, "density": 0.25}
    # Outside the trainer the model stays as it is.
    before = nnx.graphdef(model)
    model[0](jnp.ones(3))
    assert nnx.graphdef(model) == before


def test_published_size():
    # 380M: width 1024, four heads of 256, four memories and a shared one.
    d, E = 1024, 5
    gates = E * 2 * d * 4 + 2 * 4
    want = d * 4 + d * d + 2 * E * d * d + gates + 3 * 4 * d + 256 + 2 * d * d
    assert count_parameters(mom, d, depth=24) == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, r"top_k must be in 1\.\.3; got top_k=5"),
        ({"rule": "sum"}, "rule must be one of 'gated_delta_net', 'gla'; got 'sum'"),
        ({"execution": "sorted"}, "execution must be one of 'padded', 'gathered'; got 'sorted'"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
        ({"load_balancing": "none"}, "load_balancing must be one of 'micro_batch'"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_mom(**options)


def test_a_micro_batch_that_does_not_divide_the_batch_is_named():
    one = router(load_balancing="micro_batch", micro_batch_size=2)
    with pytest.raises(ValueError, match="must divide the batch of 3 sequences; got 2"):
        one(jnp.zeros((3, 4, WIDTH)))
