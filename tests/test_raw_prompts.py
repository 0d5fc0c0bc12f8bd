"""Task prompts: the user's own traffic, without answers."""

from __future__ import annotations

import json
import logging

import pytest

import evolkv
from evolkv.cli import main
from evolkv.errors import TaskError, UsageError
from evolkv.tasks import SPLITS, get_task
from evolkv.tasks.prompts import encode_text
from evolkv.tasks.protocol import AGNOSTIC, under_protocol

CHAT = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Elbe."},
    {"role": "user", "content": "And a longer one?"},
]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"prompts:path={path},split=all"


def drawn(spec, tokenizer, n=99, split="train"):
    return {each.id: each for each in get_task(spec).examples(split, n, tokenizer)}


def test_a_folder_holds_a_prompt_in_each_text_file_and_many_in_json_lines(tmp_path, tokenizer):
    (tmp_path / "mail").mkdir()
    (tmp_path / "mail" / "one.txt").write_text("Dear all,\n\nthe ship sails at noon.\n")
    (tmp_path / "two.md").write_text("# Notes\n\nOn ships.")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    write(tmp_path / "log.jsonl", {"prompt": "A third"}, {"prompt": "A fourth", "id": "mine", "max_new_tokens": 7})
    found = drawn(f"prompts:path={tmp_path},split=all", tokenizer)
    assert {name: each.prompt for name, each in found.items()} == {
        "mail/one.txt": "Dear all,\n\nthe ship sails at noon.\n",
        "two.md": "# Notes\n\nOn ships.",
        "log-1": "A third",
        "mine": "A fourth",
    }
    assert {each.max_new_tokens for each in found.values()} == {64, 7}
    assert all(each.references == () and each.metric == "fidelity" for each in found.values())
    assert drawn(f"prompts:path={tmp_path},split=all,max_new_tokens=5", tokenizer)["mine"].max_new_tokens == 5
    assert set(drawn(write(tmp_path / "B.JSONL", {"prompt": "A"}, {"prompt": "B"}), tokenizer)) == {"B-1", "B-2"}


def test_a_chat_ends_where_the_assistant_is_to_answer(tmp_path, tokenizer):
    answered = [*CHAT, {"role": "assistant", "content": "The Danube."}]
    spec = write(tmp_path / "log.jsonl", {"messages": answered}, {"messages": CHAT}, {"messages": CHAT[1:2]})
    found = drawn(spec, tokenizer)
    # What the assistant said last makes no other prompt.
    assert len(found) == 2
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert found["log-1"].prompt == expected
    (asked,) = under_protocol(AGNOSTIC, [found["log-1"]])
    assert asked.later.startswith("And a longer one?")
    assert asked.prompt + asked.later == expected
    with pytest.raises(TaskError, match="log-3: its question does not stand apart"):
        under_protocol(AGNOSTIC, [found["log-3"]])


def test_content_may_be_text_parts_and_tools_go_to_the_template(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "lake."}]
    tools = [{"type": "function", "function": {"name": "atlas"}}]
    spec = write(tmp_path / "log.jsonl", {"messages": [{"role": "user", "content": parts}], "tools": tools})
    (example,) = drawn(spec, tokenizer).values()
    assert "Name a lake." in example.prompt
    template = "{{ tools[0].function.name }}:{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = template
    (example,) = drawn(spec, tokenizer).values()
    assert example.prompt == "atlas:Name a lake."


def test_turns_of_one_conversation_are_never_in_two_splits(tmp_path, tokenizer):
    rows = []
    for number in range(12):
        chat = [{**CHAT[1], "content": f"Name river {number}."}, *CHAT[2:]]
        rows += [{"messages": chat[:1], "id": f"{number}/a"}, {"messages": chat, "id": f"{number}/b"}]
    spec = write(tmp_path / "log.jsonl", *rows).removesuffix(",split=all")
    ids = {split: {name.partition("/")[0] for name in drawn(spec, tokenizer, split=split)} for split in SPLITS}
    assert [len(ids[split]) for split in SPLITS] == [3, 3, 6]
    assert len(set.union(*ids.values())) == 12


def test_long_prompts_lose_their_middle(tmp_path, tokenizer):
    long = [{**CHAT[0], "content": "Be brief. " * 20}, {**CHAT[1], "content": f"First. {'word ' * 400}Last."}]
    spec = write(
        tmp_path / "log.jsonl", {"prompt": f"First. {'word ' * 400}Last."}, {"messages": long}, {"messages": CHAT}
    )
    found = drawn(f"{spec},context=100", tokenizer)
    plain, chat = found["log-1"].prompt, found["log-2"].prompt
    assert plain.startswith("First.")
    assert plain.endswith("Last.")
    assert 90 <= len(encode_text(tokenizer, plain)) <= 100
    # The longest message is cut, and the template stays whole.
    assert chat.count("Be brief.") == 20
    assert "First." in chat
    assert "Last.<|im_end|>" in chat
    assert len(encode_text(tokenizer, chat)) <= 100 + 20
    assert found["log-3"].prompt == drawn(spec, tokenizer)["log-3"].prompt


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "expected either 'prompt', a text, or 'messages', a chat"),
        ({"prompt": "a", "messages": CHAT}, "expected either 'prompt'"),
        ({"prompt": "  "}, "prompt is '  ', expected a text that is not blank"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\].role is missing"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no text for the assistant to answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a list of text parts alone"),
        ({"prompt": "What? A text.", "question": "What?"}, "'prompt' does not end with 'question'"),
    ],
)
def test_malformed_rows_are_named_with_their_line(tmp_path, row, words):
    spec = write(tmp_path / "log.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(TaskError, match=rf"log.jsonl line 2: .*{words}"):
        get_task(spec).check_files()


def test_what_is_no_prompt_file_is_refused(tmp_path, tokenizer):
    with pytest.raises(TaskError, match="does not exist"):
        get_task(f"prompts:{tmp_path / 'none.txt'}").check_files()
    with pytest.raises(TaskError, match="has no files; put one prompt in each"):
        get_task(f"prompts:{tmp_path}").check_files()
    (tmp_path / "one.txt").write_text("One prompt.\n\nOf two paragraphs.")
    with pytest.raises(TaskError, match=r"has 1 different prompts \(a text file is one prompt"):
        get_task(f"prompts:{tmp_path / 'one.txt'}").examples("train", 1, tokenizer)
    (tmp_path / "all.json").write_text("[]")
    with pytest.raises(TaskError, match=r"all.json: expected JSON Lines"):
        get_task(f"prompts:{tmp_path}").check_files()
    bare = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    with pytest.raises(TaskError, match=r"log.jsonl line 1: 'messages' need a chat template, .* give each chat as a"):
        drawn(write(tmp_path / "log.jsonl", {"messages": CHAT}), bare)
    bare.chat_template = "{{ raise_exception('no chats here') }}"
    with pytest.raises(TaskError, match=r"log.jsonl line 1: .* such a chat \(.*no chats here\); give others"):
        drawn(write(tmp_path / "log.jsonl", {"messages": CHAT}), bare)


@pytest.fixture
def traffic(tmp_path):
    """Sixteen prompts of different lengths, in a folder."""
    folder = tmp_path / "traffic"
    folder.mkdir()
    for i in range(16):
        words = " ".join(f"ship {i} carries {j} barrels to port {i * j % 7}." for j in range(12 + i))
        (folder / f"{i}.txt").write_text(words)
    return f"prompts:path={folder},max_new_tokens=6"


SMALL_SEARCH = {"budget": 24, "selector": "snapkv:window=8", "train": 3, "val": 3, "max_evals": 12, "population": 6}


def test_prompts_are_searched_and_evaluated_by_fidelity(small, traffic, caplog):
    model, tokenizer = small
    with caplog.at_level(logging.WARNING):
        result = evolkv.search(model, tokenizer, task=traffic, **SMALL_SEARCH)
    assert result.settings["metric"] == "fidelity"
    assert result.settings["minibatch"] == 2
    assert "3 training examples are few for texts as people write them" in caplog.text
    for metric in (None, "agreement"):
        full, found = evolkv.evaluate(
            model, tokenizer, task=traffic, methods=["full", result.profile], samples=4, metric=metric
        )
        assert full["metric"] == (metric or "fidelity")
        assert full["score"] == pytest.approx(1, abs=1e-6)
        assert 0 < found["score"] < 1
    with pytest.raises(UsageError, match="has no reference answer, and metric 'logprob' compares with one"):
        evolkv.search(model, tokenizer, task=traffic, metric="logprob", **SMALL_SEARCH)


def test_a_search_says_the_gap_between_its_training_examples_and_unseen_ones(small, traffic):
    model, tokenizer = small
    result = evolkv.search(model, tokenizer, task=traffic, **SMALL_SEARCH)
    rows = evolkv.evaluation.ReplayEngine(
        model,
        tokenizer,
        get_task(traffic).examples("train", 3, tokenizer),
        evolkv.selectors.get_selector("snapkv:window=8"),
        "fidelity",
    ).score(result.profile.budgets[None])
    assert result.train == {"score": pytest.approx(rows.mean(), abs=1e-4), "n": 3}
    assert result.gap == pytest.approx(result.train["score"] - result.validation[0]["score"])
    assert result.to_dict()["gap"] == result.gap


def test_a_mixture_with_unlabelled_prompts_is_searched_by_fidelity(traffic):
    settings = {"budget": 24}
    assert evolkv.evolution.OneBudget(task=[traffic, "niah:context=300"], **settings).metric == "fidelity"
    assert evolkv.evolution.OneBudget(task="niah:context=300", **settings).metric == "logprob"


def test_the_command_searches_prompts_and_prints_the_gap(small_folder, traffic, tmp_path, capsys):
    size = ["--train", "3", "--val", "3", "--max-evals", "8"]
    options = ["--selector", "snapkv:window=8", "--start", "uniform", *size, "--budget"]
    out = ["--storage", "none", "--out", str(tmp_path / "p.json"), "--json", str(tmp_path / "r.json")]
    assert main(["search", str(small_folder), "--task", traffic, *options, "24", *out]) == 0
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "r.json").read_text())
    gap, train = written["gap"], written["train"]["score"]
    assert f"Gap between the 3 training examples and the validation examples: {gap:+.3f} ({train:.3f} − " in said
    assert main(["search", str(small_folder), "--task", traffic, *options, "24,40", *out[:4]]) == 0
    assert " at 24 (" in capsys.readouterr().out
    assert main(["search", str(small_folder), "--task", traffic, "--metric", "logprob", *options, "24", *out]) == 2
    assert "has no reference answer" in capsys.readouterr().err
