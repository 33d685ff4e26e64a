"""Drafts that a sequence's own text gives, against a lookup in plain Python."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_jax.generation.drafts import from_text
from xquant_jax.speculation import Speculation

ROWS, PLACES = 4, 20
TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=PLACES), min_size=ROWS, max_size=ROWS)


def found_by_hand(text: list[int], speculation: Speculation) -> list[int]:
    """Every place where the text's end stands as well is tried; what follows it may go on into the draft."""
    longest, behind = speculation.min - 1, 0
    for end in range(1, len(text)):
        alike = [n for n in range(1, min(end, speculation.max) + 1) if text[end - n : end] == text[len(text) - n :]]
        if max(alike, default=0) >= max(longest, speculation.min):
            longest, behind = max(alike), end
    if not behind:
        return []
    grown = list(text)
    for i in range(speculation.tokens):
        grown.append(grown[behind + i])
    return grown[len(text) :]


@pytest.mark.parametrize("spec", ["lookup:4", "lookup:15,min=1", "lookup:1,min=3,max=3", "lookup:6,min=1,max=1"])
def test_what_followed_the_longest_and_then_the_latest_match(spec: str) -> None:
    speculation = Speculation.parse(spec)
    assert speculation is not None
    draft = jax.jit(partial(from_text, speculation=speculation))

    @settings(max_examples=100, deadline=None)
    @given(TEXTS, st.integers(0, 2))
    def agree(texts: list[list[int]], padding: int) -> None:
        padded = np.asarray([[*text, *[padding] * (PLACES - len(text))] for text in texts], np.int32)
        drafts, found = jax.device_get(draft(padded, np.asarray([len(text) - 1 for text in texts], np.int32)))
        for text, own, count in zip(texts, drafts, found, strict=True):
            assert own[:count].tolist() == found_by_hand(text, speculation)

    agree()


def test_a_period_goes_on() -> None:
    """The match reaches to the end of the text, and the draft beyond."""
    text = [[7, 1, 2, 3, 1, 2, 3, 1, 9, 9]]
    drafts, found = from_text(jnp.asarray(text), jnp.asarray([7]), Speculation("lookup", 8))
    assert found.tolist() == [8]
    assert drafts.tolist() == [[2, 3, 1, 2, 3, 1, 2, 3]]
