"""How a prompt becomes the tokens that a model reads."""

from __future__ import annotations

import copy

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from evolkv.cache.rereading import words_of
from evolkv.errors import TaskError, UsageError
from evolkv.evaluation.scoring import encode_examples
from evolkv.models.chat import user_message
from evolkv.profile_card import without_template
from evolkv.selectors import get_selector
from evolkv.tasks import Example, encode_prompt, get_task
from evolkv.tasks.longbench.subsets import SUBSETS
from evolkv.tasks.prompts import cut_middle, encode_text
from tiny import tiny_model

VOCABULARY = ["<pad>", "<end>", "<start>", "\n", *"abcdefgh"]
BOS, EOS = VOCABULARY.index("<start>"), VOCABULARY.index("<end>")
WITH_PARTS = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}d"


def adding(single):
    """A tokenizer of letters that adds special tokens to a text, such as BOS in "<start> $A"."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, "<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.post_processor = TemplateProcessing(single=single, special_tokens=[("<start>", BOS), ("<end>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<start>", eos_token="<end>", pad_token="<pad>", unk_token="<pad>"
    )


def words(ids):
    return " ".join(VOCABULARY[i] for i in ids).replace("\n", "|")


@pytest.mark.parametrize(
    ("single", "text", "read"),
    [
        ("$A", "abc", "a b c"),
        ("<start> $A", "abc", "<start> a b c"),
        ("$A <end>", "abc", "a b c"),
        ("<start> $A <end>", "abc", "<start> a b c"),
        ("<start> $A <end>", "<start>abc", "<start> a b c"),
        ("<start> $A <end>", "\n<start>abc", "| <start> a b c"),
        ("<start> $A", "\nabc", "<start> | a b c"),
        ("<start> $A <end>", "abc<end>", "<start> a b c <end>"),
        ("<start> $A <end>", "", "<start>"),
    ],
)
def test_a_prompt_begins_with_one_bos_if_the_tokenizer_adds_it_and_nothing_is_added_behind_it(single, text, read):
    assert words(encode_text(adding(single), text)) == read


@pytest.mark.parametrize("single", ["<start> $A", "<start> $A <end>"])
def test_late_questions_and_answers_have_no_special_tokens_but_their_own(single):
    example = Example(id="x", prompt="abc", later="de", references=("f",), target="fg")
    (question,) = encode_examples(adding(single), tiny_model(), [example], "logprob")
    assert words(question.prompt[0].tolist()) == "<start> a b c"
    assert [words(question.later.tolist()), words(question.target.tolist())] == ["d e", "f g"]


@pytest.mark.model
@pytest.mark.parametrize("chat", ["true", "false"])
def test_a_tokenizer_that_appends_eos_leaves_the_prompts_of_a_task_as_they_are(smollm2, chat):
    own, appending = smollm2[1], copy.deepcopy(smollm2[1])
    appending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", own.eos_token_id)]
    )
    assert appending("a")["input_ids"][-1] == own.eos_token_id
    task = get_task(f"niah:context=200,chat={chat}")
    for tokenizer in (own, appending):
        (example,) = task.examples("train", 1, tokenizer)
        assert encode_prompt(tokenizer, example).tolist() == encode_prompt(own, example).tolist()
        assert 192 <= encode_prompt(tokenizer, example).shape[1] <= 200


def test_a_message_is_rendered_as_the_chat_template_says():
    tokenizer = adding("<start> $A <end>")
    tokenizer.chat_template = "\n{{ bos_token }}{% for m in messages %}a{{ m['content'] | trim }}c{% endfor %}"
    message = user_message(tokenizer, " b ")
    assert message == "\n<start>abc"
    assert words(encode_text(tokenizer, message)) == "| <start> a b c"


def test_a_chat_template_that_takes_a_list_of_parts_alone_gets_one():
    tokenizer = adding("$A")
    tokenizer.chat_template = WITH_PARTS
    assert user_message(tokenizer, "abc") == "abcd"


@pytest.mark.parametrize("template", [WITH_PARTS, "{{ messages[0]['content'] }}d"])
def test_kvzip_begins_its_answers_as_any_chat_template_has_it(template, monkeypatch):
    tokenizer, model = adding("$A"), tiny_model()
    tokenizer.chat_template = template
    monkeypatch.setattr("evolkv.cache.rereading.tokenizer_of", lambda model: tokenizer)
    assert words(words_of(model, get_selector("kvzip")).answer) == "d"


def test_a_chat_template_that_kvzip_cannot_use_is_refused(monkeypatch):
    tokenizer = adding("$A")
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    monkeypatch.setattr("evolkv.cache.rereading.tokenizer_of", lambda model: tokenizer)
    with pytest.raises(UsageError, match=r"no users here.*kvzip:words=false"):
        words_of(tiny_model(), get_selector("kvzip"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no users here') }}", "TemplateError: no users here"),
        ("{{ messages[0]['content'] / 2 }}", "TypeError"),
        ("hello", "the message is not in what it makes"),
    ],
)
def test_a_chat_template_that_cannot_put_a_message_is_refused(template, reason):
    tokenizer = adding("$A")
    tokenizer.chat_template = template
    with pytest.raises(TaskError, match=rf"chat template of .* cannot put a user's message \({reason}.*--raw") as error:
        user_message(tokenizer, "abc")
    assert "chat=false" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("single", ["$A", "<start> $A"])
def test_a_cut_keeps_the_markup_of_a_chat_and_no_bos_that_is_added(single):
    tokenizer = adding(single)
    for text in ("<start><end>abcdefg<end>h", "<end>abcdefg<end>h"):
        read = words(encode_text(tokenizer, cut_middle(tokenizer, text, 6)))
        assert read == words(encode_text(tokenizer, text)[:3] + encode_text(tokenizer, text)[-3:])


@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        ("niah:context=120", False),
        ("niah:context=120,chat=false", True),
        ("ruler:vt,context=700", False),
        ("ruler:vt,context=700,chat=false", True),
        ("jsonl:path={}.jsonl", True),
        ("jsonl:path={}.jsonl,chat=true", False),
        ("prompts:path={}.txt", True),
        ("prompts:path={}.txt,chat=true", False),
    ],
)
def test_a_tasks_spec_says_whether_its_prompts_are_in_the_chat_template(tmp_path, tokenizer, spec, plain):
    spec = spec.format(tmp_path / "rows")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Which of them?", "answer": "One"}\n')
    (tmp_path / "rows.txt").write_text("Which of them?")
    own = spec if spec.startswith(("niah", "ruler")) else f"{spec},split=all"
    (example,) = get_task(own).examples("train", 1, tokenizer)
    in_template = example.prompt.startswith(user_message(tokenizer, "x").partition("x")[0])
    assert (without_template(own), in_template) == (plain, not plain)


@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        ("longbench:subset=trec_e", True),
        ("longbench:subset=qasper", False),
        ("longbench:subset=qasper,chat=false", True),
        ("gsm8k", True),
        ("code", True),
        ("gsm8k:chat=true", False),
        ("prompts:path=log.jsonl", None),
        ("prompts:path=logs", None),
        ("jsonl:path=a.jsonl && gsm8k", True),
        ("jsonl:path=a.jsonl && niah", None),
        ("my task:,", False),
        ("own:subset=trec", False),
        (None, False),
    ],
)
def test_a_spec_that_does_not_decide_says_so(spec, plain):
    assert without_template(spec) is plain


@pytest.mark.parametrize("subset", sorted(SUBSETS))
def test_longbench_leaves_the_template_out_of_the_subsets_that_say_so(subset):
    assert without_template(f"longbench:subset={subset}") is not SUBSETS[subset].chat
