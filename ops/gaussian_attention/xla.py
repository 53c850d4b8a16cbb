"""Gaussian-kernel attention through landmarks in plain JAX on every backend, forward and backward.

With U = P v [m, V], Y the iterate for A^+, Z = Y, normalised D Y D, and W = Z U:

    o = P^T W                                                                                   (1)

Only U is a sum over tokens. Backward, with dW = P do, a sum over tokens too:

    dU = Z^T dW      dZ = dW U^T      dv = P^T dU      dP_mt = W_m do_t + dU_m v_t               (2)
    dA = -Y^T dY Y^T, and with D also that of row sums                                          (3)

and P_mt = exp(-scale |l_m - q_t|^2 / 2) has dq_t = scale sum_m (dP P)_mt (l_m - q_t), which needs
P alone. Distances are sums of squares of differences where there are few (A), and |l|^2 + |q|^2 -
2 l q of what is left of a common shift where there are many (P): the kernel is that of differences,
and a mean far from zero would cost digits.

Letters: B batch, H heads, T time, m, n landmarks, K key, V value."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from ..chunks.chunking import einsum


class Others(Protocol):
    """What other devices have of the same sequences: a sum over all of them."""

    def total(self, own: jax.Array) -> jax.Array: ...


class _Nobody:
    def total(self, own: jax.Array) -> jax.Array:
        return own


NOBODY: Others = _Nobody()


class _Kernels(NamedTuple):
    """q, landmarks, v: [B, H, T or m, K or V] in float32, q and landmarks from their centre.

    same: [B, m, m] bool, whether landmarks of one document; there: [B, T] bool; None for all."""

    q: jax.Array
    landmarks: jax.Array
    v: jax.Array
    A: jax.Array
    P: jax.Array
    same: Any
    there: Any


def _kernels(inputs: Any, scale: float) -> _Kernels:
    q, landmarks, v, key_mask, documents, landmark_documents = inputs
    q, landmarks, v = (jnp.swapaxes(x.astype(jnp.float32), 1, 2) for x in (q, landmarks, v))
    same = sees = None
    if documents is not None:
        same = landmark_documents[:, :, None] == landmark_documents[:, None, :]
        sees = landmark_documents[:, :, None] == documents[:, None, :]
    if key_mask is not None:
        q, v = (jnp.where(key_mask[:, None, :, None], x, 0.0) for x in (q, v))
        sees = key_mask[:, None, :] if sees is None else sees & key_mask[:, None, :]
    centre = landmarks.mean(2, keepdims=True)
    q, landmarks = q - centre, landmarks - centre
    squares = (landmarks**2).sum(-1)[..., :, None] + (q**2).sum(-1)[..., None, :]
    distances = squares - 2 * einsum("bhmk,bhtk->bhmt", landmarks, q)
    P = jnp.exp(-0.5 * scale * jnp.maximum(distances, 0.0))
    among = ((landmarks[:, :, :, None] - landmarks[:, :, None]) ** 2).sum(-1)
    A = _where(same, jnp.exp(-0.5 * scale * among))
    return _Kernels(q, landmarks, v, A, _where(sees, P), same, key_mask)


def _where(keep: Any, x: jax.Array) -> jax.Array:
    return x if keep is None else jnp.where(keep[:, None], x, 0.0)


def newton_inverse(A: jax.Array, same: Any, iterations: int) -> tuple[jax.Array, jax.Array]:
    """The iterate for A^+ [B, H, m, m], and |A Y A - A| / |A| [B, H, m] of the document of each
    landmark.

    A is symmetric with blocks of its documents, `same` [B, m, m]; None means one. Each has its own
    first factor and stops on its own: an iterate that does not lower the residual, or is not
    finite, is not taken."""

    def of_document(x_BHm: jax.Array) -> jax.Array:
        if same is None:
            return jnp.broadcast_to(x_BHm.sum(-1, keepdims=True), x_BHm.shape)
        return einsum("bmn,bhn->bhm", same.astype(jnp.float32), x_BHm)

    among = A.sum(-1)[:, :, None]
    row_sum = jnp.max(among if same is None else jnp.where(same[:, None], among, 0.0), axis=-1)
    first = _over(1.8, row_sum**2)
    size = of_document((A**2).sum(-1))

    def with_residual(Y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Y, A Y, and the residual."""
        AY = einsum("bhij,bhjk->bhik", A, Y)
        R = einsum("bhij,bhjk->bhik", AY, A) - A
        return Y, AY, jnp.sqrt(_over(of_document((R**2).sum(-1)), size))

    def step(_: Any, current: Any) -> Any:
        Y, AY, error = current
        new = with_residual(2 * Y - einsum("bhij,bhjk->bhik", Y, AY))
        better = new[2] < error  # false where it is no number
        keep = better[..., None]  # rows of A Y are those of Y's document, too
        taken = (jnp.where(keep, x, y) for x, y in zip(new[:2], (Y, AY), strict=True))
        return *taken, jnp.where(better, new[2], error)

    Y, _, error = lax.fori_loop(0, iterations, step, with_residual(first[..., None] * A))
    return Y, error


def _over(x: Any, y: jax.Array) -> jax.Array:
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1.0), 0.0)


def _inverse(kernels: _Kernels, iterations: int, jitter: float) -> tuple[jax.Array, jax.Array]:
    A = kernels.A
    return newton_inverse(A + jitter * jnp.eye(A.shape[-1])[None, None], kernels.same, iterations)


def _scaled(Y: jax.Array, A: jax.Array, normalise: bool) -> jax.Array:
    """Z."""
    if not normalise:
        return Y
    D = A.sum(-1) ** -0.5  # at least one on the diagonal of A
    return D[..., :, None] * Y * D[..., None, :]


def outputs(
    inputs: Any, others: Others, *, scale: float, normalise: bool, iterations: int, jitter: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """o and the residual in float32, and U over all devices."""
    kernels = _kernels(inputs, scale)
    U = others.total(einsum("bhmt,bhtv->bhmv", kernels.P, kernels.v))
    Y, error = _inverse(kernels, iterations, jitter)
    W = einsum("bhmn,bhnv->bhmv", _scaled(Y, kernels.A, normalise), U)
    o = einsum("bhmt,bhmv->bthv", kernels.P, W)  # Eq. 1
    return o, error.max(-1), U


def gradients(
    inputs: Any,
    U: Any,
    do: jax.Array,
    others: Others,
    *,
    scale: float,
    normalise: bool,
    iterations: int,
    jitter: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, landmarks and v, float32; U: that of the forward pass, None to form it
    again."""
    kernels = _kernels(inputs, scale)
    q, landmarks, v, A, P, *_ = kernels
    do = jnp.swapaxes(do.astype(jnp.float32), 1, 2)
    if U is None:
        U = others.total(einsum("bhmt,bhtv->bhmv", P, v))
    dW = others.total(einsum("bhmt,bhtv->bhmv", P, do))
    Y, _ = _inverse(kernels, iterations, jitter)
    Z, of_scaling = jax.vjp(lambda Y, A: _scaled(Y, A, normalise), Y, A)
    W = einsum("bhmn,bhnv->bhmv", Z, U)
    # Eq. 2
    dU = einsum("bhmn,bhmv->bhnv", Z, dW)
    dY, dA = of_scaling(einsum("bhmv,bhnv->bhmn", dW, U))
    dv = einsum("bhmt,bhmv->bhtv", P, dU)
    dP = einsum("bhmv,bhtv->bhmt", W, do) + einsum("bhmv,bhtv->bhmt", dU, v)
    # Eq. 3
    dA = dA - einsum("bhnm,bhnk,bhlk->bhml", Y, dY, Y)
    pull_P = scale * dP * P
    dq = einsum("bhmt,bhmk->bhtk", pull_P, landmarks) - pull_P.sum(2)[..., None] * q
    dl = einsum("bhmt,bhtk->bhmk", pull_P, q) - pull_P.sum(3)[..., None] * landmarks
    pull_A = scale * dA * A
    pull_A = pull_A + jnp.swapaxes(pull_A, -1, -2)
    dl = others.total(dl) + (
        einsum("bhmn,bhnk->bhmk", pull_A, landmarks) - pull_A.sum(3)[..., None] * landmarks
    )
    if kernels.there is not None:
        dq, dv = (jnp.where(kernels.there[:, None, :, None], x, 0.0) for x in (dq, dv))
    dq, dl, dv = (jnp.swapaxes(x, 1, 2) for x in (dq, dl, dv))
    return dq, dl, dv


def forward(
    q, landmarks, v, key_mask, documents, landmark_documents, **options
) -> tuple[jax.Array, jax.Array]:
    """o and the residual in float32; shapes as in `api.py`."""
    inputs = (q, landmarks, v, key_mask, documents, landmark_documents)
    return outputs(inputs, NOBODY, **options)[:2]


def backward(
    q, landmarks, v, key_mask, documents, landmark_documents, do, dresidual, **options
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, landmarks and v, float32; the residual has none."""
    del dresidual
    inputs = (q, landmarks, v, key_mask, documents, landmark_documents)
    return gradients(inputs, None, do, NOBODY, **options)
