"""Checkpoints in GGUF files against the same ones in folders."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from experiments.conversion.reading import read_checkpoint
from models.weights.gguf_file import BLOCK, NETWORK, GgufFile

DATA = Path(__file__).parents[2] / "data/checkpoints"
F32, F16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))
NAMES = {theirs: ours for ours, theirs in (NETWORK | BLOCK).items()}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def turned(name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """The rows as llama.cpp's converter puts them: of each head 0, K/2, 1, K/2 + 1, ..."""
    for which, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if which in name:
            size = len(array) // config[heads]
            order = np.arange(size).reshape(2, -1).T.reshape(-1)
            rows = (np.arange(config[heads])[:, None] * size + order).reshape(-1)
            return array[rows]
    return array


def written(
    folder: str, file: Path, kind: gguf.GGMLQuantizationType = F32, **changed: Any
) -> dict[str, np.ndarray]:
    """Writes a checkpoint to `file`; returns the numbers that it then has, by public names.
    changed: keys of the file by their last part, with dots as two underlines."""
    config = json.loads((DATA / folder / "config.json").read_text())
    family = config["model_type"]
    writer = gguf.GGUFWriter(file, changed.pop("architecture", family))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    for key, value in changed.items():
        writer.add_uint32(f"{family}.{key.replace('__', '.')}", value)
    numbers = {}
    for name, array in load_file(DATA / folder / "model.safetensors").items():
        array = array.astype(np.float32)
        own = kind if array.ndim == 2 and array.shape[1] % 32 == 0 else F32
        stored = turned(name, array, config) if family == "llama" else array
        writer.add_tensor(gguf_name(name), quantize(stored, own), raw_dtype=own)
        numbers[name] = dequantize(quantize(array, own), own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


@pytest.mark.parametrize("folder", ["llama_gqa_tied", "qwen2", "qwen3"])
def test_a_file_is_the_folder_with_the_same_numbers(folder: str, tmp_path: Path) -> None:
    written(folder, tmp_path / "model.gguf")
    wanted, got = read_checkpoint(DATA / folder), read_checkpoint(tmp_path / "model.gguf")
    assert got.config.model.to_dict() == wanted.config.model.to_dict()
    assert got.params.keys() == wanted.params.keys()
    for path, array in wanted.params.items():
        np.testing.assert_array_equal(got.params[path], array.astype(np.float32), path)


@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_numbers_of_fewer_bits_are_those_that_they_stand_for(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    numbers = written("qwen3", tmp_path / "model.gguf", kind)
    file = GgufFile(tmp_path / "model.gguf")
    assert file.shapes == {name: array.shape for name, array in numbers.items()}
    for name, array in numbers.items():
        np.testing.assert_array_equal(file.read(name).astype(np.float32), array, name)
    quantised = ("Q8_0",) if kind == Q8_0 else ()
    assert file.quantised == quantised and any(a.shape[-1] % 32 == 0 for a in numbers.values())
    warnings = read_checkpoint(tmp_path / "model.gguf").warnings
    assert any("Q8_0" in warning for warning in warnings) == bool(quantised)


def test_a_byte_level_tokenizer_comes_with_its_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    tokens = ["<|end|>", *"abc", "Ġ", "Ġa", "ab", "1", "2", "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ a", "a b", "1 2"])
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    made = GgufFile(tmp_path / "model.gguf").tokenizer
    assert made is not None
    tokenizer = Tokenizer.from_str(made)
    encoded = tokenizer.encode("ab a12<|end|>c").tokens
    assert encoded == ["ab", "Ġa", "1", "2", "<|end|>", "c"]  # digits never merge
    assert tokenizer.decode(tokenizer.encode("ab a12c").ids) == "ab a12c"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "gpt2"}, "general.architecture must be one of llama, qwen2, qwen3"),
        ({"expert_count": 4}, "qwen2.expert_count=4 is not read"),
        ({"attention__sliding_window": 64}, "qwen2.attention.sliding_window=64 is not read"),
    ],
)
def test_another_model_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    written("qwen2", tmp_path / "model.gguf", **changed)
    with pytest.raises(ValueError, match=message):
        GgufFile(tmp_path / "model.gguf")


@pytest.mark.parametrize("size", [0, 3, 40, 5000])
def test_a_file_that_is_cut_short_is_refused(size: int, tmp_path: Path) -> None:
    written("qwen2", tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[:size])
    with pytest.raises(ValueError, match="damaged or no GGUF file"):
        GgufFile(tmp_path / "model.gguf")
