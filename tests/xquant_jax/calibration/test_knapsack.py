"""The choice for every layer is the cheapest that fits."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_jax.calibration.knapsack import choose


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Costs that may be negative and need not fall with size, as measured ones."""
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    numbers = st.lists(st.integers(-4, 20), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    costs = np.asarray(draw(numbers), np.float64).reshape(shape) / 4  # sums are exact
    sizes = np.abs(np.asarray(draw(numbers))).reshape(shape)
    return costs, sizes, draw(st.integers(0, int(sizes.max(axis=1).sum())))


@settings(deadline=None)
@given(problems())
def test_no_other_choice_that_fits_is_cheaper_or_as_cheap_and_smaller(
    problem: tuple[np.ndarray, np.ndarray, int],
) -> None:
    costs, sizes, capacity = problem
    layers = np.arange(len(costs))
    found = choose(costs, sizes, capacity)
    all_of_them = (np.asarray(c) for c in itertools.product(range(costs.shape[1]), repeat=len(costs)))
    fitting = [(costs[layers, c].sum(), sizes[layers, c].sum()) for c in all_of_them]
    fitting = [(cost, size) for cost, size in fitting if size <= capacity]
    if found is None:
        assert fitting == []
    else:
        assert (costs[layers, found].sum(), sizes[layers, found].sum()) == min(fitting)


def test_many_layers_alike_are_chosen_for_as_well() -> None:
    """126 layers, 4^126 choices. No choice is cheaper than the Lagrangian bound, whatever its multiplier."""
    costs = np.random.default_rng(0).random((126, 1)) / np.asarray([[4.0, 8, 16, 256]])
    sizes, capacity = np.tile([9, 13, 17, 33], (126, 1)), 126 * 14
    found = choose(costs, sizes, capacity)
    assert found is not None
    layers = np.arange(126)
    assert sizes[layers, found].sum() <= capacity
    multipliers = np.geomspace(1e-4, 1, 1000)
    bound = max((costs + m * sizes).min(axis=1).sum() - m * capacity for m in multipliers)
    assert bound <= costs[layers, found].sum() <= bound + 0.01 * costs.max(axis=1).sum()
