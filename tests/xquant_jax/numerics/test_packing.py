"""The byte layout: packing is the identity, and words are laid out as documented."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from xquant_jax.numerics.packing import PLANES, pack, unpack

pytestmark = pytest.mark.optimized

SHAPES = st.tuples(st.integers(1, 3), st.just(128), st.integers(1, 5))


@settings(deadline=None, max_examples=25)
@given(data=st.data(), bits=st.sampled_from(sorted(PLANES)))
def test_unpack_gives_back_what_was_packed(data: st.DataObject, bits: int) -> None:
    codes = data.draw(hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, 2**bits - 1)))
    words = pack(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(unpack(words, bits), codes)
    assert sum(w.nbytes for w in words) == codes.size * bits // 8


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_token_f_4p_plus_r_sits_in_word_r_at_bit_f_p(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (128, 3), dtype=np.uint8)
    low = 0
    for p, words in zip(PLANES[bits], pack(jnp.asarray(codes), bits), strict=True):
        words = np.asarray(words)
        assert words.shape == (4 * p, 3)
        for token in range(128):
            f, r = divmod(token, 4 * p)
            np.testing.assert_array_equal((words[r] >> (f * p)) % 2**p, (codes[token] >> low) % 2**p)
        low += p


def test_high_plane_of_eight_bits_is_a_four_bit_stream() -> None:
    """What a self-speculative draft reads: q = 16 u + 7.5 within half a coarse step."""
    codes = np.random.default_rng(0).integers(0, 256, (128, 4), dtype=np.uint8)
    _, high = pack(jnp.asarray(codes), 8)
    coarse = np.asarray(unpack((high,), 4)).astype(float) * 16 + 7.5
    assert np.abs(coarse - codes).max() <= 7.5
