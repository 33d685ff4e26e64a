"""The harness' words for how a text is to be continued; needs no harness."""

import dataclasses
import functools
from typing import Any

import pytest

import xquant_jax as xq
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation.lm_eval_options import LENGTHS, request_for
from xquant_jax.generation.request import Request
from xquant_jax.generation.sampling import Sampling
from xquant_jax.model.loading import DEMO
from xquant_jax.model.tokenizer import Tokenizer

load = functools.cache(xq.load)


def asked(**wishes: Any) -> Request:
    return request_for(load("demo"), wishes, max_new_tokens=256, seed=7)


def test_nothing_said_is_greedy() -> None:
    assert asked() == Request("", max_new_tokens=256, seed=7, stop=[])
    assert asked(until=None, max_gen_toks=None, temperature=None, do_sample=None, top_k=None) == asked()


@pytest.mark.parametrize("name", LENGTHS)
def test_names_of_the_length(name: str) -> None:
    assert asked(**{name: 16}).max_new_tokens == 16
    assert asked(**{name: 16, "max_gen_toks": 16}).max_new_tokens == 16


@pytest.mark.parametrize(
    ("wishes", "temperature"),
    [
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": True, "temperature": 0}, 0.0),
        ({"do_sample": False, "temperature": 1}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"temperature": 0.0}, 0.0),
    ],
)
def test_do_sample_comes_before_temperature(wishes: dict, temperature: float) -> None:
    assert asked(**wishes).sampling == Sampling(temperature=temperature)
    drawn = Sampling(temperature=temperature, top_p=0.95) if temperature else Sampling()
    assert asked(**wishes, top_p=0.95).sampling == drawn  # which means nothing to greedy


def test_what_changes_nothing_is_taken() -> None:
    neutral = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "top_k": -1.0, "top_p": 1, "min_p": 0}
    assert asked(**neutral) == asked()
    sampling: Any = asked(**neutral, do_sample=True, repetition_penalty=1.0).sampling
    assert sampling.checked() == Sampling(temperature=1.0)


def test_sampling_and_seed_are_passed_on() -> None:
    penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": -0.5}
    filters = {"top_k": 20, "top_p": 0.9, "min_p": 0.1}
    request = asked(**penalties, **filters, do_sample=True, temperature=0.5, seed=3)
    assert request.sampling == Sampling(**penalties, **filters, temperature=0.5)
    assert request.seed == 3
    assert asked(**penalties).sampling == Sampling(**penalties)


def test_stop_strings() -> None:
    assert asked(until="\n").stop == ["\n"]
    assert asked(until=["</s>", "", "<|im_end|>", "<|endoftext|>"]).stop == ["</s>", "<|im_end|>", "<|endoftext|>"]
    assert asked(until=[]).stop == []


def test_special_tokens_that_the_model_lacks_are_no_stop_strings() -> None:
    """A tokenizer may have more tokens than the model; tasks name the special tokens of many models."""
    backend = Tokenizer.from_file(DEMO / "tokenizer.json").backend
    backend.add_special_tokens(["<|im_end|>"])
    model = dataclasses.replace(load("demo"), tokenizer=Tokenizer(backend))
    request = request_for(model, {"until": ["Q:", "<|im_end|>", "<|im_end|>\n"]}, max_new_tokens=256, seed=7)
    assert request.stop == ["Q:"]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"max_gen_toks": 8, "max_tokens": 16}, "max_gen_toks=8 and max_tokens=16 say the same thing and differ"),
        ({"max_gen_toks": 0}, "max_new_tokens=0 is not possible"),
        ({"max_tokens": "many"}, "max_tokens='many' is not a whole number"),
        ({"num_beams": 4}, "num_beams=4 is not supported; choose 1"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 is not supported; choose 1"),
        ({"length_penalty": 2, "early_stopping": True}, "options early_stopping=True, length_penalty=2 are not supp"),
        ({"until": 3}, "until=3 is not possible"),
        ({"until": ["a", 3]}, "is not possible; give a string or a list of them"),
        ({"do_sample": "no"}, "do_sample='no' is not possible"),
        ({"do_sample": True, "temperature": -1}, "temperature=-1.0 is not possible"),
        ({"do_sample": True, "top_p": 7}, "top_p=7.0 is not possible"),
        ({"do_sample": True, "top_k": 1.5}, "top_k=1.5 is not a whole number"),
        ({"seed": 2**64}, "is not possible; choose from -2"),
    ],
)
def test_what_cannot_be_honoured(wishes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(**wishes)
