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


def test_numbers_of_any_type_give_floats():
    assert type(cache_score(100, 128)) is float
    assert type(fitness(np.float32(0.5), np.int64(100), 128)) is float


def test_less_than_the_target_costs_less_than_more():
    assert max(range(1, 300), key=lambda mean: cache_score(mean, 128)) == 128
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
