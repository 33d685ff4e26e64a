"""The host's side of one sequence: its tokens as text, and where a stop string ends it."""

import dataclasses
from collections.abc import Sequence

from xquant_jax.generation.request import CheckedRequest
from xquant_jax.model.tokenizer import TextStream, Tokenizer

LENGTH, STOP = "length", "stop"


@dataclasses.dataclass
class Transcript:
    """Collects one sequence's new tokens, and with every token the likeliest ones if they are told.

    `text` never holds a stop string nor a stop token. `tokens` and `logprobs` include the stop token, or all tokens
    up to the one that completed the stop string. `finish_reason` is "stop", "length" or, while unfinished, None.
    """

    tokenizer: Tokenizer | None
    prompt_tokens: Sequence[int]
    stop_ids: frozenset[int]
    stop_strings: Sequence[str]
    max_new_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, request: CheckedRequest) -> "Transcript":
        return cls(tokenizer, request.tokens, frozenset(request.stop_ids), request.stop, request.max_new_tokens)

    def __post_init__(self) -> None:
        self._stream: TextStream | None = self.tokenizer.stream(self.prompt_tokens) if self.tokenizer else None
        self._shown = 0

    def push(self, token: int, logprob: float, top: list[tuple[int, float]] | None = None) -> str:
        """Takes the next token; returns text that is now certain (it may lag while a stop string is possible)."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if top is not None:
            self.top_logprobs.append(top)
        if token in self.stop_ids:
            self.finish_reason = STOP
        elif self._stream is not None:
            self._add(self._stream.push(token))
        if self.finish_reason is None and len(self.tokens) == self.max_new_tokens:
            self.finish_reason = LENGTH
        ended_by_text = self.finish_reason == STOP and token not in self.stop_ids
        if self.finish_reason is not None and self._stream is not None and not ended_by_text:
            self._add(self._stream.finish())
        return self._show(len(self.text) if self.finish_reason else len(self.text) - self._held_back())

    def _add(self, piece: str) -> None:
        """Extends the text, up to the first stop string that this completes."""
        longest = max(map(len, self.stop_strings), default=0)
        begin = max(0, len(self.text) - longest)
        self.text += piece
        found = [at for stop in self.stop_strings if (at := self.text.find(stop, begin)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish_reason = STOP

    def _held_back(self) -> int:
        """Characters at the end of the text that may be the start of a stop string."""
        longest = 0
        for stop in self.stop_strings:
            for n in range(1, min(len(stop), len(self.text) + 1)):
                if self.text.endswith(stop[:n]):
                    longest = max(longest, n)
        return longest

    def _show(self, until: int) -> str:
        piece = self.text[self._shown : until]
        self._shown = max(self._shown, until)
        return piece
