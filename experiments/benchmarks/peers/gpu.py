"""What the GPU benchmark runs beside our kernels: others' kernels on the same inputs, where they
can be imported.

Each takes the inputs of a case by name and the mode, "forward" or "forward+backward" (gradients of
all inputs of the sum of squares of the output), and returns the program to time. ImportError: not
installed, or has no such kernel."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Inputs = dict[str, jax.Array]


class TorchProgram:
    """A program whose end torch knows, not jax."""

    def __init__(self, run: Callable[[], Any], wait: Callable[[], None]):
        self._run, self.wait = run, wait

    def __call__(self) -> Any:
        return self._run()


def jax_program(call: Callable[..., jax.Array], inputs: Inputs, mode: str) -> Callable[[], Any]:
    def loss(*x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(call(*x).astype(jnp.float32)))

    arrays = tuple(inputs.values())
    program: Any = call if mode == "forward" else jax.grad(loss, tuple(range(len(arrays))))
    compiled = jax.jit(program).lower(*arrays).compile()
    return lambda: compiled(*arrays)


def _torch_program(call: Callable[..., Any], inputs: Inputs, mode: str) -> Callable[[], Any]:
    torch = importlib.import_module("torch")
    tensors = {
        name: torch.from_numpy(np.array(x, np.float32))
        .to("cuda", getattr(torch, str(x.dtype)))
        .requires_grad_(mode != "forward")
        for name, x in inputs.items()
    }

    def run() -> Any:
        o = call(**tensors)
        if mode != "forward":
            torch.autograd.grad(o.float().square().sum(), list(tensors.values()))

    return TorchProgram(run, torch.cuda.synchronize)


def flash_linear_attention(op: str, variant: str, inputs: Inputs, mode: str) -> Callable[[], Any]:
    names = {
        ("gated_linear_attention", "none"): ("simple_gla", "chunk_simple_gla"),
        ("gated_linear_attention", "constant"): ("simple_gla", "chunk_simple_gla"),
        ("gated_linear_attention", "scalar"): ("simple_gla", "chunk_simple_gla"),
        ("gated_linear_attention", "vector"): ("gla", "chunk_gla"),
        ("delta_rule", "none"): ("delta_rule", "chunk_delta_rule"),
        ("delta_rule", "scalar"): ("gated_delta_rule", "chunk_gated_delta_rule"),
        ("delta_rule", "vector"): ("kda", "chunk_kda"),
    }
    module, name = names[op, variant]
    function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    if variant == "constant":
        # Its constant decay is no differentiable input; gradients are those of q, k and v.
        decay = inputs.pop("decay_log")
        torch = importlib.import_module("torch")
        gamma = torch.from_numpy(np.array(decay)).to("cuda")
        return _torch_program(lambda q, k, v: function(q, k, v, g_gamma=gamma)[0], inputs, mode)

    def call(q: Any, k: Any, v: Any, decay_log: Any = None, beta: Any = None) -> Any:
        options = {"g": decay_log, "beta": beta}
        given = {name: x for name, x in options.items() if x is not None}
        return function(q, k, v, **given)[0]

    return _torch_program(call, inputs, mode)


def mamba_ssm(inputs: Inputs, mode: str) -> Callable[[], Any]:
    module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    moved = {name: jnp.moveaxis(x, 1, 2) if x.ndim == 3 else x for name, x in inputs.items()}

    def call(x: Any, **inputs: Any) -> Any:
        softplus = "delta_bias" in inputs
        return module.selective_scan_fn(x, **inputs, delta_softplus=softplus)

    return _torch_program(call, moved, mode)


def jax_linear_attention(op: str, variant: str, inputs: Inputs, mode: str) -> Callable[[], Any]:
    jla_ops = importlib.import_module("jla.ops")
    importlib.import_module("jla.ops.mosaic_gpu")
    kinds = {
        "gated_linear_attention": {"scalar": "simple_gla", "vector": "gla"},
        "delta_rule": {"none": "deltanet", "scalar": "gated_deltanet", "vector": "kda"},
    }
    if variant not in kinds[op]:
        raise ImportError("no such kernel")
    kind = kinds[op][variant]

    def call(q: Any, k: Any, v: Any, decay_log: Any = None, beta: Any = None) -> Any:
        options = {"g": decay_log, "beta": beta}
        given = {name: x for name, x in options.items() if x is not None}
        return jla_ops.linear_attention(kind, q, k, v, impl="mosaic_gpu", **given)[0]

    names = list(inputs)
    return jax_program(lambda *x: call(**dict(zip(names, x, strict=True))), inputs, mode)


def jax_linear_attention_mamba(inputs: Inputs, mode: str) -> Callable[[], Any]:
    jla_ops = importlib.import_module("jla.ops")
    importlib.import_module("jla.ops.mosaic_gpu")

    def call(x: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
        return jla_ops.linear_attention("mamba1", C, B, x, dt=delta, a=A, impl="mosaic_gpu")[0]

    return jax_program(call, inputs, mode)


def associative_scan(inputs: Inputs, mode: str) -> Callable[[], Any]:
    def call(a_real: Any, a_imaginary: Any, *b: Any) -> Any:
        inputs = jax.lax.complex(*(x.astype(jnp.float32) for x in b))
        a = jax.lax.complex(a_real, a_imaginary)[None, None]
        x = _scanned(jnp.broadcast_to(a, inputs.shape), inputs)
        return x.real + x.imag

    return jax_program(call, inputs, mode)


def associative_scan_mamba(inputs: Inputs, mode: str) -> Callable[[], Any]:
    """All states in memory, [B, T, D, N]."""

    def call(x: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
        x, delta, b, c = (y.astype(jnp.float32) for y in (x, delta, B, C))
        a = jnp.exp(delta[..., None] * A[None, None])
        h = _scanned(a, (delta * x)[..., None] * b[:, :, None])
        return jnp.einsum("btdn,btn->btd", h, c).astype(B.dtype)

    return jax_program(call, inputs, mode)


def _scanned(a: jax.Array, u: jax.Array) -> jax.Array:
    """h_t = a_t h_{t-1} + u_t along axis 1."""

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (a, u), axis=1)[1]
