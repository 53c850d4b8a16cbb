"""A router with a load-balancing loss: top-k of a softmax over memories or experts.

    p_t = softmax(x_t W_r),   I_t = the k largest
    w_t^m = p_t^m / sum_{j in I_t} p_t^j   for m in I_t;   w_t^m = p_t^m without `normalised`

With scores="sigmoid" (DeepSeek-V3, 2024, arXiv 2412.19437, Eq. 15 and 16) I_t are the k largest of
s_t + b, s_t = sigmoid(x_t W_r), and s_t stands for p_t in the weights, s_t / sum(s_t) in the loss.
b [M] has no gradient, and the rule that moves it in that report is left out. `scale` multiplies the
weights.

    f_m = (selections of m) / tokens,   P_m = mean_t p_t^m,   loss = M sum_m f_m P_m

over the tokens of a group: the whole batch ("global_batch"; Qiu et al., "Demons in the Detail",
2025, arXiv 2501.11873) or every `micro_batch_size` sequences, averaged ("micro_batch"; what
gradient accumulation and data-parallel replicas compute when each balances its own share). Balanced
routing has the loss k. The gradient flows through P alone: selections have none."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import check_choice
from models.parts.projections import XAVIER_SMALL, projection
from models.parts.variables import report


class Router(nnx.Module):
    """x_BTD -> the selected ones [B, T, k], int32, and their weights, float32.

    Reports `auxiliary_loss`, the load-balancing loss times `balance_weight`, and `routing_entropy`,
    the entropy in nats of how often each is selected in the batch: log M where all are used
    alike, 0 where k = 1 is used alone."""

    def __init__(
        self,
        width: int,
        *,
        choices: int,
        top_k: int,
        load_balancing: str,
        micro_batch_size: int,
        balance_weight: float,
        normalised: bool = True,
        scores: str = "softmax",
        scale: float = 1.0,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ):
        check_choice("load_balancing", load_balancing, ("micro_batch", "global_batch"))
        if not 1 <= top_k <= choices:
            raise ValueError(f"top_k must be in 1..{choices}; got top_k={top_k}")
        if micro_batch_size < 1 or balance_weight < 0:
            raise ValueError(
                "micro_batch_size must be at least 1 and balance_weight at least 0; got"
                f" {micro_batch_size} and {balance_weight}"
            )
        check_choice("scores", scores, ("softmax", "sigmoid"))
        self.choices, self.top_k, self.normalised = choices, top_k, normalised
        self.scale = scale
        self.load_balancing, self.micro_batch_size = load_balancing, micro_batch_size
        self.balance_weight = balance_weight
        # Probabilities that are rounded to eight bits tie, and ties go to the first: float32
        # throughout.
        self.logits = projection(
            width,
            choices,
            ("embed", None),
            init=XAVIER_SMALL,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=jnp.float32,
        )
        self.bias_M = (
            nnx.Param(jnp.zeros((choices,), jnp.float32), group="no_decay", out_sharding=(None,))
            if scores == "sigmoid"
            else None
        )

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BTM = self.logits(x_BTD)
        if self.bias_M is None:
            score_BTM = ranked_BTM = p_BTM = jax.nn.softmax(logits_BTM, axis=-1)
        else:
            score_BTM = jax.nn.sigmoid(logits_BTM)
            ranked_BTM = score_BTM + self.bias_M[...][None, None, :]
            p_BTM = score_BTM / jnp.sum(score_BTM, axis=-1, keepdims=True)
        # Not lax.top_k: the compiler gathers its operand from all devices, also where the axis it
        # sorts is not cut.
        chosen_BTJ = jnp.argsort(-ranked_BTM, axis=-1, stable=True)[..., : self.top_k]
        weight_BTJ = jnp.take_along_axis(score_BTM, chosen_BTJ, axis=-1)
        if self.normalised:
            weight_BTJ = weight_BTJ / jnp.sum(weight_BTJ, axis=-1, keepdims=True)
        if self.scale != 1.0:
            weight_BTJ = self.scale * weight_BTJ
        selected_BTM = jax.nn.one_hot(chosen_BTJ, self.choices).sum(axis=2)
        usage_M = jnp.mean(selected_BTM, axis=(0, 1)) / self.top_k
        report(
            self,
            auxiliary_loss=self.balance_weight * self.balance(selected_BTM, p_BTM),
            routing_entropy=jnp.sum(jax.scipy.special.entr(usage_M)),
        )
        return chosen_BTJ, weight_BTJ

    def balance(self, selected_BTM: jax.Array, p_BTM: jax.Array) -> jax.Array:
        """M sum_m f_m P_m, averaged over the groups."""
        batch = p_BTM.shape[0]
        size = self.micro_batch_size if self.load_balancing == "micro_batch" else batch
        # A batch smaller than a micro-batch, such as a last one, is one group.
        size = min(size, batch)
        if batch % size:
            raise ValueError(
                f"micro_batch_size must divide the batch of {batch} sequences; got"
                f" {self.micro_batch_size}"
            )
        f_GM, P_GM = (
            x.reshape(batch // size, -1, self.choices).mean(axis=1) for x in (selected_BTM, p_BTM)
        )
        return self.choices * jnp.mean(jnp.sum(f_GM * P_GM, axis=-1))
