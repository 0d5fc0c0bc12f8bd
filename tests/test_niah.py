from __future__ import annotations

import hashlib
import re
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from evolkv.errors import TaskError, UsageError
from evolkv.models.gguf import cache_folder
from evolkv.tasks import SPLITS, encode_prompt, fingerprint, get_task
from evolkv.tasks.metrics import get_metric
from evolkv.tasks.niah import SLACK, NeedleInHaystack
from evolkv.tasks.prompts import encode_text
from evolkv.tasks.prose import gap, prose, sentences
from evolkv.tasks.wording import WORDINGS

LANGUAGES = tuple(WORDINGS)
WORDS = WORDINGS["en"].words
NEEDLE = re.compile(r"One of the special magic numbers for (\w+) is: (\d{7})\. ?")


@pytest.fixture
def haystack(tmp_path):
    """A file of 26,000 tokens or so, unlike the built-in prose; every sentence occurs once."""
    lines = (f"Entry {i} of the ledger was checked on page {i * 7 % 97} and signed." for i in range(1500))
    path = tmp_path / "a ledger, signed.txt"
    path.write_text("\n".join(lines))
    return path


def body(example):
    """The haystack of a prompt, without needles."""
    text = example.prompt.split("about the numbers afterwards.\n")[1].rsplit("\nWhat is the special", 1)[0]
    return NEEDLE.sub("", text)


def needles(example, language):
    """(word, number) of the needles of a prompt, in their order."""
    pattern = re.escape(WORDINGS[language].needle).replace(r"\{word\}", r"(\w+)").replace(r"\{number\}", r"(\d{7})")
    return re.findall(pattern, example.prompt)


def byte_tokenizer():
    """A token for every byte: the most that a text can take."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def gemma_tokenizer():
    """Gemma 3's tokenizer, without its model."""
    folder = next(cache_folder().glob("gemma3-270m-*"), None)
    if folder is None:
        pytest.skip("gemma3-270m has not been converted: load it once")
    return AutoTokenizer.from_pretrained(folder)


def shared_prefix(first, second, tokenizer):
    ids = zip(encode_prompt(tokenizer, first)[0], encode_prompt(tokenizer, second)[0], strict=False)
    return next(i for i, (a, b) in enumerate(ids) if a != b)


@pytest.mark.parametrize(
    "task",
    [
        NeedleInHaystack(context=150),
        NeedleInHaystack(context=333),
        NeedleInHaystack(context=600, chat=False),
        NeedleInHaystack(context=1600),
        NeedleInHaystack(context=2048, needles=5),
        NeedleInHaystack(context=400, depth=0.0),
        NeedleInHaystack(context=400, depth=1.0),
    ],
    ids=str,
)
def test_prompt_has_the_asked_length_and_never_more(task, tokenizer):
    for example in task.examples("train", 6, tokenizer):
        assert task.context - SLACK <= encode_prompt(tokenizer, example).shape[1] <= task.context


def test_prompt_from_a_file_has_the_asked_length(tokenizer, haystack):
    task = NeedleInHaystack(context=500, haystack=str(haystack))
    for example in task.examples("report", 20, tokenizer):
        assert 500 - SLACK <= encode_prompt(tokenizer, example).shape[1] <= 500


@pytest.mark.parametrize(
    "text",
    ["word" * 30_000, "针在草堆里。" * 5000, "今天天气很好" * 5000],
    ids=["one word", "zh", "no stops"],
)
def test_text_without_spaces_still_gives_the_asked_length(text, tokenizer, tmp_path):
    path = tmp_path / "haystack.txt"
    path.write_text(text, encoding="utf-8")
    for example in NeedleInHaystack(context=300, haystack=str(path)).examples("train", 4, tokenizer):
        assert 300 - SLACK <= encode_prompt(tokenizer, example).shape[1] <= 300


def test_answer_is_in_the_needle_that_is_asked_for(tokenizer):
    for example in NeedleInHaystack(context=500, needles=4).examples("validation", 8, tokenizer):
        numbers = dict(NEEDLE.findall(example.prompt))
        assert len(numbers) == 4
        asked = re.search(r"number for (\w+) mentioned in the provided text is$", example.prompt)[1]
        assert example.references == (numbers[asked],)
        assert example.target == f" {numbers[asked]}"
        assert get_metric(example.metric)(f" {numbers[asked]}.", example.references) == 1.0


def test_answer_fits_in_the_new_tokens(tokenizer):
    (example,) = NeedleInHaystack(context=200).examples("train", 1, tokenizer)
    assert len(tokenizer(example.target).input_ids) < example.max_new_tokens


def test_needles_begin_at_sentence_starts(tokenizer):
    for example in NeedleInHaystack(context=700).examples("train", 8, tokenizer):
        before = example.prompt[: NEEDLE.search(example.prompt).start()]
        assert before.endswith((". ", "afterwards.\n"))


def test_numbers_never_occur_in_two_splits(tokenizer):
    task = NeedleInHaystack(context=200, needles=3)
    for i, split in enumerate(SPLITS):
        for seed in (0, 1):
            numbers = [int(n) for e in task.examples(split, 20, tokenizer, seed) for _, n in NEEDLE.findall(e.prompt)]
            assert len(numbers) == 60
            assert {number % 3 for number in numbers} == {i}


@pytest.mark.parametrize("source", ["prose", "file"])
def test_passages_of_different_splits_share_no_text(source, tokenizer, haystack):
    task = NeedleInHaystack(context=400, haystack=str(haystack) if source == "file" else None)
    stretches = {}
    for split in SPLITS:
        texts = {body(e) for seed in (0, 1) for e in task.examples(split, 12, tokenizer, seed)}
        words = [text.split() for text in texts]
        # 20 words are more than a sentence.
        stretches[split] = {tuple(w[i : i + 20]) for w in words for i in range(len(w) - 20)}
    assert all(len(found) > 200 for found in stretches.values())
    assert not stretches["train"] & stretches["validation"]
    assert not stretches["train"] & stretches["report"]
    assert not stretches["validation"] & stretches["report"]


def test_file_splits_are_disjoint_across_contexts(tokenizer, haystack):
    entries = {}
    for split in SPLITS:
        found = set()
        for context in (200, 700):
            for example in NeedleInHaystack(context=context, haystack=str(haystack)).examples(split, 33, tokenizer):
                found |= set(re.findall(r"Entry (\d+) ", body(example)))
        entries[split] = found
    assert not entries["train"] & entries["validation"]
    assert not (entries["train"] | entries["validation"]) & entries["report"]


def test_depths_descend_within_a_passage(tokenizer):
    examples = NeedleInHaystack(context=600).examples("train", 20, tokenizer)
    assert [e.extra["passage"] for e in examples] == [0] * 16 + [1] * 4
    for first, second in pairwise(examples):
        if first.extra["passage"] == second.extra["passage"]:
            assert first.extra["depth"] > second.extra["depth"]


def test_depths_cover_the_text_evenly(tokenizer):
    depths = sorted(e.extra["depth"] for e in NeedleInHaystack(context=3000).examples("train", 16, tokenizer))
    assert depths[0] < 0.1
    assert depths[-1] > 0.9
    assert max(b - a for a, b in pairwise(depths)) < 0.1


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_fixed_depth_places_every_needle_there(depth, tokenizer):
    for example in NeedleInHaystack(context=1600, depth=depth).examples("train", 3, tokenizer):
        text = example.prompt.split("afterwards.\n")[1].rsplit("\nWhat is", 1)[0]
        assert NEEDLE.search(text).start() / len(text) == pytest.approx(depth, abs=0.04)
        assert example.extra["depth"] == pytest.approx(depth, abs=0.04)


@pytest.mark.parametrize("needles", [1, 3])
def test_neighbours_share_their_prompt_up_to_the_first_needle(needles, tokenizer):
    examples = NeedleInHaystack(context=800, needles=needles).examples("train", 16, tokenizer)
    ends = [NEEDLE.search(example.prompt).start() for example in examples]
    assert ends == sorted(ends, reverse=True)
    assert ends[0] > ends[-1]
    for (first, second), end in zip(pairwise(examples), ends[1:], strict=True):
        before = len(tokenizer(second.prompt[:end].rstrip(), add_special_tokens=False).input_ids)
        assert shared_prefix(first, second, tokenizer) >= before


def test_examples_of_a_passage_differ_in_word_and_number(tokenizer):
    examples = NeedleInHaystack(context=200).examples("train", 16, tokenizer)
    assert len({e.references for e in examples}) == 16
    assert len({NEEDLE.search(e.prompt)[1] for e in examples}) > 8


@pytest.mark.parametrize("passages", [None, 3])
def test_asking_for_more_examples_keeps_the_first_ones(passages, tokenizer):
    task = NeedleInHaystack(context=200, passages=passages)
    few, many = (task.examples("report", n, tokenizer, seed=3) for n in (7, 21))
    by_id = {e.id: e for e in many}
    assert len(by_id) == 21
    assert all(by_id[e.id] == e for e in few)


def test_same_arguments_give_the_same_examples_and_another_seed_others(tokenizer):
    task = NeedleInHaystack(context=200)
    first, again = (task.examples("train", 5, tokenizer, seed=1) for _ in range(2))
    other = task.examples("train", 5, tokenizer, seed=2)
    assert first == again
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    assert not {e.references for e in first} & {e.references for e in other}


def test_passages_sets_the_number_of_different_texts(tokenizer):
    examples = NeedleInHaystack(context=200, passages=3).examples("train", 12, tokenizer)
    starts = [body(e)[:60] for e in examples]
    assert len(set(starts)) == 3
    assert all(starts.count(start) == 4 for start in starts)


def test_prompt_uses_the_chat_template_unless_plain(tokenizer):
    auto, chat, plain = (
        NeedleInHaystack(context=200, chat=chat).examples("train", 1, tokenizer)[0].prompt
        for chat in (None, True, False)
    )
    assert auto == chat
    assert auto.startswith("<|im_start|>system")
    assert plain.startswith("Some special magic numbers")


def test_encoded_prompt_has_one_beginning_of_sequence(tokenizer):
    (example,) = NeedleInHaystack(context=200).examples("train", 1, tokenizer)
    ids = encode_prompt(tokenizer, example)
    assert ids.dtype == torch.long
    assert ids.shape[0] == 1
    assert tokenizer.decode(ids[0]) == example.prompt


@pytest.mark.parametrize(
    ("task", "split", "digest"),
    [
        (NeedleInHaystack(context=300), "train", "9fe865a076def61ef48749d4e57a3d14297b65a95c73c7ed3c8a067669cfdb5b"),
        (
            NeedleInHaystack(context=500, needles=3, chat=False),
            "report",
            "3e197f5a9c7a957b9b68f92c6fc6f7d39764653d1598fad1001ef6a1b0db66a5",
        ),
    ],
    ids=["one needle", "three needles"],
)
def test_english_examples_stay_as_published(task, split, digest, tokenizer):
    text = repr(
        [
            (e.id, e.prompt, e.references, e.target, e.max_new_tokens, e.metric, dict(e.extra))
            for e in task.examples(split, 18, tokenizer, seed=5)
        ]
    )
    assert hashlib.sha256(text.encode()).hexdigest() == digest


@pytest.fixture(scope="module", params=["smollm2", "gemma3", "bytes"])
def any_tokenizer(request):
    if request.param == "smollm2":
        return request.getfixturevalue("tokenizer")
    return gemma_tokenizer() if request.param == "gemma3" else byte_tokenizer()


@pytest.mark.parametrize("language", LANGUAGES)
def test_prompt_of_every_language_has_the_asked_length(language, any_tokenizer):
    for task in (
        NeedleInHaystack(context=800, language=language, chat=False),
        NeedleInHaystack(context=1300, language=language, needles=3),
        NeedleInHaystack(context=900, language=language, depth=0.0),
        NeedleInHaystack(context=900, language=language, depth=1.0),
    ):
        for example in task.examples("report", 3, any_tokenizer, seed=2):
            assert task.context - SLACK <= encode_prompt(any_tokenizer, example).shape[1] <= task.context


@pytest.mark.parametrize("language", LANGUAGES)
def test_prose_of_every_language_takes_more_than_a_token_for_ten_characters(language, any_tokenizer):
    text = prose("density", 20_000, language)
    assert len(text) / len(encode_text(any_tokenizer, text)) < 7


@pytest.mark.parametrize("language", LANGUAGES)
def test_target_continues_the_prompt_token_by_token(language, any_tokenizer):
    for example in NeedleInHaystack(context=700, language=language).examples("train", 4, any_tokenizer):
        target = any_tokenizer(example.target, add_special_tokens=False).input_ids
        assert target == encode_text(any_tokenizer, example.prompt + example.target)[-len(target) :]
        assert len(target) < example.max_new_tokens


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_asks_for_one_of_its_needles(language, tokenizer):
    wording = WORDINGS[language]
    for example in NeedleInHaystack(context=1200, needles=4, language=language).examples("validation", 6, tokenizer):
        found = dict(needles(example, language))
        assert len(found) == 4
        assert set(found) <= set(wording.words)
        (asked,) = (word for word in found if example.prompt.endswith(wording.answer.format(word=word)))
        assert wording.question.format(word=asked) in example.prompt
        assert wording.instruction in example.prompt
        assert example.references == (found[asked],)
        assert example.target == gap(language) + found[asked]
        assert (
            get_metric(example.metric)(f"{example.target}{'。' if language == 'zh' else '.'}", example.references) == 1
        )


@pytest.mark.parametrize("language", LANGUAGES)
def test_needles_of_every_language_stand_between_sentences(language, tokenizer):
    wording, space = WORDINGS[language], gap(language)
    stop = "。" if language == "zh" else "."
    for example in NeedleInHaystack(context=900, language=language).examples("train", 17, tokenizer):
        ((word, number),) = needles(example, language)
        needle = wording.needle.format(word=word, number=number)
        before, after = example.prompt.split(needle)
        text = before.split(wording.instruction + "\n")[1]
        assert text == "" or text.endswith(stop + space)
        assert prose(f"0/train/{example.extra['passage']}", 9000, language).startswith(text)
        assert after.startswith((space, "\n"))


def test_languages_ask_for_the_same_number_and_thing_at_the_same_depth(tokenizer):
    drawn = {
        language: sorted(
            NeedleInHaystack(context=1500, language=language).examples("report", 10, tokenizer, seed=4),
            key=lambda example: int(example.id.rsplit("-", 1)[1]),
        )
        for language in LANGUAGES
    }
    assert len({e.id for examples in drawn.values() for e in examples}) == 10 * len(LANGUAGES)
    for same in zip(*drawn.values(), strict=True):
        assert len({e.references for e in same}) == 1
        places = {
            WORDINGS[language].words.index(needles(e, language)[0][0]) for language, e in zip(drawn, same, strict=True)
        }
        assert len(places) == 1
        depths = [e.extra["depth"] for e in same]
        assert max(depths) - min(depths) < 0.12


def test_every_language_has_as_many_words_each_once():
    for wording in WORDINGS.values():
        assert len(wording.words) == len(set(wording.words)) == len(WORDS)
        assert all(re.fullmatch(r"[^\W\d_]+", word) for word in wording.words)


def test_file_in_another_language_gets_the_needles_of_the_asked_one(tokenizer, haystack):
    task = NeedleInHaystack(context=500, haystack=str(haystack), language="fr")
    for example in task.examples("train", 3, tokenizer):
        assert "Entry " in example.prompt
        assert needles(example, "fr") == [(needles(example, "fr")[0][0], example.references[0])]
        assert 500 - SLACK <= encode_prompt(tokenizer, example).shape[1] <= 500


def test_unknown_language_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"unknown language 'fra'. Did you mean 'fr'\? Known: de, en, es, fr, zh"):
        get_task("niah:language=fra")


@pytest.mark.model
@torch.no_grad()
def test_full_cache_model_finds_the_needle(smollm2):
    model, tokenizer = smollm2
    for example in NeedleInHaystack(context=250).examples("report", 3, tokenizer):
        prompt = encode_prompt(tokenizer, example)
        target = tokenizer(example.target, add_special_tokens=False, return_tensors="pt").input_ids
        logits = model(torch.cat([prompt, target], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
        assert logits.argmax(-1).equal(target[0])


def test_context_too_small_says_the_minimum_and_the_minimum_works(tokenizer):
    with pytest.raises(TaskError, match=r"context=60 is too small .* at least (\d+) tokens") as error:
        NeedleInHaystack(context=60).examples("train", 1, tokenizer)
    minimum = int(re.search(r"at least (\d+)", str(error.value))[1])
    for example in NeedleInHaystack(context=minimum).examples("train", 8, tokenizer):
        assert minimum - SLACK <= encode_prompt(tokenizer, example).shape[1] <= minimum


def test_short_haystack_says_how_many_tokens_it_needs(tokenizer, haystack):
    task = NeedleInHaystack(context=8000, haystack=str(haystack))
    with pytest.raises(
        TaskError, match=r"signed\.txt has about \d+ tokens; 2 passage\(s\) of 8000 .* need about 70400"
    ):
        task.examples("train", 17, tokenizer)


@pytest.mark.parametrize("content", [b"", b"Too short."])
def test_nearly_empty_haystack_is_too_short(content, tokenizer, tmp_path):
    path = tmp_path / "haystack.txt"
    path.write_bytes(content)
    with pytest.raises(TaskError, match="give a longer text"):
        NeedleInHaystack(context=300, haystack=str(path)).examples("train", 1, tokenizer)


def test_haystack_that_is_missing_a_folder_or_not_utf8_is_refused(tokenizer, tmp_path):
    with pytest.raises(TaskError, match=r"nowhere\.txt does not exist"):
        NeedleInHaystack(haystack=str(tmp_path / "nowhere.txt")).examples("train", 1, tokenizer)
    with pytest.raises(TaskError, match="is a folder"):
        NeedleInHaystack(haystack=str(tmp_path)).examples("train", 1, tokenizer)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"first line\ncaf\xe9")
    with pytest.raises(TaskError, match=r"latin\.txt line 2: byte 0xe9 is not UTF-8"):
        NeedleInHaystack(haystack=str(latin)).examples("train", 1, tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 1.5}, "depth=1.5 is out of range"),
        ({"depth": -0.1}, "depth=-0.1 is out of range"),
        ({"needles": 0}, "needles=0 is out of range"),
        ({"needles": len(WORDS) + 1}, f"expected 1 to {len(WORDS)}"),
        ({"passages": 0}, "passages=0 is out of range"),
        ({"context": 0}, "context=0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(TaskError, match=message):
        NeedleInHaystack(**settings)


def test_a_word_in_place_of_yes_or_no_is_refused(tokenizer):
    with pytest.raises(TaskError, match="niah: chat='plain' is unknown; expected True, False or None"):
        NeedleInHaystack(chat="plain").examples("train", 1, tokenizer)


def test_unknown_split_suggests_the_nearest(tokenizer):
    with pytest.raises(UsageError, match="Did you mean 'train'"):
        get_task("niah").examples("trian", 1, tokenizer)


def test_asking_for_no_examples_is_refused(tokenizer):
    with pytest.raises(UsageError, match="at least 1"):
        get_task("niah").examples("train", 0, tokenizer)


def test_prose_is_varied_and_made_of_whole_sentences():
    stream = sentences("variety")
    drawn = [next(stream) for _ in range(2000)]
    assert len(set(drawn)) > 1950
    assert all(re.fullmatch(r"[A-Z][A-Za-z, -]+\.", sentence) for sentence in drawn)
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence, re.IGNORECASE) for sentence in drawn)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_haystack_that_holds_a_needle_is_refused_with_the_line(language, tokenizer, tmp_path):
    path = tmp_path / "haystack.txt"
    needle = WORDINGS[language].needle.format(word="x", number=1234567)
    path.write_text(f"The sea was calm. {'It rained. ' * 900}\n{needle}", encoding="utf-8")
    task = NeedleInHaystack(context=300, haystack=str(path), language=language)
    for use in (NeedleInHaystack.check_files, lambda task: task.examples("train", 1, tokenizer)):
        with pytest.raises(TaskError, match=r"haystack\.txt line 2 has .*more than one answer"):
            use(task)
