"""Budgets as a server holds them, in blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import evolkv
from evolkv.budgets import held_in_blocks
from evolkv.errors import UsageError

TASK = "niah:context=300"


@given(st.integers(1, 5000), st.integers(1, 6000), st.integers(1, 256))
def test_held_is_the_budget_rounded_up_to_where_a_block_begins(tokens, budget, block_size):
    held = int(held_in_blocks([budget], tokens, block_size)[0])
    kept = min(budget, tokens)
    assert kept <= held <= min(tokens, kept + block_size - 1)
    assert held == tokens or (tokens - held) % block_size == 0
    assert held_in_blocks([budget], tokens, 1).tolist() == [kept]


def test_budgets_keep_their_shape():
    # Of 100 tokens the last 40 are kept, and blocks begin at 32 and 64.
    assert held_in_blocks(np.full((3, 2), 40), 100, 32).tolist() == [[68, 68]] * 3
    assert held_in_blocks([[36], [100], [200]], 100, 32).tolist() == [[36], [100], [100]]


def test_eval_holds_what_a_server_holds(small):
    settings = {"task": TASK, "methods": ["snapkv", "full"], "budgets": [40], "samples": 2}
    exact, held = (evolkv.evaluate(*small, **settings, block_size=size) for size in (None, 32))
    assert exact[0]["mean_budget"] == 40
    assert 40 < held[0]["mean_budget"] < 72
    assert held[0]["block_size"] == 32
    assert "block_size" not in exact[0]
    assert held[1]["score"] == exact[1]["score"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"block_size": 0}, "--block-size is 0"), ({"block_size": 32, "prefill_chunk": 64}, "both given")],
)
def test_block_sizes_that_make_no_sense(settings, message, small):
    with pytest.raises(UsageError, match=message):
        evolkv.evaluate(*small, task=TASK, methods="snapkv", budgets=40, samples=1, **settings)
