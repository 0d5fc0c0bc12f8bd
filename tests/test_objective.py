from __future__ import annotations

import numpy as np
import pytest

from evolkv.errors import UsageError
from evolkv.evolution.objective import cache_score, fitness


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        (128, 1.0),
        (64, 0.9),  # 1 - 0.2 * (1 - 0.5)
        (0, 0.8),
        (160, 0.75),  # 1 - 32 / 128
        (256, 0.0),
        (1000, 0.0),
    ],
)
def test_cache_score_follows_equation_2(mean, expected):
    assert cache_score(mean, 128) == pytest.approx(expected)


def test_gamma_sets_the_price_of_staying_below_the_target():
    assert cache_score(64, 128, gamma=0.0) == 1.0
    assert cache_score(64, 128, gamma=1.0) == 0.5
    assert cache_score(160, 128, gamma=1.0) == cache_score(160, 128, gamma=0.0)


def test_fitness_follows_equation_1():
    assert fitness(0.5, 128, 128) == pytest.approx(0.5 * 1.3)
    assert fitness(0.5, 64, 128) == pytest.approx(0.5 * (1 + 0.3 * 0.9))
    assert fitness(0.5, 64, 128, lam=1.0, gamma=0.5) == pytest.approx(0.5 * 1.75)
    assert fitness(0.5, 400, 128) == 0.5
    assert fitness(0.5, 64, 128, lam=0) == 0.5


def test_numbers_give_floats_and_arrays_give_arrays():
    assert type(cache_score(100, 128)) is float
    assert type(fitness(0.5, np.int64(100), 128)) is float
    means = np.array([0, 64, 128, 192, 500])
    scores = np.linspace(0, 1, 5)
    assert cache_score(means, 128).tolist() == [cache_score(int(m), 128) for m in means]
    assert fitness(scores, means, 128).tolist() == [
        fitness(float(s), int(m), 128) for s, m in zip(scores, means, strict=True)
    ]


def test_less_than_the_target_costs_less_than_more():
    means = np.arange(1, 300)
    scores = cache_score(means, 128)
    assert means[scores.argmax()] == 128
    assert cache_score(128 - 32, 128) > cache_score(128 + 32, 128)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cache_score(-1, 128), "mean >= 0"),
        (lambda: cache_score(100, 0), "target > 0"),
        (lambda: cache_score(float("nan"), 128), "mean must be finite"),
        (lambda: cache_score("many", 128), "mean must be a number"),
        (lambda: cache_score(100, 128, gamma=1.5), "gamma"),
        (lambda: fitness(float("nan"), 100, 128), "score must be finite"),
        (lambda: fitness(-0.1, 100, 128), "score must not be negative"),
        (lambda: fitness(0.5, 100, 128, lam=-1), "lam"),
    ],
)
def test_values_out_of_range_are_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
