"""Conversations: `chat` answers whole ones, and a `Conversation` goes on turn by turn and keeps its cache."""

import dataclasses
import itertools
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np
from jax.sharding import Mesh

from xquant_jax.cache.config import CacheConfig
from xquant_jax.errors import CacheFullError, PromptError
from xquant_jax.generation.engine import Engine
from xquant_jax.generation.generate import Generation, StreamedToken, generate, streamed
from xquant_jax.generation.prefix import Prefix
from xquant_jax.generation.prompts import Chat, encode, written
from xquant_jax.generation.request import Options, Request, Seed, check_wishes, checked, whole_number
from xquant_jax.generation.sampling import Sampling
from xquant_jax.generation.transcript import ERROR
from xquant_jax.model.loading import Model
from xquant_jax.speculation import Speculation

Message = Mapping[str, Any]


def chat(
    model: Model,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
    cache: str | CacheConfig = "xquant:4",
    max_new_tokens: SupportsIndex = 512,
    sampling: Sampling | Literal["model"] = "model",
    seed: Seed = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | np.ndarray | None = None,
    min_tokens: SupportsIndex = 0,
    n: SupportsIndex = 1,
    prefill_chunk: SupportsIndex | None = 512,
    cache_tokens: SupportsIndex | None = None,
    mesh: Mesh | None = None,
    speculate: str | Speculation | None = None,
    prefix: Prefix | None = None,
) -> Generation:
    """The next message of the assistant in a conversation, or in each of several.

    messages: mappings with `role` and `content`, as in OpenAI's API; a list of them, or a list of such lists
    tools: JSON schemas of functions that the model may call
    template_options: more variables of the model's chat template, such as `{"enable_thinking": False}`
    sampling: by default what the model's generation_config.json says; greedy where it says nothing
    prefix: what all conversations begin with as the template writes them, stored by `prefill`

    The other arguments, and what is returned and raised, are those of `generate`; `PromptError` also for a model
    without a chat template, and for messages that the template refuses.
    """
    several: Any = messages
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise PromptError(f"messages={messages!r} are not a conversation; give a list of messages")
    if not messages or isinstance(messages[0], Mapping):
        several = [messages]
    chats = [Chat(conversation, tools, template_options or {}) for conversation in several]
    return generate(
        model,
        chats,
        cache=cache,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
        stop_ids=stop_ids,
        min_tokens=min_tokens,
        n=n,
        prefill_chunk=prefill_chunk,
        cache_tokens=cache_tokens,
        mesh=mesh,
        speculate=speculate,
        prefix=prefix,
    )


class Conversation:
    """One conversation, turn by turn. Only what is new in a turn is fed: the cache keeps what was said before.

    Where the template writes earlier turns in another way than the model said them (Qwen3's leaves their thoughts out),
    all is fed again.

    request: how every turn is to be answered; its prompt and `n` do not matter
    context: tokens of the whole conversation
    system: the system message, if any

    Raises `PromptError` for a model without a chat template, `ConfigError` for options that cannot be honoured.
    """

    def __init__(
        self, model: Model, request: Request, options: Options, *, context: int, system: str | None = None
    ) -> None:
        self._first = [] if system is None else [{"role": "system", "content": system}]
        written(model, Chat([*self._first, {"role": "user", "content": "?"}]))  # raises here, not in the first turn
        if model.tokenizer is None:
            raise PromptError("this model has no tokenizer.json, and conversations are texts")
        self._tokenizer = model.tokenizer
        asked = check_wishes(model, dataclasses.replace(request, n=1))
        self._model, self._context, self._most = model, context, asked["max_new_tokens"]
        self._request = dataclasses.replace(request, n=1, seed=asked["seed"], min_tokens=asked["min_tokens"])
        self._engine = Engine(model, options, slots=1, tokens=context, in_place=True, keep=True)
        self._answer: Generator[StreamedToken] | None = None  # of the turn that was begun last
        self.clear()

    @property
    def messages(self) -> list[Message]:
        """All that was said, the system message first."""
        return list(self._messages)

    @property
    def tokens(self) -> int:
        """How long the conversation is, in tokens."""
        return len(self._tokens)

    def clear(self) -> None:
        """Forgets everything but the system message."""
        self._end_answer()
        self._messages: list[Message] = list(self._first)
        self._text, self._tokens = "", []  # what was said, and its tokens as they were fed and made

    def say(self, text: str) -> Generator[StreamedToken]:
        """The answer to a message of the user, token by token. Closed early, or when the next one is asked for, it ends
        there, and stays in the conversation as far as it came; one that ends with an error does not, nor does its
        question.

        Its first token raises `PromptError` for a text that is none, and `CacheFullError` where the conversation has
        become too long for its context.
        """
        self._end_answer()
        self._answer = self._answered(text)
        return self._answer

    def _end_answer(self) -> None:
        if self._answer is not None:
            self._answer.close()
        self._answer = None

    def _answered(self, text: str) -> Generator[StreamedToken]:
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt = written(self._model, Chat(messages))
        tokens = self._tokens_of(prompt)
        room = self._context - len(tokens) + 1
        if room < 1:
            raise CacheFullError(
                f"the conversation has come to {len(tokens)} tokens, and its context is {self._context}; begin a new "
                f"one, or give it a larger context"
            )
        most = min(self._most, room)
        least = min(whole_number("min_tokens", self._request.min_tokens), most)
        request = dataclasses.replace(self._request, prompt=tokens, max_new_tokens=most, min_tokens=least)
        asked = checked(self._model, request)
        answer, made, reason = "", [], None
        id = self._engine.submit(asked)
        try:
            while self._engine.busy:
                for token in itertools.chain.from_iterable(map(streamed, self._engine.step(limit=1))):
                    answer, reason = answer + token.text, token.finish_reason
                    made += [] if token.token is None else [token.token]
                    yield token
        finally:
            self._engine.cancel(id)
            if reason != ERROR and made:
                self._messages = [*messages, {"role": "assistant", "content": answer}]
                said = made[:-1] if made[-1] in asked.stop_ids else made
                self._text, self._tokens = prompt + answer, [*tokens, *said]
                if self._decoded(tokens, said) != answer:  # it ended within a character or at a stop string
                    self._text = ""

    def _decoded(self, prompt: list[int], answer: list[int]) -> str:
        stream = self._tokenizer.stream(prompt)
        return "".join(map(stream.push, answer)) + stream.rest()

    def _tokens_of(self, prompt: str) -> list[int]:
        """The prompt's tokens: what was said before as it was fed and made, and the rest."""
        if self._text and prompt.startswith(self._text):
            return [*self._tokens, *encode(self._model, "the message", prompt[len(self._text) :], False)]
        return encode(self._model, "the conversation", prompt, False)
