"""What every mixer promises: documents that never leak, gradients that reach every parameter; and
what a causal one promises besides: one call for training, prefill and decoding, exact states.

A model joins by a row: a pattern of mixers, their options and the depth. It stands in `ROWS` if it
is the first of its kind, and in `OTHERS`, which only `make test-all` runs, if a row in `ROWS` calls
the same op in much the same way. Sizes are tiny and shapes are shared between tests, so that each
row compiles few programs."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.blocks.stack import available_mixers, state_bytes
from models.networks.lm import LM, build
from tests.support.layers import parts
from tests.support.mixers import TOYS, add_mixers

# A sequence is two pieces of PIECE tokens and one of one token: three lengths, three programs per
# row.
BATCH, PIECE, LENGTH, VOCABULARY = 2, 5, 11, 17


@dataclasses.dataclass(frozen=True)
class Row:
    pattern: tuple[str, ...]
    mixers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    depth: int = 2
    model: dict[str, Any] = dataclasses.field(default_factory=lambda: {"mlp": "none"})


ROWS = {
    "linear_attention": Row(("linear_attention",), {"linear_attention": {"heads": 2}}),
    "gla": Row(("gla",), {"gla": {"heads": 2}}),
    "delta_net": Row(("delta_net",), {"delta_net": {"heads": 2}}, model={"mlp": "swiglu"}),
    "mamba": Row(
        ("mamba",), {"mamba": {"state_size": 4}}, model={"mlp": "none", "tie_embeddings": True}
    ),
    "transformer": Row(("transformer",), {"transformer": {"context_length": LENGTH, "heads": 2}}),
    "gated_delta_net": Row(("gated_delta_net",), {"gated_delta_net": {"heads": 2}}),
    "mamba2": Row(("mamba2",), {"mamba2": {"state_size": 4, "heads": 4, "groups": 2}}),
    "lightning": Row(("lightning",), {"lightning": {"heads": 2}}),
    "lru": Row(("lru",), {"lru": {"state_size": 4}}),
    "flowformer": Row(("flowformer",), {"flowformer": {"heads": 2, "clip": 5.0}}),
}
LONGER = {  # other options of the same mixers, and a hybrid
    "hybrid": Row(
        ("delta_net", "window_attention"),
        {"delta_net": {"heads": 2}, "window_attention": {"window": 4, "heads": 2}},
        depth=5,  # two periods and a remainder
    ),
    "s4": Row(("s4",), {"s4": {"state_size": 4, "kernel_length": 16}}),
    "window_attention": Row(
        ("window_attention",),
        {
            "window_attention": {
                "window": 4,
                "heads": 4,
                "key_value_heads": 2,
                "qk_norm": True,
                "rope": False,
            }
        },
    ),
    "mom": Row(
        ("mom",),
        {
            "mom": {
                "heads": 2,
                "memories": 3,
                "rule": "gla",
                "execution": "gathered",
                "conv_width": 4,
            }
        },
    ),
    "liger": Row(
        ("liger",),
        {"liger": {"window": 3, "heads": 4, "key_value_heads": 2}},
        model={"lora_rank": 2},
    ),
    "lolcats": Row(
        ("lolcats",),
        {"lolcats": {"window": 3, "heads": 4, "key_value_heads": 2, "feature_size": 3}},
    ),
    "seqboat": Row(("seqboat",), {"seqboat": {"window": 3, "key_size": 8, "state_size": 3}}),
}
OTHERS = {  # mixers whose op has a row above, and further options
    "linear_attention_identity": Row(
        ("linear_attention",),
        {
            "linear_attention": {
                "heads": 2,
                "feature_map": "identity",
                "normaliser": "rms_norm",
                "conv_width": 3,
            }
        },
    ),
    "mamba_negative": Row(
        ("mamba",), {"mamba": {"state_size": 4, "eigenvalue_range": (-1, 1), "conv_width": 1}}
    ),
    "base_conv": Row(("base_conv", "gla"), {"base_conv": {}, "gla": {"heads": 2}}),
    "delta_net_negative": Row(
        ("delta_net",), {"delta_net": {"heads": 2, "conv_width": 0, "eigenvalue_range": (-1, 1)}}
    ),
    "gla_convolution": Row(("gla",), {"gla": {"heads": 1, "conv_width": 2}}),
    "gated_delta_net_negative": Row(
        ("gated_delta_net",),
        {"gated_delta_net": {"heads": 3, "conv_width": 0, "eigenvalue_range": (-1, 1)}},
    ),
    "liger_slots": Row(
        ("liger",),
        {"liger": {"window": 3, "heads": 2, "gate": "gsa", "slots": 3, "gate_projection": True}},
    ),
    "lolcats_terraced": Row(
        ("lolcats",),
        {"lolcats": {"window": 2, "terraced": True, "heads": 2, "feature_map": "relu"}},
    ),
    "lolcats_linear": Row(("lolcats",), {"lolcats": {"window": 0, "heads": 2, "feature_size": 3}}),
    "mm_mamba": Row(("mm_mamba",), {"mm_mamba": {"heads": 4, "key_value_heads": 2}}),
    "latent_attention": Row(
        ("latent_attention",),
        {
            "latent_attention": {
                "context_length": LENGTH,
                "heads": 2,
                "latent_size": 6,
                "key_size": 4,
                "shared_key_size": 2,
                "value_size": 3,
                "query_latent_size": 5,
            }
        },
    ),
    "kda": Row(("kda",), {"kda": {"heads": 2, "expand_v": 0.5}}, depth=3),
    "retnet": Row(("retnet",), {"retnet": {"heads": 2}}),
    "lion": Row(("lion",), {"lion": {"heads": 2}}, model={"mlp": "none", "branch_norm": True}),
    "hgrn2": Row(("hgrn2",), {"hgrn2": {"heads": 2}}),
    "hgrn2_hybrid": Row(
        (
            "hgrn2",
            "window_attention",
        ),  # one parameter of three layers, the last of them in the remainder
        {"hgrn2": {"heads": 2}, "window_attention": {"window": 4, "heads": 2}},
        depth=5,
    ),
    "normalised_attention": Row(
        ("normalised_attention",), {"normalised_attention": {"heads": 2, "state_size": 6}}
    ),
    "qlstm": Row(("qlstm",), {"qlstm": {"forget": "reversed", "expand": 1.0}}),
    "kronecker_attention": Row(
        ("kronecker_attention",), {"kronecker_attention": {"heads": 2, "key_size": 2}}
    ),
    "hedgehog": Row(("hedgehog",), {"hedgehog": {"heads": 2}}),
    "hedgehog_exp": Row(
        ("hedgehog",), {"hedgehog": {"heads": 4, "feature_map": "exp", "rope": False}}
    ),
    "based": Row(
        ("based", "window_attention"),
        {"based": {"heads": 2, "feature_size": 4}, "window_attention": {"window": 4, "heads": 2}},
        depth=3,
    ),
    "lightnet": Row(("lightnet",), {"lightnet": {"heads": 2, "gate_rank": 4}}),
    "lightnet_one": Row(
        ("lightnet",), {"lightnet": {"heads": 1, "gate_rank": 4, "empty_sum": "one"}}
    ),
    "monarch_mixer": Row(
        ("monarch_mixer",), {"monarch_mixer": {"context_length": LENGTH, "filter_hidden": 6}}
    ),
    "mom_padded": Row(
        ("mom",), {"mom": {"heads": 2, "memories": 3, "conv_width": 2, "execution": "padded"}}
    ),
    "seqboat_squared_relu": Row(
        ("seqboat",),
        {
            "seqboat": {
                "window": 3,
                "key_size": 12,  # of 8, no product of these is positive
                "state_size": 3,
                "attention": "squared_relu",
            }
        },
    ),
    "s4_rank_2": Row(("s4",), {"s4": {"state_size": 4, "init": "legt", "kernel_length": 4}}),
    "s4d": Row(("s4d",), {"s4d": {"state_size": 4}}),
    # Not every trained transition is stable, least of all a random one: tests/models/lssl_test.py
    # has those near HiPPO.
    "lssl": Row(("lssl",), {"lssl": {"state_size": 4, "channels": 2, "transition": "fixed"}}),
    "s4d_real": Row(("s4d",), {"s4d": {"state_size": 4, "init": "real"}}),
    "s5": Row(("s5",), {"s5": {"state_size": 8, "blocks": 2, "clip_eigenvalues": True}}),
    "transnormer": Row(
        ("diag_attention", "transnormer"),
        {"diag_attention": {"heads": 2, "block": 4}, "transnormer": {"heads": 2}},
    ),
    "mamba2_norm_before_gate": Row(
        ("mamba2",),
        {"mamba2": {"state_size": 3, "heads": 2, "norm": "before_gate", "conv_width": 1}},
    ),
    "lightning_released": Row(
        ("lightning", "window_attention"),  # layers 0, 2 and 4 of 5
        {
            "lightning": {"heads": 2, "decay": "alibi", "lrpe": "all", "gate_rank": 3},
            "window_attention": {"window": 4, "heads": 2},
        },
        depth=5,
    ),
    "lightning_receptive": Row(
        ("lightning",), {"lightning": {"heads": 4, "decay": "receptive", "lrpe": "none"}}
    ),
}
ENCODERS = {  # not causal
    "segment_mean": Row(("segment_mean",), model={"mlp": "gelu"}),
    "bidirectional_gla": Row(("bidirectional_gla",)),
    "encoder_hybrid": Row(
        ("bidirectional_gla", "segment_mean"),
        {"bidirectional_gla": {"combine": "concatenation"}},
        depth=3,
    ),
    "s_mamba": Row(("s_mamba",), {"s_mamba": {"state_size": 4}}),
    "itransformer": Row(("itransformer",), {"itransformer": {"heads": 2, "dropout": 0.0}}),
    "s4d_encoder": Row(("s4d",), {"s4d": {"state_size": 4, "causal": False}}),
    "flowformer_encoder": Row(("flowformer",), {"flowformer": {"heads": 2, "causal": False}}),
    "vig": Row(("vig",), {"vig": {"size_per_head": 16}}),
    "vit": Row(("vit",), {"vit": {"heads": 2}}),
    "slab": Row(("slab",), {"slab": {"heads": 2}}),
    "lit": Row(("lit",), {"lit": {"heads": 2}}),
    "linfusion": Row(("linfusion",), {"linfusion": {"heads": 2}}),
    "clear": Row(("clear",), {"clear": {"heads": 2}}),
    "lingen": Row(
        ("lingen",), {"lingen": {"heads": 2, "state_size": 4, "state_heads": 2, "windows": ()}}
    ),
    "soft": Row(("soft",), {"soft": {"size_per_head": 16, "window": 1, "kernel_size": 3}}),
    "mossformer2": Row(
        ("mossformer2",),
        {
            "mossformer2": {
                "group": 3,
                "qk_size": 6,
                "rotary_size": 4,
                "conv_width": 3,
                "recurrent_width": 8,
                "order": 2,
                "dropout": 0.0,
            }
        },
        model={"mlp": "none", "norm": "none"},
    ),
}
OTHER_ENCODERS = {  # the same of other mixers
    "lion_mamba": Row(("lion",), {"lion": {"operator": "mamba", "state_size": 4}}),
    "s4_encoder": Row(("s4",), {"s4": {"state_size": 4, "kernel_length": 16, "causal": False}}),
    "s5_encoder": Row(("s5",), {"s5": {"state_size": 8, "blocks": 2, "causal": False}}),
    "lru_encoder": Row(("lru",), {"lru": {"state_size": 4, "causal": False}}),
    "lssl_encoder": Row(
        ("lssl",), {"lssl": {"state_size": 4, "transition": "fixed", "causal": False}}
    ),
    "seqboat_encoder": Row(
        ("seqboat",), {"seqboat": {"window": 3, "key_size": 8, "state_size": 3, "causal": False}}
    ),
    "monarch_mixer_encoder": Row(
        ("monarch_mixer",),
        {"monarch_mixer": {"context_length": LENGTH, "filter_hidden": 6, "causal": False}},
    ),
    "kronecker_attention_encoder": Row(
        ("kronecker_attention",),
        # The exact form is cubic, and a test here has 4096 tokens.
        {"kronecker_attention": {"heads": 2, "key_size": 2, "causal": False}},
    ),
    "transnormer_encoder": Row(
        ("diag_attention", "transnormer"),
        {
            "diag_attention": {"heads": 2, "block": 4, "attention": "relu", "causal": False},
            "transnormer": {"heads": 2, "feature_map": "elu", "causal": False},
        },
    ),
}
ALL = {**ROWS, **LONGER, **OTHERS, **ENCODERS, **OTHER_ENCODERS}
CAUSAL = [
    *ROWS,
    *(pytest.param(name, marks=pytest.mark.slow) for name in LONGER),
    *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS),
]
causal_row = pytest.mark.parametrize("name", CAUSAL)
NOT_CAUSAL = [*ENCODERS, *(pytest.param(name, marks=pytest.mark.full) for name in OTHER_ENCODERS)]
every_row = pytest.mark.parametrize("name", [*CAUSAL, *NOT_CAUSAL])
encoder_row = pytest.mark.parametrize("name", NOT_CAUSAL)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    add_mixers(monkeypatch, **TOYS)


def make(
    name: str,
    *,
    seed: int = 0,
    compute_dtype: str = "float32",
    vocabulary: int = VOCABULARY,
    **model: Any,
) -> LM:
    """The row's model with random parameters of order one, so that no path through a block is
    negligible."""
    row = ALL[name]
    config = {
        "width": 32,
        "depth": row.depth,
        "pattern": row.pattern,
        "mixers": row.mixers,
        **row.model,
        **model,
    }
    dtypes: dict[str, Any] = {"param_dtype": "float32", "compute_dtype": compute_dtype}
    build_row = functools.partial(build, config, vocabulary=vocabulary, **dtypes)
    graphdef, params, variables = parts(lambda: build_row(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def value(leaf):
        noise = rng.standard_normal(leaf.shape)
        return jnp.asarray(
            noise / math.sqrt(leaf.shape[-2]) if leaf.ndim >= 2 else 1 + 0.3 * noise, leaf.dtype
        )

    return nnx.merge(graphdef, jax.tree.map(value, params), variables)


@functools.cache
def model_of(name: str) -> LM:
    return make(name)


@jax.jit
def call(
    lm: LM, tokens: jax.Array, state: Any = None, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    return lm(tokens, state, segment_ids=segment_ids)


def tokens_of(seed: int = 0) -> jax.Array:
    return jnp.asarray(
        np.random.default_rng(seed).integers(0, VOCABULARY, (BATCH, LENGTH)), jnp.int32
    )


def run(
    name: str, tokens: jax.Array, state: Any = None, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """The row's model, always with a state and segment ids: one program per length serves most
    tests."""
    lm = model_of(name)
    state = lm.init_state(BATCH) if state is None and lm.causal else state
    return call(lm, tokens, state, jnp.zeros_like(tokens) if segment_ids is None else segment_ids)


def pieces_of(tokens: jax.Array) -> list[jax.Array]:
    return [tokens[:, :PIECE], tokens[:, PIECE : 2 * PIECE], tokens[:, 2 * PIECE :]]


def assert_close(got: Any, want: Any, what: str, tolerance: float = 2e-5) -> None:
    """Compares relative to the largest number: sums of about 2^5 rounded terms, through a few
    blocks."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(1.0, float(np.abs(b).max(initial=0.0)))
        np.testing.assert_allclose(
            a, b, atol=tolerance * scale, rtol=0, err_msg=what + jax.tree_util.keystr(path)
        )


def documents_of(tokens: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Three documents and the segment ids of the sequence that they make."""
    documents = pieces_of(tokens)
    ids = (7, 3, 7)  # not sorted, and one comes back: only a change counts
    segment_ids = [jnp.full_like(d, i) for d, i in zip(documents, ids, strict=True)]
    return documents, jnp.concatenate(segment_ids, axis=1)


def padded_of(tokens: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """Tokens, segment ids, and the length of the padding: sequence 0 is a prompt of PIECE tokens
    with padding on its left, sequence 1 fills the length."""
    padding = LENGTH - PIECE
    segment_ids = jnp.ones_like(tokens).at[0, :padding].set(0)
    return tokens.at[0, :padding].set(0), segment_ids, padding


def test_every_mixer_has_a_row():
    in_rows = {mixer for row in ALL.values() for mixer in row.pattern}
    assert set(available_mixers()) | set(TOYS) == in_rows


@every_row
def test_a_packed_document_is_read_as_if_alone(name):
    tokens = tokens_of()
    documents, segment_ids = documents_of(tokens)
    logits, _ = run(name, tokens, segment_ids=segment_ids)
    alone = [run(name, document)[0] for document in documents]
    assert_close(logits, jnp.concatenate(alone, axis=1), "packed")


@every_row
def test_a_padded_prompt_is_read_as_if_unpadded(name):
    tokens = tokens_of()
    padded, segment_ids, padding = padded_of(tokens)
    logits, _ = run(name, padded, segment_ids=segment_ids)
    assert_close(logits[0, padding:], run(name, tokens[:, padding:])[0][0], "padded prompt")
    assert_close(logits[1], run(name, tokens)[0][1], "its neighbour")


@encoder_row
def test_every_token_of_an_encoder_depends_on_every_other(name):
    tokens = tokens_of()
    for place in (0, PIECE, LENGTH - 1):
        changed = tokens.at[:, place].set((tokens[:, place] + 1) % VOCABULARY)
        difference = np.abs(np.asarray(run(name, tokens)[0] - run(name, changed)[0])).max(axis=-1)
        assert difference.min() > 1e-4


@encoder_row
def test_an_encoder_has_no_state_and_says_so(name):
    lm = model_of(name)
    assert state_bytes(lm) is None and not jax.tree.leaves(run(name, tokens_of())[1])
    with pytest.raises(ValueError, match=f"a stack with .*{ALL[name].pattern[-1]}.* has no state"):
        lm.init_state(BATCH)


@causal_row
def test_step_by_step_equals_parallel(name):
    tokens, state, steps = tokens_of(), None, []
    for t in range(LENGTH):
        logits, state = run(name, tokens[:, t : t + 1], state)
        steps.append(logits)
    assert_close((jnp.concatenate(steps, axis=1), state), run(name, tokens), "step by step")


@causal_row
def test_uneven_pieces_with_state_equal_the_whole(name):
    tokens = tokens_of()
    state, pieces = None, []
    for piece in pieces_of(tokens):
        logits, state = run(name, piece, state)
        pieces.append(logits)
    assert_close((jnp.concatenate(pieces, axis=1), state), run(name, tokens), "pieces")


@causal_row
def test_the_state_after_packed_documents_is_that_of_the_last(name):
    tokens = tokens_of()
    documents, segment_ids = documents_of(tokens)
    _, state = run(name, tokens, segment_ids=segment_ids)
    _, alone = run(name, documents[-1])
    # Counters and masked entries of the states may differ; what follows may not.
    following, want = (run(name, tokens[:, :1], s)[0] for s in (state, alone))
    assert_close(following, want, "after packed documents")


@causal_row
def test_the_state_after_a_padded_prompt_is_that_of_the_prompt(name):
    tokens = tokens_of()
    padded, segment_ids, padding = padded_of(tokens)
    _, state = run(name, padded, segment_ids=segment_ids)
    _, short = run(name, tokens[:, padding:])
    _, full = run(name, tokens)
    following, after_short, after_full = (
        run(name, tokens[:, :1], s)[0] for s in (state, short, full)
    )
    assert_close(following[0], after_short[0], "after the padded prompt")
    assert_close(following[1], after_full[1], "after its neighbour")


@causal_row
def test_future_tokens_do_not_change_the_past_and_reach_the_future(name):
    tokens = tokens_of()
    changed = tokens.at[:, PIECE].set((tokens[:, PIECE] + 1) % VOCABULARY)
    difference = np.abs(np.asarray(run(name, tokens)[0] - run(name, changed)[0])).max(axis=-1)
    np.testing.assert_array_equal(difference[:, :PIECE], 0)
    assert difference[:, PIECE : PIECE + 4].min() > 1e-3


@causal_row
def test_first_and_returned_states_have_one_structure(name):
    lm = model_of(name)
    start = jax.eval_shape(lambda: lm.init_state(BATCH))
    _, final = jax.eval_shape(lambda lm, tokens: lm(tokens), lm, tokens_of())
    assert jax.tree.structure(start) == jax.tree.structure(final)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(start)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(final)
    ]


@causal_row
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_state_bytes_are_the_bytes_of_the_state(name, compute_dtype):
    lm = make(name, compute_dtype=compute_dtype)
    assert state_bytes(lm) == sum(leaf.nbytes for leaf in jax.tree.leaves(lm.init_state(3))) / 3


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.slow if name in {"gla", "delta_net", "mamba"} else pytest.mark.full,
        )
        for name in ALL
    ],
)
def test_replicas_under_vmap_learn_as_they_would_alone(name):
    graphdef, _, variables = nnx.split(model_of(name), nnx.Param, ...)
    models = [model_of(name), make(name, seed=1)]
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(nnx.state(lm, nnx.Param) for lm in models)
    )
    tokens = [tokens_of(), tokens_of(seed=1)]

    def loss(params, tokens):
        logits, _ = nnx.merge(graphdef, params, variables)(tokens)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen), logits

    gradients, logits = jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))(stacked, jnp.stack(tokens))
    for path, leaf in nnx.to_flat_state(gradients):
        values = np.asarray(leaf[...])
        assert np.isfinite(values).all(), f"gradient of {path}"
        assert np.abs(values).reshape(2, -1).max(axis=1).min() > 0, f"gradient of {path}"
    for i, lm in enumerate(models):
        assert_close(logits[i], call(lm, tokens[i])[0], f"replica {i}")


@pytest.mark.full
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_gradients_of_a_fresh_model_over_4096_tokens_are_finite(name, compute_dtype):
    row, length = ALL[name], 4096
    mixers = {
        mixer: options | ({"context_length": length} if "context_length" in options else {})
        for mixer, options in row.mixers.items()
    }
    config = {"width": 32, "depth": row.depth, "pattern": row.pattern, **row.model}
    lm = build(
        config | {"mixers": mixers},
        vocabulary=VOCABULARY,
        param_dtype="float32",
        compute_dtype=compute_dtype,
        rngs=nnx.Rngs(0),
    )
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (1, length)), jnp.int32)
    graphdef, params, variables = nnx.split(lm, nnx.Param, ...)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits, _ = nnx.merge(graphdef, params, variables)(tokens)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    value, gradients = loss(params)
    assert np.isfinite(value)
    for path, leaf in nnx.to_flat_state(gradients):
        assert np.isfinite(np.asarray(leaf[...])).all(), f"gradient of {path}"


@pytest.mark.slow
@causal_row
def test_absent_state_is_the_zero_state(name):
    assert_close(call(model_of(name), tokens_of()), run(name, tokens_of()), "no state given")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ROWS, "hybrid"])
def test_bfloat16_compute_is_near_float32_and_keeps_logits_float32(name):
    lm, tokens = make(name, compute_dtype="bfloat16"), tokens_of()
    logits, state = call(lm, tokens)
    assert logits.dtype == jnp.float32
    start = lm.init_state(BATCH)
    assert [leaf.dtype for leaf in jax.tree.leaves(start)] == [
        leaf.dtype for leaf in jax.tree.leaves(state)
    ]
    want, _ = call(model_of(name), tokens)
    # bfloat16 rounds each activation to 2^-9; a dozen roundings in two to five blocks leave a few
    # per cent.
    assert_close(logits, want, "bfloat16", tolerance=0.1)
    assert float(jnp.abs(logits - want).max()) > 0, "the compute dtype must reach the computation"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "hybrid", "encoder_hybrid"])
def test_scanned_layers_equal_unrolled_ones(name):
    # The same parameters: they are stacked either way.
    unrolled = make(name, scan_layers=False)
    assert_close(call(unrolled, tokens_of()), call(model_of(name), tokens_of()), "unrolled")
