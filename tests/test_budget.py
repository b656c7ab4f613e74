"""The knapsack against every set there is, and what a frontier promises."""

from itertools import chain, combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ila.price.knapsack import CostTable, Frontier, Group

COST = st.integers(0, 9)


@st.composite
def problems(draw) -> tuple[CostTable, dict[str, float]]:
    """A table of at most eight layers in at most four groups, and their scores."""
    groups, names = [], iter("abcdefgh")
    for size in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)):
        layers = tuple(name for name, _ in zip(names, range(size), strict=False))
        own = {name: (draw(COST), draw(COST)) for name in layers}
        groups.append(Group(layers, draw(COST), draw(COST), (draw(COST), draw(COST)), own))
    table = CostTable(draw(COST), tuple(groups))
    # Quarters add up without rounding, so that equal sums are equal.
    quarters = st.integers(-4, 12).map(lambda n: n / 4)
    return table, {name: draw(quarters) for name in table.layers}


def every_set(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    sizes = (combinations(names, size) for size in range(1, len(names) + 1))
    return list(chain.from_iterable(sizes))


@settings(max_examples=300)  # a millisecond each
@given(problem=problems(), budget=st.integers(0, 60))
def test_no_set_within_the_budget_matters_more(problem, budget):
    table, scores = problem
    positive = tuple(name for name in table.layers if scores[name] > 0)
    if not positive:
        with pytest.raises(ValueError, match="scores must hold a positive one"):
            Frontier(table, scores)
        return
    frontier = Frontier(table, scores)
    sums = [(table.cost(s), sum(scores[n] for n in s)) for s in every_set(table.layers)]
    payable = [value for cost, value in sums if cost <= budget]
    cheapest = min(table.cost((name,)) for name in positive)
    if max(payable, default=0.0) <= 0:
        with pytest.raises(ValueError, match=f"at least {cheapest}, got {budget}"):
            frontier.within(budget)
        return
    best = frontier.within(budget)
    assert best.importance == max(payable) == sum(scores[name] for name in best.opened)
    assert best.cost == table.cost(best.opened) <= budget
    assert all(scores[name] > 0 for name in best.opened)


@given(problem=problems())
def test_a_frontier_grows_in_both_and_says_the_true_cost(problem):
    table, scores = problem
    if not any(score > 0 for score in scores.values()):
        return
    points = list(Frontier(table, scores))
    assert all(table.cost(p.opened) == p.cost for p in points)
    for one, next_ in pairwise(points):
        assert one.cost < next_.cost and one.importance < next_.importance
    whole = {name for name in table.layers if scores[name] > 0}
    assert points[-1].importance == sum(scores[name] for name in whole)


def test_scores_of_other_layers_are_refused():
    table = CostTable(0, (Group(("a",), 0, 0, (0, 0), {"a": (1, 1)}),))
    with pytest.raises(ValueError, match="'b' is in one of them"):
        Frontier(table, {"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match="got 'b'"):
        table.cost({"b"})
