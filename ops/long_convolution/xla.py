"""Long convolution by the fast Fourier transform, in plain JAX on every backend.

With F the transform of a sequence padded with zeros to L >= 2T - 1, so that nothing wraps around,

    y = F^-1(F u . F k)        du = F^-1(F dy . conj F k)        dk = sum_b F^-1(F dy . conj F u)
    first T of each

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


def forward(u, kernel):
    """(y,), float32; shapes as in `api.py`."""
    length = u.shape[1]
    k_DF = _spectrum(kernel.astype(jnp.float32), length)
    u_BDF = _spectrum(_time_last(u), length)
    return (jnp.swapaxes(_sequence(u_BDF * k_DF[None], length), 1, 2),)


def backward(u, kernel, dy):
    """Gradients of u [B, T, D] and kernel [D, T], float32."""
    length = u.shape[1]
    k_DF = _spectrum(kernel.astype(jnp.float32), length)
    u_BDF, dy_BDF = (_spectrum(_time_last(x), length) for x in (u, dy))
    du_BDT = _sequence(dy_BDF * jnp.conj(k_DF)[None], length)
    dkernel_DT = _sequence((dy_BDF * jnp.conj(u_BDF)).sum(0), length)
    return jnp.swapaxes(du_BDT, 1, 2), dkernel_DT
