from __future__ import annotations

import json

import huggingface_hub
import pytest

from evolkv.errors import TaskError
from evolkv.evaluation.scoring import text_score
from evolkv.models.chat import user_message
from evolkv.tasks import SPLITS, Example, fingerprint, format_spec, get_task
from evolkv.tasks.gsm8k import Gsm8k


@pytest.fixture
def write(tmp_path):
    """Writes a file of rows; returns its path."""

    def write(*rows, name="maths.jsonl"):
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write


def row(number=0, **changes):
    answer = f"It is {number}+1=<<{number}+1={number + 1}>>{number + 1}.\n#### {number + 1}"
    return {"question": f"What comes after {number}?", "answer": answer, **changes}


def solved(number):
    return f"Question: {row(number)['question']}\nAnswer: {row(number)['answer']}\n\n"


def asked(examples):
    return {int(example.references[0]) - 1 for example in examples}


def shots(example):
    return example.prompt.rpartition("Question:")[0]


def test_prompt_is_the_shots_and_the_open_question(write, tokenizer):
    task = Gsm8k(write(row(0)), shots=2, shots_path=write(row(8), row(9), row(10), name="shots.jsonl"), split="all")
    (example,) = task.examples("report", 1, tokenizer)
    assert example.prompt == (
        "Question: What comes after 8?\nAnswer: It is 8+1=<<8+1=9>>9.\n#### 9\n\n"
        "Question: What comes after 9?\nAnswer: It is 9+1=<<9+1=10>>10.\n#### 10\n\n"
        "Question: What comes after 0?\nAnswer:"
    )
    assert (example.references, example.metric, example.max_new_tokens) == (("1",), "gsm8k", 256)
    assert example.id == "maths-1"


def test_target_is_the_solution_as_it_would_follow_the_prompt(write, tokenizer):
    path = write(row(0))
    plain, chat = (
        Gsm8k(path, shots=0, split="all", chat=chat).examples("report", 1, tokenizer)[0] for chat in (False, True)
    )
    assert plain.target == " It is 0+1=<<0+1=1>>1.\n#### 1"
    assert chat.target == "It is 0+1=<<0+1=1>>1.\n#### 1"
    assert chat.prompt == user_message(tokenizer, plain.prompt)


def test_a_chat_template_that_is_asked_for_has_to_be_there(write, tokenizer, monkeypatch):
    task = Gsm8k(write(row(0)), shots=0, split="all", chat=True)
    assert task.examples("report", 1, tokenizer)[0].prompt.endswith("<|im_start|>assistant\n")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(TaskError, match="chat=true, but this tokenizer has no chat template; use chat=false"):
        task.examples("report", 1, tokenizer)


@pytest.mark.parametrize(
    ("answer", "number"),
    [("So.\n#### 18", "18"), ("#### 1,450,000", "1,450,000"), ("#### -5", "-5"), ("#### 1\n#### $2.50 \n", "$2.50")],
)
def test_reference_is_the_final_number(answer, number, write, tokenizer):
    task = Gsm8k(write(row(answer=answer)), shots=0, split="all")
    (example,) = task.examples("report", 1, tokenizer)
    assert example.references == (number,)
    assert text_score("gsm8k", f"It is {number.replace(',', '')}.", example) == 1


def test_all_examples_of_a_file_share_their_shots(write, tokenizer):
    task = Gsm8k(write(*(row(i) for i in range(40))), shots=3)
    drawn = [e for seed, split in enumerate(SPLITS) for e in task.examples(split, 5, tokenizer, seed)]
    assert len(drawn) == 15
    assert len({shots(example) for example in drawn}) == 1
    assert shots(drawn[0]).count("Question:") == 3


def test_shots_serve_train_and_are_never_drawn(write, tokenizer):
    rows = [row(i) for i in range(40)]
    path = write(*rows)
    without = {split: asked(Gsm8k(path, shots=0).examples(split, 40, tokenizer)) for split in SPLITS}
    examples = {split: Gsm8k(path, shots=3).examples(split, 40, tokenizer) for split in SPLITS}
    left = {split: asked(examples[split]) for split in SPLITS}
    assert [len(without[split]) for split in SPLITS] == [10, 10, 20]
    assert set.union(*without.values()) == set(range(40))
    assert (left["validation"], left["report"]) == (without["validation"], without["report"])
    shown = without["train"] - left["train"]
    assert len(shown) == 3
    assert all(solved(number) in shots(examples["report"][0]) for number in shown)
    write(*rows[::-1])
    assert {split: asked(Gsm8k(path, shots=3).examples(split, 40, tokenizer)) for split in SPLITS} == left


def test_problem_that_serves_as_a_shot_is_left_out_of_another_file_and_of_split_all(write, tokenizer):
    path = write(*(row(i) for i in range(8)))
    other = write(row(2), row(90), name="shots.jsonl")
    assert asked(Gsm8k(path, 2, other, split="all").examples("train", 9, tokenizer)) == {0, 1, 3, 4, 5, 6, 7}
    examples = Gsm8k(path, 2, split="all").examples("report", 9, tokenizer)
    assert len(asked(examples)) == 6
    assert all(solved(number) not in examples[0].prompt for number in asked(examples))
    assert asked(Gsm8k(path, 2, split="all").examples("train", 9, tokenizer)) == asked(examples)


def test_fewer_examples_are_the_first_of_more_and_the_seed_chooses(write, tokenizer):
    task = Gsm8k(write(*(row(i) for i in range(80))), shots=2)
    many = task.examples("report", 20, tokenizer, seed=1)
    assert task.examples("report", 5, tokenizer, seed=1) == many[:5]
    assert task.examples("report", 20, tokenizer, seed=2) != many


def test_answer_ends_where_the_model_makes_up_a_question(write, tokenizer):
    (example,) = Gsm8k(write(row(6)), shots=0, split="all").examples("report", 1, tokenizer)
    assert text_score("gsm8k", " It is 7.\n\nQuestion: What comes after 7?\nAnswer: 8", example) == 1
    assert text_score("gsm8k", " It is 7.<|im_end|> 8", example) == 1
    assert text_score("gsm8k", " It is 8.</s> 7", example) == 0
    assert text_score("gsm8k", " It is 7. Or 8", example) == 0


def test_first_of_several_stops_ends_an_answer_and_so_may_its_first_line():
    example = Example("a", "p", ("two",), stop=("STOP", "END"), first_line=True)
    assert text_score("contains", "one END two STOP", example) == 0
    assert text_score("contains", "one STOP two END", example) == 0
    assert text_score("contains", "\none two END", example) == 1
    assert text_score("contains", "one\ntwo END", example) == 0


def test_mode_reaches_the_metric(write, tokenizer):
    flexible, strict = (
        Gsm8k(write(row(6)), shots=0, split="all", mode=mode).examples("report", 1, tokenizer)[0]
        for mode in ("flexible", "strict")
    )
    assert strict.extra == {"mode": "strict"}
    assert (text_score("gsm8k", "So 7", flexible), text_score("gsm8k", "So 7", strict)) == (1, 0)
    assert text_score("gsm8k", "#### 7, not 8", strict) == 1


def test_stop_texts_are_part_of_the_fingerprint():
    example, other = Example("a", "p", ("r",)), Example("a", "p", ("r",), stop=("x",))
    assert fingerprint([example]) != fingerprint([other])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"question": "a", ', "not valid JSON"),
        ({"question": "a"}, "answer is missing"),
        (row(question=" "), "question is ' ', expected a text that is not blank"),
        (row(answer=7), "answer is 7, expected a valid string"),
        (row(answer="It is 7."), "expected a text that ends in a number after '#### '"),
        (row(answer="#### 7 apples"), "ends in a number"),
        (row(answer="#### ."), "ends in a number"),
    ],
)
def test_malformed_row_is_named_by_file_and_line(bad, message, write, tokenizer):
    with pytest.raises(TaskError, match=rf"maths\.jsonl line 2: .*{message}|line 2: {message}") as error:
        Gsm8k(write(row(0), bad), shots=0).examples("report", 1, tokenizer)
    assert "\n" not in str(error.value)


def test_file_too_small_for_its_shots_is_refused(write, tokenizer):
    path = write(*(row(i) for i in range(12)))
    with pytest.raises(TaskError, match=r"shots=5, but .*maths\.jsonl \(what of it serves train\) has 3 problems"):
        Gsm8k(path).examples("report", 1, tokenizer)
    with pytest.raises(TaskError, match=r"shots=2, but .*shots\.jsonl has 1 problems"):
        Gsm8k(path, 2, write(row(0), name="shots.jsonl")).examples("report", 1, tokenizer)
    with pytest.raises(TaskError, match="split 'train' is empty: the file has 12 problems, of which 3 may be shots"):
        Gsm8k(path, 3).examples("train", 1, tokenizer)
    assert len(Gsm8k(path, 2).examples("train", 9, tokenizer)) == 1


def test_settings_out_of_range_are_refused():
    with pytest.raises(TaskError, match="shots=-1 is out of range"):
        get_task("gsm8k:path=x,shots=-1")
    with pytest.raises(TaskError, match="max_new_tokens=0 is out of range"):
        get_task("gsm8k:path=x,max_new_tokens=0")
    with pytest.raises(TaskError, match="mode='lax' is unknown; expected one of flexible, strict"):
        Gsm8k("x", mode="lax")
    with pytest.raises(TaskError, match="split='some' is unknown"):
        Gsm8k("x", split="some")


def test_spec_is_read_and_written():
    task = get_task("gsm8k:path=DIR/test.jsonl,shots=8,mode=strict")
    assert task == Gsm8k("DIR/test.jsonl", shots=8, mode="strict")
    assert get_task(format_spec(task)) == task


def parquet(path, rows):
    """Rows as the Hub keeps them."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(
        arrow.Table.from_pylist(rows, arrow.schema([("question", arrow.string()), ("answer", arrow.string())])), path
    )
    return str(path)


def test_parquet_gives_what_json_lines_gives(write, tmp_path, tokenizer):
    rows = [row(number) for number in range(12)]
    lines, table = write(*rows), parquet(tmp_path / "maths.parquet", rows)
    first, second = (Gsm8k(path, 2).examples("report", 9, tokenizer) for path in (lines, table))
    assert [example.prompt for example in first] == [example.prompt for example in second]
    assert [example.id for example in first] == [example.id for example in second]


def test_bad_parquet_is_named_with_its_row(tmp_path, tokenizer):
    path = parquet(tmp_path / "bad.parquet", [row(0), {"question": "Why?", "answer": None}])
    with pytest.raises(TaskError, match=r"bad\.parquet row 2: answer is None, expected a valid string"):
        Gsm8k(path).examples("report", 1, tokenizer)
    with pytest.raises(TaskError, match=r"none\.parquet has no rows"):
        Gsm8k(parquet(tmp_path / "none.parquet", [])).examples("report", 1, tokenizer)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "bad.parquet").read_bytes()[:-9])
    with pytest.raises(TaskError, match=r"cut\.parquet cannot be read as Parquet: .*; fetch it again") as error:
        Gsm8k(str(tmp_path / "cut.parquet")).examples("report", 1, tokenizer)
    assert "\n" not in str(error.value)
    with pytest.raises(TaskError, match=r"gone\.parquet does not exist"):
        Gsm8k(str(tmp_path / "gone.parquet")).examples("report", 1, tokenizer)


def test_without_a_path_the_hubs_copy_is_used(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        TaskError, match=r"gsm8k: .*openai/gsm8k cannot be fetched .* give path= a file of questions"
    ) as error:
        Gsm8k().examples("report", 1, tokenizer)
    assert "\n" not in str(error.value)
    repository = tmp_path / "datasets--openai--gsm8k"
    snapshot = repository / "snapshots" / ("0" * 40) / "main"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    parquet(snapshot / "test-00000-of-00001.parquet", [row(number) for number in range(40)])
    assert len(Gsm8k().examples("report", 3, tokenizer)) == 3
