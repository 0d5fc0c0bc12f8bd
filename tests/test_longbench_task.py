from __future__ import annotations

import hashlib
import json
import zipfile
from itertools import pairwise

import huggingface_hub
import pytest

from evolkv.errors import TaskError, UsageError
from evolkv.evaluation.scoring import text_score
from evolkv.models.chat import user_message
from evolkv.tasks import SPLITS, encode_prompt, format_spec, get_task
from evolkv.tasks.longbench import LongBench
from evolkv.tasks.longbench.subsets import EXTENDED, SUBSETS
from evolkv.tasks.metrics import METRICS

# As published: SHA-256 of the prompt (its first 12 digits), most new tokens, metric.
PUBLISHED = {
    "narrativeqa": ("aada7ed24b06", 128, "qa_f1"),
    "qasper": ("0fbdd123fe7f", 128, "qa_f1"),
    "multifieldqa_en": ("20b4666a2de8", 64, "qa_f1"),
    "multifieldqa_zh": ("344b3a4e557c", 64, "qa_f1_zh"),
    "hotpotqa": ("9ec4ae308865", 32, "qa_f1"),
    "2wikimqa": ("9ec4ae308865", 32, "qa_f1"),
    "musique": ("9ec4ae308865", 32, "qa_f1"),
    "dureader": ("ae53329f51b1", 128, "rouge_l_zh"),
    "gov_report": ("91c25d585b18", 512, "rouge_l"),
    "qmsum": ("dca23b678fe0", 512, "rouge_l"),
    "multi_news": ("2af3f28c40b9", 512, "rouge_l"),
    "vcsum": ("3e5d8241bc9b", 512, "rouge_l_zh"),
    "trec": ("0eff8bebdba9", 64, "classification"),
    "triviaqa": ("00a802e6377e", 32, "qa_f1"),
    "samsum": ("a68d88423490", 128, "rouge_l"),
    "lsht": ("f3edabdf7fae", 64, "classification"),
    "passage_count": ("986550b6c610", 32, "count"),
    "passage_retrieval_en": ("39b96b7fa52b", 32, "retrieval"),
    "passage_retrieval_zh": ("c1e2346e245e", 32, "retrieval_zh"),
    "lcc": ("6a1f24cf0bb8", 64, "code_sim"),
    "repobench-p": ("ee9ec182ea5f", 64, "code_sim"),
}
CONTINUED = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}
CHINESE = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
NOT_EXTENDED = CHINESE | {"narrativeqa", "musique", "qmsum"}


@pytest.fixture
def write(tmp_path):
    """Writes a subset's file; returns the folder."""

    def write(subset, *rows):
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / f"{subset}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path)

    return write


def row(number=0, **changes):
    return {
        "input": f"Which is number {number}?",
        "context": f"Document {number} is about {number}.",
        "answers": [f"answer {number}", "another"],
        "length": 100 + number,
        "dataset": "",
        "language": "en",
        "all_classes": ["answer 0", "Date"],
        "_id": f"id{number}",
        **changes,
    }


def first(task, tokenizer):
    return task.examples("report", 1, tokenizer)[0]


def numbers(examples):
    return [int(example.id.split("id")[1]) for example in examples]


@pytest.mark.parametrize("subset", PUBLISHED)
def test_every_subset_is_asked_and_judged_as_published(subset, write, tokenizer):
    published, max_new_tokens, metric = PUBLISHED[subset]
    assert hashlib.sha256(SUBSETS[subset].prompt.encode()).hexdigest().startswith(published)
    folder = write(subset, row(dataset=subset, context="The {text}.", input="So {what}?"))
    example = first(LongBench(subset, folder, split="all", chat=False), tokenizer)
    assert example.prompt == SUBSETS[subset].prompt.replace("{context}", "The {text}.").replace("{input}", "So {what}?")
    assert example.id == f"{subset}-id0"
    assert example.references == ("answer 0", "another")
    assert (example.max_new_tokens, example.metric) == (max_new_tokens, metric)
    assert example.first_line == (subset in FIRST_LINE)
    assert example.extra.get("all_classes") == (("answer 0", "Date") if metric == "classification" else None)


@pytest.mark.parametrize("subset", PUBLISHED)
def test_right_answer_scores_full_marks(subset, write, tokenizer):
    metric = SUBSETS[subset].metric
    right = {"retrieval": "Paragraph 3", "retrieval_zh": "段落3", "count": "3"}.get(metric, "answer 0")
    folder = write(subset, row(answers=[right]))
    example = first(LongBench(subset, folder, split="all"), tokenizer)
    assert text_score(example.metric, right, example) == pytest.approx(1, abs=1e-6)


def test_subsets_are_all_of_longbench_and_longbench_e():
    assert set(SUBSETS) == set(PUBLISHED)
    assert set(EXTENDED) == {f"{subset}_e" for subset in set(PUBLISHED) - NOT_EXTENDED}
    assert len(SUBSETS) == 21
    assert len(EXTENDED) == 13
    assert {subset.metric for subset in SUBSETS.values()} <= set(METRICS)


@pytest.mark.parametrize("subset", PUBLISHED)
def test_all_but_few_shot_and_code_go_through_the_chat_template(subset, write, tokenizer):
    folder = write(subset, row())
    plain = first(LongBench(subset, folder, split="all", chat=False), tokenizer).prompt
    asked = first(LongBench(subset, folder, split="all"), tokenizer).prompt
    assert asked == (plain if subset in CONTINUED else user_message(tokenizer, plain))
    assert ("<|im_start|>" in asked) == (subset not in CONTINUED)
    assert first(LongBench(subset, folder, split="all", chat=True), tokenizer).prompt == user_message(tokenizer, plain)


def test_model_without_a_chat_template_reads_the_plain_prompt(write, tokenizer, monkeypatch):
    folder = write("qasper", row())
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert first(LongBench("qasper", folder, split="all"), tokenizer).prompt.endswith("?\n\nAnswer:")


@pytest.mark.parametrize("subset", PUBLISHED)
def test_target_is_the_first_answer_as_it_would_follow_the_prompt(subset, write, tokenizer):
    folder = write(subset, row(answers=["这", "那"]))
    example = first(LongBench(subset, folder, split="all", chat=False), tokenizer)
    gap = "" if subset in CHINESE or example.prompt[-1].isspace() else " "
    assert example.target == gap + "这"


def test_answer_of_a_few_shot_subset_ends_with_its_first_line(write, tokenizer):
    folder = write("trec", row(answers=["Food"], all_classes=["Food", "Date"]))
    example = first(LongBench("trec", folder, split="all"), tokenizer)
    assert text_score("classification", "\n\nFood\nQuestion: When?\nType: Date", example) == 1
    assert text_score("classification", "Date\nFood", example) == 0
    assert text_score("contains", "Date\nFood", example) == 0


def test_answer_of_another_subset_counts_whole(write, tokenizer):
    folder = write("qasper", row(answers=["Food"]))
    assert text_score("contains", "Date\nFood", first(LongBench("qasper", folder, split="all"), tokenizer)) == 1


@pytest.mark.parametrize("context", [64, 65])
def test_long_prompt_keeps_both_ends_and_loses_its_middle(context, write, tokenizer):
    code = "".join(f"x = call({i})\n" for i in range(400))
    folder = write("lcc", row(context=code))
    example = first(LongBench("lcc", folder, context=context, split="all"), tokenizer)
    whole = tokenizer(SUBSETS["lcc"].prompt.format(context=code, input=""))["input_ids"]
    kept = encode_prompt(tokenizer, example)[0].tolist()
    assert len(kept) == 64
    assert kept == whole[:32] + whole[-32:]
    assert example.prompt.startswith("Please complete the code given below. \nx = call(0)\n")
    assert example.prompt.endswith("call(399)\nNext line of code:\n")


def test_prompt_that_just_fits_is_left_alone(write, tokenizer):
    folder = write("lcc", row(context="x = 1\n" * 50))
    whole = first(LongBench("lcc", folder, split="all"), tokenizer)
    length = encode_prompt(tokenizer, whole).shape[1]
    assert first(LongBench("lcc", folder, split="all", context=length), tokenizer).prompt == whole.prompt
    shorter = first(LongBench("lcc", folder, split="all", context=length - 1), tokenizer)
    assert encode_prompt(tokenizer, shorter).shape[1] < length


def test_chat_template_comes_on_top_of_the_cut_prompt(write, tokenizer):
    folder = write("gov_report", row(context="The committee met and agreed. " * 300))
    plain, chat = (
        first(LongBench("gov_report", folder, context=200, split="all", chat=chat), tokenizer) for chat in (False, None)
    )
    assert encode_prompt(tokenizer, plain).shape[1] == 200
    assert chat.prompt == user_message(tokenizer, plain.prompt)
    assert chat.prompt.count("Now, write a one-page summary of the report.\n\nSummary:<|im_end|>") == 1


def test_cut_chinese_prompt_keeps_instruction_and_question(write, tokenizer):
    folder = write("multifieldqa_zh", row(context="天气很好，大家都出去了。" * 300, input="谁出去了？"))
    example = first(LongBench("multifieldqa_zh", folder, context=150, split="all", chat=False), tokenizer)
    assert example.prompt.startswith("阅读以下文字并用中文简短回答：\n\n天气很好")
    assert example.prompt.endswith("问题：谁出去了？\n回答：")
    assert abs(encode_prompt(tokenizer, example).shape[1] - 150) <= 6


def test_longbench_e_sorts_examples_into_bins_of_length(write, tokenizer):
    lengths = [1, 3999, 4000, 7999, 8000, 30_000]
    folder = write("lcc_e", *(row(i, length=length, dataset="lcc_e") for i, length in enumerate(lengths)))
    examples = LongBench("lcc_e", folder, split="all").examples("report", 6, tokenizer)
    bins = {example.extra["length"]: example.extra["bin"] for example in examples}
    assert bins == {1: "0-4k", 3999: "0-4k", 4000: "4-8k", 7999: "4-8k", 8000: "8k+", 30_000: "8k+"}
    assert {e.metric for e in examples} == {"code_sim"}
    assert examples[0].prompt.startswith("Please complete the code")


def test_length_is_carried_along_without_a_bin_elsewhere(write, tokenizer):
    folder = write("lcc", row(length=5000))
    assert first(LongBench("lcc", folder, split="all"), tokenizer).extra == {"length": 5000}


def test_splits_share_out_all_rows_whatever_the_seeds_and_the_order(write, tokenizer):
    rows = [row(i) for i in range(40)]
    task = LongBench("qasper", write("qasper", *rows))
    drawn = {s: set(numbers(task.examples(s, 100, tokenizer, seed))) for seed, s in enumerate(SPLITS)}
    assert [len(drawn[split]) for split in SPLITS] == [10, 10, 20]
    assert set.union(*drawn.values()) == set(range(40))
    write("qasper", *rows[::-1])
    assert {s: set(numbers(task.examples(s, 100, tokenizer))) for s in SPLITS} == drawn


def test_questions_about_one_document_share_a_split_and_are_neighbours(write, tokenizer):
    rows = [row(i, context=f"Document {i % 8}.") for i in range(40)]
    task = LongBench("qasper", write("qasper", *rows), chat=False)
    documents = {}
    for split in SPLITS:
        about = [number % 8 for number in numbers(task.examples(split, 40, tokenizer))]
        documents[split] = set(about)
        changes = sum(a != b for a, b in pairwise(about))
        assert changes == len(documents[split]) - 1
    assert [len(documents[split]) for split in SPLITS] == [2, 2, 4]
    assert len(set.union(*documents.values())) == 8


def test_seed_chooses_within_the_split(write, tokenizer):
    task = LongBench("qasper", write("qasper", *(row(i) for i in range(80))))
    chosen, again, other = (numbers(task.examples("report", 10, tokenizer, seed)) for seed in (1, 1, 2))
    assert chosen == again != other


def test_split_all_gives_every_row_to_every_split(write, tokenizer):
    task = LongBench("qasper", write("qasper", *(row(i) for i in range(5))), split="all")
    assert all(set(numbers(task.examples(split, 5, tokenizer))) == set(range(5)) for split in SPLITS)


def test_rows_that_differ_in_their_id_alone_count_as_one(write, tokenizer):
    folder = write("qasper", row(0), row(0, _id="copy"), row(1))
    assert len(LongBench("qasper", folder, split="all").examples("report", 2, tokenizer)) == 2


def test_path_may_be_the_folder_the_file_or_the_archive(write, tokenizer, tmp_path):
    folder = write("lcc", row())
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as members:
        members.write(tmp_path / "lcc.jsonl", "data/lcc.jsonl")
    drawn = [
        first(LongBench("lcc", path, split="all"), tokenizer) for path in (folder, f"{folder}/lcc.jsonl", str(archive))
    ]
    assert drawn[0] == drawn[1] == drawn[2]


def test_archive_that_is_damaged_missing_or_lacks_the_subset_is_refused(tokenizer, tmp_path):
    archive = tmp_path / "data.zip"
    task = LongBench("lcc", str(archive))
    with pytest.raises(TaskError, match=r"data\.zip does not exist"):
        first(task, tokenizer)
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("data/trec.jsonl", "{}")
        members.writestr("data/lcc.jsonl", json.dumps(row()) + "\n{")
    with pytest.raises(TaskError, match=r"data\.zip has no qasper\.jsonl"):
        first(LongBench("qasper", str(archive)), tokenizer)
    with pytest.raises(TaskError, match=r"data\.zip:data/lcc\.jsonl line 2: not valid JSON"):
        first(task, tokenizer)
    archive.write_bytes(archive.read_bytes().replace(b"Document", b"document"))
    with pytest.raises(TaskError, match=r"data\.zip cannot be read as an archive: Bad CRC-32"):
        first(task, tokenizer)
    archive.write_bytes(b"PK")
    with pytest.raises(TaskError, match=r"data\.zip cannot be read as an archive") as error:
        first(task, tokenizer)
    assert "\n" not in str(error.value)


def test_archive_in_the_hubs_cache_is_used_offline(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TaskError, match=r"cannot be fetched .* give path= a folder with lcc\.jsonl") as error:
        first(LongBench("lcc"), tokenizer)
    assert "\n" not in str(error.value)
    repository = tmp_path / "datasets--THUDM--LongBench"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    with zipfile.ZipFile(snapshot / "data.zip", "w") as members:
        members.writestr("data/lcc.jsonl", json.dumps(row()))
    assert first(LongBench("lcc", split="all"), tokenizer).id == "lcc-id0"


def without(field):
    return {key: value for key, value in row(1).items() if key != field}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"input": "a", ', "not valid JSON"),
        ('["a"]', "expected a JSON object .* not a list"),
        *((without(field), f"{field} is missing") for field in ("input", "context", "answers", "length")),
        (row(input=None), "input is None, expected a valid string"),
        (row(context=3), "context is 3, expected a valid string"),
        (row(context=" "), "context is ' ', expected a text that is not blank"),
        (row(answers="b"), "answers is 'b', expected a valid list"),
        (row(answers=[]), "answers is empty"),
        (row(answers=[{}]), r"answers\[0\] is \{\}, expected a valid string"),
        (row(length="long"), "length is 'long', expected a valid integer"),
        (row(length=True), "length is True, expected a valid integer"),
        (row(_id=[1]), r"_id is \[1\], expected a valid string"),
        (row(dataset="lcc"), "the row is of dataset 'lcc', not 'trec'; give subset=lcc"),
        (without("all_classes"), "all_classes is missing"),
        (row(all_classes=None), "all_classes is None, expected a valid list"),
    ],
)
def test_malformed_row_is_named_by_file_and_line(bad, message, write, tokenizer):
    bad = bad if isinstance(bad, str) else json.dumps(bad)
    with pytest.raises(TaskError, match=r"trec\.jsonl line 2: " + message) as error:
        first(LongBench("trec", write("trec", row(), bad)), tokenizer)
    assert "\n" not in str(error.value)


def test_classes_are_asked_of_classification_alone(write, tokenizer):
    assert first(LongBench("lcc", write("lcc", row(all_classes=None)), split="all"), tokenizer)
    assert first(LongBench("qasper", write("qasper", row(all_classes=[])), split="all"), tokenizer)


def test_summary_needs_no_question(write, tokenizer):
    assert first(LongBench("gov_report", write("gov_report", row(input="")), split="all"), tokenizer)


def test_missing_folder_file_or_rows_are_named(write, tokenizer, tmp_path):
    with pytest.raises(TaskError, match="nowhere does not exist"):
        first(LongBench("lcc", str(tmp_path / "nowhere")), tokenizer)
    with pytest.raises(TaskError, match=r"has no lcc\.jsonl; it has no \.jsonl files"):
        first(LongBench("lcc", str(tmp_path)), tokenizer)
    folder = write("trec", "")
    with pytest.raises(TaskError, match=r"has no lcc\.jsonl; it has trec\.jsonl"):
        first(LongBench("lcc", folder), tokenizer)
    with pytest.raises(TaskError, match=r"trec\.jsonl has no rows"):
        first(LongBench("trec", folder), tokenizer)
    write("trec", row(0), row(1))
    with pytest.raises(TaskError, match="split 'train' is empty: the file has 2 different documents"):
        LongBench("trec", folder).examples("train", 1, tokenizer)


def test_spec_is_read_and_written():
    task = get_task("longbench:subset=lcc,path=DIR")
    assert task == LongBench("lcc", "DIR")
    assert format_spec(task) == "longbench:subset=lcc,path=DIR"
    assert get_task("longbench:subset=repobench-p_e,context=7500,split=all,chat=false").context == 7500


def test_settings_out_of_range_are_refused():
    with pytest.raises(UsageError, match=r"unknown longbench subset 'hotpot'\. Did you mean 'hotpotqa'"):
        get_task("longbench:subset=hotpot")
    with pytest.raises(UsageError, match=r"'narrativeqa_e'\. Did you mean 'narrativeqa'"):
        get_task("longbench:subset=narrativeqa_e")
    with pytest.raises(TaskError, match="needs subset"):
        get_task("longbench")
    with pytest.raises(TaskError, match="context=1 is out of range"):
        get_task("longbench:subset=lcc,context=1")
    with pytest.raises(TaskError, match="split='some' is unknown"):
        LongBench("lcc", split="some")


def test_published_rows_that_no_answer_can_score_on_stay_with_a_warning(write, tokenizer, caplog):
    folder = write("lcc", *(row(n, answers=[f"x = {n}" if n else "x = 1  # one"]) for n in range(5)))
    task = LongBench("lcc", folder, split="all")
    assert len(task.examples("report", 5, tokenizer)) == 5
    assert "no answer can score under code_sim in 1 of 5 rows (lcc-id0, …)" in caplog.text
