"""What the GPU benchmark runs beside our kernels: others' kernels on the same inputs, where they
can be imported.

`peers(op, variant)` has what there is for an op. Each takes the inputs of a case by name and the
mode, "forward" or "forward+backward" (gradients of all inputs of the sum of squares of the output),
and returns the program to time. ImportError: not installed."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ops
from experiments.benchmarks.cases import sum_of_squares

Inputs = dict[str, Any]
Peer = Callable[[Inputs, str], Callable[[], Any]]
# By op and variant: module and function of flash-linear-attention, kind of jax-linear-attention.
FLASH_LINEAR_ATTENTION = {
    ("gated_linear_attention", "none"): ("simple_gla", "chunk_simple_gla"),
    ("gated_linear_attention", "constant"): ("simple_gla", "chunk_simple_gla"),
    ("gated_linear_attention", "scalar"): ("simple_gla", "chunk_simple_gla"),
    ("gated_linear_attention", "vector"): ("gla", "chunk_gla"),
    ("delta_rule", "none"): ("delta_rule", "chunk_delta_rule"),
    ("delta_rule", "scalar"): ("gated_delta_rule", "chunk_gated_delta_rule"),
    ("delta_rule", "vector"): ("kda", "chunk_kda"),
}
JAX_LINEAR_ATTENTION = {
    ("gated_linear_attention", "scalar"): "simple_gla",
    ("gated_linear_attention", "vector"): "gla",
    ("delta_rule", "none"): "deltanet",
    ("delta_rule", "scalar"): "gated_deltanet",
    ("delta_rule", "vector"): "kda",
}


def peers(op: str, variant: str) -> dict[str, Peer]:
    """Others that can be timed beside ours, by name."""
    found: dict[str, Peer] = {}
    if (op, variant) in FLASH_LINEAR_ATTENTION:
        module, name = FLASH_LINEAR_ATTENTION[op, variant]
        constant = variant == "constant"
        found["flash-linear-attention"] = functools.partial(
            flash_linear_attention, module, name, constant
        )
    if (op, variant) in JAX_LINEAR_ATTENTION:
        kind = JAX_LINEAR_ATTENTION[op, variant]
        found["jax-linear-attention"] = functools.partial(jax_linear_attention, kind)
    if op == "selective_scan":
        found["mamba-ssm"] = mamba_ssm
        if variant == "gated":
            found["ours, gated by XLA"] = gate_outside
        else:
            found["jax-linear-attention"] = jax_linear_attention_mamba
            found["jax.lax.associative_scan"] = associative_scan_mamba
    if (op, variant) == ("diagonal_scan", "complex"):
        found["jax.lax.associative_scan"] = associative_scan
    return found


class TorchProgram:
    """A program of torch: `wait` returns when what was called has run."""

    def __init__(self, run: Callable[[], Any], wait: Callable[[], None]):
        self._run, self.wait = run, wait

    def __call__(self) -> Any:
        return self._run()


def jax_program(call: Callable[[Inputs], Any], inputs: Inputs, mode: str) -> Callable[[], Any]:
    """The compiled program of a function of the inputs."""
    program = call if mode == "forward" else jax.grad(sum_of_squares(call))
    compiled = jax.jit(program).lower(inputs).compile()
    return lambda: compiled(inputs)


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


def flash_linear_attention(
    module: str, name: str, constant: bool, inputs: Inputs, mode: str
) -> Callable[[], Any]:
    function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    if constant:
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


def jax_linear_attention(kind: str, inputs: Inputs, mode: str) -> Callable[[], Any]:
    jla_ops = importlib.import_module("jla.ops")
    importlib.import_module("jla.ops.mosaic_gpu")

    def call(inputs: Inputs) -> Any:
        renamed = {"g" if name == "decay_log" else name: x for name, x in inputs.items()}
        q, k, v = (renamed.pop(name) for name in "qkv")
        return jla_ops.linear_attention(kind, q, k, v, impl="mosaic_gpu", **renamed)[0]

    return jax_program(call, inputs, mode)


def jax_linear_attention_mamba(inputs: Inputs, mode: str) -> Callable[[], Any]:
    jla_ops = importlib.import_module("jla.ops")
    importlib.import_module("jla.ops.mosaic_gpu")

    def call(inputs: Inputs) -> Any:
        x, delta, A, B, C = (inputs[name] for name in ("x", "delta", "A", "B", "C"))
        return jla_ops.linear_attention("mamba1", C, B, x, dt=delta, a=A, impl="mosaic_gpu")[0]

    return jax_program(call, inputs, mode)


def gate_outside(inputs: Inputs, mode: str) -> Callable[[], Any]:
    """Our kernel without the gate, which is an operation of its own."""

    def call(inputs: Inputs) -> Any:
        arguments = {name: x for name, x in inputs.items() if name != "z"}
        y, _ = ops.selective_scan(**arguments, delta_softplus=True, implementation="pallas_gpu")
        return y * jax.nn.silu(inputs["z"])

    return jax_program(call, inputs, mode)


def associative_scan(inputs: Inputs, mode: str) -> Callable[[], Any]:
    def call(inputs: Inputs) -> Any:
        b = jax.lax.complex(*(x.astype(jnp.float32) for x in inputs["b"]))
        a = jax.lax.complex(*inputs["a"])[None, None]
        h = _scanned(jnp.broadcast_to(a, b.shape), b)
        return h.real, h.imag

    return jax_program(call, inputs, mode)


def associative_scan_mamba(inputs: Inputs, mode: str) -> Callable[[], Any]:
    """All states in memory, [B, T, D, N]."""

    def call(inputs: Inputs) -> Any:
        x, delta, B, C = (inputs[name].astype(jnp.float32) for name in ("x", "delta", "B", "C"))
        a = jnp.exp(delta[..., None] * inputs["A"][None, None])
        h = _scanned(a, (delta * x)[..., None] * B[:, :, None])
        return jnp.einsum("btdn,btn->btd", h, C).astype(inputs["x"].dtype)

    return jax_program(call, inputs, mode)


def _scanned(a: jax.Array, u: jax.Array) -> jax.Array:
    """h_t = a_t h_{t-1} + u_t along axis 1."""

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (a, u), axis=1)[1]
