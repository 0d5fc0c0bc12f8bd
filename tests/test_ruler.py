from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from evolkv.errors import TaskError, UsageError
from evolkv.tasks import SPLITS, encode_prompt, fingerprint, format_spec, get_task
from evolkv.tasks.metrics import get_metric
from evolkv.tasks.ruler import Ruler
from evolkv.tasks.ruler.task import FAMILIES

ESSAY = ["niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"]
NIAH = ["niah_single_1", *ESSAY, "niah_multikey_2", "niah_multikey_3"]
GENERATED = [*NIAH, "vt", "cwe", "fwe"]
ALL = [*GENERATED, "qa_1", "qa_2"]

# The most tokens that one more word, line, needle, uncommon word, coded word or document takes, about.
STEP = {
    **dict.fromkeys(ESSAY, 4),
    "niah_single_1": 27,
    "niah_multikey_2": 40,
    "niah_multikey_3": 110,
    "vt": 27,
    "cwe": 45,
    "fwe": 30,
    "qa_1": 65,
    "qa_2": 65,
}

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for ([^\n]+?) is: ([-0-9a-f]+)\.")
UUID4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small files in the formats of SQuAD and HotpotQA."""

    def qas(a, p):
        answered = {"id": f"{a}{p}", "question": f"Who owns house {a}-{p}?", "is_impossible": False}
        answered["answers"] = [{"text": f"owner {a}-{p}", "answer_start": 0}] * 2
        answered["answers"].append({"text": f"{a}-{p}", "answer_start": 6})
        unanswerable = {"id": "u", "question": "Who owns the moon?", "is_impossible": True, "answers": []}
        return [answered, unanswerable]

    articles = [
        {
            "title": f"Street_{a}",
            "paragraphs": [
                {"context": f"In street {a} there lives owner {a}-{p}. It is a quiet house.", "qas": qas(a, p)}
                for p in range(6)
            ],
        }
        for a in range(12)
    ]
    hotpot = [
        {
            "_id": f"h{i}",
            "question": f"Where was the painter of picture {i} born?",
            "answer": f"Town {i}",
            "supporting_facts": [[f"Picture {i}", 0], [f"Painter {i}", 1]],
            "context": [
                [f"Picture {i}", [f"Picture {i} is a picture.", f" Painter {i} painted it."]],
                [f"Painter {i}", [f"Painter {i} is a painter.", f" Born in Town {i}."]],
                *([f"Thing {i}-{j}", [f"Thing {i}-{j} is a thing."]] for j in range(8)),
            ],
            "type": "bridge",
            "level": "hard",
        }
        for i in range(40)
    ]
    folder = tmp_path_factory.mktemp("ruler")
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    return {"qa_1": str(folder / "squad.json"), "qa_2": str(folder / "hotpot.json")}


@pytest.fixture
def ruler(files):
    """Makes the task; the questions' file is known to it."""
    return lambda task, **settings: Ruler(task, path=files.get(task), **settings)


@pytest.fixture
def prepared(tmp_path):
    def write(*rows):
        path = tmp_path / "validation.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return str(path)

    return write


def length(tokenizer, example):
    """Tokens of the prompt and of the answer that is generated after it."""
    return encode_prompt(tokenizer, example).shape[1] + example.max_new_tokens


def question(example):
    """The text of the last task in the prompt, without demonstration, template and answer prefix."""
    starts = ("Memorize and track", "Below is a numbered", "Read the following coded", "The following are")
    text = example.prompt.rpartition("<|im_end|>")[0]
    begins = [text.rfind(start) for start in starts if start in text]
    return text[max(begins) :] if begins else text


@pytest.mark.parametrize(
    ("task", "context"),
    # The demonstrations of vt and cwe alone are too long for 500 tokens.
    [
        pytest.param(task, c, marks=[pytest.mark.slow] if c > 4096 else [])
        for task in ALL
        for c in (500, 1000, 4096, 8000)
        if c > 500 or task not in ("vt", "cwe")
    ],
)
def test_prompt_and_answer_fill_the_context_and_never_exceed_it(task, context, ruler, tokenizer):
    examples = ruler(task, context=context).examples("train", 3, tokenizer)
    assert len(examples) == 3
    for example in examples:
        assert context - STEP[task] < length(tokenizer, example) <= context
        assert example.extra["length"] == length(tokenizer, example)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multiquery", "niah_multikey_3", "vt", "fwe"])
def test_without_chat_template_the_context_is_filled_too(task, ruler, tokenizer):
    for example in ruler(task, context=1500, chat=False).examples("train", 2, tokenizer):
        assert "<|im_start|>" not in example.prompt
        assert 1500 - STEP[task] < length(tokenizer, example) <= 1500


@pytest.mark.parametrize("task", ALL)
def test_context_too_small_says_the_least_and_the_least_works(task, ruler, tokenizer):
    with pytest.raises(TaskError, match=rf"context=60 is too small for task={task} .* give at least") as error:
        ruler(task, context=60).examples("train", 4, tokenizer)
    least = int(re.search(r"at least (\d+) tokens", str(error.value))[1])
    for example in ruler(task, context=least).examples("train", 4, tokenizer):
        assert least - STEP[task] < length(tokenizer, example) <= least


@pytest.mark.parametrize("task", ALL)
def test_same_arguments_give_the_same_examples_and_another_seed_others(task, ruler, tokenizer):
    first, again = (ruler(task, context=1200).examples("report", 3, tokenizer, seed=1) for _ in range(2))
    other = ruler(task, context=1200).examples("report", 3, tokenizer, seed=2)
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)


@pytest.mark.parametrize("task", ALL)
def test_asking_for_more_examples_keeps_the_first_ones(task, ruler, tokenizer):
    few, many = (ruler(task, context=1000).examples("report", n, tokenizer) for n in (2, 6))
    assert len({example.id for example in many}) == 6
    assert {example.id: example for example in few}.items() <= {example.id: example for example in many}.items()


@pytest.mark.parametrize("task", ALL)
def test_no_answer_is_shared_by_two_examples_or_two_splits(task, ruler, tokenizer):
    found = []
    for split in SPLITS:
        answers = Counter()
        for seed in (0, 1):
            drawn = Counter(
                answer
                for example in ruler(task, context=1000).examples(split, 6, tokenizer, seed)
                for answer in example.references
            )
            assert set(drawn.values()) == {1}
            answers |= drawn
        found.append(set(answers))
    assert not found[0] & found[1]
    assert not (found[0] | found[1]) & found[2]


@pytest.mark.parametrize("task", ALL)
def test_answers_occur_in_the_question_and_score_fully(task, ruler, tokenizer):
    for example in ruler(task, context=1000).examples("validation", 4, tokenizer):
        assert all(answer in question(example) for answer in example.references)
        assert get_metric(example.metric)(example.target, example.references, **example.extra) == 1.0
        assert get_metric(example.metric)("", example.references, **example.extra) == 0.0


@pytest.mark.parametrize(
    ("tasks", "tokens", "metric"),
    [
        (NIAH, 128, "ruler_all"),
        (["vt"], 30, "ruler_all"),
        (["cwe"], 120, "ruler_all"),
        (["fwe"], 50, "ruler_all"),
        (["qa_1", "qa_2"], 32, "ruler_part"),
    ],
)
def test_metric_and_length_of_the_answer_are_the_official_ones(tasks, tokens, metric, ruler, tokenizer):
    for task in tasks:
        (example,) = ruler(task, context=1000).examples("train", 1, tokenizer)
        assert (example.max_new_tokens, example.metric) == (tokens, metric)


def test_answer_prefix_follows_the_chat_template(tokenizer):
    (chat,) = Ruler("niah_single_1", context=700).examples("train", 1, tokenizer)
    (plain,) = Ruler("niah_single_1", context=700, chat=False).examples("train", 1, tokenizer)
    key = NEEDLE.search(chat.prompt)[2]
    prefix = f" The special magic number for {key} mentioned in the provided text is"
    assert chat.prompt.endswith(f"<|im_end|>\n<|im_start|>assistant\n{prefix}")
    assert plain.prompt.endswith(f"What is the special magic number for {key} mentioned in the provided text?{prefix}")
    assert plain.prompt.startswith("A special magic number is hidden within the following text.")


@pytest.mark.parametrize(
    ("task", "needles", "keys", "asked"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 4, 1),
        ("niah_multivalue", 4, 1, 1),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_needles_are_as_many_as_the_task_says_and_those_asked_for_are_the_references(
    task, needles, keys, asked, ruler, tokenizer
):
    for example in ruler(task, context=1000).examples("train", 4, tokenizer):
        found = NEEDLE.findall(example.prompt)
        assert len(found) == needles
        assert len({key for _, key, _ in found}) == keys
        query = re.search(r"for ([^\n]+?) mentioned in the provided text (is|are)$", example.prompt)[1]
        wanted = re.split(r", and |, ", query)
        assert len(wanted) == asked
        assert example.references == tuple(value for key in wanted for _, other, value in found if other == key)
        value = UUID4 if task == "niah_single_3" else r"[1-9]\d{6}"
        assert all(re.fullmatch(value, reference) for reference in example.references)
        assert all(re.fullmatch(r"[A-Za-z][^\n]*-[^\n]+", key) for _, key, _ in found)


@pytest.mark.parametrize(("task", "kind"), [("niah_multikey_2", "number"), ("niah_multikey_3", "uuid")])
def test_haystack_of_needles_holds_nothing_else_and_no_key_twice(task, kind, tokenizer):
    for example in Ruler(task, context=3000, chat=False).examples("train", 3, tokenizer):
        first, *lines, last = example.prompt.split("\n")
        found = [NEEDLE.fullmatch(line).groups() for line in lines]
        assert len(found) > 20
        assert {name for name, _, _ in found} == {f"{kind}s"}
        assert len({key for _, key, _ in found}) == len({value for _, _, value in found}) == len(found)
        asked = re.search(rf"special magic {kind} for ([^\n]+?) mentioned", last)[1]
        assert example.references == ({key: value for _, key, value in found}[asked],)
        assert first.startswith(f"A special magic {kind} is hidden")


def test_values_are_listed_as_the_question_lists_keys(tokenizer):
    (example,) = Ruler("niah_multivalue", context=700).examples("train", 1, tokenizer)
    assert example.target == " {}, {}, {}, and {}".format(*example.references)
    assert [example.prompt.index(value) for value in example.references] == sorted(
        example.prompt.index(value) for value in example.references
    )


def test_needles_in_an_essay_begin_at_sentence_starts(tokenizer):
    for example in Ruler("niah_multiquery", context=1500, chat=False).examples("train", 6, tokenizer):
        for needle in NEEDLE.finditer(example.prompt):
            before = example.prompt[: needle.start()]
            assert before.endswith((". ", "afterwards.\n")) or example.prompt[needle.end()] == "\n"


def test_variable_tracking_has_one_chain_of_four_hops_after_a_demonstration(tokenizer):
    for example in Ruler("vt", context=3000, chat=False).examples("train", 4, tokenizer):
        demonstration, text = example.prompt.split("\n\nMemorize and track")
        lines = text.split("\n")
        chain = [line for line in lines if line.startswith("VAR")]
        assert lines.count(NOISE) > 60
        value = re.fullmatch(r"VAR ([A-Z]{5}) = (\d{5})", chain[0])[2]
        assert [re.match(r"VAR ([A-Z]{5}) = ", line)[1] for line in chain] == list(example.references)
        hops = [f"VAR {name} = VAR {source} " for source, name in pairwise(example.references)]
        assert len(hops) == 4
        assert chain[1:] == hops
        assert lines[-1].endswith(f"5 variables are assigned the value {value}, they are: ")
        assert example.target == " " + " ".join(example.references)
        shown = re.findall(r"^VAR ([A-Z]{3}) = ", demonstration, re.MULTILINE)
        assert len(shown) == 5
        assert demonstration.endswith("they are:  " + " ".join(shown))
        unsolved = demonstration.removesuffix(" " + " ".join(shown))
        assert 470 < len(tokenizer(unsolved).input_ids) <= 500


@pytest.mark.parametrize(
    ("context", "often", "seldom", "shown_often", "shown_seldom", "shown_words"),
    [(4096, 30, 3, 10, 3, 40), (4095, 6, 1, 3, 1, 20)],
)
def test_common_words_occur_as_often_as_official(
    context, often, seldom, shown_often, shown_seldom, shown_words, tokenizer
):
    def counts(text):
        listing = text.split("\n")[1]
        numbers, words = zip(*re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", listing), strict=True)
        assert numbers == tuple(str(i) for i in range(1, len(words) + 1))
        return Counter(words)

    for example in Ruler("cwe", context=context, chat=False).examples("train", 2, tokenizer):
        demonstration, last = re.split(r"\n(?=Below is)", example.prompt)
        found = counts(last)
        assert {word for word, times in found.items() if times == often} == set(example.references)
        assert len(example.references) == 10
        assert set(found.values()) == {often, seldom}
        shown = counts(demonstration)
        assert len(shown) == shown_words
        assert Counter(shown.values()) == {shown_often: 10, shown_seldom: shown_words - 10}
        solved = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", demonstration.rpartition("list are:")[2])
        assert set(solved) == {word for word, times in shown.items() if times == shown_often}
        assert example.target.startswith(f" 1. {example.references[0]} 2. {example.references[1]} ")
        assert not set(shown) & set(example.references)


def test_common_words_come_back_only_when_all_have_been_asked_for(tokenizer):
    examples = Ruler("cwe", context=1000).examples("train", 40, tokenizer)
    assert len({word for example in examples for word in example.references}) == 400


@pytest.mark.parametrize("context", [500, 4096])
def test_coded_words_follow_a_zeta_distribution_whose_first_rank_is_dots(context, tokenizer):
    for example in Ruler("fwe", context=context, chat=False).examples("train", 3, tokenizer):
        text = re.search(r"frequently appeared coded words\. (.+)\nQuestion", example.prompt)[1]
        ranked = Counter(text.split(" ")).most_common()
        assert ranked[0][0] == "..."
        assert {word for word, _ in ranked[1:4]} == set(example.references)
        assert ranked[3][1] > ranked[4][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        assert len(ranked) <= (context - 50) // 50
        for rank, (_, times) in enumerate(ranked, start=1):
            assert times == pytest.approx(ranked[0][1] / rank**2, abs=1)


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_question_has_its_documents_among_numbered_others(task, ruler, tokenizer):
    for example in ruler(task, context=1000, chat=False).examples("report", 5, tokenizer):
        blocks = example.prompt.split("\n\n")
        documents = [re.fullmatch(r"Document (\d+):\n(.+)", block, re.DOTALL) for block in blocks[2:-2]]
        assert [int(match[1]) for match in documents] == list(range(1, len(documents) + 1))
        texts = [match[2] for match in documents]
        number = re.search(r"(\d+(-\d+)?)", example.references[0])[1]
        if task == "qa_1":
            street = number.partition("-")[0]
            assert example.references == (f"owner {number}", number)
            assert sum(f"In street {street} " in text for text in texts) == 6
            assert blocks[-1] == f"Question: Who owns house {number}? Answer:"
        else:
            assert {f"Picture {number}\nPicture {number} is a picture. Painter {number} painted it."} < set(texts)
            assert sum(text.startswith(f"Thing {number}-") for text in texts) == 8
        assert len(texts) > 10


def test_question_that_cannot_be_answered_is_not_asked(ruler, tokenizer):
    examples = ruler("qa_1", context=500, split="all").examples("train", 72, tokenizer)
    assert len({example.references for example in examples}) == 72


def test_needed_documents_are_there_even_where_not_all_ten_fit(ruler, tokenizer):
    for example in ruler("qa_2", context=250).examples("train", 5, tokenizer):
        number = example.references[0].removeprefix("Town ")
        assert f"\nPicture {number}\n" in example.prompt
        assert f"\nPainter {number}\n" in example.prompt


def test_documents_repeat_where_the_file_has_no_more(ruler, tokenizer):
    (example,) = ruler("qa_1", context=4000).examples("train", 1, tokenizer)
    documents = re.findall(r"In street \d+ there lives owner \d+-\d+", example.prompt)
    assert len(documents) > 18 == len(set(documents))


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_splits_of_a_file_share_no_document(task, ruler, tokenizer):
    found = {}
    for split in SPLITS:
        prompts = "".join(e.prompt for e in ruler(task, context=1500).examples(split, 6, tokenizer))
        found[split] = set(re.findall(r"lives owner (\d+)-|\n(?:Picture|Thing) (\d+)", prompts))
    assert all(found.values())
    assert not found["train"] & found["validation"]
    assert not (found["train"] | found["validation"]) & found["report"]


def test_neighbours_share_their_haystack_up_to_the_first_needle(tokenizer):
    examples = Ruler("niah_single_2", context=900).examples("train", 12, tokenizer)
    first_needles = [NEEDLE.search(example.prompt).start() for example in examples]
    for (first, second), begins in zip(pairwise(examples), pairwise(first_needles), strict=True):
        shared = next(i for i, (a, b) in enumerate(zip(first.prompt, second.prompt, strict=False)) if a != b)
        assert shared >= min(begins) - 1


def test_generated_passages_of_different_splits_share_no_text(tokenizer):
    stretches = {}
    for split in SPLITS:
        words = [NEEDLE.sub("", e.prompt).split()[40:-40] for e in ruler_essay().examples(split, 17, tokenizer)]
        stretches[split] = {tuple(w[i : i + 20]) for w in words for i in range(len(w) - 20)}
        assert len({w[0] + w[1] + w[2] + w[3] for w in words}) > 1
    assert not stretches["train"] & stretches["validation"]
    assert not (stretches["train"] | stretches["validation"]) & stretches["report"]


def ruler_essay(**settings):
    return Ruler("niah_single_2", **{"context": 700, **settings})


def test_haystack_of_the_user_is_shared_out_and_goes_round_where_it_is_short(tokenizer, tmp_path):
    path = tmp_path / "ledger.txt"
    path.write_text("\n".join(f"Entry {i} was checked on page {i * 7 % 97} and signed." for i in range(200)))
    found = {}
    for split in SPLITS:
        examples = ruler_essay(essays=str(path)).examples(split, 20, tokenizer)
        examples += ruler_essay(essays=str(path), context=2000).examples(split, 3, tokenizer)
        found[split] = Counter(re.findall(r"Entry (\d+) was", " ".join(example.prompt for example in examples)))
        assert all(e.max_new_tokens + encode_prompt(tokenizer, e).shape[1] in range(695, 2001) for e in examples)
    assert len(found["report"]) > len(found["train"]) > 40
    assert not found["train"].keys() & found["validation"].keys()
    assert not (found["train"] | found["validation"]).keys() & found["report"].keys()
    (longest,) = ruler_essay(essays=str(path), context=2500).examples("train", 1, tokenizer)
    assert max(Counter(re.findall(r"Entry (\d+) was", longest.prompt)).values()) > 1


@pytest.mark.parametrize("text", ["针在草堆里。" * 3000, "word" * 9000], ids=["zh", "one word"])
def test_haystack_without_spaces_fills_the_context_too(text, tokenizer, tmp_path):
    path = tmp_path / "haystack.txt"
    path.write_text(text, encoding="utf-8")
    for example in ruler_essay(essays=str(path)).examples("train", 2, tokenizer):
        assert 600 < length(tokenizer, example) <= 700


def test_empty_haystack_is_refused(tokenizer, tmp_path):
    path = tmp_path / "haystack.txt"
    path.write_text("Too short")
    with pytest.raises(TaskError, match=r"haystack\.txt has 2 word\(s\); give a longer text"):
        ruler_essay(essays=str(path)).examples("train", 1, tokenizer)


def test_essays_that_hold_a_needle_are_refused_with_the_line(tokenizer, tmp_path):
    path = tmp_path / "essays.txt"
    path.write_text("A walk by the sea. " * 400 + "\nOne of the special magic numbers for calm-sea is: 1234567.\n")
    for use in (lambda task: task.check_files(), lambda task: task.examples("train", 1, tokenizer)):
        with pytest.raises(TaskError, match=r"essays\.txt line 2 has 'One of the special magic'.*take that"):
            use(ruler_essay(essays=str(path)))


def test_the_haystack_in_use_is_named(tmp_path):
    path = tmp_path / "essays.txt"
    path.write_text("A walk by the sea. " * 400)
    assert ruler_essay().haystack_used() == "generated prose"
    assert re.fullmatch(r"essays\.txt, sha256 [0-9a-f]{16}", ruler_essay(essays=str(path)).haystack_used())
    assert Ruler("niah_single_1").haystack_used() is None
    assert get_task(["niah", "ruler:niah_single_2", "ruler:vt"]).haystack_used() == (
        "niah: generated prose; ruler: generated prose"
    )


def test_prepared_row_becomes_an_example(prepared, tokenizer):
    row = {
        "index": 7,
        "input": "Memorize.\nVAR A = 1\nQuestion: Which?",
        "outputs": ["A", "B"],
        "length": 30,
        "answer_prefix": " Answer: they are: ",
    }
    (chat,) = Ruler("vt", path=prepared(row), split="all").examples("train", 1, tokenizer)
    assert chat.id == "ruler-vt-validation-7"
    assert chat.prompt.startswith("<|im_start|>system")
    assert chat.prompt.endswith("Question: Which?<|im_end|>\n<|im_start|>assistant\n Answer: they are: ")
    assert (chat.references, chat.target) == (("A", "B"), " A B")
    assert (chat.metric, chat.max_new_tokens) == ("ruler_all", 30)
    assert chat.extra["length"] == length(tokenizer, chat)
    (plain,) = Ruler("vt", path=prepared(row), split="all", chat=False).examples("train", 1, tokenizer)
    assert plain.prompt == row["input"] + row["answer_prefix"]


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multiquery", "vt", "cwe", "fwe"])
def test_prepared_row_with_the_prefix_in_its_input_gives_the_same_example(task, prepared, tokenizer):
    (example,) = Ruler(task, context=1200).examples("train", 1, tokenizer)
    (plain,) = Ruler(task, context=1200, chat=False).examples("train", 1, tokenizer)
    row = {"index": 0, "input": plain.prompt, "outputs": list(plain.references), "length": 1200}
    (read,) = Ruler(task, path=prepared(row), split="all").examples("train", 1, tokenizer)
    prefix = read.prompt.rpartition("<|im_start|>assistant\n")[2]
    assert prefix == example.prompt.rpartition("<|im_start|>assistant\n")[2]
    assert prefix.startswith((" Answer: ", " The special magic "))
    assert read.references == plain.references


def test_prepared_rows_are_shared_out(prepared, tokenizer):
    path = prepared(*({"input": f"Question {i}?", "outputs": [f"answer {i}"]} for i in range(20)))
    drawn = [{e.id for e in Ruler("fwe", path=path).examples(split, 20, tokenizer)} for split in SPLITS]
    assert [len(ids) for ids in drawn] == [5, 5, 10]
    assert len(set().union(*drawn)) == 20
    assert len(Ruler("fwe", path=path, split="all").examples("train", 20, tokenizer)) == 20


def test_prepared_row_longer_than_the_context_is_named(prepared, tokenizer):
    path = prepared({"input": "short", "outputs": ["a"]}, {"input": "long " * 300, "outputs": ["a"]})
    with pytest.raises(TaskError, match=r"validation\.jsonl line 2: .* more than context=200; give context=(\d+)") as e:
        Ruler("qa_1", path=path, context=200, split="all").examples("train", 2, tokenizer)
    context = int(re.search(r"give context=(\d+)", str(e.value))[1])
    assert len(Ruler("qa_1", path=path, context=context, split="all").examples("train", 2, tokenizer)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ({"outputs": ["a"]}, "line 2: input is missing"),
        ({"input": "a"}, "line 2: outputs is missing"),
        ({"input": "a", "outputs": "b"}, "line 2: outputs is 'b', expected a valid list"),
        ({"input": "a", "outputs": ["b"], "answer_prefix": 3}, "line 2: answer_prefix is 3, expected a valid string"),
    ],
)
def test_malformed_prepared_row_is_named_by_file_and_line(row, message, prepared, tokenizer):
    path = prepared({"input": "a", "outputs": ["b"]}, row)
    with pytest.raises(TaskError, match=r"validation\.jsonl " + message) as error:
        Ruler("vt", path=path, split="all").examples("train", 1, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("qa_1", '{"data": [\n{"title"', r"not valid JSON .*line 2"),
        ("qa_1", "[]", r"is \[\], expected an object"),
        ("qa_1", '{"data": 3}', r"data is 3, expected a valid list"),
        ("qa_1", '{"data": [{"title": "a"}]}', r"data\[0\]\.paragraphs is missing"),
        ("qa_1", '{"data": [{"title": "a", "paragraphs": [{}]}]}', r"data\[0\]\.paragraphs\[0\]\.context is missing"),
        (
            "qa_1",
            '{"data": [{"title": "a", "paragraphs": [{"context": "c", "qas": [{"answers": [{"text": "t"}]}]}]}]}',
            r"data\[0\]\.paragraphs\[0\]\.qas\[0\]\.question is missing",
        ),
        (
            "qa_1",
            '{"data": [{"title": "a", "paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}]}',
            r"qas\[0\] should have an answer",
        ),
        ("qa_1", '{"data": []}', "split 'train' is empty: the file has 0"),
        ("qa_2", '{"data": []}', "expected HotpotQA's list of questions, not a dict"),
        ("qa_2", "[3]", r"\[0\]: is 3, expected an object"),
        ("qa_2", '[{"question": "q", "answer": "a", "context": [["t"]]}]', r"\[0\]: context\[0\]\[1\] is missing"),
        (
            "qa_2",
            '[{"question": "q", "answer": "a", "context": [["t", "x"]]}]',
            r"\[0\]: context\[0\]\[1\] is 'x', expected a valid list",
        ),
    ],
)
def test_malformed_questions_are_named_by_file_and_place(task, content, message, tmp_path, tokenizer):
    path = tmp_path / "questions.json"
    path.write_text(content)
    with pytest.raises(TaskError, match=r"questions\.json.*" + message) as error:
        Ruler(task, path=str(path)).examples("train", 1, tokenizer)
    assert "\n" not in str(error.value)


def test_settings_come_from_a_spec_and_go_back(files):
    assert get_task("ruler:task=vt,context=4096") == Ruler("vt") == get_task("ruler:task=vt")
    task = get_task(f"ruler:task=qa_2,path={files['qa_2']},context=900,chat=false,split=all")
    assert task == Ruler("qa_2", 900, files["qa_2"], chat=False, split="all") == get_task(format_spec(task))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ruler", "task 'ruler' needs task; write ruler:task=VALUE"),
        ("ruler:task=niah_multikey2", "unknown ruler task 'niah_multikey2'. Did you mean 'niah_multikey_2'"),
        ("ruler:task=vt,context=0", "context=0 is not a length"),
        ("ruler:task=qa_1", r"task=qa_1 needs SQuAD's dev-v2\.0\.json; write ruler:task=qa_1,path=FILE"),
        ("ruler:task=qa_2", r"task=qa_2 needs HotpotQA's hotpot_dev_distractor_v1\.json"),
        ("ruler:task=vt,path=x.json", r"task=vt reads no file but one that RULER prepared, named \*\.jsonl"),
        ("ruler:task=vt,essays=x.txt", r"essays=x\.txt is of no use to task=vt"),
        ("ruler:task=niah_single_2,essays=x.txt,path=y.jsonl", "essays=x.txt is of no use"),
        ("ruler:task=vt,split=all", "split=all is about the rows of a file"),
        ("ruler:task=vt,path=x.jsonl,split=some", "expected one of auto, all"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(spec, message):
    with pytest.raises(UsageError, match=message) as error:
        get_task(spec)
    assert "\n" not in str(error.value)


def test_chat_without_a_chat_template_is_refused(tokenizer):
    class Bare:
        chat_template = None

    with pytest.raises(TaskError, match="chat=true, but this tokenizer has no chat template"):
        Ruler("vt", chat=True).examples("train", 1, Bare())


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multivalue", "vt", "cwe", "fwe", "qa_1"])
def test_the_question_of_a_prepared_row_is_known_by_its_words(task, prepared, tokenizer, files):
    (plain,) = Ruler(task, context=1200, path=files.get(task), chat=False).examples("train", 1, tokenizer)
    question = plain.prompt[plain.question_at :]
    assert question.startswith(FAMILIES[task].asks)
    # In a chat template that puts the answer on a line of its own, and without line breaks at all.
    for text in (f"<|user|>\n{plain.prompt}<|end|>\n<|assistant|>\n", " ".join(plain.prompt.split())):
        row = {"input": text, "outputs": ["a"]}
        (read,) = Ruler(task, context=2000, path=prepared(row), split="all", chat=False).examples("train", 1, tokenizer)
        assert read.prompt[read.question_at :].startswith(question[:20])
        assert question[:20] not in read.prompt[read.question_at + 1 :]


def test_a_prepared_row_in_other_words_has_no_question_to_hold_back(prepared, tokenizer):
    row = {"input": "Some text.\nWho am I?", "outputs": ["a"]}
    (read,) = Ruler("niah_single_1", path=prepared(row), split="all", chat=False).examples("train", 1, tokenizer)
    assert read.question_at is None
