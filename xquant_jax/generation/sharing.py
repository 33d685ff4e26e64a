"""What requests have in common, and how it is stored once."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from xquant_jax.generation.found import Found
from xquant_jax.generation.prefix import Prefix, quantum, used
from xquant_jax.generation.request import CheckedRequest, Options
from xquant_jax.numerics.packing import BLOCK


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What the requests of an engine may have in common, stored once. By default nothing.

    prefix: what all prompts begin with, and tokens of the shortest of them
    samples: answers to one prompt that share its blocks; 1: every answer has blocks of its own
    prompts: how many prompts they share at the same time, of up to `tokens` tokens beside the prefix
    found: blocks of prompts that are kept for prompts to come
    """

    prefix: Prefix | None = None
    shortest: int = 2**30
    samples: int = 1
    prompts: int = 0
    tokens: int = 0
    found: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How requests lie in an engine.

    tokens: of a slot's own
    origin: tokens of the prefix
    """

    sharing: Sharing
    tokens: int
    origin: int


def plan_sharing(
    requests: Sequence[CheckedRequest], slots: int, options: Options, prefix: Prefix | None, *, alone: bool
) -> Plan:
    """How these requests lie in `slots` slots. On a mesh (not `alone`) every one has a cache of its own."""
    sizes = [len(request.tokens) for request in requests]
    origin = used(prefix, options, min(sizes))
    times = Counter(tuple(request.tokens) for request in requests)
    alike = [count for tokens, count in times.items() if len(tokens) - origin >= BLOCK]  # with a block to share
    samples = min(slots, max(alike, default=1)) if alone else 1
    tokens = options.cache_tokens or max(own_tokens(request, origin, samples) for request in requests)
    prompts = min(slots, 1 + -(-slots * len(times) // len(requests))) if samples > 1 else 0
    found = found_blocks(times, options, origin) if alone and options.prefill_chunk is not None else 0
    longest = max(sizes) - origin
    return Plan(Sharing(prefix, min(sizes), samples, prompts, longest if samples > 1 else 0, found), tokens, origin)


def own_tokens(request: CheckedRequest, origin: int, samples: int) -> int:
    """Tokens of a request that its own slot must hold, where `origin` tokens of its prompt lie elsewhere, and with
    several samples all its other whole blocks."""
    if samples > 1:
        origin += (len(request.tokens) - origin) // BLOCK * BLOCK
    return request.capacity - origin


def found_blocks(prompts: Counter[tuple[int, ...]], options: Options, origin: int) -> int:
    """Blocks that a store needs so that whatever two of these prompts begin with is found: those blocks, and room for
    one prompt more. 0 if there are none."""
    store, seen = Found(0, quantum(options), origin), Counter()
    for tokens in prompts:
        seen.update(store.keys(list(tokens)))
    common = sum(count > 1 for count in seen.values())
    if BLOCK * common < quantum(options):
        return 0
    return common + (max(map(len, prompts)) - origin) // BLOCK
