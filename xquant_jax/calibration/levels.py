"""Weighted k-means of numbers between 0 and 1, solved exactly on a histogram."""

import numpy as np
from jaxtyping import Float

BINS = 1024


def levels(weights: Float[np.ndarray, " bins"], count: int) -> Float[np.ndarray, " count"]:
    """The `count` levels that minimize sum w (u - nearest level)^2, rising.

    Clusters of numbers on a line are intervals, so dynamic programming over their ends finds the optimum (Wang and
    Song 2011, Ckmeans.1d.dp). A millionth of the weight is spread evenly, so that stretches without any have levels.
    """
    bins = len(weights)
    center = (np.arange(bins) + 0.5) / bins
    w = weights.astype(np.float64) / max(weights.sum(), np.finfo(np.float64).tiny) + 1e-6 / bins
    mass, first, second = (np.concatenate([[0.0], np.cumsum(w * center**k)]) for k in range(3))
    total = mass - mass[:, None]  # [start, end] of an interval
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = second - second[:, None] - (first - first[:, None]) ** 2 / total
    cost[np.tril_indices(bins + 1)] = np.inf
    best = np.full(bins + 1, np.inf)  # of everything before an end, with as many intervals as so far
    best[0] = 0
    starts = []
    for _ in range(count):
        candidates = best[:, None] + cost
        starts.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
    end, found = bins, []
    for start_of in reversed(starts):
        start = start_of[end]
        found.append((first[end] - first[start]) / (mass[end] - mass[start]))
        end = start
    return np.asarray(found[::-1], np.float32)
