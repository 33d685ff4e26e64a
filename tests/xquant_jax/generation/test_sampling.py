"""The distribution that tokens are drawn from, against probabilities computed with numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import counted_compilations
from xquant_jax.errors import ConfigError
from xquant_jax.generation.sampling import (
    Chosen,
    Sampling,
    SamplingRows,
    Seen,
    likely_by_rank,
    recommended,
    sample,
    token_keys,
)

LOGITS = np.log(np.asarray([0.4, 0.3, 0.15, 0.1, 0.05]))
DRAWS = 4000


def keys_of(size: int) -> jax.Array:
    """A key of its own for every sequence."""
    return jnp.stack([jnp.full(size, 7, jnp.uint32), jnp.arange(size, dtype=jnp.uint32)], axis=1)


@jax.jit
def compiled_sample(logits: Any, rows: SamplingRows, seen: Seen, forbidden: Any, top: Any) -> Chosen:
    """Every sequence is at token 0."""
    size = len(logits)
    return sample(logits, rows, keys_of(size), jnp.zeros(size, jnp.int32), seen, forbidden, top)


def chosen(
    logits: Any, samplings: list[Sampling], seen: Any = None, top: Any = None, answered: Any = None, forbidden: Any = ()
) -> Chosen:
    logits = jnp.asarray(logits, jnp.float32)
    size, vocabulary = logits.shape
    before = Seen.nothing(size, vocabulary)
    before = Seen(
        before.anywhere if seen is None else jnp.asarray(seen),
        before.answered if answered is None else jnp.asarray(answered),
    )
    top = jnp.zeros(size, jnp.int32) if top is None else jnp.asarray(top)
    forbid = jnp.tile(jnp.asarray([*forbidden, *[-1] * (3 - len(forbidden))], jnp.int32), (size, 1))
    rows = SamplingRows.of([sampling.checked() for sampling in samplings])
    return compiled_sample(logits, rows, before, forbid, top)


def frequencies(seen: Any = None, answered: Any = None, forbidden: Any = (), **options: Any) -> np.ndarray:
    seen, answered = (None if a is None else np.tile(a, (DRAWS, 1)) for a in (seen, answered))
    logits = np.tile(LOGITS, (DRAWS, 1))
    tokens = chosen(logits, [Sampling(**options)] * DRAWS, seen, answered=answered, forbidden=forbidden).tokens
    return np.bincount(np.asarray(tokens), minlength=5) / DRAWS


def distribution(*weights: float) -> np.ndarray:
    return np.asarray(weights) / sum(weights)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, distribution(0.4, 0.3, 0.15, 0.1, 0.05)),
        ({"temperature": 0.5}, distribution(0.16, 0.09, 0.0225, 0.01, 0.0025)),
        ({"temperature": 1.0, "top_k": 2}, distribution(0.4, 0.3, 0, 0, 0)),
        ({"temperature": 1.0, "top_k": 99}, distribution(0.4, 0.3, 0.15, 0.1, 0.05)),
        ({"temperature": 1.0, "top_p": 0.75}, distribution(0.4, 0.3, 0.15, 0, 0)),
        ({"temperature": 1.0, "top_p": 0.01}, distribution(1, 0, 0, 0, 0)),
        ({"temperature": 1.0, "min_p": 0.3}, distribution(0.4, 0.3, 0.15, 0, 0)),
        ({"temperature": 2.0, "top_k": 4, "min_p": 0.55}, distribution(0.4**0.5, 0.3**0.5, 0.15**0.5, 0, 0)),
        (
            {"temperature": 1.0, "repetition_penalty": 2.0, "seen": [True, False, False, False, False]},
            distribution(0.4**2, 0.3, 0.15, 0.1, 0.05),
        ),
        (
            {"temperature": 1.0, "frequency_penalty": 0.5, "answered": [2, 0, 0, 1, 0]},
            distribution(0.4 * np.exp(-1), 0.3, 0.15, 0.1 * np.exp(-0.5), 0.05),
        ),
        (
            {"temperature": 1.0, "presence_penalty": 0.5, "answered": [2, 0, 0, 1, 0]},
            distribution(0.4 * np.exp(-0.5), 0.3, 0.15, 0.1 * np.exp(-0.5), 0.05),
        ),
        ({"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0}, distribution(0.4, 0.3, 0.15, 0.1, 0.05)),
        ({"temperature": 1.0, "forbidden": (0, 4)}, distribution(0, 0.3, 0.15, 0.1, 0)),
        ({"temperature": 1e-6}, distribution(1, 0, 0, 0, 0)),
    ],
)
def test_tokens_are_drawn_from_the_filtered_distribution(options: dict[str, Any], expected: np.ndarray) -> None:
    drawn = frequencies(**options)
    assert (drawn[expected == 0] == 0).all()
    np.testing.assert_allclose(drawn, expected, atol=5 * np.sqrt(0.25 / DRAWS))  # five standard deviations


MIXED = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.8),
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=1.2, min_p=0.2),
    Sampling(1.2, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01),
    Sampling(1.2, temperature=0.7, top_k=2**40, top_p=1.0, min_p=0.0),
]


def alone(logits: np.ndarray, sampling: Sampling, seen: np.ndarray, key: Any) -> int:
    """One sequence's token by the definition, step after step."""
    if sampling.repetition_penalty is not None:
        penalty = np.float32(sampling.repetition_penalty)
        logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not sampling.temperature:
        return int(logits.argmax())
    logits = logits / np.float32(sampling.temperature)
    if sampling.top_k is not None:
        logits = np.where(logits < np.sort(logits)[-min(sampling.top_k, logits.size)], -np.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(-logits)
        probabilities = np.exp(logits[order] - logits.max())
        probabilities /= probabilities.sum()
        kept = order[np.cumsum(probabilities) - probabilities < sampling.top_p]
        logits = np.where(np.isin(np.arange(logits.size), kept), logits, -np.inf)
    if sampling.min_p is not None:
        logits = np.where(np.exp(logits - logits.max()) < sampling.min_p, -np.inf, logits)
    return int(jax.random.categorical(key, jnp.asarray(logits)))


def test_sequences_of_different_options_are_each_sampled_as_if_alone_by_one_program() -> None:
    rng = np.random.default_rng(0)
    logits, seen = rng.normal(size=(25, 8, 50), scale=2).astype(np.float32), rng.random((25, 8, 50)) < 0.3
    keys = token_keys(keys_of(8), jnp.zeros(8, jnp.int32))
    orders = [np.roll(np.arange(8), n) for n in range(25)]
    chosen(logits[0], MIXED, seen[0])
    with counted_compilations() as compiled:
        mixed = [chosen(logits[n], [MIXED[i] for i in order], seen[n]).tokens for n, order in enumerate(orders)]
        greedy = [chosen(logits[n], [Sampling()] * 8, seen[n]).tokens for n in range(25)]
    assert compiled == []
    for n, order in enumerate(orders):
        expected = [alone(logits[n, row], MIXED[i], seen[n, row], keys[row]) for row, i in enumerate(order)]
        assert np.asarray(mixed[n]).tolist() == expected
        assert np.asarray(greedy[n]).tolist() == logits[n].argmax(-1).tolist()


def test_a_penalty_makes_positive_logits_smaller_and_negative_ones_more_negative() -> None:
    logits, seen = [[3.0, 2.0, -1.0]], [[True, False, True]]
    assert chosen(logits, [Sampling(repetition_penalty=2.0)], seen).tokens[0] == 1


def test_top_p_of_one_keeps_every_token() -> None:
    logits = jnp.linspace(20, -20, 128_256)[None]  # sums of probabilities in float32 reach 1 before the last of them
    rows = SamplingRows.of([Sampling(temperature=1.0, top_p=1.0).checked()])
    assert jnp.isfinite(likely_by_rank(logits, rows)).all()


def test_log_probabilities_are_the_models_own() -> None:
    told = chosen(LOGITS[None] + 7, [Sampling(temperature=0.3, top_k=1)], top=[2])
    np.testing.assert_allclose(told.logprobs, np.log(0.4), rtol=1e-5)
    assert np.asarray(told.top_tokens)[0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(told.top_logprobs[0], np.sort(LOGITS)[::-1], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is not possible"),
        ({"temperature": float("nan")}, "temperature=nan is not possible"),
        ({"temperature": float("inf")}, "temperature=inf is not possible"),
        ({"temperature": 1e-7}, "temperature=1e-07 is not possible"),
        ({"temperature": 1.0, "top_k": -2}, "top_k=-2 is not possible"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan is not possible"),
        ({"presence_penalty": float("inf")}, "presence_penalty=inf is not possible"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf is not possible"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 is not possible"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5 is not possible"),
        ({"temperature": 1.0, "min_p": -1.0}, "min_p=-1.0 is not possible"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is not possible"),
        ({"top_k": 5}, "top_k has no effect at temperature 0"),
    ],
)
def test_values_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options).checked()


def test_what_changes_nothing_is_taken_at_any_temperature() -> None:
    neutral = Sampling(1.0, 0.0, 0, 1.0, 0.0, 0.0, 0.0)
    assert neutral.checked() == Sampling(temperature=None).checked()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, Sampling()),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(temperature=0.6, top_p=0.9)),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, Sampling()),
        ({"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}, Sampling(1.05, temperature=0.7, top_k=20)),
        ({"repetition_penalty": 1.1, "top_p": None}, Sampling(1.1)),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, Sampling()),
    ],
)
def test_the_models_own_sampling_is_that_of_its_generation_config(said: dict[str, Any], expected: Sampling) -> None:
    assert recommended(said).checked() == expected.checked()


def test_what_is_said_stands_over_what_is_not() -> None:
    base = Sampling(1.1, temperature=0.6, top_p=0.9)
    assert Sampling(temperature=None).over(base) == base
    assert Sampling(temperature=0.2).over(base) == Sampling(1.1, temperature=0.2, top_p=0.9)
    assert Sampling(temperature=0.0).over(base) == Sampling(1.1, temperature=0.0)
    assert Sampling(temperature=0.6, top_p=0.9).told() == "temperature 0.6, top_p 0.9"
    assert Sampling(1.1).told() == "greedy, repetition_penalty 1.1"
