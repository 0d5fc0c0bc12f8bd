from __future__ import annotations

import json
import logging
import os

import pytest

from evolkv.errors import TaskError, UsageError
from evolkv.evaluation.scoring import text_score
from evolkv.tasks import SPLITS, get_task
from evolkv.tasks.jsonl import JsonLines


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
        return str(path)

    return write


def rows(count):
    return [{"prompt": f"Question {i}?", "answers": [f"answer {i}"], "id": f"q{i}"} for i in range(count)]


def ids(examples):
    return [example.id for example in examples]


def test_row_becomes_an_example(write):
    row = {
        "id": 7,
        "prompt": "Which?\n",
        "answers": ["Food", "Meal"],
        "metric": "exact_match",
        "max_new_tokens": 5,
        "all_classes": ["Food", "Date"],
        "subset": "ignored",
    }
    (example,) = JsonLines(write(row), split="all").examples("train", 1, None)
    assert example.id == "7"
    assert example.prompt == "Which?\n"
    assert example.references == ("Food", "Meal")
    assert example.target == "Food"
    assert (example.metric, example.max_new_tokens) == ("exact_match", 5)
    assert example.extra == {"all_classes": ("Food", "Date")}


def test_row_says_what_of_an_answer_is_judged(write):
    row = {"prompt": "Which?", "answer": "Food", "metric": "exact_match"}
    judged = {"first_line": True, "stop": ["###", "\n"]}
    (example,) = JsonLines(write({**row, **judged}), split="all").examples("train", 1, None)
    assert (example.first_line, example.stop) == (True, ("###", "\n"))
    assert text_score("exact_match", "Food ### Meal", example) == 1.0
    (plain,) = JsonLines(write(row), split="all").examples("train", 1, None)
    assert (plain.first_line, plain.stop) == (False, ())
    assert text_score("exact_match", "Food ### Meal", plain) == 0.0


def test_row_may_give_one_answer_and_nothing_else(write):
    (example,) = JsonLines(write({"prompt": "Which?", "answer": "this"}), split="all").examples("report", 1, None)
    assert example.references == ("this",)
    assert example.target == " this"
    assert (example.id, example.metric, example.max_new_tokens) == ("rows-1", "contains", 32)


def test_settings_of_the_task_override_those_of_the_rows(write):
    path = write({"prompt": "a", "answer": "b", "metric": "exact_match", "max_new_tokens": 5})
    (example,) = JsonLines(path, metric="contains", max_new_tokens=9, split="all").examples("train", 1, None)
    assert (example.metric, example.max_new_tokens) == ("contains", 9)


def test_logprob_is_a_metric_a_row_may_name(write):
    path = write({"prompt": "a", "answer": "b", "metric": "logprob"})
    assert JsonLines(path, split="all").examples("train", 1, None)[0].metric == "logprob"


def test_splits_share_out_all_rows_whatever_the_seeds(write):
    task = JsonLines(write(*rows(40)))
    drawn = {split: set(ids(task.examples(split, 100, None, seed))) for seed, split in enumerate(SPLITS)}
    assert [len(drawn[split]) for split in SPLITS] == [10, 10, 20]
    assert len(set.union(*drawn.values())) == 40


def test_splits_do_not_depend_on_the_order_of_rows(write):
    first = {split: set(ids(JsonLines(write(*rows(40))).examples(split, 20, None))) for split in SPLITS}
    second = {split: set(ids(JsonLines(write(*rows(40)[::-1])).examples(split, 20, None))) for split in SPLITS}
    assert first == second


def test_seed_sets_the_order_within_a_split(write):
    task = JsonLines(write(*rows(80)))
    first, again, other = (ids(task.examples("report", 40, None, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert set(first) == set(other)
    assert ids(task.examples("report", 5, None, seed=1)) == first[:5]


def test_overriding_the_metric_draws_the_same_rows(write):
    path = write(*rows(40))
    plain, overridden = (JsonLines(path, metric=m).examples("report", 7, None) for m in (None, "logprob"))
    assert ids(plain) == ids(overridden)


def test_split_all_gives_every_row_to_every_split(write):
    task = JsonLines(write(*rows(6)), split="all")
    assert all(set(ids(task.examples(split, 6, None))) == {f"q{i}" for i in range(6)} for split in SPLITS)
    # As long as there are enough, training and validation share none.
    assert not set(ids(task.examples("train", 3, None))) & set(ids(task.examples("validation", 3, None)))


def test_rows_with_the_same_prompt_stay_in_one_split(write):
    data = [{"prompt": f"Question {i % 9}?", "answer": str(i)} for i in range(90)]
    task = JsonLines(write(*data))
    prompts = [{e.prompt for e in task.examples(split, 90, None)} for split in SPLITS]
    assert [len(p) for p in prompts] == [2, 2, 5]
    assert len(set.union(*prompts)) == 9


def test_duplicate_rows_are_dropped_and_counted(write, caplog):
    caplog.set_level(logging.INFO, logger="evolkv")
    duplicates = [{**row, "id": "copy"} for row in rows(3)]
    examples = JsonLines(write(*rows(8), *duplicates), split="all").examples("train", 8, None)
    assert sorted(ids(examples)) == [f"q{i}" for i in range(8)]
    assert "dropped 3 duplicate rows" in caplog.text


def test_too_few_rows_give_all_of_them_with_a_warning(write, caplog):
    assert len(JsonLines(write(*rows(8))).examples("report", 10, None)) == 4
    assert "split 'report' has 4 rows; using all of them, not 10" in caplog.text


def test_blank_lines_byte_order_mark_and_line_separators_in_texts_are_harmless(write):
    path = write(
        "\ufeff" + json.dumps({"prompt": "a", "answer": "b"}) + "\r",
        "",
        '{"prompt": "c\u2028d", "answer": "e"}',
        "",
    )
    examples = JsonLines(path, split="all").examples("train", 2, None)
    assert {e.prompt for e in examples} == {"a", "c\u2028d"}
    assert set(ids(examples)) == {"rows-1", "rows-3"}


def test_chat_puts_the_prompt_in_the_template(write, tokenizer):
    path = write({"prompt": "Which?", "answer": "this"})
    (example,) = JsonLines(path, split="all", chat=True).examples("train", 1, tokenizer)
    assert example.prompt.endswith("<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n")
    assert example.target == "this"


def test_chat_without_a_template_is_refused(write):
    with pytest.raises(TaskError, match="no chat template"):
        JsonLines(write(*rows(4)), chat=True).examples("train", 1, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", ', "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ('["a"]', "line 2: expected a JSON object .* not a list"),
        ({"answers": ["b"]}, "line 2: prompt is missing"),
        ({"prompt": 3, "answers": ["b"]}, "line 2: prompt is 3, expected a valid string"),
        ({"prompt": " ", "answers": ["b"]}, "line 2: prompt is ' ', expected a text that is not blank"),
        ({"prompt": "\ud800", "answers": ["b"]}, "line 2: prompt: .* is half of a character"),
        ({"prompt": "a"}, "line 2: expected either 'answers', a list of texts, or 'answer'"),
        ({"prompt": "a", "answers": "b"}, "line 2: answers is 'b', expected a valid list"),
        ({"prompt": "a", "answers": []}, "line 2: answers is empty"),
        ({"prompt": "a", "answers": [None]}, r"line 2: answers\[0\] is None, expected a valid string"),
        ({"prompt": "a", "answer": True}, "line 2: answer is True, expected a valid string"),
        (
            {"prompt": "a", "answer": "b", "metric": "contain"},
            "line 2: metric: unknown metric 'contain'. Did you mean 'contains'",
        ),
        ({"prompt": "a", "answer": "b", "metric": ["contains"]}, "line 2: metric is .*, expected a valid string"),
        (
            {"prompt": "a", "answer": "b", "max_new_tokens": 0},
            "line 2: max_new_tokens is 0, expected greater than or equal to 1",
        ),
        (
            {"prompt": "a", "answer": "b", "max_new_tokens": "many"},
            "line 2: max_new_tokens is 'many', expected a valid integer",
        ),
        ({"prompt": "a", "answer": "b", "all_classes": "x"}, "line 2: all_classes is 'x', expected a valid list"),
        ({"prompt": "a", "answer": "b", "id": [1]}, r"line 2: id is \[1\], expected a valid string"),
        ({"prompt": "a", "answer": "b", "id": "\ud8006"}, "line 2: id: .* is half of a character"),
        ({"prompt": "a", "answer": "b", "answers": ["b"]}, "line 2: expected either 'answers'"),
        ({"prompt": "a", "answer": "b", "first_line": 1}, "line 2: first_line is 1, expected a valid boolean"),
        ({"prompt": "a", "answer": "b", "stop": "x"}, "line 2: stop is 'x', expected a valid list"),
        (
            {"prompt": "a", "answer": "b", "stop": [""]},
            r"line 2: stop\[0\] is empty",
        ),
    ],
)
def test_malformed_row_is_named_by_file_and_line(row, message, write):
    with pytest.raises(TaskError, match=r"rows\.jsonl " + message) as error:
        JsonLines(write({"prompt": "a", "answer": "b"}, row), split="all").examples("train", 1, None)
    assert "\n" not in str(error.value)


def test_file_that_is_empty_missing_a_folder_or_not_utf8_is_refused(write, tmp_path):
    with pytest.raises(TaskError, match="has no rows"):
        JsonLines(write("", "  ")).examples("train", 1, None)
    with pytest.raises(TaskError, match="does not exist"):
        JsonLines(str(tmp_path / "nowhere.jsonl")).examples("train", 1, None)
    with pytest.raises(TaskError, match="is a folder"):
        JsonLines(str(tmp_path)).examples("train", 1, None)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "a", "answer": "b"}\n{"prompt": "caf\xe9", "answer": "b"}\n')
    with pytest.raises(TaskError, match=r"latin\.jsonl line 2: byte 0xe9 is not UTF-8"):
        JsonLines(str(latin)).examples("train", 1, None)


def test_a_pipe_is_refused_because_it_can_be_read_only_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(TaskError, match="is a pipe or a device, and a task reads its file several times"):
        get_task(f"jsonl:path={tmp_path / 'pipe.jsonl'}").check_files()


def test_split_without_rows_is_refused(write):
    with pytest.raises(TaskError, match="split 'train' is empty: the file has 3 different prompts"):
        JsonLines(write(*rows(3))).examples("train", 1, None)


def test_settings_out_of_range_are_refused():
    with pytest.raises(TaskError, match="max_new_tokens=0 is out of range"):
        get_task("jsonl:path=x,max_new_tokens=0")
    with pytest.raises(UsageError, match=r"unknown metric 'exact'\. Did you mean 'exact_match'"):
        get_task("jsonl:path=x,metric=exact")
    with pytest.raises(TaskError, match="split='some' is unknown"):
        JsonLines("x", split="some")
    with pytest.raises(TaskError, match="context=1 is out of range"):
        JsonLines("x", context=1)


def test_long_prompts_lose_their_middle_where_a_length_is_given(write, tokenizer):
    path = write({"prompt": "start " + "more " * 100 + "end", "answer": "a"}, {"prompt": "short", "answer": "a"})
    cut, short = sorted(
        JsonLines(path, context=20, split="all").examples("train", 2, tokenizer), key=lambda e: -len(e.prompt)
    )
    assert cut.prompt.startswith("start more")
    assert cut.prompt.endswith("more end")
    assert len(tokenizer(cut.prompt)["input_ids"]) == 20
    assert short.prompt == "short"


def test_a_row_that_its_metric_cannot_score_is_named_by_line(write):
    path = write({"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d", "metric": "classification"})
    with pytest.raises(TaskError, match=r"rows\.jsonl line 2: metric 'classification' needs the names of all classes"):
        JsonLines(path, split="all").examples("train", 2, None)


@pytest.mark.parametrize(
    ("row", "accepted"),
    [
        ({"answer": "seven", "metric": "count"}, False),
        ({"answers": ["seven", "7"], "metric": "count"}, True),
        ({"answer": "news", "metric": "classification", "all_classes": ["sport", "art"]}, False),
        ({"answer": "art", "metric": "classification", "all_classes": ["sport", "art"]}, True),
        ({"answer": "the", "metric": "qa_f1"}, False),
        ({"answer": "many", "metric": "gsm8k"}, False),
        ({"answer": "\nAnswer: 7", "metric": "contains", "stop": ["\n"]}, False),
        ({"answer": "7\nor 8", "metric": "contains", "first_line": True}, False),
        ({"answer": "x = 1  # one", "metric": "code_sim"}, True),
        ({"answer": "seven", "metric": "logprob"}, True),
    ],
)
def test_a_row_whose_own_answer_cannot_score_is_refused_with_its_line(row, accepted, write):
    task = JsonLines(str(write({"prompt": "a", "answer": "b"}, {"prompt": "c", **row})))
    if accepted:
        task.check_files()
        return
    with pytest.raises(TaskError, match=r"rows\.jsonl line 2: the answer '.*' scores 0 under metric"):
        task.check_files()


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d", "prompt": "e"}\n')
    with pytest.raises(TaskError, match=r"rows\.jsonl line 2: key 'prompt' is given twice; give it once"):
        JsonLines(str(path)).check_files()


def test_a_blank_id_is_refused(write):
    with pytest.raises(TaskError, match=r"rows\.jsonl line 1: id is ' ', expected a text that is not blank"):
        JsonLines(write({"id": " ", "prompt": "a", "answer": "b"}), split="all").examples("train", 1, None)
