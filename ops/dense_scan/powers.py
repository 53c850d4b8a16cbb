"""Powers of many dense matrices at once, in float32 at the highest precision of products.

Everything is made by squaring or by doubling, in O(log L) products: L Krylov vectors A^l x from
[X, A^n X] with A^n squared on the way. Powers must stay bounded in float32: the state matrices of
S4 and LSSL are contractions after discretisation.

Letters: D matrices of size N, M rows, R vectors, G giant steps of C powers."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def matrix_power(A_DNN: jax.Array, exponent: int) -> jax.Array:
    """A^exponent [D, N, N], by squaring."""
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.matrix_power(A_DNN, exponent)


def power_less_one(E_DNN: jax.Array, exponent: int) -> jax.Array:
    """(I + E)^exponent - I [D, N, N], by squaring.

    A small E keeps its digits, however near the identity the power is: the identity is never added
    to it."""
    result = jnp.zeros_like(E_DNN)
    for bit in f"{exponent:b}":  # (I + F)^2 - I = 2 F + F^2
        result = 2 * result + einsum("dij,djk->dik", result, result)
        if bit == "1":
            result = result + E_DNN + einsum("dij,djk->dik", E_DNN, result)
    return result


def krylov(A_DNN: jax.Array, start_DRN: jax.Array, length: int) -> jax.Array:
    """The vectors A^l start, l = 0 .. length - 1: [D, length, R, N]."""
    vectors, power = start_DRN[:, None], A_DNN
    while vectors.shape[1] < length:
        vectors = jnp.concatenate([vectors, einsum("dij,dlrj->dlri", power, vectors)], axis=1)
        power = einsum("dij,djk->dik", power, power)
    return vectors[:, :length]


def krylov_kernel(A_DNN: jax.Array, B_DN: jax.Array, C_DMN: jax.Array, length: int) -> jax.Array:
    """The numbers C A^l B, l = 0 .. length - 1: [D, M, length].

    With l = g c + j they are the products of about sqrt(length) rows C (A^c)^g and as many columns
    A^j B."""
    chunk = 1 << math.isqrt(max(length - 1, 0)).bit_length()
    columns_DCN = krylov(A_DNN, B_DN[:, None], chunk)[:, :, 0]
    step_DNN = matrix_power(A_DNN, chunk)
    rows_DGMN = krylov(jnp.swapaxes(step_DNN, 1, 2), C_DMN, -(-length // chunk))
    kernel_DMGC = einsum("dgmn,dcn->dmgc", rows_DGMN, columns_DCN)
    return kernel_DMGC.reshape(*C_DMN.shape[:2], -1)[..., :length]
