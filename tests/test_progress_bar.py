"""The bars that a search and an evaluation draw in a notebook or on a terminal."""

from __future__ import annotations

import re

import evolkv
from evolkv.evaluation import EvaluationProgress
from evolkv.evolution import SearchProgress


def last_pictures(text):
    """The last picture of each bar, without its clock."""
    return [line.rpartition("\r")[2].partition("[")[0].strip() for line in text.rstrip("\n").split("\n")]


def test_each_stage_gets_a_bar(capfd):
    draw = evolkv.progress_bar()
    for stage, done, total in (("prefill", 1, 2), ("prefill", 2, 2), ("prefill", 2, 2), ("search", 3, 9)):
        draw(SearchProgress(stage, done, total, score=None if stage == "prefill" else 0.75, budget=64))
    draw(SearchProgress("search", 9, 9, score=0.875, budget=64))
    draw(SearchProgress("search", 9, 9, score=0.875, budget=128))
    text = capfd.readouterr().err
    bars = last_pictures(text)
    assert [re.match(r"[\w, ]+: 100%", bar)[0] for bar in bars] == [
        "prefill, budget 64: 100%",
        "search, budget 64: 100%",
        "search, budget 128: 100%",
    ]
    assert "2/2" in bars[0]
    assert "score 0.8750" in text


def test_an_evaluation_gets_one_bar(capfd):
    draw = evolkv.progress_bar()
    for done in (2, 3, 4):
        draw(EvaluationProgress(done, 4, recorded=2))
    (bar,) = last_pictures(capfd.readouterr().err)
    assert bar.startswith("evaluation: 100%")
