"""What an answer is."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Drafted:
    """What became of drafts.

    steps: of the model, each of which made a token and those of its draft that were accepted
    drafted: tokens that were checked; what cannot be accepted where a block of the cache is whole is not counted
    accepted: tokens that were right
    """

    steps: int
    drafted: int
    accepted: int

    def __add__(self, other: "Drafted") -> "Drafted":
        return Drafted(self.steps + other.steps, self.drafted + other.drafted, self.accepted + other.accepted)

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were right; 0 if there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a step of the model made on average; 0 if there was none. 1 is decoding without drafts."""
        return (self.steps + self.accepted) / self.steps if self.steps else 0.0

    def told(self) -> str:
        """In words, for people: `drafts: 60 of 90 tokens accepted (67%), 2.50 tokens a step`."""
        return (
            f"drafts: {self.accepted:,} of {self.drafted:,} tokens accepted ({self.acceptance:.0%}), "
            f"{self.tokens_per_step:.2f} tokens a step"
        )


@dataclasses.dataclass(frozen=True)
class Completion:
    """One prompt's answer. `tokens` are the new ones, `logprobs` theirs under the model itself (natural log).

    seed: that gives this answer again in the same call
    top_logprobs: if asked for, the likeliest (token id, log-probability) at every token, likeliest first
    error: what ended it where it could not go on
    speculation: what became of its drafts, in a run that drafts
    cached_tokens: tokens of the prompt that had been stored before, and were not fed again
    """

    prompt: str | list[int]
    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop": a stop token or string; "length": max_new_tokens; "error"
    seed: int
    top_logprobs: list[list[tuple[int, float]]] | None = None
    error: str | None = None
    speculation: Drafted | None = None
    cached_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """Its fields, without those that say nothing."""
        written = dataclasses.asdict(self)
        return {name: value for name, value in written.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of request number `index`: its completions, or the error that a bad request is."""

    index: int
    completions: tuple[Completion, ...] = ()
    error: str | None = None

    @property
    def completion(self) -> Completion | None:
        """The first one."""
        return self.completions[0] if self.completions else None
