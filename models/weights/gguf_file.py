"""Checkpoints in one GGUF file, as llama.cpp has them, of the families Llama, Qwen2 and Qwen3.

The file says what the model is in keys of its own and has names of its own; here it looks like a
folder of the format of Hugging Face. Numbers of fewer bits are read as the float32 that they stand
for. Of Llama, llama.cpp turns adjacent channels of a head, and so the rows of queries and keys
stand in another order: channel 2 i + j there is channel i + j K / 2 here.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ARCHITECTURES = ("llama", "qwen2", "qwen3")
SUFFIX = ".gguf"
PLAIN = {
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
}
NETWORK = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TURNED = ("self_attn.q_proj", "self_attn.k_proj")
# Keys of numbers that the model has beside those of `config`, and the values that change nothing.
NEUTRAL = {
    "expert_count": (0,),
    "rope.scaling.type": ("none",),
    "attention.sliding_window": (0,),
    "attention.scale": (0.0,),
    "logit_scale": (0.0, 1.0),
}
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


class GgufFile:
    """The tensors of a file by their names in the format of Hugging Face: `shapes` and `dtypes` by
    name, `read`; `config`, what config.json would say, and `tokenizer`, what tokenizer.json would,
    or None for a kind that is not known here.

    Raises ValueError, and names what it is, for a file that is no GGUF or cut short, another
    architecture, and tensors or keys that the model cannot have."""

    def __init__(self, path: Path):
        try:
            self._reader = gguf.GGUFReader(path)
        # The library has no error of its own for bytes that make no sense, nor for their end.
        except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
            raise ValueError(
                f"{path} is damaged or no GGUF file ({error}); fetch it again"
            ) from error
        self.path = path
        self._tensors: dict[str, Any] = {}
        for tensor in self._reader.tensors:
            self._tensors[self._public_name(tensor.name)] = tensor
        self.config = self._config()
        self.shapes = {
            name: tuple(int(extent) for extent in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.dtypes = {
            name: PLAIN.get(tensor.tensor_type, np.dtype(np.float32))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """The numbers of a tensor, those of fewer bits as float32."""
        tensor = self._tensors[name]
        kind = tensor.tensor_type
        try:
            numbers = tensor.data if kind in PLAIN else dequantize(tensor.data, kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: the tensor {tensor.name} is of type {kind.name}, which is not read"
            ) from error
        numbers = np.asarray(numbers).reshape(self.shapes[name])
        turned = re.search(rf"({'|'.join(map(re.escape, TURNED))})\.", name)
        if not turned or self.config["model_type"] != "llama":
            return numbers
        heads = "num_attention_heads" if turned[1] == TURNED[0] else "num_key_value_heads"
        pairs = numbers.reshape(self.config[heads], -1, 2, *numbers.shape[1:])
        return np.swapaxes(pairs, 1, 2).reshape(numbers.shape)

    @property
    def quantised(self) -> tuple[str, ...]:
        """The types of fewer bits that the file has."""
        kinds = {tensor.tensor_type for tensor in self._tensors.values()} - PLAIN.keys()
        return tuple(sorted(kind.name for kind in kinds))

    @property
    def tokenizer(self) -> str | None:
        """tokenizer.json of a byte-level tokenizer with GPT-2's splitting, as text."""
        if self._value("tokenizer.ggml.model", "") != "gpt2":
            return None
        splitting: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        kind = self._value("tokenizer.ggml.pre", "")
        if kind == "smollm":
            splitting.insert(0, pre_tokenizers.Digits(individual_digits=True))
        elif kind not in ("gpt-2", "default"):
            return None
        tokens = self._value("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._value("tokenizer.ggml.merges")]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        made = Tokenizer(models.BPE(vocabulary, merges))
        made.pre_tokenizer = pre_tokenizers.Sequence(splitting)
        made.decoder = decoders.ByteLevel()
        kinds = self._value("tokenizer.ggml.token_type", [])
        for token, kind in zip(tokens, kinds, strict=False):
            if kind in (CONTROL, USER_DEFINED):
                made.add_special_tokens([AddedToken(token, special=kind == CONTROL)])
        return made.to_str()

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _public_name(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        public = (
            f"model.layers.{block[1]}.{BLOCK[block[2]]}"
            if block and block[2] in BLOCK
            else NETWORK.get(stem)
        )
        if public is None or kind not in ("weight", "bias"):
            raise ValueError(f"{self.path} has the tensor {name}, which no model here has")
        return f"{public}.{kind}"

    def _config(self) -> dict[str, Any]:
        architecture = self._value("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"{self.path}: general.architecture must be one of {', '.join(ARCHITECTURES)}; got"
                f" {architecture!r}"
            )

        def of_model(key: str, default: Any = None) -> Any:
            value = self._value(f"{architecture}.{key}", default)
            # Stored in float32; what was meant is the shortest decimal.
            return float(str(np.float32(value))) if isinstance(value, float) else value

        for key, neutral in NEUTRAL.items():
            if (value := of_model(key, neutral[0])) not in neutral:
                raise ValueError(f"{self.path}: {architecture}.{key}={value!r} is not read")
        config = {
            "model_type": architecture,
            "hidden_size": of_model("embedding_length"),
            "num_hidden_layers": of_model("block_count"),
            "intermediate_size": of_model("feed_forward_length"),
            "num_attention_heads": of_model("attention.head_count"),
            "num_key_value_heads": of_model("attention.head_count_kv")
            or of_model("attention.head_count"),
            "head_dim": of_model("attention.key_length"),
            "rms_norm_eps": of_model("attention.layer_norm_rms_epsilon"),
            "rope_theta": of_model("rope.freq_base", 10000.0),
            "max_position_embeddings": of_model("context_length"),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._value("tokenizer.ggml.eos_token_id"),
        }
        config["num_key_value_heads"] = (
            config["num_key_value_heads"] or config["num_attention_heads"]
        )
        if architecture != "llama":
            del config["attention_bias"]  # follows from the family
        return {key: value for key, value in config.items() if value is not None}
