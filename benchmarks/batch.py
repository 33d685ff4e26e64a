"""Slots that are kept full against batches of a fixed membership: the same prompts, answers of many lengths.

    python -m benchmarks.batch [--cache SPEC]

Both run the demo model, eight sequences at a time, each compiled before it is measured. A fixed batch takes the prompts
as they come and ends when its longest answer does.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

import xquant_jax as xq
from xquant_jax.generation.batch import prepare
from xquant_jax.generation.request import Options, Request

SLOTS, PROMPTS, LONGEST = 8, 32, 192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="xquant:4")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = xq.load("demo")
    rng = np.random.default_rng(0)
    limits = np.exp(rng.uniform(np.log(8), np.log(LONGEST), PROMPTS)).astype(int).tolist()
    prompts = [rng.integers(256, model.config.vocab_size, int(n)).tolist() for n in rng.integers(8, 64, PROMPTS)]
    requests = [Request(prompt, limit, stop_ids=[]) for prompt, limit in zip(prompts, limits, strict=True)]
    batch = prepare(model, Options(cache=arguments.cache, slots=SLOTS))

    def slots() -> None:
        assert sum(len(a.completion.tokens) for a in batch.answers(requests) if a.completion) == sum(limits)

    def fixed() -> None:
        for start in range(0, PROMPTS, SLOTS):
            longest = max(limits[start : start + SLOTS])
            xq.generate(
                model,
                prompts[start : start + SLOTS],
                cache=arguments.cache,
                max_new_tokens=longest,
                stop_ids=[],
                cache_tokens=64 + LONGEST,
            )

    def seconds(function: Callable[[], None]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    slots()
    fixed()
    rounds = [(seconds(slots), seconds(fixed)) for _ in range(arguments.rounds)]
    print(f"{PROMPTS} answers of 8 to {LONGEST} tokens, {sum(limits)} in all, {SLOTS} at a time, {arguments.cache}")
    for name, times in zip(("slots", "fixed batches"), zip(*rounds, strict=True), strict=True):
        print(f"{name:14} {sum(limits) / float(np.median(times)):8.0f} tokens/s")


if __name__ == "__main__":
    main()
