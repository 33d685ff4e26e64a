"""Lengths that prompts are padded to and answers get room for, few enough that little is compiled."""

from jax.sharding import Mesh

from xquant_jax import sharding
from xquant_jax.numerics.packing import BLOCK

PREFILL_TOKENS = 512
"""Prompt tokens fed at once, padding included: several short prompts together, long ones alone."""

SMALLEST_BUCKET = 16
"""Tokens that the shortest prompts are padded to."""


def bucket_length(longest: int, prefill_chunk: int | None) -> tuple[int, int]:
    """Length that prompts are padded to, and prompt tokens per chunk; the chunk divides the length.

    Powers of two up to the chunk, then eight steps per doubling: few programs to compile, little cache wasted.
    """
    power = max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length())
    if prefill_chunk is None or power <= prefill_chunk:
        return power, power
    chunks = -(-longest // prefill_chunk)
    step = max(1, (1 << (chunks - 1).bit_length()) // 16)
    return -(-chunks // step) * step * prefill_chunk, prefill_chunk


def answer_room(max_new_tokens: int) -> int:
    """Places for new tokens: a power of two, at least 16, up to 512, then whole 512s."""
    if max_new_tokens > 512:
        return -(-max_new_tokens // 512) * 512
    return max(16, 1 << (max_new_tokens - 1).bit_length())


def rows_at_once(chunk: int, mesh: Mesh | None) -> int:
    """Prompts that are fed together into a cache of their own, where a row takes at least a block."""
    return sharding.round_up(max(1, PREFILL_TOKENS // max(chunk, BLOCK)), sharding.batch_parts(mesh))
