"""One choice for every layer, the cheapest of those that fit: the multiple-choice knapsack problem, solved exactly."""

import numpy as np
from jaxtyping import Float, Int


def choose(
    costs: Float[np.ndarray, "L C"], sizes: Int[np.ndarray, "L C"], capacity: int
) -> Int[np.ndarray, " L"] | None:
    """Which choice each layer gets, so that the sum of costs is least and that of sizes at most `capacity`.

    None if the smallest choices do not fit. Of two as cheap, the smaller. By dynamic programming over the sums of
    sizes, without those that another one beats in both (Kellerer, Pferschy and Pisinger 2004, Knapsack Problems,
    chapter 11): layers alike have few different sums, so that there is little to keep.
    """
    kept = [(0, 0.0)]  # size and cost of the layers so far, the sizes rising and the costs falling
    steps: list[list[tuple[int, int]]] = []  # for each of them, which one of the layer below it continues, and how
    for own_costs, own_sizes in zip(costs.tolist(), sizes.tolist(), strict=True):
        candidates = sorted(
            (size + own_sizes[choice], cost + own_costs[choice], below, choice)
            for below, (size, cost) in enumerate(kept)
            for choice in range(len(own_sizes))
            if size + own_sizes[choice] <= capacity
        )
        kept, step = [], []
        for size, cost, below, choice in candidates:
            if not kept or cost < kept[-1][1]:
                kept.append((size, cost))
                step.append((below, choice))
        if not kept:
            return None
        steps.append(step)
    place, chosen = len(kept) - 1, []
    for step in reversed(steps):
        place, choice = step[place]
        chosen.append(choice)
    return np.asarray(chosen[::-1])
