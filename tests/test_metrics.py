from __future__ import annotations

import pytest

from evolkv.errors import UsageError
from evolkv.tasks.metrics import METRICS, check_metric, get_metric


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        (" 1234567.", ["1234567"], 1.0),
        ("The answer is STRASSE", ["straße"], 1.0),
        ("one of several", ["two", "several"], 1.0),
        ("123456 7", ["1234567"], 0.0),
        ("", ["1234567"], 0.0),
        ("anything", [""], 0.0),
        ("anything", [" any "], 1.0),
        ("anything", [], 0.0),
    ],
)
def test_contains_looks_for_any_reference_whatever_its_case(prediction, references, score):
    assert get_metric("contains")(prediction, references) == score


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("  New\n York ", ["new york"], 1.0),
        ("new york", ["London", "New  York"], 1.0),
        ("New York.", ["New York"], 0.0),
        ("in New York", ["New York"], 0.0),
        ("", ["x"], 0.0),
        ("x", [], 0.0),
    ],
)
def test_exact_match_ignores_case_and_whitespace_only(prediction, references, score):
    assert get_metric("exact_match")(prediction, references) == score


@pytest.mark.parametrize("name", METRICS)
def test_text_metrics_take_extra_arguments_and_score_between_0_and_1(name):
    references = ("Paragraph 1 (段落1)", "Paragraph 2 (段落2)")
    score = get_metric(name)("Paragraph 1", references, all_classes=references, depth=0.5)
    assert isinstance(score, float)
    assert 0 <= score <= 1


@pytest.mark.parametrize("name", METRICS)
def test_without_references_nothing_is_right(name):
    assert get_metric(name)("1", (), all_classes=["1"]) == 0


def test_metrics_are_those_that_files_may_name():
    names = {
        "classification",
        "code_sim",
        "contains",
        "count",
        "exact_match",
        "gsm8k",
        "logprob",
        "qa_f1",
        "qa_f1_zh",
        "retrieval",
        "retrieval_zh",
        "rouge_l",
        "rouge_l_zh",
        "ruler_all",
        "ruler_part",
    }
    assert names == {*METRICS, "logprob"}


def test_logprob_is_a_name_but_not_a_text_metric():
    check_metric("logprob")
    assert "logprob" not in METRICS
    with pytest.raises(UsageError, match="probabilities, not text"):
        get_metric("logprob")


def test_unknown_metric_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"unknown metric 'log_prob'\. Did you mean 'logprob'"):
        get_metric("log_prob")


@pytest.mark.parametrize("metric", ["exact_match", "contains"])
def test_letters_are_the_same_in_every_unicode_form(metric):
    composed, decomposed = "CAF\u00c9", "cafe\u0301"
    assert get_metric(metric)(composed, [decomposed]) == get_metric(metric)(decomposed, [composed]) == 1.0
    assert get_metric(metric)("cafe", [composed]) == 0.0
