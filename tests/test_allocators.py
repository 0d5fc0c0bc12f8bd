from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evolkv.allocators import ALLOCATORS, complete, expand, layout, pyramid, uniform
from evolkv.errors import BudgetError, UsageError
from evolkv.selectors import get_selector


@st.composite
def reachable(draw, numbers=None):
    """(budgets, total, floor, ceiling) with a total within reach."""
    if numbers is None:
        numbers = st.integers(0, 4000)
    budgets = draw(st.lists(numbers, min_size=1, max_size=60))
    assume(any(budgets))
    floor = draw(st.integers(0, 100))
    ceiling = draw(st.integers(floor, 3000))
    total = draw(st.integers(len(budgets) * floor, len(budgets) * ceiling))
    return budgets, total, floor, ceiling


def order_is_kept(given_, result):
    given_, result = np.asarray(given_), np.asarray(result)
    larger = given_[:, None] > given_[None, :]
    same = given_[:, None] == given_[None, :]
    difference = result[:, None] - result[None, :]
    return (difference[larger] >= 0).all() and (np.abs(difference[same]) <= 1).all()


@settings(max_examples=300, deadline=None)
@given(reachable())
def test_completion_meets_the_total_within_the_bounds_and_keeps_the_order(case):
    budgets, total, floor, ceiling = case
    result = complete(budgets, total, floor, ceiling)
    assert result.dtype == np.int64
    assert result.sum() == total
    assert result.min() >= floor
    assert result.max() <= ceiling
    assert order_is_kept(budgets, result)


@settings(max_examples=300, deadline=None)
@given(reachable(st.floats(1e-12, 1e12)))
def test_projection_meets_the_total_within_the_bounds_and_keeps_the_order(case):
    weights, total, floor, ceiling = case
    result = complete(weights, total, floor, ceiling)
    assert result.sum() == total
    assert result.min() >= floor
    assert result.max() <= ceiling
    assert order_is_kept(weights, result)


@settings(max_examples=300, deadline=None)
@given(reachable(st.integers(1, 4000)), st.data())
def test_bounds_of_their_own_are_kept_by_every_entry(case, data):
    budgets, _, floor, ceiling = case
    own = np.array(data.draw(st.lists(st.integers(floor, ceiling), min_size=len(budgets), max_size=len(budgets))))
    total = data.draw(st.integers(floor * len(budgets), int(own.sum())))
    result = complete(budgets, total, floor, own)
    assert result.sum() == total
    assert (result >= floor).all()
    assert (result <= own).all()
    for limit in np.unique(own):
        assert order_is_kept(np.array(budgets)[own == limit], result[own == limit])


@settings(max_examples=300, deadline=None)
@given(reachable())
def test_free_entries_stay_in_proportion(case):
    budgets, total, floor, ceiling = case
    result = complete(budgets, total, floor, ceiling)
    free = (result > floor + 1) & (result < ceiling - 1)
    ratio = result[free] / np.array(budgets)[free] if np.array(budgets)[free].all() else np.ones(1)
    # Each free entry is its share rounded up or down.
    if ratio.size > 1:
        low = (result[free] - 1) / np.array(budgets)[free]
        high = (result[free] + 1) / np.array(budgets)[free]
        assert low.max() <= high.min() + 1e-9


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(33, 1600), min_size=1, max_size=60))
def test_completion_to_the_total_they_have_changes_nothing(budgets):
    assert complete(budgets, sum(budgets), 33, 1600).tolist() == budgets


@settings(max_examples=300, deadline=None)
@given(reachable(), st.integers(1, 10**6), st.booleans())
def test_unreachable_totals_are_refused(case, by, above):
    budgets, _, floor, ceiling = case
    total = len(budgets) * ceiling + by if above else len(budgets) * floor - by
    with pytest.raises(BudgetError, match="above the sum" if above else "below the sum"):
        complete(budgets, total, floor, ceiling)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([], "empty"),
        ([0, 0, 0], "all zero"),
        ([100, -1], "not negative"),
        ([100, float("nan")], "finite"),
        ([100, float("inf")], "finite"),
        (["many", 3], "must be numbers"),
    ],
)
def test_budgets_without_proportions_are_refused(budgets, message):
    with pytest.raises(BudgetError, match=message):
        complete(budgets, 100, 1, 100)


@pytest.mark.parametrize(
    ("total", "floor", "ceiling", "message"),
    [
        (100.5, 1, 100, "whole number"),
        (100, 1.5, 100, "floor must be a whole number"),
        (100, 50, 40, "floor <= ceiling"),
        (100, -1, 100, "floor <= ceiling"),
        (100, [1, 1, 1], 100, "does not fit budgets of shape"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(total, floor, ceiling, message):
    with pytest.raises(BudgetError, match=message):
        complete([10, 20], total, floor, ceiling)


def test_completion_follows_the_papers_formula_when_nothing_is_clipped():
    budgets = np.array([100, 200, 300])
    by_formula = budgets + budgets / 600 * (1200 - 600)
    assert complete(budgets, 1200, 1, 10_000).tolist() == by_formula.tolist()


def test_clipped_mass_goes_to_the_free_entries_in_proportion():
    # 1000 would get 2000 of 3000; the 200 above its ceiling go to the others 1 : 3.
    assert complete([125, 375, 1000], 3000, 1, 1800).tolist() == [300, 900, 1800]
    # Zero weights stay at the floor until the others are full.
    assert complete([0, 0, 1], 120, 10, 200).tolist() == [10, 10, 100]
    assert complete([0, 0, 1], 300, 10, 200).tolist() == [50, 50, 200]


def test_a_matrix_keeps_its_shape():
    result = complete(np.full((4, 3), 50), 4 * 3 * 64, 33, np.array([[40], [512], [512], [512]]))
    assert result.shape == (4, 3)
    assert result.sum() == 4 * 3 * 64
    assert (result[0] == 40).all()


def test_expansion_has_exactly_the_new_mean():
    budgets = [33, 40, 200, 239]
    expanded = expand(budgets, 256, 33, 4096)
    assert expanded.sum() == 4 * 256
    assert expanded.tolist() == [66, 80, 400, 478]


def test_uniform_gives_every_entry_the_budget():
    assert uniform(3, 128).tolist() == [128] * 3
    assert uniform(2, 64, num_kv_heads=3).tolist() == [[64] * 3] * 2


@pytest.mark.parametrize("arguments", [(0, 128), (3, 0), (3, 1.5), (3, True), (3, 128, 0)])
def test_uniform_refuses_counts_that_are_not_positive_ints(arguments):
    with pytest.raises(BudgetError, match="whole number"):
        uniform(*arguments)


def test_pyramid_is_the_line_of_the_authors_code():
    # m = 128 - 32 = 96: min = 4.8, max = 187.2, both plus the window.
    budgets = pyramid(30, 128)
    assert budgets.sum() == 30 * 128
    assert (budgets[0], budgets[-1]) == (219, 37)
    line = 32 + np.linspace(187.2, 4.8, 30)
    assert np.abs(budgets - line).max() < 1


def test_pyramid_stops_at_the_ceiling_and_stays_a_line():
    assert pyramid(5, 1000, ceiling=1200).tolist() == [1200, 1100, 1000, 900, 800]
    assert pyramid(5, 1000, floor=900).tolist() == [1100, 1050, 1000, 950, 900]


def test_pyramid_gives_the_heads_of_a_layer_the_same_number():
    budgets = pyramid(6, 64, num_kv_heads=2)
    assert budgets.shape == (6, 2)
    assert (budgets[:, 0] == pyramid(6, 64)).all()
    assert (budgets[:, 0] == budgets[:, 1]).all()


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(0, 64),
    st.integers(1, 2000),
    st.floats(1, 100),
    st.none() | st.integers(0, 4000),
)
def test_pyramid_has_the_exact_mean_and_falls_with_height(layers, window, spare, beta, above):
    budget = window + spare
    ceiling = None if above is None else budget + above
    budgets = pyramid(layers, budget, beta=beta, window=window, ceiling=ceiling)
    assert budgets.sum() == layers * budget
    assert (np.diff(budgets) <= 0).all()
    assert budgets.min() >= max(window, 1)
    assert ceiling is None or budgets.max() <= ceiling


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"budget": 31}, "window <= budget"),
        ({"budget": 64, "beta": 0.5}, "beta"),
        ({"budget": 64, "beta": float("nan")}, "beta"),
        ({"budget": 64, "ceiling": 60}, "outside floor"),
        ({"budget": 64, "floor": 65}, "outside floor"),
        ({"budget": 64, "window": -1}, "0 <= window"),
    ],
)
def test_pyramid_refuses_what_it_cannot_lay_out(settings_, message):
    with pytest.raises(BudgetError, match=message):
        pyramid(4, **settings_)


def test_unknown_allocator_suggests_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'pyramid'"):
        ALLOCATORS["piramid"]
    assert set(ALLOCATORS) == {"uniform", "pyramid", "cosine"}


def test_a_layer_that_cannot_hold_the_floor_gets_what_it_can_hold():
    ceilings = [24, 24, 24, 512]
    assert expand([64] * 4, 64, 32, ceilings).tolist() == [24, 24, 24, 184]
    assert expand([[64, 64]] * 4, 64, 32, ceilings).tolist() == [[24, 24]] * 3 + [[184, 184]]


@pytest.mark.parametrize("allocator", ["uniform", "pyramid", "cosine"])
def test_layouts_have_the_exact_mean_within_what_layers_can_hold(allocator):
    selector = get_selector("snapkv")
    budgets = layout(allocator, (4, 2), 64, selector, [24, 24, 24, 512])
    assert budgets.tolist() == [[24, 24]] * 3 + [[184, 184]]
    # Where the layers cannot hold the budget, each holds what it can, and no other could take what is left.
    assert layout(allocator, (4,), 64, selector, [24] * 4).sum() == 4 * 64
    for budget in (146, 147, 200):
        budgets = layout(allocator, (4, 2), budget, selector, [24, 24, 24, 512])
        assert np.minimum(budgets, 512)[3].tolist() == [512, 512]
