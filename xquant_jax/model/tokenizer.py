"""Text to token ids and back, by the `tokenizers` library."""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend

from xquant_jax.errors import CheckpointError

CONTEXT = 16
"""Tokens after which a stream looks for a place to forget what it has shown."""

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What bytes that make no character are decoded to."""


@dataclasses.dataclass(frozen=True, eq=False)
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
        """Token ids, with the special tokens (such as a leading BOS) that the tokenizer file prescribes.

        A text that begins with those of its beginning, as chats do that a template has written, gets no second ones.
        """
        encoding = self.backend.encode(text, add_special_tokens=special_tokens)
        ids, added = encoding.ids, list(itertools.takewhile(bool, encoding.special_tokens_mask))
        before, text_begins = ids[: len(added)], ids[len(added) : 2 * len(added)]
        return ids[len(added) :] if before == text_begins else ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, without special ones."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    @cached_property
    def special(self) -> dict[int, str]:
        """The special tokens, which texts do not show, by their id."""
        return {id: token.content for id, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def stream(self, prompt: Sequence[int]) -> "TextStream":
        return TextStream(self, prompt)

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """Tokens that are one byte each (byte fallback). A run of them is decoded as a whole: characters if all of it
        is UTF-8, a mark for every byte if not."""
        found = {byte: self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        ids = [id for byte, id in found.items() if id is not None and self.decode([id]) != f"<0x{byte:02X}>"]
        return frozenset(ids)

    def stands_alone(self, token: int) -> bool:
        """Whether the text of a sequence is that of the tokens before this one, then that from this one on."""
        known = self._alone.get(token)
        if known is None:
            text = self.decode([token])
            known = self._alone[token] = bool(text) and INCOMPLETE not in text and token not in self.byte_tokens
        return known

    @cached_property
    def _alone(self) -> dict[int, bool]:
        return {}


class TextStream:
    """Turns the tokens that follow a prompt into text, each piece as soon as nothing that comes can change it.

    The pieces together are the text of prompt and answer less that of the prompt. Where the prompt ends within a
    character, less that of its tokens up to the character.

    A token's text depends on its neighbours (leading spaces, characters of several tokens, runs of bytes that are UTF-8
    as a whole or not at all). So all tokens from one that stands alone are decoded together again.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = [token for token in prompt if token not in tokenizer.special]
        self._forget()
        self._prompt = len(self._tokens)  # those of them that are of the prompt, until something was shown
        self._shown = ""  # text of the tokens that is not, or no longer, news

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that is certain with it."""
        if token in self._tokenizer.special:
            return ""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(INCOMPLETE) or token in self._tokenizer.byte_tokens:
            return ""
        piece = self._new(text)
        self._prompt, self._shown = 0, text
        if len(self._tokens) > CONTEXT:
            self._forget()
            self._shown = self._tokenizer.decode(self._tokens)
        return piece

    def rest(self) -> str:
        """Text that was held back: all there is if no token follows."""
        return self._new(self._tokenizer.decode(self._tokens))

    def _new(self, text: str) -> str:
        """Of the text of all tokens, what was not shown and is not the prompt's."""
        shown = self._shown
        for end in range(self._prompt, 0, -1):
            shown = self._tokenizer.decode(self._tokens[:end])
            if text.startswith(shown):
                break
        else:
            shown = self._shown
        return text[len(shown) :] if text.startswith(shown) else ""

    def _forget(self) -> None:
        """Drops the tokens before the last one that stands alone."""
        for start in range(len(self._tokens) - 1, 0, -1):
            if self._tokenizer.stands_alone(self._tokens[start]):
                del self._tokens[:start]
                return
