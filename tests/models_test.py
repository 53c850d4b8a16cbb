"""Layers against slow float64 transcriptions of their papers' equations, initial values, options, and the backbone."""

import math
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import (
    delta_net,
    gla,
    linear_attention,
    lm,
    mamba,
    transformer,
    window_attention,
)
from models import linear_self_attention as lsa
from models.mlp import inner_width
from models.stack import available_mixers, shortest_period

BATCH, LENGTH, WIDTH = 2, 9, 16


FLOAT32: dict[str, Any] = {
    "param_dtype": jnp.dtype("float32"),
    "compute_dtype": jnp.dtype("float32"),
}


def randomised(build: Callable[[], Any]) -> Any:
    """The module with random parameters of order one: no term of an equation can hide behind a zero or a one."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(0)

    def value(leaf):
        return jnp.asarray(
            rng.standard_normal(leaf.shape) / math.sqrt(leaf.shape[0]) + 0.2, leaf.dtype
        )

    return nnx.merge(graphdef, jax.tree.map(value, state))


def build_mixer(module: Any, **options: Any) -> Any:
    return randomised(
        lambda: module.Mixer(WIDTH, depth=2, rngs=nnx.Rngs(0), **FLOAT32, **options)
    )


def inputs() -> np.ndarray:
    return (
        np.random.default_rng(7)
        .standard_normal((BATCH, LENGTH, WIDTH))
        .astype(np.float32)
    )


def weight(linear: nnx.Linear) -> np.ndarray:
    return np.asarray(linear.kernel[...], np.float64)


def array(parameter: nnx.Param) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def rms(x: np.ndarray, scale: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def causal_convolution(x_TD: np.ndarray, w_WD: np.ndarray) -> np.ndarray:
    y_TD = np.zeros_like(x_TD)
    width = len(w_WD)
    for t in range(len(x_TD)):
        for tap in range(width):
            if t - (width - 1 - tap) >= 0:
                y_TD[t] += w_WD[tap] * x_TD[t - (width - 1 - tap)]
    return y_TD


def check_layer(mixer: Any, transcription: Any) -> None:
    """Compares the layer with `transcription(x_TD float64) -> y_TD`, one sequence at a time."""
    x = inputs()
    got, _ = jax.jit(lambda mixer, x: mixer(x))(mixer, x)
    want = np.stack([transcription(sequence.astype(np.float64)) for sequence in x])
    np.testing.assert_allclose(
        np.asarray(got), want, atol=2e-5 * max(1.0, np.abs(want).max()), rtol=0
    )


def heads_of(x_TD: np.ndarray, heads: int) -> np.ndarray:
    return x_TD.reshape(len(x_TD), heads, -1)


def test_linear_attention_computes_equations_18_to_20():
    mixer = build_mixer(linear_attention, heads=2)

    def phi(x):
        return np.where(x > 0, x + 1, np.exp(x))  # elu(x) + 1

    def transcription(x_TD):
        q, k, v = (
            heads_of(x_TD @ weight(m), 2) for m in (mixer.query, mixer.key, mixer.value)
        )
        o = np.zeros_like(v)
        for h in range(2):
            S, z = np.zeros((8, 8)), np.zeros(8)
            for t in range(len(x_TD)):
                S += np.outer(phi(k[t, h]), v[t, h])
                z += phi(k[t, h])
                o[t, h] = phi(q[t, h]) @ S / (phi(q[t, h]) @ z)
        return o.reshape(len(x_TD), -1) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_linear_attention_without_denominator_normalises_each_head():
    mixer = build_mixer(
        linear_attention,
        heads=2,
        feature_map="identity",
        normaliser="rms_norm",
        expand_k=0.5,
    )

    def transcription(x_TD):
        q, k, v = (
            heads_of(x_TD @ weight(m), 2) for m in (mixer.query, mixer.key, mixer.value)
        )
        scores = np.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[-1])
        o = np.einsum("hts,shv->thv", np.tril(scores), v)
        return rms(o, array(mixer.norm.scale)).reshape(len(x_TD), -1) @ weight(
            mixer.output
        )

    check_layer(mixer, transcription)


def test_gla_computes_its_recurrence_gate_and_output():
    mixer = build_mixer(gla, heads=2, gate_rank=3)

    def transcription(x_TD):
        q, k, v = (
            heads_of(x_TD @ weight(m), 2) for m in (mixer.query, mixer.key, mixer.value)
        )
        logits = x_TD @ weight(mixer.gate_in) @ weight(mixer.gate_out) + array(
            mixer.gate_out.bias
        )
        alpha = heads_of(sigmoid(logits) ** (1 / 16), 2)
        o = np.zeros_like(v)
        for h in range(2):
            S = np.zeros((4, 8))  # K = 16 / 2 / 2, V = 16 / 2
            for t in range(len(x_TD)):
                S = np.diag(alpha[t, h]) @ S + np.outer(k[t, h], v[t, h])
                o[t, h] = q[t, h] @ S / math.sqrt(4)
        normed = rms(o, array(mixer.norm.scale)).reshape(len(x_TD), -1)
        return (silu(x_TD @ weight(mixer.output_gate)) * normed) @ weight(mixer.output)

    check_layer(mixer, transcription)


@pytest.mark.parametrize("conv_width", [0, 4])
@pytest.mark.parametrize(("eigenvalue_range", "beta_max"), [((0, 1), 1), ((-1, 1), 2)])
def test_delta_net_computes_its_recurrence(conv_width, eigenvalue_range, beta_max):
    mixer = build_mixer(
        delta_net, heads=2, conv_width=conv_width, eigenvalue_range=eigenvalue_range
    )

    def transcription(x_TD):
        def activated(linear, convolution):
            y_TD = x_TD @ weight(linear)
            return heads_of(
                silu(
                    causal_convolution(y_TD, array(convolution.weight_WD))
                    if conv_width
                    else y_TD
                ),
                2,
            )

        q, k = activated(mixer.query, mixer.conv_q), activated(mixer.key, mixer.conv_k)
        v = activated(mixer.value, mixer.conv_v)
        q = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6)
        k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
        beta = beta_max * sigmoid(x_TD @ weight(mixer.beta))
        o = np.zeros_like(v)
        for h in range(2):
            S = np.zeros((8, 8))
            for t in range(len(x_TD)):
                S = (np.eye(8) - beta[t, h] * np.outer(k[t, h], k[t, h])) @ S + beta[
                    t, h
                ] * np.outer(k[t, h], v[t, h])
                o[t, h] = q[t, h] @ S / math.sqrt(8)
        return rms(o, array(mixer.norm.scale)).reshape(len(x_TD), -1) @ weight(
            mixer.output
        )

    check_layer(mixer, transcription)


@pytest.mark.parametrize("eigenvalue_range", [(0, 1), (-1, 1)])
def test_mamba_computes_its_block(eigenvalue_range):
    mixer = build_mixer(
        mamba, state_size=3, dt_rank=2, eigenvalue_range=eigenvalue_range
    )

    def transcription(u_TD):
        z = u_TD @ weight(mixer.gate)
        x = causal_convolution(
            u_TD @ weight(mixer.input), array(mixer.conv.weight_WD)
        ) + array(mixer.conv.bias_D)
        x = silu(x)
        dt = np.log1p(
            np.exp(
                x @ weight(mixer.dt_in) @ weight(mixer.dt_out) + array(mixer.dt_bias_E)
            )
        )
        B, C = x @ weight(mixer.write), x @ weight(mixer.read)
        A = -np.exp(array(mixer.a_log_EN))
        h, y = np.zeros_like(A), np.zeros_like(x)
        for t in range(len(x)):
            factor = np.exp(dt[t][:, None] * A)
            if eigenvalue_range == (-1, 1):
                factor = 2 * factor - 1
            h = factor * h + dt[t][:, None] * B[t][None, :] * x[t][:, None]
            y[t] = h @ C[t] + array(mixer.skip_E) * x[t]
        return (y * silu(z)) @ weight(mixer.output)

    check_layer(mixer, transcription)


def rotated(x: np.ndarray, position: int, base: float = 10000.0) -> np.ndarray:
    half = len(x) // 2
    y = np.zeros_like(x)
    for i in range(half):
        angle = position * base ** (-i / half)
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return y


@pytest.mark.parametrize(
    ("module", "options", "window"),
    [
        (window_attention, {"window": 3, "key_value_heads": 2}, 3),
        (window_attention, {"window": 4, "rope": False, "qk_norm": True}, 4),
        (transformer, {"context_length": LENGTH, "qk_norm": True}, LENGTH),
    ],
)
def test_attention_is_softmax_over_the_window(module, options, window):
    mixer = build_mixer(module, heads=4, **options)
    groups = options.get("key_value_heads", 4)

    def transcription(x_TD):
        q = heads_of(x_TD @ weight(mixer.query), 4)
        k, v = (
            heads_of(x_TD @ weight(mixer.key), groups),
            heads_of(x_TD @ weight(mixer.value), groups),
        )
        if options.get("qk_norm"):
            q, k = (
                rms(q, array(mixer.query_norm.scale)),
                rms(k, array(mixer.key_norm.scale)),
            )
        o = np.zeros((len(x_TD), 4, 4))
        for h in range(4):
            g = h // (4 // groups)
            for t in range(len(x_TD)):
                seen = range(max(0, t - window + 1), t + 1)
                pairs = [(q[t, h], k[s, g]) for s in seen]
                if options.get("rope", True):
                    pairs = [(rotated(q[t, h], t), rotated(k[s, g], s)) for s in seen]
                scores = np.array([a @ b for a, b in pairs]) / math.sqrt(4)
                p = np.exp(scores - scores.max())
                o[t, h] = sum(
                    p_s * v[s, g] for p_s, s in zip(p / p.sum(), seen, strict=True)
                )
        return o.reshape(len(x_TD), -1) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_rotary_attention_sees_differences_of_positions_only():
    mixer = build_mixer(transformer, context_length=LENGTH, heads=2)
    x = inputs()
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], (BATCH, LENGTH))
    call = jax.jit(lambda mixer, x, positions: mixer(x, positions=positions))
    want, _ = call(mixer, x, positions)
    got, state = call(mixer, x, positions + 1000)
    # Float32 angles near 1000 carry 1000 * 2^-24 each.
    np.testing.assert_allclose(got, want, atol=2e-3)
    np.testing.assert_array_equal(state["position"], 1000 + LENGTH)


def test_negative_eigenvalues_reach_below_zero_and_default_ones_do_not():
    key = jnp.zeros(WIDTH).at[0].set(1.0)
    step = jax.jit(lambda mixer, x, state: mixer(x, state))

    def eigenvalue(mixer):
        # With v = 0 a unit key direction of the state is multiplied by the moving eigenvalue 1 - beta.
        mixer.value.kernel[...] = jnp.zeros_like(mixer.value.kernel[...])
        # Sigmoid saturates.
        mixer.beta.kernel[...] = jnp.full_like(mixer.beta.kernel[...], 10.0)
        mixer.key.kernel[...] = jnp.eye(WIDTH)
        start = mixer.init_state(1)
        start["memory"] = start["memory"].at[0, 0, 0, 0].set(1.0)
        _, state = step(mixer, key[None, None, :], start)
        return float(state["memory"][0, 0, 0, 0])

    options = {"heads": 1, "conv_width": 0}
    assert eigenvalue(build_mixer(delta_net, **options)) == pytest.approx(0.0, abs=1e-3)
    assert eigenvalue(
        build_mixer(delta_net, eigenvalue_range=(-1, 1), **options)
    ) == pytest.approx(-1.0, abs=1e-3)

    def smallest_factor(mixer):
        # Nothing is written, the state only decays.
        mixer.write.kernel[...] = jnp.zeros_like(mixer.write.kernel[...])
        # Delta large: exp(Delta A) -> 0.
        mixer.dt_bias_E[...] = jnp.full_like(mixer.dt_bias_E[...], 20.0)
        start = mixer.init_state(1)
        start["memory"] = jnp.ones_like(start["memory"])
        return float(step(mixer, inputs()[:1, :1], start)[1]["memory"].min())

    assert smallest_factor(build_mixer(mamba)) == pytest.approx(0.0, abs=1e-3)
    assert smallest_factor(
        build_mixer(mamba, eigenvalue_range=(-1, 1))
    ) == pytest.approx(-1.0, abs=1e-3)


def test_mamba_starts_as_published():
    mixer: Any = mamba.Mixer(64, depth=8, rngs=nnx.Rngs(0), **FLOAT32)
    dt = np.log1p(np.exp(array(mixer.dt_bias_E)))
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 1e-1 * 1.001
    assert dt.min() < 2e-3 and dt.max() > 5e-2, "log-uniform over the whole range"
    np.testing.assert_allclose(
        -np.exp(array(mixer.a_log_EN)),
        np.tile(-np.arange(1.0, 17.0), (128, 1)),
        rtol=1e-6,
    )
    np.testing.assert_array_equal(array(mixer.skip_E), 1)
    assert mixer.dt_out.kernel.shape == (4, 128)  # R = ceil(64 / 16)
    for parameter, bound in (
        (mixer.input.kernel, 64**-0.5),
        (mixer.dt_out.kernel, 4**-0.5),
        (mixer.conv.weight_WD, 4**-0.5),
        (mixer.output.kernel, (128 * 8) ** -0.5),
    ):
        assert 0.95 * bound < np.abs(array(parameter)).max() <= bound * (1 + 1e-6)
    groups = {
        path[-1]: p.get_metadata().get("group")
        for path, p in nnx.to_flat_state(nnx.state(mixer, nnx.Param))
    }
    assert (
        groups["a_log_EN"] == groups["dt_bias_E"] == "ssm"
        and groups["skip_E"] == "no_decay"
    )
    assert groups["kernel"] is None


def test_every_parameter_has_one_axis_name_per_dimension():
    known = {"layers", "vocabulary", "embed", "heads", "mlp", None}
    required = {
        "window_attention": {"window": 4, "qk_norm": True},
        "transformer": {"context_length": 4},
        "monarch_mixer": {"context_length": 4},
    }
    for mixer in available_mixers():
        model = nnx.eval_shape(
            lambda m=mixer: tiny_lm(pattern=(m,), mixers={m: required.get(m, {})})
        )
        for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            names = parameter.get_metadata()["out_sharding"]
            assert len(names) == parameter.ndim and set(names) <= known, (
                f"{mixer} {path}: {names}"
            )
            assert (names[0] == "layers") == ("period" in path)


def test_building_needs_no_mesh():
    assert flax.config.flax_always_shard_variable is False
    assert tiny_lm().head_WD is not None


def test_first_values_have_the_published_sizes():
    model = tiny_lm(
        width=128, depth=2, pattern=("gla",), mixers={}, vocabulary_size=256
    )
    block = model.stack.period[0]
    for parameter, std in (
        (model.embedding.embedding, 0.02),
        (block.mlp.up.kernel, 0.02),
        (block.mlp.down.kernel, 0.02 / math.sqrt(2 * 2)),
        (block.mixer.value.kernel, 2**-2.5 * math.sqrt(2 / (128 + 128))),
    ):
        assert array(parameter).std() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("width", "inner"), [(32, 88), (128, 344), (1024, 2816), (2048, 5632)]
)
def test_mlp_inner_width_is_eight_thirds_rounded_up(width, inner):
    assert inner_width(width, 4.0) == inner


@pytest.mark.parametrize(
    ("names", "period"),
    [
        ("a", 1),
        ("aaaa", 1),
        ("abab", 2),
        ("ababa", 2),
        ("aab", 3),
        ("aaba", 3),
        ("abc", 3),
    ],
)
def test_the_shortest_period_is_found(names, period):
    assert shortest_period(names) == period


def tiny_lm(
    *,
    vocabulary_size: int = 11,
    compute_dtype: str = "float32",
    seed: int = 0,
    **model: Any,
) -> Any:
    config = {
        "width": 16,
        "depth": 2,
        "pattern": ("linear_attention",),
        "mixers": {},
        **model,
    }
    return lm.build(
        config,
        vocabulary_size=vocabulary_size,
        param_dtype="float32",
        compute_dtype=compute_dtype,
        rngs=nnx.Rngs(seed),
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"pattern": ("delta_nte",)},
            (
                "a mixer of model.pattern .* must be one of .*'delta_net'.*'gla'.*; got"
                " 'delta_nte'"
            ),
        ),
        ({"pattern": "gla"}, r"write \('gla',\)"),
        ({"pattern": ()}, "pattern must name between 1 and depth=2"),
        (
            {"pattern": ("gla", "mamba", "gla")},
            "pattern must name between 1 and depth=2",
        ),
        (
            {"mixers": {"gla": {"head": 2}}},
            (
                "mixer gla has no option 'head'; known options in model.mixers.gla:"
                " .*heads"
            ),
        ),
        ({"mixers": {"gal": {}}}, "a mixer of .* must be one of .*; got 'gal'"),
        (
            {"pattern": ("window_attention",)},
            "mixer window_attention needs the option 'window'",
        ),
        (
            {"widht": 3},
            "model lm has no option 'widht'; known options in model: .*width",
        ),
        ({"mlp": "relu"}, "mlp must be one of 'swiglu', 'none'; got 'relu'"),
        ({"remat": "some"}, "remat must be one of"),
        ({"embedding_dropout": 1.0}, r"embedding_dropout must be in \[0, 1\)"),
        (
            {"mixers": {"linear_attention": {"heads": 3}}},
            "heads must divide the 16 channels.*heads=3",
        ),
        (
            {"mixers": {"linear_attention": {"feature_map": "identity"}}},
            'needs normaliser="rms_norm"',
        ),
        ({"mixers": {"linear_attention": {"conv_width": -1}}}, "conv_width must be 0"),
        (
            {"pattern": ("mamba",), "mixers": {"mamba": {"eigenvalue_range": (0, 2)}}},
            "eigenvalue_range must be one of",
        ),
    ],
)
def test_impossible_options_raise_and_say_what_is_possible(model, message):
    with pytest.raises(ValueError, match=message):
        tiny_lm(**model)


def test_readout_positions_select_logits():
    model = randomised(tiny_lm)
    tokens = jnp.arange(12).reshape(2, 6) % 11
    at = jnp.array([[5, 0], [2, 2]])
    everywhere, selected = jax.jit(
        lambda model: (model(tokens)[0], model(tokens, readout_positions=at)[0])
    )(model)
    np.testing.assert_allclose(
        selected, jnp.take_along_axis(everywhere, at[..., None], axis=1), atol=1e-6
    )


def test_given_positions_reach_every_mixer():
    options = {
        "pattern": ("transformer",),
        "mixers": {"transformer": {"context_length": 6, "heads": 1}},
        "mlp": "none",
    }
    model = randomised(lambda: tiny_lm(**options))
    tokens, positions = jnp.arange(6)[None, :], jnp.arange(6)[None, :]
    call = jax.jit(lambda model, positions: model(tokens, positions=positions)[0])
    counted, _ = jax.jit(lambda model: model(tokens))(model)
    np.testing.assert_allclose(call(model, positions), counted, atol=1e-5)
    np.testing.assert_allclose(call(model, positions + 5), counted, atol=1e-4)
    assert np.abs(np.asarray(call(model, 2 * positions) - counted)).max() > 1e-2


def test_tied_head_is_the_embedding():
    tied, untied = (
        randomised(lambda t=t: tiny_lm(tie_embeddings=t)) for t in (True, False)
    )
    count = [
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(m, nnx.Param)))
        for m in (tied, untied)
    ]
    assert count[1] - count[0] == 11 * 16
    gradient = jax.jit(jax.grad(lambda m: m(jnp.zeros((1, 2), jnp.int32))[0].sum()))(
        tied
    )
    assert np.abs(array(gradient.embedding.embedding)[1:]).max() > 0, (
        "rows of absent tokens learn through the head"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [("full", True), pytest.param("dots", False, marks=pytest.mark.full)],
)
def test_remat_changes_no_gradient(remat, scan_layers):
    tokens = jnp.arange(6)[None, :]

    @jax.jit
    @jax.grad
    def gradient(model):
        return jnp.sum(jnp.square(model(tokens)[0]))

    options = {
        "depth": 3,
        "pattern": ("linear_attention", "gla"),
        "scan_layers": scan_layers,
    }
    want = jax.tree.leaves(gradient(randomised(lambda: tiny_lm(**options))))
    got = jax.tree.leaves(gradient(randomised(lambda: tiny_lm(remat=remat, **options))))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=1e-4)


def test_embedding_dropout_draws_anew_in_each_training_call_and_never_in_evaluation():
    model = tiny_lm(embedding_dropout=0.5)
    tokens = jnp.arange(11)[None, :]

    @nnx.jit
    def call(model):
        return model(tokens)[0]

    first, second = call(model), call(model)
    assert np.abs(np.asarray(first - second)).max() > 0
    evaluated = nnx.view(model, deterministic=True)
    np.testing.assert_array_equal(call(evaluated), call(evaluated))
    model.eval()
    np.testing.assert_array_equal(call(model), call(evaluated))
    model.train()
    assert np.abs(np.asarray(call(model) - first)).max() > 0


@pytest.mark.full
def test_embedding_dropout_works_for_replicas_under_vmap():
    def replica(key):
        return nnx.split(
            lm.build(
                {
                    "width": 16,
                    "depth": 2,
                    "pattern": ("linear_attention",),
                    "embedding_dropout": 0.5,
                },
                vocabulary_size=11,
                param_dtype="float32",
                compute_dtype="float32",
                rngs=nnx.Rngs(key),
            )
        )

    graphdef, _ = replica(jax.random.key(0))
    states = jax.vmap(lambda key: replica(key)[1])(
        jax.random.split(jax.random.key(1), 2)
    )

    @jax.jit
    @jax.vmap
    def step(state):
        model = nnx.merge(graphdef, state)
        logits, _ = model(jnp.zeros((1, 4), jnp.int32))
        return logits, nnx.state(model)

    first, states = step(states)
    second, _ = step(states)
    assert np.abs(np.asarray(first[0] - first[1])).max() > 0
    assert np.abs(np.asarray(first - second)).max() > 0


# Linear self-attention on regression prompts.


def prompts(
    batch: int = 3, examples: int = 7, dimension: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, examples + 1, dimension))
    y = rng.standard_normal((batch, examples + 1))
    tokens = np.concatenate((x, y[..., None]), axis=-1).astype(np.float32)
    tokens[:, -1, -1] = 0
    return tokens, x, y[:, :-1]


def build_lsa(**model: Any) -> Any:
    config = {"dimension": 4, **model}
    return lsa.build(
        config,
        vocabulary_size=0,
        param_dtype="float32",
        compute_dtype="float32",
        rngs=nnx.Rngs(0),
    )


def test_linear_self_attention_computes_its_definition():
    model = build_lsa(init_scale=0.5)
    tokens, _, _ = prompts()
    W_PV, W_KQ = array(model.w_pv_LEE)[0], array(model.w_kq_LEE)[0]
    for got, tokens_NE in zip(model(tokens), tokens.astype(np.float64), strict=True):
        E = tokens_NE.T
        f = E + W_PV @ E @ (E.T @ W_KQ @ E) / (E.shape[1] - 1)
        assert float(got) == pytest.approx(f[-1, -1], abs=1e-5)


def test_linear_self_attention_with_constructed_weights_is_one_step_of_gradient_descent():
    model = build_lsa()
    P = np.random.default_rng(1).standard_normal((4, 4))
    model.set_gradient_step(P)
    tokens, x, y = prompts()
    h = np.einsum("bn,bnd->bd", y, x[:, :-1]) / y.shape[1]
    np.testing.assert_allclose(
        model(tokens), np.einsum("bd,de,be->b", x[:, -1], P, h), atol=1e-5
    )

    def loss(w):
        return jnp.sum((y[0] - x[0, :-1] @ w) ** 2) / (2 * y.shape[1])

    step = -P @ np.asarray(jax.grad(loss)(jnp.zeros(4)))
    assert float(model(tokens)[0]) == pytest.approx(float(x[0, -1] @ step), abs=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_masked_linear_self_attention_layers_are_steps_of_gradient_descent(depth):
    model = build_lsa(depth=depth, mask_query=True)
    rng = np.random.default_rng(2)
    preconditioners = 0.3 * rng.standard_normal((depth, 4, 4))
    model.set_gradient_steps(list(preconditioners))
    tokens, x, y = prompts()
    for b, got in enumerate(model(tokens)):
        w = np.zeros(4)
        for P in preconditioners:
            w = w + P @ (x[b, :-1].T @ (y[b] - x[b, :-1] @ w)) / y.shape[1]
        assert float(got) == pytest.approx(w @ x[b, -1], abs=1e-4)


def test_linear_self_attention_ignores_the_order_of_examples_and_is_odd_in_the_labels():
    model = build_lsa(init="guaranteed", init_scale=0.5)
    tokens, _, _ = prompts()
    shuffled = np.concatenate(
        (tokens[:, [3, 0, 6, 1, 2, 5, 4]], tokens[:, -1:]), axis=1
    )
    np.testing.assert_allclose(model(shuffled), model(tokens), atol=1e-6)
    flipped = tokens * np.array([1, 1, 1, 1, -1], np.float32)
    np.testing.assert_allclose(model(flipped), -model(tokens), atol=1e-6)


def test_guaranteed_initialisation_has_the_blocks_of_the_theorem():
    model = build_lsa(init="guaranteed", init_scale=0.25)
    W_PV, W_KQ = array(model.w_pv_LEE)[0], array(model.w_kq_LEE)[0]
    want = np.zeros((5, 5))
    want[-1, -1] = 0.25
    np.testing.assert_allclose(W_PV, want)
    assert np.linalg.norm(W_KQ) == pytest.approx(0.25, rel=1e-5)
    np.testing.assert_allclose(W_KQ, W_KQ.T, atol=1e-7)
    assert np.linalg.eigvalsh(W_KQ).min() > -1e-6 and not W_KQ[-1].any()


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            lambda: build_lsa(init="zero"),
            "init must be one of 'gaussian', 'guaranteed'",
        ),
        (
            lambda: build_lsa(layers=2),
            "has no option 'layers'; known options in model: depth",
        ),
        (lambda: build_lsa()(jnp.zeros((2, 5, 4))), r"examples must be \[B, N\+1, 5\]"),
        (
            lambda: build_lsa(mask_query=True).set_gradient_step(np.eye(4)),
            "needs depth=1 and mask_query=False",
        ),
        (
            lambda: build_lsa(mask_query=True).set_gradient_steps([np.eye(4)] * 2),
            "one matrix per layer",
        ),
        (
            lambda: build_lsa().set_gradient_step(np.eye(3)),
            r"a preconditioner must be \[4, 4\]; got \(3, 3\)",
        ),
    ],
)
def test_linear_self_attention_rejects_what_it_cannot_do(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()
