"""Shared by tests of models: random parameters, and a layer against a slow float64 transcription of
its paper."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.networks import lm

BATCH, LENGTH, WIDTH = 2, 7, 16
FLOAT32: dict[str, Any] = {
    "param_dtype": jnp.dtype("float32"),
    "compute_dtype": jnp.dtype("float32"),
}


def parts(build: Callable[[], Any]) -> tuple[Any, nnx.State, nnx.State]:
    """What `nnx.merge` makes the module of: structure, abstract parameters, and the values of all
    other variables, such as constants that differ between layers."""
    graphdef, params, variables = nnx.eval_shape(lambda: nnx.split(build(), nnx.Param, ...))
    if jax.tree.leaves(variables):
        variables = jax.jit(
            lambda: nnx.split(build(), nnx.Param, ...)[2]
        )()  # under jit no parameter is computed
    return graphdef, params, variables


def randomised(build: Callable[[], Any]) -> Any:
    """The module with random parameters of order one: no term of an equation can hide behind a zero
    or a one."""
    rng = np.random.default_rng(0)

    def value(leaf):
        return jnp.asarray(
            rng.standard_normal(leaf.shape) / math.sqrt(max(leaf.shape[:1], default=1)) + 0.2,
            leaf.dtype,
        )

    graphdef, params, variables = parts(build)
    return nnx.merge(graphdef, jax.tree.map(value, params), variables)


def build_mixer(module: Any, **options: Any) -> Any:
    """models/<module>'s mixer of width WIDTH in a network of two layers."""
    return randomised(lambda: module.Mixer(WIDTH, depth=2, rngs=nnx.Rngs(0), **FLOAT32, **options))


def count_parameters(module: Any, width: int, **options: Any) -> int:
    """Parameters of a mixer of any size; nothing is computed."""
    mixer = nnx.eval_shape(lambda: module.Mixer(width, rngs=nnx.Rngs(0), **FLOAT32, **options))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)))


def inputs() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)


@jax.jit
def call(mixer: Any, x: jax.Array, **given: Any) -> jax.Array:
    return mixer(x, **given)[0]


def check_layer(
    mixer: Any, transcription: Callable[[np.ndarray], np.ndarray], **given: Any
) -> None:
    """Compares the layer, called with `given`, with `transcription(x_TD float64) -> y_TD`, one
    sequence at a time."""
    x = inputs()
    want = np.stack([transcription(sequence.astype(np.float64)) for sequence in x])
    np.testing.assert_allclose(
        np.asarray(call(mixer, x, **given)), want, atol=2e-5 * max(1.0, np.abs(want).max()), rtol=0
    )


def weight(linear: nnx.Linear) -> np.ndarray:
    return np.asarray(linear.kernel[...], np.float64)


def array(variable: nnx.Variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def project(x_TD: np.ndarray, linear: nnx.Linear, heads: int) -> np.ndarray:
    """x W, split into heads: [T, H, K]."""
    return (x_TD @ weight(linear)).reshape(len(x_TD), heads, -1)


def merge(o_THV: np.ndarray) -> np.ndarray:
    return o_THV.reshape(len(o_THV), -1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def rms(x: np.ndarray, scale: np.ndarray | float = 1.0, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def convolved(x_TD: np.ndarray, convolution: Any) -> np.ndarray:
    """Causal depthwise convolution, the last tap on the current token, and its bias if it has one;
    x itself where it is switched off."""
    if not convolution.width:
        return x_TD
    w_WD = array(convolution.weight_WD)
    y_TD = np.zeros_like(x_TD)
    for t in range(len(x_TD)):
        for back in range(min(len(w_WD), t + 1)):
            y_TD[t] += w_WD[-1 - back] * x_TD[t - back]
    return y_TD if convolution.bias_D is None else y_TD + array(convolution.bias_D)


def rotated(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Pairs (x_i, x_{i + K/2}) as complex numbers, turned by angle_i."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate((z.real, z.imag), axis=-1)


def normalised(q_features, k_features, v):
    """sum_{s <= t} score v / sum_{s <= t} score, over explicit scores."""
    scores = np.tril(np.einsum("thf,shf->hts", q_features, k_features))
    return np.einsum("hts,shv->thv", scores / scores.sum(-1, keepdims=True), v)


def turned(mixer, x_THK):
    return rotated(x_THK, np.arange(len(x_THK))[:, None, None] * array(mixer.rotation.theta_K))


def queries_keys_values(mixer, x_TD, heads):
    def activated(linear, convolution):
        return silu(convolved(x_TD @ weight(linear), convolution)).reshape(len(x_TD), heads, -1)

    q, k = activated(mixer.query, mixer.conv_q), activated(mixer.key, mixer.conv_k)
    return unit(q), unit(k), activated(mixer.value, mixer.conv_v)


def delta_recurrence(q, k, v, beta, alpha_THK):
    """(I - beta k^T k) Diag(alpha) S + beta k^T v, with matrices as the papers write them."""
    o = np.zeros_like(v)
    for h in range(q.shape[1]):
        S = np.zeros((q.shape[-1], v.shape[-1]))
        for t in range(len(q)):
            erase = np.eye(q.shape[-1]) - beta[t, h] * np.outer(k[t, h], k[t, h])
            S = erase @ np.diag(alpha_THK[t, h]) @ S + beta[t, h] * np.outer(k[t, h], v[t, h])
            o[t, h] = q[t, h] @ S / math.sqrt(q.shape[-1])
    return o


def initial_values(module, width, *names, **options):
    """The initial values of parameters, with their groups; under jit, so that the others are not
    computed."""
    shapes = nnx.eval_shape(
        lambda: module.Mixer(width, depth=2, rngs=nnx.Rngs(0), **FLOAT32, **options)
    )
    assert {getattr(shapes, name).get_metadata()["group"] for name in names} == {"no_decay"}

    @jax.jit
    def values():
        mixer = module.Mixer(width, depth=2, rngs=nnx.Rngs(0), **FLOAT32, **options)
        return [getattr(mixer, name)[...] for name in names]

    return [np.asarray(value, np.float64) for value in values()]


def check_window_attention(module: Any, options: dict[str, Any], window: int) -> None:
    """The layer is softmax attention over the last `window` tokens, with heads=4 and `options`."""
    mixer = build_mixer(module, heads=4, **options)
    angle = 10000.0 ** (-np.arange(2) / 2)
    groups = options.get("key_value_heads", 4)

    def transcription(x_TD):
        q = project(x_TD, mixer.query, 4)
        k, v = (project(x_TD, m, groups) for m in (mixer.key, mixer.value))
        if options.get("qk_norm"):
            q, k = (rms(q, array(mixer.query_norm.scale)), rms(k, array(mixer.key_norm.scale)))
        o = np.zeros((len(x_TD), 4, 4))
        for h in range(4):
            g = h // (4 // groups)
            for t in range(len(x_TD)):
                seen = range(max(0, t - window + 1), t + 1)
                pairs = [(q[t, h], k[s, g]) for s in seen]
                if options.get("rope", True):
                    pairs = [
                        (rotated(q[t, h], t * angle), rotated(k[s, g], s * angle)) for s in seen
                    ]
                scores = np.array([a @ b for a, b in pairs]) / math.sqrt(4)
                p = np.exp(scores - scores.max())
                o[t, h] = sum(p_s * v[s, g] for p_s, s in zip(p / p.sum(), seen, strict=True))
        return merge(o) @ weight(mixer.output)

    check_layer(mixer, transcription)


def tiny_lm(
    *, vocabulary: int = 11, compute_dtype: str = "float32", seed: int = 0, **model: Any
) -> Any:
    """A language model of two layers, of linear attention unless `model` has another pattern."""
    config = {"width": WIDTH, "depth": 2, "pattern": ("linear_attention",), "mixers": {}, **model}
    return lm.build(
        config,
        vocabulary=vocabulary,
        param_dtype="float32",
        compute_dtype=compute_dtype,
        rngs=nnx.Rngs(seed),
    )
