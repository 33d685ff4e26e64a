"""EleutherAI's lm-evaluation-harness over a cache method. Needs the `lm-eval` extra.

Importing this module registers the model type `xquant` with the harness:

    lm_eval.simple_evaluate(model="xquant", model_args={"model": "demo", "cache": "xquant:4"}, tasks=[...])

Likelihoods are those of `evaluation.scoring`; generation is `xquant_jax.generate` through the same cache. Protocol
"paper" sees every token quantized, however short the text; in "streaming" the newest 0 to 127 tokens are exact.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from xquant_jax.cache.config import CacheConfig
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation.scoring import Scorer
from xquant_jax.generation.generate import generate
from xquant_jax.generation.sampling import Sampling
from xquant_jax.model.loading import load

SHORTEST = 32
"""Tokens that the shortest sequences are padded to."""


@register_model("xquant")
class XQuantLM(TemplateLM):
    """A model whose every answer goes through `cache`.

    model: converted or Hugging Face directory, or "demo"
    batch_size: sequences at once
    max_length: tokens of context and continuation; longer ones lose their start. By default what config.json allows
    max_gen_toks: new tokens where a task does not say
    calibration: file of xquant calibrate, by default the model's own
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
        report: Callable[[int, int, str], None] = lambda done, total, kind: None,
    ) -> None:
        super().__init__()
        if device is not None:
            raise ConfigError(f"device={device}: JAX chooses the device; set JAX_PLATFORMS instead")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size} is not supported; choose a whole number from 1")
        self.model = load(model, dtype=dtype, calibration=calibration)
        if self.model.tokenizer is None:
            raise ConfigError(f"{model} has no tokenizer.json, and tasks are texts")
        self.cache = CacheConfig.parse(cache)
        self.batch_size = min(int(batch_size), max_batch_size or int(batch_size))
        self.max_length = max_length or self.model.checkpoint.config.get("max_position_embeddings", 2048)
        self.max_gen_toks = max_gen_toks
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
        """The harness keeps requests apart by it."""
        return f"xquant-{self.model.config.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokens = self._tokenizer.encode(string, special_tokens=add_special_tokens is not False)
        twice = add_special_tokens is None and len(tokens) > 1 and tokens[0] == tokens[1] == self.prefix_token_id
        return tokens[1:] if twice else tokens

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
        """Continuations up to a stop string, a stop token or the number of tokens the task allows."""
        answers: dict[int, str] = {}
        self._report(0, len(requests), "continuations")
        order = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        for _, alike in itertools.groupby(order, key=lambda i: repr(requests[i].args[1])):
            for numbers in _batches(alike, self.batch_size):
                wishes = requests[numbers[0]].args[1]
                options = self._options(wishes)
                room = self.max_length - options["max_new_tokens"]
                if room < 1:
                    raise ConfigError(
                        f"max_gen_toks={options['max_new_tokens']} leaves no room for a context within "
                        f"max_length={self.max_length}; lower it or raise max_length"
                    )
                prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in numbers]
                results = generate(self.model, prompts, cache=self.cache, **options).results
                for i, result in zip(numbers, results, strict=True):
                    answers[i] = result.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, result.text)
                self._report(len(answers), len(requests), "continuations")
        return [answers[i] for i in range(len(requests))]

    def _options(self, wishes: dict[str, Any]) -> dict[str, Any]:
        """What `generate` is asked for, from the harness's words for it."""
        wishes = dict(wishes)
        until = wishes.pop("until", None) or []
        new_tokens = int(wishes.pop("max_gen_toks", self.max_gen_toks))
        temperature = float(wishes.pop("temperature", 0.0))
        if not wishes.pop("do_sample", temperature > 0):
            temperature = 0.0
        asked = {name: wishes.pop(name) for name in ("top_k", "top_p", "min_p") if name in wishes}
        if wishes:
            raise ConfigError(f"generation options {', '.join(sorted(wishes))} are not supported; leave them out")
        return {
            "max_new_tokens": new_tokens,
            "stop": [until] if isinstance(until, str) else [stop for stop in until if stop],
            "sampling": Sampling(temperature=temperature, **(asked if temperature else {})),
        }


Answers = dict[str, list[str | bool | int]]
"""Of each task, the answer to each of its documents: a text, the number of a choice, or whether a text is the likeliest
one. Tasks that only count likelihoods have none."""


def answers(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Answers:
    """What the samples that the harness logs say, in the order of their documents."""
    found: Answers = {}
    for task, logged in samples.items():
        own = [_answer(sample["filtered_resps"]) for sample in sorted(logged, key=lambda sample: sample["doc_id"])]
        told = [answer for answer in own if answer is not None]
        if len(told) == len(own):
            found[task] = told
    return found


def _answer(responses: Sequence[Any]) -> str | bool | int | None:
    if isinstance(responses[0], str):
        return responses[0]
    if not isinstance(responses[0], tuple | list):
        return None
    if len(responses) == 1:
        return bool(responses[0][1])
    return int(np.argmax([likelihood for likelihood, _ in responses]))


def agreement(own: Answers, reference: Answers) -> dict[str, dict[str, float]]:
    """Of each task, the share of documents whose answer is the reference's, and for texts the mean share of the
    reference's characters before the first that differs. Says what a score does not where the model itself fails."""
    table = {}
    for task, others in reference.items():
        pairs = list(zip(own[task], others, strict=True))
        table[task] = {"same_answer": float(np.mean([a == b for a, b in pairs]))}
        if isinstance(others[0], str):
            table[task]["same_text"] = float(np.mean([_same_text(str(a), str(b)) for a, b in pairs]))
    return table


def _same_text(own: str, reference: str) -> float:
    """The share of the reference before the first character that differs; 0 of an empty one that is not met."""
    if own == reference:
        return 1.0
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, reference, strict=False))
    return sum(1 for _ in same) / max(1, len(reference))


def _batches(numbers: Iterable[int], size: int) -> Iterable[list[int]]:
    return (list(batch) for batch in itertools.batched(numbers, size))
