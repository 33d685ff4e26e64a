"""Text to token ids and back, by the `tokenizers` library."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from xquant_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A model's `tokenizer.json`."""

    backend: Backend

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        try:
            return cls(Backend.from_file(str(path)))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens (such as a leading BOS) that the tokenizer file prescribes."""
        return self.backend.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def continuation(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Text of `tokens` behind `prompt`, a leading space included (some decoders strip it from a text's start)."""
        before, whole = self.decode(prompt), self.decode([*prompt, *tokens])
        return whole[len(before) :] if whole.startswith(before) else self.decode(tokens)

    def stream(self, prompt: Sequence[int]) -> "TextStream":
        return TextStream(self, DecodeStream(ids=list(prompt), skip_special_tokens=True))


@dataclasses.dataclass
class TextStream:
    """Turns tokens into text one by one; text comes once it can no longer change (whole characters)."""

    tokenizer: Tokenizer
    decoder: DecodeStream

    def push(self, token: int) -> str:
        return self.decoder.step(self.tokenizer.backend, token) or ""
