"""Checkpoints that `transformers` makes come in with its logits, and it loads what goes out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.conversion.reading import read_checkpoint
from experiments.conversion.writing import write_checkpoint
from tests.experiments.convert_test import logits

transformers: Any = pytest.importorskip("transformers", reason="the extra `transformers`")
torch: Any = pytest.importorskip("torch", reason="the extra `transformers`")

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


def scaled(**rotation: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0, **rotation}}


PATTERN = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", HEADS),
    "llama, tied, sharded": ("llama", {**HEADS, "tie_word_embeddings": True}),
    "llama, biases": ("llama", {**HEADS, "attention_bias": True, "mlp_bias": True}),
    "llama, head_dim": ("llama", {**HEADS, "head_dim": 12}),
    "llama, linear": ("llama", HEADS | scaled(rope_type="linear", factor=3.0)),
    "llama, dynamic": ("llama", HEADS | scaled(rope_type="dynamic", factor=2.0)),
    "llama, llama3": (
        "llama",
        HEADS
        | scaled(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama, yarn": (
        "llama",
        HEADS | scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "qwen2, yarn of its own": (
        "qwen2",
        HEADS
        | scaled(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            attention_factor=0.8,
            beta_fast=20.0,
            beta_slow=2.0,
        ),
    ),
    "mistral": ("mistral", {**HEADS, "sliding_window": 5}),
    "mistral, no window": ("mistral", {**HEADS, "sliding_window": None, "head_dim": 6}),
    "qwen2": ("qwen2", HEADS),
    "qwen2, windows after two layers": (
        "qwen2",
        {
            **HEADS,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
    "qwen3": ("qwen3", {**HEADS, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, layers with and without a window": (
        "qwen3",
        {
            **HEADS,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": PATTERN,
        },
    ),
    "mamba": ("mamba", {"state_size": 4, "time_step_rank": 3}),
    "mamba, biases": ("mamba", {"state_size": 4, "use_bias": True, "use_conv_bias": False}),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1}),
    "mamba2, groups": ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 4}),
}

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "head_dim": 8,
}
CASES |= {
    "qwen3_moe": ("qwen3_moe", {**HEADS, **EXPERTS, "head_dim": 8}),
    "qwen3_moe, normalised": ("qwen3_moe", {**HEADS, **EXPERTS, "norm_topk_prob": True}),
    "mixtral": ("mixtral", {**HEADS, "num_local_experts": 3, "sliding_window": 7}),
    "bamba": (
        "bamba",
        {
            **HEADS,
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 6,
            "mamba_n_groups": 2,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **HEADS,
            **LINEAR,
            **EXPERTS,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 8,
        },
    ),
    "qwen3_next, dense": (
        "qwen3_next",
        {**HEADS, **LINEAR, "num_hidden_layers": 4, "mlp_only_layers": [0, 1, 2, 3]}
        | scaled(partial_rotary_factor=0.5),
    ),
}


def made(family: str, options: dict[str, Any]) -> Any:
    """A model with weights at which every part of it counts."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL | options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = 0.1 if name.endswith(("A_log", "dt_bias", "dt_proj.bias", ".D")) else 0.3
            if weight.ndim < 2:
                weight.add_(spread * torch.randn_like(weight))
            else:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return model


def published(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens), use_cache=False).logits.numpy()


def check_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.linalg.norm(found - expected) < 2e-5 * np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_both_ways(case: str, tmp_path: Path) -> None:
    model = made(*CASES[case])
    tokens = np.random.default_rng(0).integers(0, 40, (2, 33))
    expected = published(model, tokens)
    size = "5KB" if "sharded" in case else "1GB"
    model.save_pretrained(tmp_path / "in", max_shard_size=size)
    checkpoint = read_checkpoint(tmp_path / "in")
    assert not checkpoint.warnings
    check_close(logits(checkpoint, tokens, np.ones_like(tokens)), expected)

    family = model.config.model_type
    write_checkpoint(
        tmp_path / "out", checkpoint.config, checkpoint.params, family=family, file_bytes=20_000
    )
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(told.values()), told
    check_close(published(again.eval(), tokens), expected)
