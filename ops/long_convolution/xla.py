"""Long convolution by the fast Fourier transform, in plain JAX on every backend.

With F the transform of a sequence padded with zeros to L >= 2T - 1, so that nothing wraps around,

    y = F^-1(F u . F k)        du = F^-1(F dy . conj F k)        dk = sum_b F^-1(F dy . conj F u)
    first T of each; without the sum where rows have kernels of their own

L is a power of two, which the transform of every backend is made for. The backward pass transforms
the inputs anew: kept spectra would be four times as large as they are."""

import jax.numpy as jnp


def _spectrum(x, length):
    """The transform [..., F] of x [..., length] padded to L, at frequencies from 0 up."""
    return jnp.fft.rfft(x, 2 * _power_of_two(length))


def _sequence(spectrum, length):
    """The first `length` values [..., length] of what has this spectrum [..., F]."""
    return jnp.fft.irfft(spectrum, 2 * _power_of_two(length))[..., :length]


def _power_of_two(n):
    return 1 << (n - 1).bit_length()


def _time_last(x_BTD):
    """[B, D, T], float32."""
    return jnp.swapaxes(x_BTD.astype(jnp.float32), 1, 2)


def _of_rows(kernel):
    """[B or 1, D, T], float32."""
    return kernel.reshape(-1, *kernel.shape[-2:]).astype(jnp.float32)


def forward(u, kernel):
    """(y,), float32; shapes as in `api.py`."""
    length = u.shape[1]
    k_BDF = _spectrum(_of_rows(kernel), length)
    u_BDF = _spectrum(_time_last(u), length)
    return (jnp.swapaxes(_sequence(u_BDF * k_BDF, length), 1, 2),)


def backward(u, kernel, dy):
    """Gradients of u [B, T, D] and of the kernel, float32."""
    length = u.shape[1]
    k_BDF = _spectrum(_of_rows(kernel), length)
    u_BDF, dy_BDF = (_spectrum(_time_last(x), length) for x in (u, dy))
    du_BDT = _sequence(dy_BDF * jnp.conj(k_BDF), length)
    dk_BDF = dy_BDF * jnp.conj(u_BDF)
    dkernel = _sequence(dk_BDF.sum(0) if kernel.ndim == 2 else dk_BDF, length)
    return jnp.swapaxes(du_BDT, 1, 2), dkernel
