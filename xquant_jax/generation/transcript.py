"""The host's side of one sequence: its tokens as text, and where a stop string ends it."""

import dataclasses

from xquant_jax.generation.request import CheckedRequest
from xquant_jax.model.tokenizer import INCOMPLETE, TextStream, Tokenizer

LENGTH, STOP, ERROR = "length", "stop", "error"


@dataclasses.dataclass
class Transcript:
    """Collects one sequence's new tokens, and with every token the likeliest ones if they are told.

    `text` never holds a stop string nor a stop token. `tokens` and `logprobs` include the stop token, or all tokens
    up to the one that completed the stop string. `finish_reason` is "stop", "length", "error" (`error` says which) or,
    while unfinished, None.
    """

    tokenizer: Tokenizer | None
    request: CheckedRequest
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self._stream: TextStream | None = self.tokenizer.stream(self.request.tokens) if self.tokenizer else None
        special = self.tokenizer.special if self.tokenizer else {}
        self._special = special if any(s in stop for s in special.values() for stop in self.request.stop) else {}
        self._marks: list[tuple[int, str]] = []  # where in the text such a token stands, which it does not show
        self._shown = 0
        self._searched = 0  # characters among which no stop string begins

    def push(self, token: int, logprob: float, top: list[tuple[int, float]] | None = None) -> str:
        """Takes the next token; returns text that is now certain (it may lag while a stop string is possible)."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if top is not None:
            self.top_logprobs.append(top)
        if token in self.request.stop_ids and len(self.tokens) > self.request.min_tokens:
            self.finish_reason = STOP
            return self._finish()
        found = self._stream is not None and self._read(self._stream, token)
        if found:
            self.finish_reason = STOP
            return self._show(len(self.text))
        if len(self.tokens) == self.request.max_new_tokens:
            self.finish_reason = LENGTH
            return self._finish()
        return self._show(len(self.text) - self._held_back())

    def fail(self, error: str) -> str:
        """Ends the sequence with an error; returns the text that was held back."""
        self.finish_reason, self.error = ERROR, error
        return self._finish()

    def _finish(self) -> str:
        if self._stream is not None:
            self.text += self._stream.rest()
        return self._show(len(self.text))

    def _read(self, stream: TextStream, token: int) -> bool:
        """Extends the text by what a token makes certain, or up to the first stop string that it completes."""
        before = len(self.text)
        self.text += stream.push(token)
        if not self.request.stop:
            return False
        whole = self.text + stream.rest()  # characters that a stop string completes are whole, whatever follows
        here = len(self.text if INCOMPLETE in whole[len(self.text) :] else whole)
        if token in self._special:
            self._marks.append((here, self._special[token]))
        if len(self.tokens) <= self.request.min_tokens:
            self._searched = here
            return False
        marked, longest = self._marked(whole), max(map(len, self.request.stop))
        begin = self._in_marked(max(self._searched, before - longest))
        found = [at for stop in self.request.stop if (at := marked.find(stop, begin)) >= 0]
        if found:
            self.text = whole[: self._in_text(min(found))]
        return bool(found)

    def _held_back(self) -> int:
        """Characters at the end of the text that may be the start of a stop string."""
        if not self.request.stop:
            return 0
        marked, longest = self._marked(self.text), 0
        for stop in self.request.stop:
            for n in range(1, min(len(stop), len(marked) + 1)):
                if marked.endswith(stop[:n]):
                    longest = max(longest, n)
        return len(self.text) - self._in_text(len(marked) - longest)

    def _marked(self, text: str) -> str:
        """The text with the special tokens that stop strings are about."""
        parts, at = [], 0
        for position, content in self._marks:
            parts += [text[at:position], content]
            at = position
        return "".join([*parts, text[at:]])

    def _in_marked(self, position: int) -> int:
        return position + sum(len(content) for at, content in self._marks if at < position)

    def _in_text(self, position: int) -> int:
        """Where in the text a position among the marked one lies."""
        hidden = 0
        for at, content in self._marks:
            hidden += min(max(position - hidden - at, 0), len(content))
        return position - hidden

    def _show(self, until: int) -> str:
        piece = self.text[self._shown : until]
        self._shown = max(self._shown, until)
        return piece
