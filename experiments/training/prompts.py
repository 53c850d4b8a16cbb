"""Prompts to tokens and back, for the tasks whose tokens are text, and as plain numbers for all
others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from experiments.training.config import Config
from experiments.training.task import Task


@dataclass(frozen=True)
class PromptCoder:
    """encode: a prompt to token numbers, ValueError for one that has none; decode: the reverse."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def find_prompt_coder(config: Config, task: Task) -> PromptCoder:
    """The coder of a run's task: its tokenizer for text; numbers separated by spaces for other
    tokens."""
    vocabulary = task.sizes.get("vocabulary")
    if not vocabulary:
        raise ValueError(f"task {config.task.name} has no tokens, so there is nothing to generate")
    if config.task.name != "text":
        return PromptCoder(_numbers(vocabulary), lambda tokens: " ".join(map(str, tokens)))
    if config.task.tokenizer == "bytes":
        return PromptCoder(
            lambda prompt: list(prompt.encode("utf-8")),
            lambda tokens: bytes(tokens).decode("utf-8", errors="replace"),
        )
    tokenizer = Tokenizer.from_str(task.kept["tokenizer"].decode("utf-8"))
    return PromptCoder(
        lambda prompt: tokenizer.encode(prompt, add_special_tokens=False).ids,
        lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=False),
    )


def _numbers(vocabulary_size: int) -> Callable[[str], list[int]]:
    def encode(prompt: str) -> list[int]:
        words = prompt.split()
        if not all(word.isdigit() and int(word) < vocabulary_size for word in words):
            raise ValueError(
                f"--prompt must be tokens 0..{vocabulary_size - 1} separated by spaces;"
                f" got {prompt!r}"
            )
        return [int(word) for word in words]

    return encode
