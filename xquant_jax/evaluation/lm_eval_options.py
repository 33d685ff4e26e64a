"""How lm-evaluation-harness says that a text is to be continued, as the request that it stands for.

Its words are those of its task files (`generation_kwargs`) and of `--gen-kwargs`, with the meaning that its own models
of Hugging Face transformers and vLLM give them.
"""

from collections.abc import Mapping
from typing import Any

from xquant_jax.errors import ConfigError
from xquant_jax.generation.request import Request, check_wishes, whole_number
from xquant_jax.generation.sampling import FILTERS, Sampling
from xquant_jax.model.loading import Model

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names for the tokens of an answer."""

ONLY_ONE = ("num_beams", "num_return_sequences")
"""What can only be 1, which changes nothing."""

PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")


def request_for(model: Model, wishes: Mapping[str, Any], *, max_new_tokens: int, seed: int) -> Request:
    """What these options ask for, still without a prompt.

    max_new_tokens, seed: where the options do not say

    Raises `ConfigError` for one that cannot be honoured, or is not known.
    """
    said = {name: value for name, value in wishes.items() if value is not None}
    said.pop("use_cache", None)
    lengths = {name: _whole(name, said.pop(name)) for name in LENGTHS if name in said}
    if len({*lengths.values()}) > 1:
        told = " and ".join(f"{name}={length}" for name, length in lengths.items())
        raise ConfigError(f"{told} say the same thing and differ; give {next(iter(lengths))} alone")
    request = Request(
        "",
        max_new_tokens=next(iter(lengths.values()), max_new_tokens),
        seed=_whole("seed", said.pop("seed", seed)),
        stop=_stops(model, said.pop("until", [])),
        sampling=_sampling(said),
    )
    for name in ONLY_ONE:
        if (number := said.pop(name, 1)) != 1:
            raise ConfigError(f"{name}={number!r} is not supported; choose 1")
    if said:
        told = ", ".join(f"{name}={value!r}" for name, value in sorted(said.items()))
        raise ConfigError(f"generation options {told} are not supported; leave them out")
    check_wishes(model, request)
    return request


def _stops(model: Model, until: Any) -> list[str]:
    """The stop strings, less empty ones and those that the model cannot say: tasks name special tokens of many."""
    strings = [until] if isinstance(until, str) else until
    if not isinstance(strings, list | tuple) or not all(isinstance(string, str) for string in strings):
        raise ConfigError(f"until={until!r} is not possible; give a string or a list of them")
    special = model.tokenizer.special if model.tokenizer else {}
    never = [content for id, content in special.items() if id >= model.config.vocab_size]
    return [string for string in strings if string and not any(content in string for content in never)]


def _sampling(said: dict[str, Any]) -> Sampling:
    """Takes what is about sampling out of the options. `do_sample` comes before `temperature`, which tells what it is
    where it does not say; a temperature of 0 is greedy anyway."""
    temperature, draws = said.pop("temperature", None), said.pop("do_sample", None)
    if draws not in (None, True, False):
        raise ConfigError(f"do_sample={draws!r} is not possible; choose true or false")
    if temperature is None:
        temperature = 1.0 if draws else 0.0
    elif draws is not None and not draws:
        temperature = 0.0
    values = {name: said.pop(name) for name in (*PENALTIES, *FILTERS) if name in said}
    if "top_k" in values:
        values["top_k"] = _whole("top_k", values["top_k"])
    if temperature == 0:
        values = {name: value for name, value in values.items() if name not in FILTERS}
    return Sampling(temperature=temperature, **values)


def _whole(name: str, value: Any) -> int:
    """A whole number, also one written as -1.0: so the harness reads `top_k=-1` on its command line."""
    return whole_number(name, int(value) if isinstance(value, float) and value.is_integer() else value)
