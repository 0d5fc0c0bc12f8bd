from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from evolkv.errors import TaskError, UsageError
from evolkv.tasks import TASKS, Example, Mixture, encode_prompt, fingerprint, format_spec, get_task, get_tasks
from evolkv.tasks.jsonl import JsonLines
from evolkv.tasks.niah import NeedleInHaystack

paths = st.text(st.sampled_from("ab\\\\,,=: 'é\n"), max_size=12)


def test_bare_name_gives_the_defaults():
    assert get_task("niah") == get_task("niah:") == NeedleInHaystack()


def test_values_take_the_types_of_the_fields():
    assert get_task("niah:context=600, needles=2,depth=0.25,chat=false") == NeedleInHaystack(
        context=600, needles=2, depth=0.25, chat=False
    )
    assert get_task("niah:depth=none,passages=3") == NeedleInHaystack(passages=3)
    assert get_task("jsonl:path=x,chat=True") == JsonLines("x", chat=True)
    assert get_task("jsonl:path=x,chat=no,max_new_tokens=4") == JsonLines("x", max_new_tokens=4)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (r"C:\data\my file.jsonl", r"C:\data\my file.jsonl"),
        (r"\\server\share\x.jsonl", r"\\server\share\x.jsonl"),
        ("/data/a=b/c:d.jsonl", "/data/a=b/c:d.jsonl"),
        (r"one\, two.jsonl", "one, two.jsonl"),
        (r"C:\folder\\", "C:\\folder\\"),
    ],
)
def test_paths_come_through_as_written(text, path):
    assert get_task(f"jsonl:path={text},chat=true") == JsonLines(path, chat=True)


def test_backslashes_at_the_very_end_are_literal():
    assert get_task("jsonl:path=C:\\folder\\") == JsonLines("C:\\folder\\")


@given(
    path=paths,
    metric=st.sampled_from([None, "contains", "logprob"]),
    tokens=st.none() | st.integers(1, 2**31),
    split=st.sampled_from(["auto", "all"]),
    chat=st.booleans(),
)
def test_formatted_jsonl_spec_gives_the_task_back(path, metric, tokens, split, chat):
    task = JsonLines(path, metric, tokens, split, chat)
    assert get_task(format_spec(task)) == task


@given(
    context=st.integers(1, 10**6),
    needles=st.integers(1, 9),
    depth=st.none() | st.floats(0, 1),
    haystack=st.none() | paths.filter(lambda path: path.strip().lower() != "none"),
    passages=st.none() | st.integers(1, 99),
    chat=st.sampled_from([None, True, False]),
)
def test_formatted_niah_spec_gives_the_task_back(context, needles, depth, haystack, passages, chat):
    task = NeedleInHaystack(context, needles, depth, haystack, passages, chat)
    assert get_task(format_spec(task)) == task


@pytest.mark.parametrize(
    ("short", "spec"),
    [
        ("ruler:niah_single_1", "ruler:task=niah_single_1"),
        ("ruler: vt ,context=2048", "ruler:task=vt,context=2048"),
        ("longbench:trec,path=data", "longbench:subset=trec,path=data"),
        (r"jsonl:one\, two.jsonl,chat=true", r"jsonl:path=one\, two.jsonl,chat=true"),
        ("gsm8k:test.jsonl", "gsm8k:path=test.jsonl"),
        ("code:folder", "code:path=folder"),
        ("prompts:logs/day=3/a.jsonl,chat=true", "prompts:path=logs/day=3/a.jsonl,chat=true"),
    ],
)
def test_the_key_of_the_main_setting_may_be_left_out(short, spec):
    assert get_task(short) == get_task(spec)


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("niah,gsm8k", ["niah", "gsm8k"]),
        ("niah:context=1600,needles=1", ["niah:context=1600,needles=1"]),
        ("niah:context=1600,needles=1, gsm8k", ["niah:context=1600,needles=1", "gsm8k"]),
        ("niah,jsonl:path=x,chat=true,niah:needles=2", ["niah", "jsonl:path=x,chat=true", "niah:needles=2"]),
        ("ruler:vt,context=2048,longbench:trec", ["ruler:task=vt,context=2048", "longbench:subset=trec"]),
        (r"jsonl:path=a\,niah,chat=true", [r"jsonl:path=a\,niah,chat=true"]),
        ("jsonl:path=C:\\x\\\\,niah", ["jsonl:path=C:\\x\\", "niah"]),
        ("niah && code,gsm8k", ["niah && code", "gsm8k"]),
    ],
)
def test_commas_stand_between_tasks_as_well_as_between_settings(text, specs):
    assert get_tasks(text) == get_tasks([text]) == [get_task(spec) for spec in specs]
    assert get_task(text) == get_task(" && ".join(specs))


def test_an_unknown_task_after_a_comma_is_named():
    with pytest.raises(UsageError, match=r"unknown task 'gsm9k'\. Did you mean 'gsm8k'"):
        get_task("niah,gsm9k")


def test_none_is_what_is_listed_as_none():
    assert get_task("niah:haystack=none,depth=none") == get_task("niah")
    assert get_task("gsm8k:path=none,shots_path=None") == get_task("gsm8k")
    assert get_task("jsonl:path=none").path == "none"


def test_default_settings_are_left_out_of_a_formatted_spec():
    assert format_spec(NeedleInHaystack(needles=2)) == "niah:needles=2"
    assert format_spec(NeedleInHaystack()) == "niah"


def test_task_passes_through_unchanged():
    task = NeedleInHaystack(context=300)
    assert get_task(task) is task


def test_tasks_are_registered_under_their_names():
    assert all(TASKS[name].name == name for name in TASKS)
    assert {"niah", "jsonl"} <= set(TASKS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nihah", "unknown task 'nihah'. Did you mean 'niah'"),
        ("", "unknown task ''"),
        ("RULER:vt", "unknown task 'RULER'. Did you mean 'ruler'"),
        ("niah_single_1", "unknown task 'niah_single_1'. Did you mean 'ruler:niah_single_1'"),
        ("trec:context=2000", "unknown task 'trec'. Did you mean 'longbench:trec'"),
        ("niah:contxt=5", "unknown niah setting 'contxt'. Did you mean 'context'"),
        ("niah:name=x", "unknown niah setting 'name'"),
    ],
)
def test_unknown_names_suggest_the_nearest(spec, message):
    with pytest.raises(UsageError, match=message):
        get_task(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("niah:context=long", "task 'niah': context=long: expected a whole number"),
        ("niah:context=1.5", "context=1.5: expected a whole number"),
        ("niah:context=", "context=: expected a whole number"),
        (f"niah:context={'9' * 400}", "expected a whole number up to"),
        ("niah:context=3000000000", "expected a whole number up to 2,147,483,648"),
        ("niah:context=none", "context=none: expected a whole number"),
        ("niah:depth=deep", "depth=deep: expected a number"),
        ("niah:depth=nan", "depth=nan: expected a number"),
        ("niah:depth=2", "depth=2.0 is out of range"),
        ("niah:chat=cat", "chat=cat: expected true or false"),
        ("jsonl:path=x,chat=maybe", "chat=maybe: expected true or false"),
        ("jsonl", "'jsonl' needs path"),
        ("niah:context", "'context' is not key=value"),
        ("niah,context=600", "settings stand after a colon; write 'niah:context=600'"),
        ("niah:=5", "'=5' is not key=value"),
        ("niah:context=600,,needles=1", "'' is not key=value"),
        ("niah:context=600,context=700", "context is given twice"),
    ],
)
def test_malformed_spec_is_refused_in_one_line(spec, message):
    with pytest.raises(TaskError, match=message) as error:
        get_task(spec)
    assert "\n" not in str(error.value)


def test_target_defaults_to_the_first_reference_after_a_space():
    assert Example("a", "Which?", ("this", "that")).target == " this"
    assert Example("a", "Which?\n", ("this",)).target == "this"
    assert Example("a", "Which?", ("this",), target="that").target == "that"


@pytest.mark.parametrize(
    ("prompt", "answer", "target"),
    [
        ("Which?", " this", " this"),
        ("def one():", "\n    return 1", "\n    return 1"),
        ("首都是哪里？\n回答：", "北京", "北京"),
        ("日本の首都は", "東京", "東京"),
        ("答案：", "42", "42"),
        ("Answer in Chinese:", "北京", " 北京"),
        ("한국의 수도는", "서울", " 서울"),
        ("Well \N{GRINNING FACE}", "this", " this"),
        ("", "this", " this"),
    ],
)
def test_target_has_no_space_that_the_text_would_not_have(prompt, answer, target):
    assert Example("a", prompt, (answer,)).target == target


def test_example_without_references_is_refused():
    with pytest.raises(TaskError, match="'a' has no reference answer"):
        Example("a", "Which?", ())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": 0}, "example 0: id is 0; expected a text"),
        ({"prompt": None}, "prompt is None; expected a text"),
        ({"references": "mat"}, "references is 'mat'; expected a tuple of texts"),
        ({"references": (7,)}, r"references is \(7,\); expected a tuple of texts"),
        ({"stop": "mat"}, "stop is 'mat'; expected a tuple of texts"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; expected 0 or more"),
        ({"max_new_tokens": 4.0}, "max_new_tokens is 4.0; expected a whole number"),
        ({"question_at": "4"}, "question_at is '4'; expected a whole number"),
        ({"prompt": "half \ud800"}, "example 'a' holds what a record cannot: '.ud800' is half of a character"),
        ({"extra": {"depth": np.float32(0.5)}}, "holds what a record cannot: Object of type float32 is not JSON"),
        ({"extra": None}, "holds what a record cannot"),
        ({"extra": {"depth": float("nan")}}, "holds what a record cannot: Out of range float values"),
    ],
)
def test_an_example_of_other_types_is_refused_in_one_line(changes, words):
    with pytest.raises(TaskError, match=words) as refusal:
        Example(**{"id": "a", "prompt": "Which?", "references": ("this",), **changes})
    assert "\n" not in str(refusal.value)


def test_an_example_takes_lists_and_numbers_of_numpy():
    given = Example("a", "Which?", ["this"], stop=["."], max_new_tokens=np.int64(4), question_at=np.int64(1))
    assert given == Example("a", "Which?", ("this",), stop=(".",), max_new_tokens=4, question_at=1)
    assert type(given.max_new_tokens) is type(given.question_at) is int


def test_prompt_is_encoded_with_one_beginning_of_sequence_token():
    words = Tokenizer(models.WordLevel({"<s>": 0, "hello": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    assert encode_prompt(tokenizer, Example("a", "hello hello", ("r",))).tolist() == [[0, 1, 1]]
    assert encode_prompt(tokenizer, Example("a", "<s>hello hello", ("r",))).tolist() == [[0, 1, 1]]


def test_fingerprint_changes_with_every_part_and_with_the_order():
    first = Example("a", "p", ("r",))
    others = [
        Example("b", "p", ("r",)),
        Example("a", "q", ("r",)),
        Example("a", "p", ("s",)),
        Example("a", "p", ("r",), target="t"),
        Example("a", "p", ("r",), max_new_tokens=1),
        Example("a", "p", ("r",), metric="exact_match"),
        Example("a", "p", ("r",), extra={"depth": 0.5}),
    ]
    assert len({fingerprint([example]) for example in [first, *others]}) == 8
    assert fingerprint([first, others[0]]) != fingerprint([others[0], first])


def test_several_specs_are_a_mixture_however_they_are_given():
    mixture = Mixture((NeedleInHaystack(context=600), JsonLines("a, b.jsonl", chat=True)))
    spec = r"niah:context=600 && jsonl:path=a\, b.jsonl,chat=true"
    assert format_spec(mixture) == spec
    assert get_task(spec) == get_task(["niah:context=600", mixture.tasks[1]]) == mixture
    assert get_task(["niah"]) == NeedleInHaystack()


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([], "no task is given"),
        (NeedleInHaystack, "the task is <class '.*NeedleInHaystack'>; expected a spec"),
        ([None], "the task is None; expected a spec"),
        (["niah", "niah:context=1600"], "twice"),
        (["niah", "nyah"], "Did you mean 'niah'"),
    ],
)
def test_unusable_mixtures_are_refused(specs, words):
    with pytest.raises(UsageError, match=words):
        get_task(specs)


def test_a_mixture_within_a_list_is_the_one_that_its_spec_reads():
    mixture = get_task(["niah:context=800 && niah:context=3200", "code"])
    assert len(mixture.tasks) == 3
    assert (
        get_task([get_task(["niah", "code"]), "niah:context=800"]).tasks
        == get_task("niah && code && niah:context=800").tasks
    )
    assert get_task(format_spec(mixture)) == mixture


@pytest.mark.parametrize(
    "spec",
    [
        *("jsonl:{}", "prompts:{}", "code:path={}", "niah:haystack={}", "longbench:trec,path={}"),
        *("longbench:trec,path={}.zip", "gsm8k:path={}", "gsm8k:path={}.parquet", "ruler:niah_single_2,essays={}"),
    ],
)
def test_a_home_folder_that_no_user_has_is_a_path_that_does_not_exist(spec):
    with pytest.raises(TaskError, match=r"~nobody-here/x.* does not exist"):
        get_task(spec.format("~nobody-here/x")).check_files()


def test_a_mixture_draws_as_many_examples_of_each_task(tmp_path):
    specs = []
    for name in ("one", "two", "three"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"prompt": "{name} {i}", "answer": "b"}}\n' for i in range(20)))
        specs.append(f"jsonl:path={path}")
    drawn = {
        split: [e.id.partition("-")[0] for e in get_task(specs).examples(split, 5, None)]
        for split in ("train", "validation", "report")
    }
    assert list(drawn.values()) == [["one"] * 2 + ["two"] * 2 + ["three"]] * 3
    alone = get_task(specs[1]).examples("train", 2, None, seed=3)
    assert get_task(specs).examples("train", 6, None, seed=3)[2:4] == alone
    with pytest.raises(TaskError, match="2 train examples cannot cover a mixture of 3 tasks"):
        get_task(specs).examples("train", 2, None)
