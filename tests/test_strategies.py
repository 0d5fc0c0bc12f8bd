from __future__ import annotations

import numpy as np
import pytest

from evolkv.errors import BudgetError, UsageError
from evolkv.evolution.objective import fitness
from evolkv.evolution.strategies import STRATEGIES, GroupedCMA, JointCMA, RandomSearch, StartOnly

MAKERS = {
    "joint": lambda seed=0: JointCMA(shape=(12,), budget=128, seed=seed),
    "joint, heads": lambda seed=0: JointCMA(shape=(6, 3), budget=64, seed=seed),
    "evolkv": lambda seed=0: GroupedCMA(num_layers=12, budget=128, group_size=5, generations=4, seed=seed),
    "random": lambda seed=0: RandomSearch(shape=(12,), budget=128, seed=seed),
}


def one_layer_matters(layer, need=700):
    """A score that rises smoothly as one entry gets what it needs."""

    def score(budgets):
        return float(1 / (1 + np.exp(-4 * np.log(np.ravel(budgets)[layer] / need))))

    return score


def drive(strategy, score, generations):
    """Run a strategy for a number of generations at most; return all generations' candidates."""
    history = []
    for _ in range(generations):
        if strategy.done:
            break
        candidates = strategy.ask()
        history.append(candidates)
        strategy.tell([score(candidate) for candidate in candidates])
    return history


def same(history, other):
    return len(history) == len(other) and all(
        np.array_equal(np.stack(a), np.stack(b)) for a, b in zip(history, other, strict=True)
    )


@pytest.mark.parametrize("name", MAKERS)
def test_same_seed_and_fitness_give_the_same_candidates(name):
    score = one_layer_matters(3)
    first, again, other = (drive(MAKERS[name](seed), score, 9) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("name", MAKERS)
def test_interleaved_strategies_and_global_random_numbers_do_not_disturb_each_other(name):
    score = one_layer_matters(3)
    alone = drive(MAKERS[name](1), score, 5)
    np.random.seed(123)  # noqa: NPY002
    expected_draw = np.random.random()  # noqa: NPY002
    np.random.seed(123)  # noqa: NPY002
    mine, other = MAKERS[name](1), MAKERS["joint"](7)
    interleaved = []
    for _ in range(5):
        candidates = mine.ask()
        others = other.ask()
        other.tell([score(candidate) for candidate in others])
        mine.tell([score(candidate) for candidate in candidates])
        interleaved.append(candidates)
    assert same(alone, interleaved)
    assert np.random.random() == expected_draw  # noqa: NPY002


@pytest.mark.parametrize("name", MAKERS)
def test_strategies_print_nothing_and_write_no_files(name, tmp_path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)
    drive(MAKERS[name](), lambda budgets: 0.0, 30)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert not recwarn.list


@pytest.mark.parametrize("name", MAKERS)
def test_asking_twice_returns_the_same_candidates(name):
    strategy = MAKERS[name]()
    first = strategy.ask()
    first[0][:] = 0
    second = strategy.ask()
    assert second[0].min() >= 33
    assert same([first[1:]], [second[1:]])


@pytest.mark.parametrize("name", MAKERS)
def test_best_is_the_fittest_candidate_told(name):
    strategy = MAKERS[name]()
    with pytest.raises(UsageError, match="no best candidate yet"):
        strategy.best  # noqa: B018
    score = one_layer_matters(3)
    seen = [candidate for generation in drive(strategy, score, 6) for candidate in generation]
    budgets, best = strategy.best
    assert best == max(score(candidate) for candidate in seen)
    assert score(budgets) == best
    assert strategy.generation == 6


@pytest.mark.parametrize("name", MAKERS)
def test_tell_refuses_what_does_not_belong_to_the_candidates(name):
    strategy = MAKERS[name]()
    with pytest.raises(UsageError, match="without candidates"):
        strategy.tell([1.0])
    count = len(strategy.ask())
    with pytest.raises(UsageError, match=f"2 fitness values for {count} candidates"):
        strategy.tell([1.0, 2.0])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="finite"):
            strategy.tell([0.5] * (count - 1) + [bad])
    strategy.tell([0.5] * count)
    with pytest.raises(UsageError, match="without candidates"):
        strategy.tell([0.5] * count)


@pytest.mark.parametrize("shape", [(30,), (30, 3), 7])
@pytest.mark.parametrize("strategy", [JointCMA, RandomSearch])
def test_every_candidate_spends_exactly_the_target_within_the_bounds(strategy, shape):
    search = strategy(shape=shape, budget=96, floor=40, ceiling=900, population=10)
    noise = np.random.default_rng(0)
    for candidates in drive(search, lambda budgets: noise.random(), 20):
        assert len(candidates) == 10
        for candidate in candidates:
            assert candidate.shape == search.shape
            assert candidate.dtype == np.int64
            assert candidate.sum() == 96 * candidate.size
            assert candidate.min() >= 40
            assert candidate.max() <= 900


@pytest.mark.parametrize("strategy", [JointCMA, RandomSearch])
def test_the_first_candidate_is_the_uniform_allocation(strategy):
    assert strategy(shape=(10,), budget=77).ask()[0].tolist() == [77] * 10


def test_joint_finds_the_one_layer_that_needs_more():
    score = one_layer_matters(17, need=900)
    strategy = JointCMA(shape=(30,), budget=128)
    drive(strategy, score, 40)
    budgets, best = strategy.best
    assert best > 0.8
    assert budgets.argmax() == 17
    assert budgets[17] > 900
    assert strategy.mean.sum() == 128 * 30
    assert score(strategy.mean) > 0.8


def test_joint_finds_the_one_head_that_needs_more():
    score = one_layer_matters(56, need=900)
    strategy = JointCMA(shape=(30, 3), budget=64)
    drive(strategy, score, 75)
    assert np.unravel_index(strategy.best[0].argmax(), (30, 3)) == (18, 2)
    assert strategy.best[1] > 0.7


def test_joint_beats_random_search_at_the_same_cost():
    score = one_layer_matters(17, need=900)
    joint, random = JointCMA(shape=(30,), budget=128), RandomSearch(shape=(30,), budget=128)
    drive(joint, score, 30)
    drive(random, score, 30)
    assert joint.best[1] > random.best[1]


def test_each_generation_of_joint_holds_the_mean_of_its_distribution():
    strategy = JointCMA(shape=(8,), budget=128)
    score = one_layer_matters(2)
    for _ in range(5):
        mean = strategy.mean
        candidates = strategy.ask()
        assert np.array_equal(candidates[0], mean)
        strategy.tell([score(candidate) for candidate in candidates])


@pytest.mark.parametrize("name", ["joint", "evolkv"])
def test_the_smallest_population_works(name):
    score = one_layer_matters(2, need=300)
    strategy = STRATEGIES[name](4, population=4)
    drive(strategy, score, 60)
    assert strategy.best[1] > score(np.full(4, 128))


def test_joint_starts_from_given_budgets():
    start = [400] + [50] * 7
    strategy = JointCMA(shape=(8,), budget=128, x0=start)
    first = strategy.ask()[0]
    assert first.sum() == 8 * 128
    assert first[0] > 5 * first[1]
    exact = [582] + [63] * 6 + [64]
    assert sum(exact) == 8 * 128
    assert JointCMA(shape=(8,), budget=128, x0=exact).ask()[0].tolist() == exact
    with pytest.raises(BudgetError, match="x0 has shape"):
        JointCMA(shape=(8,), budget=128, x0=[1, 2])


def test_joint_keeps_layers_of_a_sliding_window_below_their_own_ceiling():
    ceiling = np.array([64, 1600, 64, 1600])
    strategy = JointCMA(shape=(4,), budget=100, ceiling=ceiling)
    for candidates in drive(strategy, one_layer_matters(0), 15):
        for candidate in candidates:
            assert (candidate <= ceiling).all()
            assert candidate.sum() == 400


def test_flat_fitness_widens_joint_and_does_not_end_it():
    strategy = JointCMA(shape=(5,), budget=128)
    history = drive(strategy, lambda budgets: 0.0, 400)
    assert len(history) == 400
    assert not strategy.done
    spread = [np.std(np.log(generation), axis=0).mean() for generation in history]
    assert np.mean(spread[-50:]) > 1.5 * np.mean(spread[:3])
    assert strategy.mean.tolist() == strategy.best[0].tolist() == [128] * 5


def test_joint_leaves_a_plateau_once_fitness_differs():
    strategy = JointCMA(shape=(12,), budget=128)
    drive(strategy, lambda budgets: float(min(budgets[4] / 600, 1) if budgets[4] > 350 else 0), 80)
    assert strategy.best[0][4] >= 600


def test_joint_is_done_once_it_has_converged():
    target = np.array([300, 60, 120, 40, 120])
    strategy = JointCMA(shape=(5,), budget=128, population=10)
    drive(strategy, lambda budgets: 1 / (1 + np.abs(np.log(budgets / target)).sum()), 400)
    assert strategy.done
    assert np.abs(strategy.best[0] / target - 1).max() < 0.05
    with pytest.raises(UsageError, match="the search is done"):
        strategy.ask()


@pytest.mark.parametrize("strategy", [JointCMA, RandomSearch])
def test_bounds_that_leave_one_allocation_end_the_search_after_one_generation(strategy):
    search = strategy(shape=(4,), budget=128, floor=128, ceiling=500)
    history = drive(search, lambda budgets: 0.5, 10)
    assert len(history) == 1
    assert search.best[0].tolist() == [128] * 4


def test_groups_are_neighbours_from_bottom_to_top_with_their_own_populations():
    strategy = GroupedCMA(num_layers=19, group_size=8, generations=2)
    groups, sizes = [], []
    while not strategy.done:
        candidates = strategy.ask()
        groups.append((strategy.group.start, strategy.group.stop))
        sizes.append(len(candidates))
        strategy.tell([0.0] * len(candidates))
    assert groups == [(0, 8), (0, 8), (8, 16), (8, 16), (16, 19), (16, 19)]
    # 4 + floor(3 ln n) for n = 8 and 3
    assert sizes == [10, 10, 10, 10, 7, 7]
    assert strategy.generation == 6


def test_other_layers_stay_at_the_best_scheme_which_never_gets_worse():
    strategy = GroupedCMA(num_layers=12, budget=128, group_size=5, generations=6, floor=33, ceiling=1600)
    need = np.linspace(40, 400, 12)
    scheme, group, best = np.full(12, 128), slice(0, 5), -np.inf
    while not strategy.done:
        candidates = strategy.ask()
        if strategy.group != group:
            scheme, group = strategy.best[0], strategy.group
        outside = np.ones(12, dtype=bool)
        outside[group] = False
        for candidate in candidates:
            assert (candidate[outside] == scheme[outside]).all()
            assert candidate.min() >= 33
            assert candidate.max() <= 1600
        values = [fitness(float(np.minimum(c / need, 1).mean()), float(c[group].mean()), 128) for c in candidates]
        strategy.tell(values)
        assert strategy.best[1] == max(best, *values)
        best = strategy.best[1]
    assert not (strategy.best[0] == 128).all()


def test_a_candidate_replaces_the_best_scheme_only_if_strictly_fitter():
    strategy = GroupedCMA(num_layers=4, group_size=2, generations=1)
    first = strategy.ask()
    strategy.tell([1.0] * len(first))
    second = strategy.ask()
    strategy.tell([1.0] * len(second))
    assert np.array_equal(strategy.best[0], first[0])


def test_grouped_finds_the_layer_that_needs_more():
    score = one_layer_matters(5, need=500)
    strategy = GroupedCMA(num_layers=12, budget=128, group_size=4, generations=30)
    drive(strategy, score, 1000)
    assert strategy.done
    assert strategy.best[0].argmax() == 5
    assert strategy.best[0][5] > 500


def test_a_group_of_one_layer_is_searched_as_well():
    strategy = GroupedCMA(num_layers=3, budget=128, group_size=1, generations=60)
    target = np.array([60, 400, 128])
    drive(strategy, lambda budgets: float(1 / (1 + np.abs(budgets / target - 1).sum())), 1000)
    assert strategy.done
    assert np.abs(strategy.best[0] - target).max() <= 5
    # Groups that have converged give up their remaining generations.
    assert strategy.generation < 3 * 60


@pytest.mark.filterwarnings("error")
def test_a_group_of_one_layer_may_have_little_room_or_none():
    ceiling = [160, 160, 160, 120, 160]
    strategy = GroupedCMA(num_layers=5, budget=128, group_size=1, generations=40, floor=120, ceiling=ceiling)
    drive(strategy, lambda budgets: float(-abs(budgets - 150).sum()) / 128, 1000)
    assert strategy.done
    assert np.abs(strategy.best[0] - np.minimum(150, ceiling)).max() <= 2


def test_grouped_leaves_layers_without_room_alone():
    ceiling = np.array([64, 1600, 1600, 64])
    strategy = GroupedCMA(num_layers=4, budget=128, group_size=2, generations=3, floor=64, ceiling=ceiling)
    for candidates in drive(strategy, one_layer_matters(1), 10):
        for candidate in candidates:
            assert candidate[0] == candidate[3] == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JointCMA(shape=(1, 2, 3)), "shape"),
        (lambda: JointCMA(shape=(0,)), "shape"),
        (lambda: JointCMA(budget=0), "budget"),
        (lambda: JointCMA(budget=20), "out of reach"),
        (lambda: JointCMA(sigma=0), "sigma"),
        (lambda: JointCMA(sigma="wide"), "sigma"),
        (lambda: JointCMA(population=2), "population"),
        (lambda: JointCMA(seed=-1), "seed"),
        (lambda: JointCMA(floor=10, ceiling=5), "floor <= ceiling"),
        (lambda: GroupedCMA(num_layers=2.5), "num_layers"),
        (lambda: GroupedCMA(group_size=0), "group_size"),
        (lambda: GroupedCMA(generations=0), "generations"),
        (lambda: GroupedCMA(budget=2000), "out of reach"),
        (lambda: RandomSearch(population=True), "population"),
        (lambda: RandomSearch(floor=1.5), "floor"),
        (lambda: StartOnly(seed=-1), "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_unknown_strategy_suggests_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'evolkv'"):
        STRATEGIES["evolvk"]
    assert set(STRATEGIES) == {"joint", "gradient", "start", "evolkv", "random"}
