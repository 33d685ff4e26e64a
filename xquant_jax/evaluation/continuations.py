"""How long a cache goes on as the model without one would: errors of many steps add up, which a loss does not show.

The model without a cache continues every window greedily. Then each cache sees the window and that text through
protocol "streaming", and at every token says which it would have chosen. Up to the first that differs, its own greedy
generation would write the same text; the share of all that differ tells how often it would have to be put right
(the first divergent token, and the share of divergent tokens, of Deiseroth et al. 2024, arXiv 2311.01544).
"""

from collections.abc import Iterator

import numpy as np

from xquant_jax.cache.config import CacheConfig
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation.evaluate import BATCH, fill
from xquant_jax.evaluation.results import Evaluation, Measurement
from xquant_jax.evaluation.scoring import Scorer
from xquant_jax.evaluation.windows import Windows
from xquant_jax.generation.generate import generate
from xquant_jax.model.loading import Model


def write(model: Model, windows: Windows, length: int) -> list[list[int]]:
    """What the model continues each window with, `length` tokens, the likeliest one each time. No token ends it."""
    if length < 1:
        raise ConfigError(f"generate={length} leaves no token to compare; choose 1 or more")
    prompts = [window.tolist() for window in windows.tokens]
    cache = "bf16" if model.dtype == "bfloat16" else "bf16,dtype=float32"  # rounds nothing
    results = generate(model, prompts, cache=cache, max_new_tokens=length, stop_ids=[]).results
    return [result.tokens for result in results]


def follow(
    evaluation: Evaluation, model: Model, windows: Windows, *, batch: int | None = None
) -> Iterator[Measurement]:
    """Finds where each cache differs from `evaluation.continuations`; yields a measurement when it is done."""
    texts = np.concatenate([windows.tokens, np.asarray(evaluation.continuations, np.int32)], axis=1)
    count, length = texts.shape
    own = evaluation.generated
    batch = min(batch or BATCH, count)
    lengths = np.full(batch, length, np.int32)
    for m in [evaluation.baseline, *evaluation.measurements]:
        if m.differing is not None:
            continue
        cache = None if m is evaluation.baseline else CacheConfig.parse(m.cache)
        program = Scorer(model, cache, "streaming", evaluation.chunk).program(batch, length)
        same: list[np.ndarray] = []
        for start in range(0, count, batch):
            rows = texts[start : start + batch]
            same += list(np.asarray(program(fill(rows, batch), lengths).greedy)[: len(rows), -own:])
        m.differing = [np.flatnonzero(~row).tolist() for row in same]
        yield m
