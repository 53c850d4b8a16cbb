"""Flowformer against a slow transcription of its paper, gradients included."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import flowformer
from tests.support.layers import array, build_mixer, call, inputs, merge, sigmoid

HEADS = 2
MAPS = ("query", "key", "value", "output")
RELU_FLOOR = EPS = 1e-6

# causal, clip and what else differs from the defaults; a clip of 1 cuts about half of the sources
CAUSAL: Any = (True, 5.0, {})
CLIPPED: Any = (False, 1.0, {"expand": 0.5, "allocation": False})
CASES = [
    CAUSAL,
    (True, 1.0, {"expand": 0.5, "allocation": False}),
    pytest.param(True, 1.0, {"competition": False, "feature_map": "relu"}, marks=pytest.mark.full),
    (False, None, {}),
    CLIPPED,
    pytest.param(False, 1.0, {"competition": False, "feature_map": "relu"}, marks=pytest.mark.full),
]
case = pytest.mark.parametrize(("causal", "clip", "options"), CASES)


def built(causal: bool, clip: float | None, options: dict[str, Any]) -> Any:
    return build_mixer(flowformer, heads=HEADS, causal=causal, clip=clip, **options)


def values(mixer: Any) -> dict[str, np.ndarray]:
    """Weights and biases by name, float64."""
    return {
        f"{name}.{part}": array(getattr(getattr(mixer, name), part))
        for name in MAPS
        for part in ("kernel", "bias")
    }


def transcription(
    p: dict[str, np.ndarray],
    x_TD: np.ndarray,
    causal: bool,
    clip: float | None,
    competition: bool = True,
    allocation: bool = True,
    feature_map: str = "sigmoid",
    expand: float = 1.0,
) -> np.ndarray:
    del expand  # it is in the shapes
    phi = sigmoid if feature_map == "sigmoid" else lambda x: np.maximum(x, 0) + RELU_FLOOR
    q, k, v = (
        (x_TD @ p[f"{name}.kernel"] + p[f"{name}.bias"]).reshape(len(x_TD), HEADS, -1)
        for name in MAPS[:3]
    )
    attend = causal_flow if causal else flow
    R = [
        attend(phi(q[:, h]), phi(k[:, h]), v[:, h], clip or np.inf, competition, allocation)
        for h in range(HEADS)
    ]
    return merge(np.stack(R, axis=1)) @ p["output.kernel"] + p["output.bias"]


def product(x, y):
    """Of capacities and their sum, with what the authors' code adds to both."""
    return ((x + EPS) * (y + EPS)).sum(axis=-1)


def flow(q, k, v, clip, competition, allocation):
    incoming, outgoing = product(q, k.sum(axis=0)), product(k, q.sum(axis=0))
    conserved_in = product(q, (k / outgoing[:, None]).sum(axis=0))
    conserved_out = product(k, (q / incoming[:, None]).sum(axis=0))
    share = np.exp(np.clip(conserved_out, -clip, clip))
    c = len(q) * share / share.sum() if competition else np.ones(len(q))
    A = (q @ k.T / incoming[:, None]) @ (c[:, None] * v)
    return sigmoid(conserved_in)[:, None] * A if allocation else A


def causal_flow(q, k, v, clip, competition, allocation):
    incoming, outgoing, share, c, R = [], [], [], [], []
    for t in range(len(q)):
        n, past = t + 1, range(t + 1)
        incoming.append(product(q[t], k[:n].sum(axis=0)))
        outgoing.append(product(k[t], q[:n].sum(axis=0)))
        conserved_in = product(q[t], sum(k[j] * (j + 1) / outgoing[j] for j in past)) / n
        conserved_out = product(k[t], sum(q[i] * (i + 1) / incoming[i] for i in past)) / n
        share.append(np.exp(np.clip(conserved_out, -clip, clip)))
        c.append(n * share[t] / sum(share) if competition else 1.0)
        A = sum((q[t] @ k[j]) * c[j] * v[j] for j in past) / incoming[t]
        R.append(sigmoid(conserved_in) * A if allocation else A)
    return np.array(R)


@case
def test_flowformer_computes_the_papers_equations(causal, clip, options):
    mixer, x = built(causal, clip, options), inputs()
    p = values(mixer)
    want = np.stack([transcription(p, s, causal, clip, **options) for s in x.astype(np.float64)])
    np.testing.assert_allclose(call(mixer, x), want, atol=2e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(("causal", "clip", "options"), [CAUSAL, CLIPPED])
def test_its_gradients_are_those_of_the_papers_equations(causal, clip, options):
    """Along a random direction of each array; that of the equations from differences, float64."""
    mixer, rng = built(causal, clip, options), np.random.default_rng(1)
    point = {**values(mixer), "x": inputs().astype(np.float64)}
    weights = rng.standard_normal(point["x"].shape)

    @jax.jit
    def gradients(mixer, x):
        return jax.grad(lambda m, x: jnp.sum(m(x)[0] * weights), argnums=(0, 1))(mixer, x)

    def loss(p):
        y = [transcription(p, s, causal, clip, **options) for s in p["x"]]
        return float((np.stack(y) * weights).sum())

    of_mixer, of_x = gradients(mixer, jnp.asarray(inputs()))
    got = {**values(of_mixer), "x": np.asarray(of_x, np.float64)}
    step = 1e-5
    for name, value in point.items():
        direction = rng.standard_normal(value.shape)
        ahead, behind = (loss({**point, name: value + s * direction}) for s in (step, -step))
        want = (ahead - behind) / (2 * step)
        scale = np.linalg.norm(got[name]) * np.linalg.norm(direction)
        assert scale > 0.1, f"{name} has no gradient to speak of"
        assert abs((got[name] * direction).sum() - want) < 1e-4 * scale, name


def test_the_first_token_of_a_causal_flow_is_its_value_whatever_the_scores():
    mixer, x = built(*CAUSAL), inputs()
    p = values(mixer)
    value = x[:, 0] @ p["value.kernel"] + p["value.bias"]
    want = sigmoid(1.0) * value @ p["output.kernel"] + p["output.bias"]
    # Capacities of a tenth and EPS beside them.
    np.testing.assert_allclose(call(mixer, x)[:, 0], want, atol=3e-5 * np.abs(want).max(), rtol=0)


def test_without_causality_the_order_of_tokens_does_not_matter():
    mixer, x = built(False, None, {}), inputs()
    order = np.random.default_rng(0).permutation(x.shape[1])
    np.testing.assert_allclose(call(mixer, x[:, order]), call(mixer, x)[:, order], atol=2e-5)


def test_only_a_causal_flow_has_a_state_to_decode_from():
    with pytest.raises(ValueError, match="flowformer with causal=False has no state"):
        built(False, 1.0, {}).init_state(2)


def test_a_causal_flow_without_a_clip_is_refused():
    with pytest.raises(ValueError, match=r"clip must be a number in \(0, 40\] with causal=True"):
        built(True, None, {})


def test_a_head_keeps_k_by_v_and_four_vectors_and_two_numbers():
    mixer = nnx.eval_shape(lambda: built(True, 1.0, {}))
    state = nnx.eval_shape(lambda: mixer.init_state(1))
    floats = HEADS * (8 * 8 + 4 * 8 + 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == floats + 1
