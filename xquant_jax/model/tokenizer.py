"""Text to token ids and back, by the `tokenizers` library."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from xquant_jax.errors import CheckpointError

CONTEXT = 16
"""Tokens that are decoded again with every new one."""

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode the bytes of an incomplete character to."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A model's `tokenizer.json`."""

    backend: Backend

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Raises `CheckpointError` for a file that is none.

        Truncation and padding that it may hold, those of batches in training, do not apply.
        """
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens (such as a leading BOS) that the tokenizer file prescribes."""
        return self.backend.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def stream(self, prompt: Sequence[int]) -> "TextStream":
        return TextStream(self, list(prompt[-CONTEXT:]))


@dataclasses.dataclass
class TextStream:
    """Turns new tokens into text one by one, each piece as soon as its characters are whole.

    A token's text depends on the tokens before it (leading spaces, characters of several tokens), so a few of them,
    at first the end of the prompt, are decoded again with it, and the text that was shown is cut off.
    """

    tokenizer: Tokenizer
    tokens: list[int]

    def __post_init__(self) -> None:
        self._shown = self._decode().rstrip(INCOMPLETE)

    def push(self, token: int) -> str:
        self.tokens.append(token)
        text = self._decode()
        if text.endswith(INCOMPLETE):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        if len(self.tokens) > 2 * CONTEXT:
            self.tokens = self.tokens[-CONTEXT:]
            self._shown = self._decode()
        return piece

    def finish(self) -> str:
        """What was held back: characters that never became whole."""
        return self._decode()[len(self._shown) :]

    def _decode(self) -> str:
        return self.tokenizer.decode(self.tokens)
