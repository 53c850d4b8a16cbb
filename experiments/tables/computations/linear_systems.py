"""How far the forms of a layer are from each other: a linear time-varying system walked through
time, the same as one matrix, the equations of its paper, and our layer.

    h_i = Lam_i h_{i-1} + B_i u_i,    y_i = C_i h_i + D u_i,    h_0 = 0,    Lam_i diagonal
    y = Phi u,    Phi_ij = C_i (Lam_i .. Lam_{j+1}) B_j for j <= i, and D besides for j = i

After Sieber et al., "Understanding the Differences in Foundation Models", NeurIPS 2024, arXiv
2405.15731. The three forms are computed in float64 from the layer's own parameters, and the layer
as it always runs, in float32. Which systems the layers are is said in `systems_of_layers.py`.

Letters: T time (i and j), N states, C inputs of the system, E its outputs, D width of the model."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.tables.computations import systems_of_layers
from experiments.tables.computations.systems_of_layers import System

WIDTH, LENGTH = 8, 12
LEAST = 2.0**-53  # half of what separates float64 numbers near one


def walk(system: System) -> jax.Array:
    """y [T, E] of the states, one after the other."""
    write_TN = jnp.einsum("tnc,tc->tn", system.write_TNC, system.input_TC)

    def step(h_N, token):
        decay_N, write_N, read_EN = token
        h_N = decay_N * h_N + write_N
        return h_N, read_EN @ h_N

    tokens = (system.decay_TN, write_TN, system.read_TEN)
    _, y_TE = jax.lax.scan(step, jnp.zeros_like(write_TN[0]), tokens)
    return y_TE + system.input_TC @ system.skip_CE


def matrix(system: System) -> jax.Array:
    """Phi [T, T, E, C]."""
    length, states = system.decay_TN.shape

    def next_row(before_TN, token):
        i, decay_N = token
        # Lam_i .. Lam_{j+1} for j < i, 1 for j = i, and nothing after.
        own_T = (jnp.arange(length) == i).astype(decay_N.dtype)
        row_TN = before_TN * decay_N[None, :] + own_T[:, None]
        return row_TN, row_TN

    zeros_TN = jnp.zeros((length, states), system.decay_TN.dtype)
    _, decays_TTN = jax.lax.scan(next_row, zeros_TN, (jnp.arange(length), system.decay_TN))
    phi = jnp.einsum("ien,ijn,jnc->ijec", system.read_TEN, decays_TTN, system.write_TNC)
    eye_TT = jnp.eye(length, dtype=phi.dtype)
    return phi + jnp.einsum("ij,ce->ijec", eye_TT, system.skip_CE)


def quadratic(system: System) -> jax.Array:
    """y [T, E] as the product of one matrix and all inputs."""
    return jnp.einsum("ijec,jc->ie", matrix(system), system.input_TC)


class Result(NamedTuple):
    """What a form gives: the layer's output, and gradients of (parameters, x)."""

    y_TD: Any
    gradients: Any


def measure(layer: str, seed: int) -> dict[str, dict[str, float]]:
    """`distances` as decimal logarithms, of no less than float64 can tell, "values_log10" and
    "gradients_log10"."""
    return {
        form: {f"{what}_log10": _log10(number) for what, number in numbers.items()}
        for form, numbers in distances(layer, seed).items()
    }


def distances(layer: str, seed: int) -> dict[str, dict[str, float]]:
    """{form: {"values" and "gradients": number}}: the largest difference to the system's walk
    through time, over the largest number of the same array, and the worst of the arrays.

    form: "quadratic", "equations" and "layer", of `forms`."""
    found = forms(layer, seed)
    wanted = found.pop("recurrence")
    return {
        form: {
            "values": _distance(result.y_TD, wanted.y_TD),
            "gradients": _distance(result.gradients, wanted.gradients),
        }
        for form, result in found.items()
    }


def forms(layer: str, seed: int) -> dict[str, Result]:
    """{"recurrence", "quadratic", "equations", "layer"} of a layer with random parameters of order
    one, for a random sequence whose outputs get a random cotangent."""
    law = systems_of_layers.LAYERS[layer]
    given = random_layer(law.mixer, law.options, seed)
    found = {"layer": _result(given.call, given.params, given.x_TD, given.cotangent_TD)}
    with jax.enable_x64(True):
        exact = given.in_float64()

        def solved(solve: Callable[[System], jax.Array], params: Any, x_TD: jax.Array) -> jax.Array:
            return law.finish(params, x_TD, solve(law.system(params, x_TD)))

        def written(params: Any, x_TD: jax.Array) -> jax.Array:
            return law.finish(params, x_TD, law.equations(params, x_TD))

        found["recurrence"] = _result(functools.partial(solved, walk), *exact)
        found["quadratic"] = _result(functools.partial(solved, quadratic), *exact)
        found["equations"] = _result(written, *exact)
    return found


def taylor(degree: int, seed: int) -> dict[str, dict[str, float]]:
    """{"softmax": {"values_log10", "features"}}: how far from softmax attention the system is whose
    features are those of the exponential's Taylor polynomial, and how many they are, for keys of
    size 2. The sequence is halved, so that logits are of order one."""
    law = systems_of_layers.LAYERS["softmax"]
    given = random_layer(law.mixer, {**law.options, "size_per_head": 2}, seed)
    with jax.enable_x64(True):
        params, x_TD, _ = given._replace(x_TD=given.x_TD / 2).in_float64()
        system = systems_of_layers.taylor_system(params, x_TD, degree)
        exact_TE = law.equations(params, x_TD)
        error = _distance(walk(system), exact_TE)
    features = system.decay_TN.shape[1] // exact_TE.shape[1]
    return {"softmax": {"values_log10": _log10(error), "features": float(features)}}


class RandomLayer(NamedTuple):
    """A layer, in float32: call(params, x_TD) -> y_TD."""

    call: Callable[[Any, jax.Array], jax.Array]
    params: Any
    x_TD: jax.Array
    cotangent_TD: jax.Array

    def in_float64(self) -> Any:
        """(params, x_TD, cotangent_TD), the same numbers; to be called under jax.enable_x64."""
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), self[1:])


def random_layer(mixer: Any, options: Mapping[str, Any], seed: int) -> RandomLayer:
    """A mixer of models/ with parameters of order one: matrices of N(0, 1 / inputs), and of all
    others the first values and N(0, 0.3^2)."""
    dtypes: Any = {"param_dtype": jnp.float32, "compute_dtype": jnp.float32}
    layer = mixer(WIDTH, depth=1, rngs=nnx.Rngs(seed), **dtypes, **options)
    graphdef, state = nnx.split(layer, nnx.Param)
    rng = np.random.default_rng(seed)

    def randomised(leaf: jax.Array) -> jax.Array:
        noise = rng.standard_normal(leaf.shape)
        value = noise / math.sqrt(leaf.shape[0]) if leaf.ndim == 2 else leaf + 0.3 * noise
        return jnp.asarray(value, jnp.float32)

    params = jax.tree.map(randomised, nnx.to_pure_dict(state))

    def call(params: Any, x_TD: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda leaf: leaf, state)  # what it is filled with may be traced
        nnx.replace_by_pure_dict(own, params)
        return nnx.merge(graphdef, own)(x_TD[None])[0][0]

    x_TD, cotangent_TD = jnp.asarray(rng.standard_normal((2, LENGTH, WIDTH)), jnp.float32)
    return RandomLayer(call, params, x_TD, cotangent_TD)


def _result(
    function: Callable[[Any, jax.Array], jax.Array], params: Any, x_TD: Any, cotangent_TD: Any
) -> Result:
    def both(params: Any, x_TD: Any) -> tuple[Any, Any]:
        y_TD, pullback = jax.vjp(function, params, x_TD)
        return y_TD, pullback(cotangent_TD)

    return Result(*jax.tree.map(np.asarray, jax.jit(both)(params, x_TD)))


def _log10(number: float) -> float:
    return math.log10(max(number, LEAST))


def _distance(got: Any, wanted: Any) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return max(
        float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()) for a, b in pairs
    )
