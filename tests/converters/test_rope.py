"""RoPE whose frequencies depend on the length of the sequence."""

import dataclasses

import numpy as np
import pytest

from xquant_jax.errors import ConfigError
from xquant_jax.numerics.rope import Rope

DYNAMIC = Rope(10_000.0, "dynamic", 2.0, original_positions=32)
LONGROPE = Rope(scaling="longrope", original_positions=32, short_factors=(1.0, 1.5, 2.0), long_factors=(1.0, 4.0, 9.0))


@pytest.mark.parametrize("scaling", ["default", "linear", "llama3", "yarn"])
def test_most_scalings_know_no_length(scaling):
    rope = Rope(scaling=scaling, original_positions=32)
    assert rope.longest is None
    assert rope.for_length(10**6) is rope


def test_dynamic_is_the_default_up_to_the_models_positions_and_refused_beyond():
    assert DYNAMIC.longest == 32
    assert DYNAMIC.for_length(32) is DYNAMIC
    assert np.array_equal(DYNAMIC.frequencies(6), Rope().frequencies(6))
    with pytest.raises(ConfigError, match=r"^33 tokens .* max_position_embeddings=32, .*'dynamic' .* at most 32$"):
        DYNAMIC.for_length(33)


def test_longrope_has_other_frequencies_for_longer_sequences():
    plain = Rope().frequencies(6)
    short, long = LONGROPE.for_length(32), LONGROPE.for_length(33)
    assert (short, long) == (LONGROPE, dataclasses.replace(LONGROPE, long=True))
    assert (short.longest, long.longest) == (32, None)
    assert np.array_equal(short.frequencies(6), plain / np.float32([1.0, 1.5, 2.0]))
    assert np.array_equal(long.frequencies(6), plain / np.float32([1.0, 4.0, 9.0]))
    assert long.for_length(7) == short
    assert len({short, long, LONGROPE}) == 2  # they are keys of compiled programs
