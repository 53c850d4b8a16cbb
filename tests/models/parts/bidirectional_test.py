"""An encoder's mixer made of a causal one, against the causal mixer called by hand; and layers with
causal=False, against sums over both sides."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import delta_net, gla, mamba
from models.blocks.stack import available_mixers, find_mixer
from models.parts.bidirectional import Bidirectional
from tests.contracts.ops import assert_close
from tests.support.layers import (
    FLOAT32,
    LENGTH,
    WIDTH,
    array,
    convolved,
    inputs,
    randomised,
    sigmoid,
    weight,
)

SEGMENT_IDS = jnp.array([[0, 0, 0, 1, 1, 0, 0], [2, 2, 2, 2, 2, 2, 2]])


def encoder(module: Any, combine: str = "sum", **options: Any) -> Any:
    def make() -> Bidirectional:
        given: dict[str, Any] = {"depth": 2, "rngs": nnx.Rngs(0), **FLOAT32}
        mixer = functools.partial(module.Mixer, WIDTH, **given, **options)
        return Bidirectional(mixer, WIDTH, combine=combine, **given)

    return randomised(make)


@pytest.mark.parametrize(
    ("module", "options"),
    [(gla, {"heads": 2, "conv_width": 3}), (mamba, {"state_size": 3}), (delta_net, {"heads": 2})],
)
@pytest.mark.parametrize("combine", ["sum", "concatenation"])
def test_an_encoder_reads_its_segments_in_both_directions(module, options, combine):
    mixer, x = encoder(module, combine, **options), jnp.asarray(inputs())

    @jax.jit
    def both(mixer, x):
        turned = mixer.backward(x[:, ::-1], segment_ids=SEGMENT_IDS[:, ::-1])[0]
        return mixer.forward(x, segment_ids=SEGMENT_IDS)[0], turned[:, ::-1]

    forward, backward = both(mixer, x)
    want = np.asarray(forward + backward)
    if combine == "concatenation":
        want = np.concatenate((forward, backward), axis=-1) @ array(mixer.output.kernel)
    got, state = jax.jit(lambda mixer, x: mixer(x, segment_ids=SEGMENT_IDS))(mixer, x)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    assert state is None and np.abs(np.asarray(forward - backward)).max() > 0.1


def test_another_combination_is_refused():
    with pytest.raises(ValueError, match="combine must be one of 'sum', 'concatenation'"):
        encoder(gla, "product")


# Of the mixers that walk backwards themselves.
OPTIONS: dict[str, dict[str, Any]] = {
    "linear_attention": {"heads": 2, "conv_width": 3},
    "transnormer": {"heads": 2},
    "normalised_attention": {"heads": 2, "state_size": 6},
    "kronecker_attention": {"heads": 2, "key_size": 2},
    "hedgehog": {"heads": 2},
    "based": {"heads": 2, "feature_size": 4},
    "retnet": {"heads": 2},
    "lightning": {"heads": 2, "layer": 1},
    "gla": {"heads": 2, "conv_width": 3},
    "hgrn2": {"heads": 2},
    "lightnet": {"heads": 2, "gate_rank": 4},
    "flowformer": {"heads": 2, "clip": 5.0},
    "delta_net": {"heads": 2},
    "gated_delta_net": {"heads": 2},
    "kda": {"heads": 2},
    "mamba": {"state_size": 3},
    "mamba2": {"state_size": 4, "heads": 2, "groups": 1},
    "lssl": {"state_size": 4, "channels": 2, "transition": "fixed"},
    "s4": {"state_size": 4, "kernel_length": 16},
    "s4d": {"state_size": 4},
    "s5": {"state_size": 8, "blocks": 2, "clip_eigenvalues": True},
    "lru": {"state_size": 4},
    "qlstm": {"forget": "reversed"},
    "base_conv": {},
}
FLIPPED = {
    *("diag_attention", "lion", "liger", "lolcats", "transformer", "window_attention"),
    *("latent_attention", "mm_mamba", "mom", "monarch_mixer", "seqboat"),
}
IN_MAKE_TEST = ("hedgehog", "lightnet", "s4d", "base_conv")


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        pytest.param(name, packed, marks=() if name in IN_MAKE_TEST else pytest.mark.full)
        for name in OPTIONS
        # Those of s4 are convolutions where there are no segments and no state.
        for packed in ((True, False) if name in ("lssl", "s4", "s4d") else (True,))
    ],
)
def test_a_mixer_in_reverse_is_itself_along_reversed_tokens(name, packed):
    given: dict[str, Any] = {"depth": 2, **FLOAT32, **OPTIONS[name]}
    mixer = randomised(lambda: find_mixer(name)(WIDTH, rngs=nnx.Rngs(0), **given))

    @jax.jit
    def both(mixer, x):
        state, ids, reversed_ids = None, None, None
        if packed:
            ids, reversed_ids = SEGMENT_IDS, SEGMENT_IDS[:, ::-1]
            _, state = mixer(x + 1)
        y, after = mixer(x[:, ::-1], state, segment_ids=reversed_ids)
        return mixer(x, state, segment_ids=ids, reverse=True), (y[:, ::-1], after)

    got, wanted = (
        jax.tree_util.tree_leaves_with_path(x) for x in both(mixer, jnp.asarray(inputs()))
    )
    for (path, value), (_, expected) in zip(got, wanted, strict=True):
        assert_close(jax.tree_util.keystr(path), value, expected, 2e-5)


def test_every_mixer_but_a_few_walks_backwards_itself():
    walking = {
        name
        for name in available_mixers()
        if "reverse" in inspect.signature(find_mixer(name).__call__).parameters
    }
    both = {name for name in available_mixers() if getattr(find_mixer(name), "causal", 1) is False}
    assert walking == set(OPTIONS) and walking | FLIPPED == set(available_mixers()) - both


# Mixers with causal=False, against slow sums over both sides.


def two_sided(past, future, x_TD):
    """sum_{s <= t} past_{t-s} x_s + sum_{s > t} future_{s-t-1} x_s, with kernels [lag, ..., D]."""
    return np.stack(
        [
            sum(
                past[t - s] * x if s <= t else future[s - t - 1] * x
                for s, x in enumerate(np.asarray(x_TD, np.float64))
            )
            for t in range(len(x_TD))
        ]
    )


def glu(mixer, y_TD):
    g = np.asarray(jax.nn.gelu(y_TD), np.float64)
    value, gate = (g @ weight(m) + array(m.bias) for m in (mixer.output, mixer.output_gate))
    return value * sigmoid(gate)


def krylov(A, b, C, length):
    """C A^l b of each channel: [length, ..., D]."""
    kernel = []
    for _ in range(length):
        kernel.append(np.einsum("dmn,dn->md", C, b))
        b = np.einsum("dkn,dn->dk", A, b)
    return np.stack(kernel)


def s4_layer(mixer, x_TD):
    E, b = mixer.system().increment()
    A = np.asarray(E, np.float64) + np.eye(E.shape[1])
    systems = (mixer.system(read) for read in mixer.reads())
    reads = (np.asarray(each.untruncated_read(E, mixer.kernel_length)) for each in systems)
    past, future = (krylov(A, np.asarray(b), C[:, None], LENGTH)[:, 0] for C in reads)
    return glu(mixer, two_sided(past, future, x_TD) + array(mixer.skip_D) * x_TD)


def s4d_layer(mixer, x_TD):
    factor, write = (np.asarray(part, complex) for part in mixer.system())
    past, future = (
        np.stack(
            [np.real((real + 1j * imaginary) * factor**lag * write).sum(1) for lag in range(LENGTH)]
        )
        for real, imaginary in (map(np.asarray, read) for read in mixer.reads())
    )
    return glu(mixer, two_sided(past, future, x_TD) + array(mixer.skip_D) * x_TD)


def lssl_layer(mixer, x_TD):
    A, b = (np.asarray(part, np.float64) for part in mixer.system())
    past, future = (
        krylov(A, b, array(read), LENGTH) for read in (mixer.read_DMN, mixer.backward_read_DMN)
    )
    y_TMD = two_sided(past, future, x_TD) + array(mixer.skip_DM).T * x_TD[:, None]
    g_TDM = np.swapaxes(np.asarray(jax.nn.gelu(y_TMD), np.float64), 1, 2)
    return g_TDM.reshape(len(x_TD), -1) @ weight(mixer.output) + array(mixer.output.bias)


def states(factor, u_TN) -> Any:
    h, found = 0, []
    for u in u_TN:
        h = factor * h + u
        found.append(h)
    return np.stack(found)


def both_states(mixer, factor, u_TN):
    """C h + C' h', real parts."""
    h, back = states(factor, u_TN), states(factor, u_TN[::-1])[::-1]
    y = h.real @ weight(mixer.read_real) - h.imag @ weight(mixer.read_imaginary)
    y = y + back.real @ weight(mixer.backward_read_real)
    return y - back.imag @ weight(mixer.backward_read_imaginary)


def s5_layer(mixer, x_TD):
    factor, scale = (np.asarray(part, complex) for part in mixer.system())
    u = scale * (x_TD @ (weight(mixer.write_real) + 1j * weight(mixer.write_imaginary)))
    y = 2 * both_states(mixer, factor, u) + array(mixer.skip_D) * x_TD
    g = np.asarray(jax.nn.gelu(y), np.float64)
    return g * sigmoid(g @ weight(mixer.output_gate) + array(mixer.output_gate.bias))


def lru_layer(mixer, x_TD):
    factor = np.asarray(mixer.factor()[0]) + 1j * np.asarray(mixer.factor()[1])
    B = weight(mixer.write_real) + 1j * weight(mixer.write_imaginary)
    u = np.exp(array(mixer.scale_log_N)) * (x_TD @ B)
    return glu(mixer, both_states(mixer, factor, u) + array(mixer.skip_D) * x_TD)


def monarch_mixer_layer(mixer, x_TD):
    parts = convolved(x_TD @ weight(mixer.input) + array(mixer.input.bias), mixer.conv)
    x1, x2, v = np.split(parts, 3, axis=1)
    kernels = [
        np.asarray(f(LENGTH, f.rates()), np.float64).T
        for f in (
            mixer.filter,
            mixer.backward_filter,
            mixer.residual_filter,
            mixer.backward_residual_filter,
        )
    ]
    z, beta = v * x1, array(mixer.beta_2D)
    s = (two_sided(kernels[0], kernels[1], z) + beta[0] * z) * x2
    s = s + two_sided(kernels[2], kernels[3], x_TD) + beta[1] * x_TD
    h = s @ weight(mixer.output) + array(mixer.output.bias)
    g, a = jnp.split(mixer.channels_in(jnp.asarray(h, jnp.float32)[None]), 2, axis=-1)
    return h + np.asarray(mixer.channels_out(jax.nn.gelu(g) * a))[0]


LAYERS = {
    "s4": ({"state_size": 4, "kernel_length": 16}, s4_layer),
    "s4d": ({"state_size": 4}, s4d_layer),
    "lssl": ({"state_size": 4, "channels": 2, "transition": "fixed"}, lssl_layer),
    "s5": ({"state_size": 8, "blocks": 2, "clip_eigenvalues": True}, s5_layer),
    "lru": ({"state_size": 4}, lru_layer),
    "monarch_mixer": (
        {"context_length": LENGTH, "filter_hidden": 6, "blocks": 2},
        monarch_mixer_layer,
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in ("s4", "lssl", "monarch_mixer") else ()
        )
        for name in LAYERS
    ],
)
def test_a_layer_reads_both_sides_of_its_documents_and_no_padding(name):
    options, layer = LAYERS[name]
    given: dict[str, Any] = {"depth": 2, **FLOAT32, **options, "causal": False}
    mixer = randomised(lambda: find_mixer(name)(WIDTH, rngs=nnx.Rngs(0), **given))
    x = inputs()
    kept = LENGTH - 2
    masked = "mask" in inspect.signature(type(mixer).__call__).parameters

    @jax.jit
    def outputs(mixer, x):
        whole = mixer(x)[0], mixer(x, segment_ids=SEGMENT_IDS)[0]
        if not masked:
            return whole
        mask = jnp.arange(LENGTH)[None] < jnp.full((len(x), 1), kept)
        return *whole, mixer(jnp.where(mask[..., None], x, 1e3), mask=mask)[0][:, :kept]

    def wanted(x_BTD):
        return np.stack([layer(mixer, x_TD.astype(np.float64)) for x_TD in x_BTD])

    def apart(x_TD, ids):
        documents = np.split(x_TD.astype(np.float64), np.flatnonzero(np.diff(ids)) + 1)
        return np.concatenate([layer(mixer, document) for document in documents])

    packed = [apart(*row) for row in zip(x, np.asarray(SEGMENT_IDS), strict=True)]
    want = (wanted(x), np.stack(packed), wanted(x[:, :kept]))
    for got, expected in zip(outputs(mixer, jnp.asarray(x)), want, strict=False):
        np.testing.assert_allclose(got, expected, atol=3e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match=f"{name} with causal=False has no state"):
        mixer.init_state(2)


@pytest.mark.parametrize("name", [pytest.param("s5", marks=pytest.mark.slow), "lru"])
def test_reversed_tokens_are_read_as_by_the_layer_with_its_directions_exchanged(name):
    options, _ = LAYERS[name]
    given: dict[str, Any] = {"depth": 2, **FLOAT32, **options, "causal": False}
    mixer = randomised(lambda: find_mixer(name)(WIDTH, rngs=nnx.Rngs(0), **given))
    x = jnp.asarray(inputs())
    want = mixer(x)[0][:, ::-1]
    for part in ("real", "imaginary"):
        names = f"read_{part}", f"backward_read_{part}"
        forward, backward = (getattr(mixer, name) for name in names)
        setattr(mixer, names[0], backward)
        setattr(mixer, names[1], forward)
    np.testing.assert_allclose(mixer(x[:, ::-1])[0], want, atol=2e-5 * np.abs(want).max())
