"""A request on its way through an engine, and what is told of it."""

import dataclasses

from xquant_jax.generation.answer import Completion, Drafted
from xquant_jax.generation.request import CheckedRequest
from xquant_jax.generation.transcript import Transcript


@dataclasses.dataclass
class Progress:
    """What one step made for request `id`: new tokens, their log-probabilities, and the text that became certain with
    each.

    rest: text that an error ended
    completion: the whole answer, once there is no more to come
    """

    id: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    rest: str = ""
    completion: Completion | None = None

    def add(self, token: int, logprob: float, text: str) -> None:
        """Takes the next token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.texts.append(text)

    @property
    def text(self) -> str:
        """The text that became certain."""
        return "".join(self.texts) + self.rest


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request and the answer so far. `cached`: tokens of its prompt that were stored before it came."""

    id: int
    request: CheckedRequest
    transcript: Transcript
    cached: int = 0

    @property
    def stored(self) -> list[int]:
        """The tokens that its cache holds: the last one of an answer is never stored."""
        return [*self.request.tokens, *self.transcript.tokens[:-1]]

    def not_finite(self, dtype: str) -> str:
        """The error of a sequence whose next logits are not finite."""
        wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}
        return (
            f"the logits of token {len(self.transcript.tokens) + 1} of the answer are not finite in {dtype}: numbers "
            f"overflow, or weights are damaged"
            + (f"; load the model with dtype={wider[dtype]}" if dtype in wider else "")
        )

    def completion(self, drafted: Drafted | None) -> Completion:
        """The answer, which is finished. `drafted`: what became of its drafts, if there were any."""
        t, request = self.transcript, self.request
        return Completion(
            request.prompt,
            t.text,
            t.tokens,
            t.logprobs,
            t.finish_reason or "",
            request.seed,
            t.top_logprobs if request.logprobs else None,
            t.error,
            drafted,
            self.cached,
        )
