"""The distribution that tokens are drawn from, against probabilities computed with numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xquant_jax.errors import ConfigError
from xquant_jax.generation.sampling import Sampling, _filter, sample

LOGITS = np.log(np.asarray([0.4, 0.3, 0.15, 0.1, 0.05]))
DRAWS = 4000


def frequencies(seen: Any = None, **options: Any) -> np.ndarray:
    sampling = Sampling(**options).checked()
    keys = jax.random.split(jax.random.key(0), DRAWS)
    seen = None if seen is None else jnp.broadcast_to(jnp.asarray(seen), (DRAWS, 5))
    tokens, _ = sample(jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, 5)), sampling, keys, seen)
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
    ],
)
def test_tokens_are_drawn_from_the_filtered_distribution(options: dict[str, Any], expected: np.ndarray) -> None:
    drawn = frequencies(**options)
    assert (drawn[expected == 0] == 0).all()
    np.testing.assert_allclose(drawn, expected, atol=5 * np.sqrt(0.25 / DRAWS))  # five standard deviations


def test_a_penalty_makes_positive_logits_smaller_and_negative_ones_more_negative() -> None:
    logits, seen = jnp.asarray([[3.0, 2.0, -1.0]]), jnp.asarray([[True, False, True]])
    tokens, _ = sample(logits, Sampling(repetition_penalty=2.0).checked(), None, seen)
    assert tokens[0] == 1


def test_top_p_of_one_keeps_every_token() -> None:
    logits = jnp.linspace(20, -20, 128_256)[None]  # sums of probabilities in float32 reach 1 before the last of them
    assert jnp.isfinite(_filter(logits, Sampling(temperature=1.0, top_p=1.0))).all()


def test_log_probabilities_are_the_models_own() -> None:
    sampling = Sampling(temperature=0.3, top_k=1).checked()
    _, logprobs = sample(jnp.asarray(LOGITS)[None] + 7, sampling, jax.random.split(jax.random.key(0), 1), None)
    np.testing.assert_allclose(logprobs, np.log(0.4), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is not possible"),
        ({"temperature": float("nan")}, "temperature=nan is not possible"),
        ({"temperature": float("inf")}, "temperature=inf is not possible"),
        ({"temperature": 1e-40}, "temperature=1e-40 is not possible"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 is not possible"),
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
