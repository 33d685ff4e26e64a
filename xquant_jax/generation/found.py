"""Beginnings that an engine finds again by itself: whole blocks of prompts, by what they and all before them hold."""

from collections import OrderedDict
from collections.abc import Iterator
from hashlib import sha256

import numpy as np

from xquant_jax.numerics.packing import BLOCK


class Found:
    """Which blocks of prompts a store of `size` blocks holds. What was used longest ago goes first; a block goes before
    those that it follows.

    Blocks are copied out of the store and into it in the order in which programs run, so none is taken away while it is
    read.

    quantum: tokens in multiples of which a prompt can go on from what is stored
    start: tokens at the beginning of all prompts that are stored elsewhere
    """

    def __init__(self, size: int, quantum: int, start: int = 0) -> None:
        self.size, self.quantum, self.start = size, quantum, start
        self._numbers: OrderedDict[bytes, int] = OrderedDict()  # the oldest first
        self._free = list(range(size))

    def lookup(self, tokens: list[int]) -> list[int]:
        """Numbers of the blocks that the prompt begins with and can go on from; at least one token is left."""
        numbers = []
        for key in self.keys(tokens):
            if key not in self._numbers:
                break
            numbers.append(self._numbers[key])
        most = (len(tokens) - 1) // self.quantum * self.quantum - self.start
        whole = (self.start + BLOCK * len(numbers)) // self.quantum * self.quantum - self.start
        return numbers[: max(0, min(whole, most)) // BLOCK]

    def save(self, tokens: list[int], places: int) -> list[int]:
        """Numbers that the prompt's first `places` blocks are to be written to; `size` for those that need not be."""
        keys = list(self.keys(tokens))[: min(places, self.size)]
        numbers = [self.size] * len(keys)
        for i, key in enumerate(keys):
            if key not in self._numbers:
                numbers[i] = self._free.pop() if self._free else self._numbers.popitem(last=False)[1]
                self._numbers[key] = numbers[i]
            self._numbers.move_to_end(key)
        for key in reversed(keys):
            self._numbers.move_to_end(key)
        return numbers

    def forget(self, tokens: list[int]) -> None:
        """Takes the prompt's blocks for not stored: what was to be written was not."""
        self._free += [self._numbers.pop(key) for key in self.keys(tokens) if key in self._numbers]

    def keys(self, tokens: list[int]) -> Iterator[bytes]:
        """A key for each whole block behind `start`: of its tokens and of all before it."""
        key = b""
        for first in range(self.start, len(tokens) - BLOCK + 1, BLOCK):
            key = sha256(key + np.asarray(tokens[first : first + BLOCK], "<i4").tobytes()).digest()
            yield key
