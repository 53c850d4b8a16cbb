"""Reading config.json: every key is taken, or known to change no number, or told of."""

import json
from collections.abc import Collection, Mapping
from typing import Any

MISSING = object()

# Keys of any family that change no logits, or that say what others say, too.
WITHOUT_NUMBERS = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range"),
    *("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "auto_map", "vocab_size"),
    *("_attn_implementation", "attn_implementation", "return_dict", "output_attentions"),
    *("output_hidden_states", "transformers.js_config", "is_llama_config", "pretraining_tp"),
    *("tie_word_embeddings", "id2label", "label2id", "task_specific_params", "_name_or_path"),
}


class Keys:
    """The keys of a config.json, each to be taken once."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self.values, self.where = dict(values), where
        self._left = set(values) - WITHOUT_NUMBERS

    def get(self, name: str, default: Any = MISSING) -> Any:
        """The value of a key, or `default`, which stands for null, too. Raises ValueError for a key
        that is missing and has no default."""
        self._left.discard(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is MISSING:
            raise ValueError(f"{self.where} must have the key {name!r}")
        return default

    def number(self, name: str, default: Any = MISSING) -> Any:
        """A number above 0, or the default as it is."""
        value = self.get(name, default)
        given = value is not default
        if given and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise ValueError(f"{self.where}: {name} must be a number above 0; got {value!r}")
        return value

    def integer(self, name: str, default: Any = MISSING) -> int:
        """An integer above 0, or the default as it is."""
        value = self.number(name, default)
        if value is not default and value != int(value):
            raise ValueError(f"{self.where}: {name} must be an integer; got {value!r}")
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or False."""
        return self.must(name, default, (True, False))

    def must(self, name: str, default: Any, possible: Collection[Any]) -> Any:
        """The value of a key that can only be one of `possible` here. Raises ValueError for
        others."""
        value = self.get(name, default)
        if not any(value is one or (value == one and type(value) is type(one)) for one in possible):
            expected = " or ".join(json.dumps(one) for one in possible)
            raise ValueError(f"{self.where}: {name} must be {expected}; got {json.dumps(value)}")
        return value

    def ignore(self, *names: str) -> None:
        """Keys that change no number in this family."""
        self._left -= set(names)

    @property
    def left(self) -> list[str]:
        """Keys that nobody has taken."""
        return sorted(self._left)
