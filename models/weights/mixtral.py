"""Mixtral: Mistral with experts, which have names of their own."""

from collections.abc import Mapping
from typing import Any

from models.weights import llama
from models.weights.llama import (
    BLOCK,
    EMBEDDING,
    HEAD,
    MIXERS,
    ignored,
    network_entries,
    read,
    write,
)
from models.weights.table import Entry

__all__ = ["EMBEDDING", "HEAD", "MIXERS", "ignored", "network_entries", "read", "write"]

CLASSES = {"mixtral": "MixtralForCausalLM"}
MLPS = ("experts",)
TIED = {"mixtral": False}
FLOAT32 = ()
EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}


def layer_entries(mixer: str, model: Mapping[str, Any]) -> list[Entry]:
    """The tensors of a layer with this mixer."""
    experts = llama.expert_entries(model, f"{BLOCK}.block_sparse_moe", EXPERT)
    return [*llama.attention_entries(mixer, model), *experts]
