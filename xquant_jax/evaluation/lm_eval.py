"""EleutherAI's lm-evaluation-harness over a cache method. Needs the `lm-eval` extra.

Importing this module registers the model type `xquant` with the harness:

    lm_eval.simple_evaluate(model="xquant", model_args={"model": "demo", "cache": "xquant:4"}, tasks=[...])

Likelihoods are those of `evaluation.scoring`; texts are generated as by `xquant_jax.generate` through the same cache.
Protocol "paper" sees every token quantized, however short the text; in "streaming" the newest 0 to 127 tokens are
exact.
"""

import dataclasses
import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from xquant_jax.cache.config import CacheConfig
from xquant_jax.errors import ConfigError, PromptError, XQuantError, XQuantWarning
from xquant_jax.evaluation.lm_eval_options import request_for
from xquant_jax.evaluation.scoring import Scorer
from xquant_jax.generation.batch import prepare
from xquant_jax.generation.request import Options, Request, checked_seed
from xquant_jax.model.chat_template import ChatTemplate
from xquant_jax.model.loading import load

SHORTEST = 32
"""Tokens that the shortest sequences are padded to."""

POSITIONS = 2048
"""Tokens of context and continuation where config.json does not say."""

END = "END_OF_THE_LAST_MESSAGE "
"""Marks where a chat template puts the end of the last message; templates may trim the space."""


class Written(str):
    """A text that a chat template wrote. It holds the special tokens that belong to it: its tokens get no others, as
    in transformers' `apply_chat_template(tokenize=True)`."""


@register_model("xquant")
class XQuantLM(TemplateLM):
    """A model whose every answer goes through `cache`.

    model: converted or Hugging Face directory, or "demo"
    batch_size: sequences at once
    max_length: tokens of context and continuation; longer ones lose their start. By default what config.json allows
    max_gen_toks: new tokens where a task does not say
    calibration: file of xquant calibrate, by default the model's own
    seed: of what is sampled
    report: called with how many of how many requests of a kind are answered, and the kind
    """

    def __init__(
        self,
        model: str,
        cache: str = "xquant:4",
        protocol: str = "paper",
        dtype: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
        device: str | None = None,
        calibration: str | None = None,
        seed: int = 0,
        report: Callable[[int, int, str], None] = lambda done, total, kind: None,
    ) -> None:
        super().__init__()
        if device is not None:
            raise ConfigError(f"device={device}: JAX chooses the device; set JAX_PLATFORMS instead")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size} is not supported; choose a whole number from 1")
        self.model = load(model, dtype=dtype, calibration=calibration, context=max_length)
        if self.model.tokenizer is None:
            raise ConfigError(f"{model} has no tokenizer.json, and tasks are texts")
        self.cache = CacheConfig.parse(cache)
        self.batch_size = min(int(batch_size), max_batch_size or int(batch_size))
        positions = self.model.checkpoint.config.get("max_position_embeddings") or POSITIONS
        self.max_length = max_length or min(positions, self.model.config.rope.longest or positions)
        self.max_gen_toks = max_gen_toks
        self.seed = checked_seed(seed)
        self._template_name = "default"
        self._report = report
        self._scorer = Scorer(self.model, self.cache, protocol)

    @property
    def eot_token_id(self) -> int:
        if not self.model.stop_ids:
            raise ConfigError("this model's config.json names no eos_token_id, and a text without context needs one")
        return self.model.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the model's first token, else its last."""
        first = self.model.checkpoint.config.get("bos_token_id")
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """The harness keeps the texts of requests apart by it: of other tokens, or by another template."""
        templates = self.model.chat_template.templates if self.model.chat_template else {}
        source = templates[self._template_name].source if self._template_name in templates else ""
        return f"xquant-{hashlib.sha256((self._tokenizer.backend.to_str() + source).encode()).hexdigest()[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the special tokens that the tokenizer prescribes unless the text holds them, or has none by
        its nature or by `add_special_tokens=False`."""
        special = not isinstance(string, Written) if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode(string, special_tokens=special)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both as token ids. The continuation gets the spaces that the context ends with, as words are split so."""
        special = not isinstance(context, Written)
        start = self.tok_encode(context.rstrip(), special)
        whole = self.tok_encode(context + continuation, special)
        return start or [self.prefix_token_id], whole[len(start) :]

    @property
    def _tokenizer(self) -> Any:
        return self.model.tokenizer

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of log-likelihoods of each continuation, and whether it is what greedy decoding would say."""
        texts = [[*context, *continuation][-self.max_length :] for _, context, continuation in requests]
        answers: dict[int, tuple[float, bool]] = {}
        report = self._report if not disable_tqdm else lambda done, total, kind: None
        report(0, len(texts), "likelihoods")
        for numbers in _batches(sorted(range(len(texts)), key=lambda i: -len(texts[i])), self.batch_size):
            length = max(SHORTEST, 1 << (len(texts[numbers[0]]) - 1).bit_length())
            tokens = np.zeros((self.batch_size, length), np.int32)
            lengths = np.ones(self.batch_size, np.int32)
            for row, i in enumerate(numbers):
                tokens[row, : len(texts[i])], lengths[row] = texts[i], len(texts[i])
            scores = self._scorer.program(self.batch_size, length)(tokens, lengths)
            loss, greedy = np.asarray(scores.loss), np.asarray(scores.greedy)
            for row, i in enumerate(numbers):
                request, _, continuation = requests[i]
                end = len(texts[i]) - 1
                if len(continuation) > end:
                    raise ConfigError(
                        f"a continuation of {len(continuation)} tokens does not fit max_length={self.max_length} "
                        f"behind any context; raise max_length"
                    )
                scored = slice(end - len(continuation), end)
                answers[i] = -float(loss[row, scored].sum(dtype=np.float64)), bool(greedy[row, scored].all())
                if request is not None:
                    self.cache_hook.add_partial("loglikelihood", request, answers[i])
            report(len(answers), len(texts), "likelihoods")
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in pieces of `max_length` that overlap in one token."""
        totals: list[float] = []
        self._report(0, len(requests), "rolling likelihoods")
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pieces = [(None, *utils.make_disjoint_window(window)) for window in windows]
            total = sum(likelihood for likelihood, _ in self._loglikelihood_tokens(pieces, disable_tqdm=True))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
            self._report(len(totals), len(requests), "rolling likelihoods")
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, a stop token or the number of tokens the task allows.

        Requests that are the same, as a task's repeats are, have draws of their own; the same call draws the same.
        """
        asked = [self._request(*request.args[:2]) for request in requests]
        batch = prepare(self.model, Options(cache=self.cache, slots=self.batch_size))
        texts: dict[int, str] = {}
        self._report(0, len(requests), "continuations")
        for answer in batch.answers(asked):
            completion = answer.completion
            error = answer.error if completion is None else completion.error
            if completion is None or error is not None:
                raise XQuantError(f"continuation {answer.index + 1} of {len(requests)} cannot be generated: {error}")
            texts[answer.index] = completion.text
            self.cache_hook.add_partial("generate_until", requests[answer.index].args, completion.text)
            self._report(len(texts), len(requests), "continuations")
        return [texts[i] for i in range(len(requests))]

    def _request(self, context: str, wishes: Mapping[str, Any]) -> Request:
        """What is asked, with as much of the context's end as there is room for."""
        request = request_for(self.model, wishes, max_new_tokens=self.max_gen_toks, seed=self.seed)
        room = self.max_length - int(request.max_new_tokens)
        if room < 1:
            raise ConfigError(
                f"max_gen_toks={request.max_new_tokens} leaves no room for a context within "
                f"max_length={self.max_length}; lower it or raise max_length"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        return dataclasses.replace(request, prompt=tokens[-room:])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's chat template. Chooses it where the model has several: True is the default one.

        Raises `ConfigError` for a model that has none, or none of this name.
        """
        if not chat_template:
            return None
        name = chat_template if isinstance(chat_template, str) else "default"
        source = self._chosen(name).templates["default"].source
        self._template_name = name
        return source

    def _chosen(self, name: str) -> ChatTemplate:
        """The model's chat template of this name, as its only one."""
        template = self.model.chat_template
        if template is None:
            raise ConfigError(
                "this model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); ask "
                "it without --apply-chat-template"
            )
        if name not in template.templates:
            names = ", ".join(sorted(template.templates))
            raise ConfigError(f"this model has no chat template {name!r}; choose {names}")
        return dataclasses.replace(template, templates={"default": template.templates[name]})

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation up to where the answer begins, or without `add_generation_prompt` to the end of
        its last message, which the answer continues.

        A template that refuses a system message gets the conversation without it, and a warning is given.
        """
        try:
            return self._written(chat_history, add_generation_prompt)
        except PromptError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) in (0, len(chat_history)):
                raise
            text = self._written(rest, add_generation_prompt)
            warnings.warn(f"system messages are left out: {error}", XQuantWarning, stacklevel=2)
            return text

    def _written(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> Written:
        template = self._chosen(self._template_name)
        if add_generation_prompt:
            return Written(template.render(messages))
        *before, last = messages
        marked = {**last, "content": last["content"] + END}
        text = template.render([*before, marked], add_generation_prompt=False)
        whole, found, _ = text.rpartition(END.strip())
        if not found or last["content"].strip() not in whole:
            raise PromptError(
                "the chat template does not write the last message as it is, so no answer can continue it"
            )
        return Written(whole if text.startswith(whole + END) else whole.rstrip())  # trimmed by the template


def _batches(numbers: Iterable[int], size: int) -> Iterable[list[int]]:
    return (list(batch) for batch in itertools.batched(numbers, size))
