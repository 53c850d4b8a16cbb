"""The optimizer of a run: clipping, an optax optimizer with a warmup schedule, parameter groups,
and the guard that rejects non-finite steps."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from experiments.training.config import HALVING, OPTIMIZERS, REFINED, SCHEDULES, halving_period
from experiments.training.hyperparameters import Hyperparameters
from experiments.training.refined_schedule import refined_schedule

# "matrix": a linear map between hidden vectors, which decays, and is what Muon is for. "decay": all
# else that decays at the full rate. "ssm" and, with decay, "ssm_decay": parameters of state-space
# models, which have a rate of their own. "frozen": keeps the value it starts with.
FROZEN = "frozen"
GROUPS = ("matrix", "decay", "no_decay", "ssm", "ssm_decay", FROZEN)
DECAYING = ("matrix", "decay", "ssm_decay")

WSD_DECAY = 0.2  # the last fifth of the run

# Momentum of Muon (Jordan et al., 2024) and the root mean square to which it scales its updates,
# that of AdamW's in practice (Liu et al., 2025, arXiv 2502.16982): lr and weight_decay mean the
# same for both.
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2

# optax accepts a non-finite update after this many in a row. Here it never should: the run stops
# instead.
NEVER = 2**31 - 2


def parameter_groups(params: nnx.State, frozen: Sequence[str] = ()) -> dict[str, Any]:
    """The group of every (abstract) parameter, as a tree of names.

    A parameter whose whole path, such as stack/period/0/mixer/query/kernel, matches one of the
    regular expressions `frozen` is "frozen". Otherwise its `group` metadata wins. Otherwise vectors
    (norms, biases, gates) do not decay, where the leading axis that the scan over layers adds does
    not count, and all else does: as a matrix if its last two axes have logical names, none of them
    the vocabulary. Embeddings, heads and convolutions are no such matrices.

    Raises ValueError for an expression that matches nothing, and if nothing is left to train."""
    unused = set(frozen)

    def group(path: tuple[Any, ...], param: Any) -> str:
        name = "/".join(map(str, path))
        matching = {pattern for pattern in frozen if re.fullmatch(pattern, name)}
        unused.difference_update(matching)
        if matching:
            return FROZEN
        metadata = param.get_metadata()
        axes = metadata.get("out_sharding") or ()
        if len(param.shape) - ("layers" in axes) < 2:
            default = "no_decay"
        elif None in axes[-2:] or "vocabulary" in axes or not axes:
            default = "decay"
        else:
            default = "matrix"
        chosen = metadata.get("group", default)
        if chosen not in GROUPS:
            raise ValueError(f"parameter {name}: group must be one of {GROUPS}; got {chosen!r}")
        return chosen

    flat = [(path, group(path, param)) for path, param in nnx.to_flat_state(params)]
    names = ["/".join(map(str, path)) for path, _ in flat]
    if unused:
        raise ValueError(
            "config.optimizer.frozen must be regular expressions that match whole paths of"
            f" parameters; {', '.join(map(repr, sorted(unused)))} match none of {', '.join(names)}"
        )
    if all(chosen == FROZEN for _, chosen in flat):
        raise ValueError("config.optimizer.frozen leaves no parameter to train")
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def make_schedule(options: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Learning rate after n updates: linear warmup from 0 to lr, then one of

    cosine, linear      to end_lr at `steps`
    constant            lr
    wsd                 lr, then linear to end_lr over the last fifth (Hu et al., 2024, arXiv
                        2404.06395)
    halving:<n>         lr for 2 n updates, then half of it for n, a quarter for n, and so on: with
                        n those of an epoch, that of Informer (Zhou et al., AAAI 2021) and the
                        forecasters after it
    refined:<workdir>   no warmup; by the gradient norms of the run in <workdir>, between end_lr and
                        lr

    Raises ValueError for another name, and for a <workdir> without the norms of a finished run.
    """
    name, lr, end_lr, warmup = (
        options["schedule"],
        options["lr"],
        options["end_lr"],
        options["warmup_steps"],
    )
    if name.startswith(REFINED):
        workdir = Path(name.removeprefix(REFINED)).expanduser()
        return refined_schedule(workdir, lr=lr, end_lr=end_lr, steps=steps)
    decay_steps = max(steps - warmup, 1)
    if name == "cosine":
        decay = optax.cosine_decay_schedule(lr, decay_steps, alpha=end_lr / lr)
    elif name == "linear":
        decay = optax.linear_schedule(lr, end_lr, decay_steps)
    elif name == "constant":
        decay = optax.constant_schedule(lr)
    elif (period := halving_period(name)) is not None:
        decay = optax.exponential_decay(lr, period, 0.5, transition_begin=period, staircase=True)
    elif name == "wsd":
        last = max(min(round(WSD_DECAY * steps), decay_steps), 1)
        decay = optax.linear_schedule(lr, end_lr, last, decay_steps - last)
    else:
        raise ValueError(
            f"config.optimizer.schedule must be one of {', '.join(SCHEDULES)},"
            f" {REFINED}<workdir> or {HALVING}<updates>; got {name!r}"
        )
    return (
        optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), decay], [warmup])
        if warmup
        else decay
    )


class MasterWeights(NamedTuple):
    """weights: the parameters in float32; inner: the state of the optimizer that updates them."""

    weights: Any
    inner: Any


def with_master_weights(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on float32 copies of parameters of fewer bits, which are their rounded values; for
    gradients in float32.

    A step of a learning rate is mostly smaller than what bfloat16 resolves (2^-8 of a parameter):
    added to the parameter itself it is lost, and moments in bfloat16 cannot fall any more.
    Micikevicius et al., 2018, arXiv 1710.03740, section 3.1."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params: Any) -> MasterWeights:
        weights = wide(params)
        return MasterWeights(weights, inner.init(weights))

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        updates, inner_state = inner.update(grads, state.inner, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        # What makes the rounded parameters of these weights out of those of before.
        updates = jax.tree.map(jnp.subtract, weights, wide(params))
        return updates, MasterWeights(weights, inner_state)

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


class Kar3State(NamedTuple):
    """The fast and the slow moment."""

    m1: Any
    m2: Any


def scale_by_kar3(b1: Any, b2: Any) -> optax.GradientTransformation:
    """sign(g) + sign(m1) + sign(m2) by the moments of the steps before, m <- b m + (1 - b) g, 0 at
    first: Kar3, which trains HyperZ.Z.W (arXiv 2401.17948)."""

    def init(params: Any) -> Kar3State:
        return Kar3State(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params

        def signs(*terms: jax.Array) -> jax.Array:
            return sum(map(jnp.sign, terms), start=jnp.zeros_like(terms[0]))

        def moved(moments: Any, decay: Any) -> Any:
            return jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, moments, updates)

        moments = Kar3State(moved(state.m1, b1), moved(state.m2, b2))
        return jax.tree.map(signs, updates, state.m1, state.m2), moments

    return optax.GradientTransformation(init, update)


def make_optimizer(
    options: Mapping[str, Any],
    numbers: Hyperparameters,
    groups: dict[str, Any],
    param_dtype: str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation of config.optimizer.

    Inside a program `numbers` may be its arguments: of the numbers in `options` it is only asked
    whether they are 0, and the state has none of them.

    Only the groups of DECAYING have weight decay. Muon trains the group "matrix", leading axes
    (layers, experts) being batches of matrices, and AdamW everything else beside it. The learning
    rate of the groups "ssm" and "ssm_decay" follows the same schedule, scaled to the peak ssm_lr
    (0: lr).
    clip_norm bounds the global norm of all gradients together (0: off). The group "frozen" is never
    updated and has no moments. Parameters of fewer bits than float32 have master weights and
    moments in float32. A step with a non-finite
    gradient changes nothing and is counted in the state (ApplyIfFiniteState). Raises ValueError for
    an unknown name."""
    decaying = jax.tree.map(lambda group: group in DECAYING, groups)
    moments: Any = {"b1": numbers.b1, "b2": numbers.b2}
    common = {"weight_decay": numbers.weight_decay, "mask": decaying}
    if options["name"] == "adamw":
        core = optax.adamw(numbers.rate, eps=numbers.eps, **moments, **common)
    elif options["name"] == "lion":
        core = optax.lion(numbers.rate, **moments, **common)
    elif options["name"] == "lamb":
        core = optax.lamb(numbers.rate, eps=numbers.eps, **moments, **common)
    elif options["name"] == "kar3":
        core = optax.chain(
            scale_by_kar3(numbers.b1, numbers.b2),
            optax.add_decayed_weights(**common),
            optax.scale_by_learning_rate(numbers.rate),
        )
    elif options["name"] == "muon":
        matrices = muon(
            numbers.rate,
            beta=MUON_MOMENTUM,
            consistent_rms=MUON_RMS,
            weight_decay=numbers.weight_decay,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(
                lambda _: MuonDimensionNumbers(-2, -1), params
            ),
        )
        others = optax.adamw(numbers.rate, eps=numbers.eps, **moments, **common)
        labels = jax.tree.map(lambda group: group == "matrix", groups)
        core = optax.partition({True: matrices, False: others}, labels)
    else:
        raise ValueError(
            f"config.optimizer.name must be one of {', '.join(OPTIMIZERS)}; got {options['name']!r}"
        )
    clip = (
        optax.clip_by_global_norm(numbers.clip_norm) if options["clip_norm"] else optax.identity()
    )
    chain = [clip, core]
    if options["ssm_lr"]:
        in_ssm = jax.tree.map(lambda group: group.startswith("ssm"), groups)
        chain.append(optax.masked(optax.scale(numbers.ssm_scale), in_ssm))
    update: Any = optax.chain(*chain)
    if jnp.dtype(param_dtype) != jnp.float32:
        update = with_master_weights(update)
    if FROZEN in jax.tree.leaves(groups):
        trained = jax.tree.map(lambda group: group != FROZEN, groups)
        update = optax.partition({True: update, False: optax.set_to_zero()}, trained)
    return optax.with_extra_args_support(optax.apply_if_finite(update, NEVER))
