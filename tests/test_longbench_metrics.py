"""The metrics of LongBench, RULER and GSM8K.

Expected scores come from running LongBench's metrics.py (with rouge 1.0.1, jieba 0.42.1 and fuzzywuzzy 0.18.0
without python-Levenshtein), RULER's constants.py and lm-evaluation-harness's filters and exact_match on the same texts.
"""

from __future__ import annotations

import os
import string
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolkv.errors import TaskError, UsageError
from evolkv.tasks.metrics import get_metric

TREC = ["Food", "Date", "Order, rank", "Individual"]


def score(name, prediction, *references, **extra):
    return get_metric(name)(prediction, references, **extra)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The  Cat, sat!", ["a cat sat down"], 0.8),
        ("Paris", ["London", "the city of Paris"], 0.5),
        ("no no no yes", ["no yes yes"], 0.5714285714285715),
        ("rock-n-roll", ["rock n roll"], 0.0),
        ("the", ["the"], 0.0),
        ("", [""], 0.0),
    ],
)
def test_qa_f1_counts_shared_words_without_articles_and_punctuation(prediction, references, expected):
    assert score("qa_f1", prediction, *references) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("2012年，铜仁市的财政总收入增长了25.89%。", "铜仁市财政总收入增长25.89%", 0.7142857142857143),
        ("《红楼梦》的作者是曹雪芹", "曹雪芹", 0.2857142857142857),
        ("北京 大学", "北京大学", 0.0),
        ("Hello, World！", "hello world", 1.0),
        ("。", "。", 0.0),
    ],
)
def test_qa_f1_zh_counts_shared_words_that_jieba_finds(prediction, reference, expected):
    assert score("qa_f1_zh", prediction, reference) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The cat sat on the mat. It slept.", ["The cat lay on the mat. Then it slept well."], 0.6666666617283951),
        ("a b c d", ["d c b a", "a c"], 0.6666666622222223),
        ("a summary without difference", ["a summary without difference"], 0.999999995),
        ("Case Counts", ["case counts"], 0.0),
        (" ", [" "], 0.999999995),
        ("", ["a"], 0.0),
        ("a", [""], 0.0),
        ("...", ["..."], 0.0),
    ],
)
def test_rouge_l_counts_words_in_common_order_and_texts_without_a_sentence_score_0(prediction, references, expected):
    assert score("rouge_l", prediction, *references) == pytest.approx(expected, abs=1e-9)


def test_rouge_l_zh_counts_words_that_jieba_finds():
    shared = score("rouge_l_zh", "会议讨论了缓存压缩的方法。", "本次会议主要讨论缓存压缩方法。")
    assert shared == pytest.approx(0.749999995, abs=1e-9)
    assert score("rouge_l_zh", "", "会议") == 0


def test_rouge_l_gives_up_on_very_long_sentences_whoever_calls():
    def from_depth(depth, words):
        return from_depth(depth - 1, words) if depth else score("rouge_l", "a" + " b" * words, "a")

    assert from_depth(0, 1100) == 0
    assert from_depth(600, 600) == from_depth(0, 600) == pytest.approx(2 / 3, abs=1e-8)


@pytest.mark.parametrize(
    ("prediction", "references", "all_classes", "expected"),
    [
        ("Type: Food", ["Food"], TREC, 1.0),
        ("Food or Date", ["Date"], TREC, 0.5),
        ("Food", ["Date", "Food"], TREC, 1.0),
        ("food", ["Food"], TREC, 0.0),
        ("Date", ["Food"], TREC, 0.0),
        ("属于教育类", ["教育"], ("农业、农村", "军事", "教育"), 1.0),
        ("soccer player", ["soccer player"], ["soccer", "soccer player"], 1.0),
        ("soccer player", ["soccer player"], ["soccer", "play", "soccer player"], 0.5),
    ],
)
def test_classification_shares_the_point_among_the_classes_named(prediction, references, all_classes, expected):
    assert score("classification", prediction, *references, all_classes=all_classes) == expected


@pytest.mark.parametrize("extra", [{}, {"all_classes": None}, {"all_classes": "Food"}])
def test_classification_without_classes_says_what_is_missing(extra):
    with pytest.raises(TaskError, match=r"needs the names of all classes.* 'all_classes'") as error:
        score("classification", "Food", "Food", **extra)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "prediction", "references", "expected"),
    [
        ("retrieval", "Paragraph 7", ["Paragraph 7"], 1.0),
        ("retrieval", "7 or 17, maybe 7", ["Paragraph 7"], 0.6666666666666666),
        ("retrieval", "17", ["Paragraph 7", "Paragraph 17"], 1.0),
        ("retrieval", "Paragraph seven", ["Paragraph 7"], 0.0),
        ("retrieval", "07", ["Paragraph 7"], 0.0),
        ("retrieval_zh", "段落5", ["段落5"], 1.0),
        ("retrieval_zh", "段落5和段落29", ["段落29"], 0.5),
        ("retrieval_zh", "", ["段落29"], 0.0),
        ("count", "There are 11 paragraphs", ["11"], 1.0),
        ("count", "11 of 30 and 11", ["11"], 0.6666666666666666),
        ("count", "11.0", ["11"], 0.5),
        ("count", "eleven", ["11"], 0.0),
        ("count", "011", ["11"], 0.0),
    ],
)
def test_retrieval_and_count_give_the_share_of_right_numbers(name, prediction, references, expected):
    assert score(name, prediction, *references) == expected


@pytest.mark.parametrize(
    ("name", "reference", "shape"),
    [("retrieval", "段落7", "Paragraph 7"), ("retrieval_zh", "Paragraph 7\nor so", "段落7")],
)
def test_retrieval_refuses_a_reference_that_names_no_paragraph(name, reference, shape):
    with pytest.raises(TaskError, match=f"metric '{name}': reference .* names no paragraph; .*'{shape}'") as error:
        score(name, "7", reference)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("    return self.total", "    return self.total", 1.0),
        ("int x = getValue(a);", "int y = getValues(a, b);", 0.86),
        ("\n```python\n# the sum\nreturn total + 1\nmore()", "return total", 0.86),
        ("\n \nreturn x", "return x", 0.22),
        ("# only a comment", "return x", 0.0),
        ("# only a comment", "", 1.0),
        # Above 200 characters difflib sets frequent ones aside.
        ("ab" * 150, "ba" * 150, 0.0),
    ],
)
def test_code_sim_compares_the_first_line_of_code_as_difflib_does(prediction, reference, expected):
    assert score("code_sim", prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "flexible", "strict"),
    [
        ("She has 3 + 15 = 18 eggs.", "18", 1, 0),
        ("#### 18", "9 + 9 = <<9+9=18>>18\n#### 18", 1, 1),
        ("#### 18 eggs in 2 days", "18", 0, 1),
        ("#### 17\n#### 18", "18", 1, 0),
        ("####18", "18", 1, 0),
        ("#### $18", "18", 1, 0),
        ("The total is $1,800.", "1800", 1, 0),
        ("The answer is -5", "-5", 1, 0),
        ("18.00", "18", 0, 0),
        ("It is 18...", "18", 0, 0),
        ("eighteen", "18", 0, 0),
        ("", "18", 0, 0),
    ],
)
def test_gsm8k_takes_the_last_number_or_strictly_the_first_after_four_hashes(prediction, reference, flexible, strict):
    assert score("gsm8k", prediction, reference) == flexible
    assert score("gsm8k", prediction, reference, mode="flexible") == flexible
    assert score("gsm8k", prediction, reference, mode="strict") == strict


@pytest.mark.parametrize("mode", ["strikt", None, ["strict"]])
def test_gsm8k_refuses_an_unknown_mode(mode):
    with pytest.raises(UsageError, match=r"unknown gsm8k mode .*Known: flexible, strict"):
        score("gsm8k", "18", "18", mode=mode)


@pytest.mark.parametrize(
    ("prediction", "references", "share", "any_of_them"),
    [
        ("Values: 123 and abc.", ["123", "ABC", "zzz"], 2 / 3, 1),
        ("x", ["y"], 0, 0),
        ("", ["a"], 0, 0),
        ("a", [" a"], 0, 0),
        ("anything", [""], 1, 1),
    ],
)
def test_ruler_wants_all_references_or_any(prediction, references, share, any_of_them):
    assert score("ruler_all", prediction, *references) == pytest.approx(share, abs=1e-9)
    assert score("ruler_part", prediction, *references) == any_of_them


TEXTS = st.text(st.sampled_from("abc thean 0123456789.,$#`/-\n\t，。的北京大学《》é😀"), max_size=40)
FREE = ["qa_f1", "qa_f1_zh", "rouge_l", "rouge_l_zh", "classification", "count", "code_sim", "gsm8k"]
WORDS = st.lists(st.text(string.ascii_lowercase, min_size=3, max_size=8).filter("the".__ne__), min_size=1, max_size=9)


@pytest.mark.parametrize("name", [*FREE, "ruler_all", "ruler_part"])
@settings(max_examples=60, deadline=None)
@given(prediction=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=3))
def test_any_texts_score_between_0_and_1(name, prediction, references):
    value = score(name, prediction, *references, all_classes=references)
    assert isinstance(value, float)
    assert 0 <= value <= 1


@pytest.mark.parametrize("name", FREE)
@settings(max_examples=60, deadline=None)
@given(prediction=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=3))
def test_the_best_reference_counts(name, prediction, references):
    extra = {"all_classes": references}
    each = [score(name, prediction, reference, **extra) for reference in references]
    assert score(name, prediction, *references, **extra) == max(each)


@pytest.mark.parametrize("name", ["qa_f1", "qa_f1_zh", "rouge_l", "rouge_l_zh", "code_sim", "ruler_all", "ruler_part"])
@settings(max_examples=60, deadline=None)
@given(words=WORDS)
def test_a_perfect_match_scores_1(name, words):
    text = " ".join(words)
    assert score(name, text, text) == pytest.approx(1, abs=1e-8)


@pytest.mark.slow
def test_libraries_are_loaded_at_first_use_and_write_nothing(tmp_path):
    code = (
        "import sys, evolkv, evolkv.cli, evolkv.tasks.metrics as m\n"
        "print(sorted({'jieba', 'rouge'} & set(sys.modules)))\n"
        "print(m.get_metric('rouge_l_zh')('会议', ['会议']))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "0.999999995"]
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())
