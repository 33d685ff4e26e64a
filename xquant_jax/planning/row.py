"""What is said of one cache method on one device, at one context and batch. `planning/costs.py` works it out."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a batch on a device.

    flops, bytes: operations done, and bytes of memory read and written
    seconds: the longer of the two, perfectly overlapped; where kernels were counted, their time in place of what they
        do of these
    intensity: FLOP per byte
    bound: what takes longer, `compute` or `memory`; `kernels` where most of the time is that of counted kernels
    """

    flops: float
    bytes: float
    seconds: float
    intensity: float
    bound: str


@dataclasses.dataclass(frozen=True)
class Speculating:
    """Decoding in steps that verify a draft, and what it gains.

    tokens_per_step: what a sequence is expected to get from one verification, with the token behind the last that is
        accepted
    draft_s: seconds to draft for every sequence
    verify_s: seconds of the step that verifies all drafts
    tokens_per_second: of the whole batch
    speedup: these, relative to decoding without drafts
    """

    tokens_per_step: float
    draft_s: float
    verify_s: float
    tokens_per_second: float
    speedup: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One cache method at a context and batch. Tokens per second are those of the whole batch, decoding.

    bytes_per_token: of all layers, growing with the context: codes, scales and running sum
    memory: bytes of weights, factors (what the method multiplies with besides), codes, scales, window, scratch, total
    fits: whether that total does
    largest_context: tokens per sequence that fit, at this batch; 0 if not even one block does
    largest_batch: sequences that fit, at this context
    prefill_s: seconds to feed the context of all sequences
    decode: one more token of every sequence
    counted: whether the history's part of it is what kernels take by their machine code, not by a roofline
    best: tokens per second at the largest batch; None where not one sequence fits
    speculating: the same context and batch with speculation; None where it was not asked for
    """

    cache: str
    bytes_per_token: float
    memory: dict[str, int]
    fits: bool
    largest_context: int
    largest_batch: int
    prefill_s: float
    decode: Step
    counted: bool
    tokens_per_second: float
    best: float | None
    speculating: Speculating | None
