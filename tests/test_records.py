"""Every example on record: what a line says, and that a stopped or killed evaluation goes on to the same result."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import evolkv
from evolkv import BudgetProfile
from evolkv.cli import console, main
from evolkv.cli.arguments import for_typer
from evolkv.cli.tables import print_table
from evolkv.errors import RunError, UsageError
from evolkv.evaluation import EvaluationInterrupted, EvaluationProgress, Method
from evolkv.evaluation.compare import compare_records
from evolkv.evaluation.records import RecordLog, Records, read_records, sha256
from evolkv.evaluation.summary import summarise
from evolkv.report.needles import needle_grids
from evolkv.report.sources import read_sources
from evolkv.report.tables import results_note, results_table
from evolkv.selectors import get_selector
from evolkv.tasks import format_spec, get_task
from evolkv.tasks.jsonl import JsonLines
from evolkv.tasks.metrics import get_metric
from tiny import VOCABULARY, tiny_model

EXAMPLES = 12
METHODS = {"methods": ["full", "streaming_llm", "snapkv"], "budgets": [40, 56], "samples": EXAMPLES}
ROWS = 5


@pytest.fixture(scope="module")
def tiny():
    """A random model and a tokenizer whose tokens are letters (Latin Extended-A)."""
    vocabulary = {"<pad>": 0, "<end>": 1, "<start>": 2} | {chr(256 + i): i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    return tiny_model(), fast


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A file of prompts that begin alike, so that neighbours share their prefill."""
    words, path = random.Random(0), tmp_path_factory.mktemp("task") / "letters.jsonl"
    text = lambda size: "".join(words.choices("šŢţŤťŦŧŨ", k=size))  # noqa: E731
    # Of what this model writes, whatever it is asked.
    answers = lambda: ["".join(words.choices("ĪĞżŗ", k=12)) for _ in range(2)]  # noqa: E731
    begin = text(70)
    rows = [{"prompt": begin + text(90), "answers": answers(), "id": f"letters {i}"} for i in range(EXAMPLES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:path={path},metric=code_sim,max_new_tokens=12,split=all"


@pytest.fixture(scope="module")
def whole(tiny, task, tmp_path_factory):
    """An evaluation that nothing interrupted: its file and rows."""
    path = tmp_path_factory.mktemp("whole") / "records.jsonl"
    return path, evolkv.evaluate(*tiny, task=task, records=path, **METHODS)


def lines(path):
    header, *records = map(json.loads, path.read_text().splitlines())
    return header, records


def test_every_example_is_on_record_once_for_each_method_and_budget(tiny, task, whole):
    path, rows = whole
    header, records = lines(path)
    assert header["format"] == "evolkv.records/1"
    assert list(header["settings"]["methods"]) == [
        "full",
        "streaming_llm@40",
        "streaming_llm@56",
        "snapkv@40",
        "snapkv@56",
    ]
    keys = {(each["task"], each["method"], each["budget"], each["example"]) for each in records}
    assert len(records) == len(keys) == ROWS * EXAMPLES
    assert {each["protocol"] for each in records} == {row["protocol"] for row in rows} == {"aware"}
    assert {each["example"] for each in records} == {f"letters {i}" for i in range(EXAMPLES)}


def test_a_record_says_what_was_asked_answered_and_held(tiny, task, whole):
    _, tokenizer = tiny
    examples = {each.id: each for each in get_task(task).examples("report", EXAMPLES, tokenizer, 0)}
    entry = 2 * 16 * 4
    for each in lines(whole[0])[1]:
        example = examples[each["example"]]
        assert each["prompt_sha256"] == sha256(example.prompt)
        assert each["prompt_tokens"] == len(example.prompt)
        assert each["references"] == list(example.references)
        assert each["metric"] == "code_sim"
        # The score can be checked by whoever has the line.
        assert each["score"] == get_metric("code_sim")(each["prediction"], each["references"], **each["extra"])
        assert each["mean_budget"] == (each["budget"] or each["prompt_tokens"])
        assert each["kv_bytes"] == each["mean_budget"] * 4 * 2 * entry
    # Neither are all answers the same nor all scores.
    assert len({each["prediction"] for each in lines(whole[0])[1]}) > 5
    assert len({each["score"] for each in lines(whole[0])[1]}) > 5


def test_rows_follow_from_the_file_alone(whole):
    path, rows = whole
    assert summarise(read_records(path)) == rows
    _, records = lines(path)
    for row in rows:
        scores = [
            each["score"] for each in records if (each["method"], each["budget"]) == (row["method"], row["budget"])
        ]
        assert row["score"] == pytest.approx(np.mean(scores))


def test_records_of_log_probs_have_no_prediction(tiny, task, tmp_path):
    path = tmp_path / "r.jsonl"
    (row,) = evolkv.evaluate(*tiny, task=task, methods=["full"], samples=2, metric="logprob", records=path)
    _, records = lines(path)
    assert [each["prediction"] for each in records] == [None, None]
    assert row["score"] == pytest.approx(np.mean([each["score"] for each in records]))


def test_a_finished_evaluation_computes_nothing_again(tiny, task, whole):
    path, rows = whole
    before, calls, steps = path.read_bytes(), [], []
    handle = tiny[0].register_forward_hook(lambda *call: calls.append(1))
    again = evolkv.evaluate(*tiny, task=task, records=path, on_progress=steps.append, **METHODS)
    handle.remove()
    assert again == rows
    assert not calls
    assert path.read_bytes() == before
    assert steps == [EvaluationProgress(EXAMPLES, EXAMPLES, EXAMPLES)]


@pytest.mark.parametrize(
    ("threads", "metric"),
    [(1, "logprob"), (2, None), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, None), (2, "logprob")))],
)
def test_a_file_cut_anywhere_leads_to_the_same_rows(tiny, task, tmp_path, threads, metric):
    settings = {**METHODS, "task": task, "metric": metric}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
        rows = evolkv.evaluate(*tiny, records=path, **settings)
        data = path.read_bytes()
        header = data.index(b"\n") + 1
        places = random.Random(threads)
        for size in [0, 10, header - 1, header, *(places.randrange(header, len(data)) for _ in range(4))]:
            cut.write_bytes(data[:size])
            assert evolkv.evaluate(*tiny, records=cut, **settings) == rows, size
            assert sorted(cut.read_bytes().splitlines()) == sorted(data.splitlines()), size
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """One shard after another, so that the first has ended before the last example is begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_evaluation_says_what_it_has_and_goes_on_from_there(tiny, task, whole, tmp_path):
    path = tmp_path / "r.jsonl"

    def stop(step):
        if step.done == 10:
            raise KeyboardInterrupt

    settings = {**METHODS, "task": task, "records": path}
    with pytest.raises(EvaluationInterrupted) as stopped:
        evolkv.evaluate(*tiny, on_progress=stop, **settings)
    found = stopped.value
    assert 0 < found.finished < found.total == EXAMPLES
    assert [row["n"] for row in found.rows] == [found.finished] * ROWS
    steps = []
    again = evolkv.evaluate(*tiny, on_progress=steps.append, **settings)
    assert steps[0] == EvaluationProgress(found.finished, EXAMPLES, found.finished)
    assert steps[-1].done == EXAMPLES
    assert again == whole[1]
    with pytest.raises(KeyboardInterrupt):
        evolkv.evaluate(*tiny, task=task, on_progress=stop, **METHODS)


@pytest.mark.usefixtures("one_thread")
def test_an_evaluation_that_runs_out_of_memory_says_what_takes_less_and_keeps_what_is_finished(tiny, task, tmp_path):
    path = tmp_path / "r.jsonl"

    def fail(step):
        if step.done == 10:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RunError, match=r"out of memory in the evaluation; fewer methods .* finished examples are in"):
        evolkv.evaluate(*tiny, task=task, on_progress=fail, records=path, **METHODS)
    assert read_records(path).examples
    with pytest.raises(RunError, match=r"--prefill-chunk take less$"):
        evolkv.evaluate(*tiny, task=task, on_progress=fail, **METHODS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed: the records have 0, now 1"),
        ({"samples": 5}, f"samples: the records have {EXAMPLES}, now 5"),
        ({"metric": "logprob"}, 'metric: the records have null, now "logprob"'),
        ({"prefill_chunk": 64}, "prefill_chunk: the records have null, now 64"),
        ({"budgets": [40, 57]}, "methods.streaming_llm@56"),
        ({"methods": ["full", "snapkv"]}, "methods.streaming_llm@40"),
        ({"sample_ids": ["letters 1"]}, 'sample_ids: the records have null, now ["letters 1"]'),
    ],
)
def test_records_of_other_settings_are_refused_by_name(tiny, task, whole, changes, words):
    path, _ = whole
    before = path.read_bytes()
    with pytest.raises(UsageError) as caught:
        evolkv.evaluate(*tiny, task=task, records=path, **{**METHODS, **changes})
    assert words in str(caught.value)
    assert "give another --records, or delete it" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_another_model_dtype_or_profile_is_refused_by_name(tiny, task, tmp_path):
    model, tokenizer = tiny
    path, profile = tmp_path / "r.jsonl", tmp_path / "p.json"
    BudgetProfile.from_budgets(model, [40, 40, 60, 60]).save(profile)
    settings = {"task": task, "methods": ["full", "snapkv"], "budgets": [50], "samples": 1, "records": path}
    evolkv.evaluate(model, tokenizer, **settings)
    with pytest.raises(UsageError, match=r"model\.fingerprint"):
        evolkv.evaluate(tiny_model(seed=1), tokenizer, **settings)
    with pytest.raises(UsageError, match=r'model\.dtype: the records have "float32", now "bfloat16"'):
        evolkv.evaluate(tiny_model().bfloat16(), tokenizer, **settings)
    settings |= {"methods": [str(profile)], "records": tmp_path / "profile.jsonl"}
    evolkv.evaluate(model, tokenizer, **settings)
    BudgetProfile.from_budgets(model, [60, 60, 40, 40]).save(profile)
    with pytest.raises(UsageError, match=r"methods\..*p\.json@50"):
        evolkv.evaluate(model, tokenizer, **settings)


def test_two_methods_of_one_name_are_refused_and_one_given_twice_is_taken_once(tiny, task):
    twins = [
        Method("mine", get_selector("snapkv"), profile=BudgetProfile.from_budgets(tiny[0], budgets))
        for budgets in ([40, 40, 60, 60], [60, 60, 40, 40])
    ]
    with pytest.raises(UsageError, match="two different methods are called mine@50"):
        evolkv.evaluate(*tiny, task=task, methods=twins, samples=1)
    rows = evolkv.evaluate(*tiny, task=[task, task], methods=["full", twins[0], twins[0]], samples=1)
    assert [row["method"] for row in rows] == ["full", "mine"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: "precious notes\n", "not a file of records"),
        (lambda text: "precious", "not a file of records"),
        (lambda text: '{"format": "evolkv.results/1"}\n', "not a file of records"),
        (lambda text: text.replace("records/1", "records/2", 1), "this EvolKV reads 'evolkv.records/1'"),
        (lambda text: text.replace('"aware", "seed": 0', '"aware", "seed": "x"', 1), "line 1: settings: seed"),
        (lambda text: text.replace('{"task"', "{task", 1), "line 2: not JSON"),
        (lambda text: text.replace('"score": ', '"score": 7', 1), "line 2: score"),
        (lambda text: text.replace('"example": "letters', '"example": "words', 1), "line 2: example 'words"),
        (
            lambda text: text.replace(
                '"method": "full", "budget": null, "metric"', '"method": "h2o", "budget": 9, "metric"', 1
            ),
            "line 2: method 'h2o@9'",
        ),
        (
            lambda text: text + text.splitlines()[-1].replace('"prediction": "', '"prediction": "?') + "\n",
            "not the same",
        ),
    ],
)
def test_a_damaged_file_is_refused_in_one_line_and_kept(tiny, task, whole, tmp_path, spoil, words):
    path = tmp_path / "r.jsonl"
    path.write_text(spoil(whole[0].read_text()))
    before = path.read_bytes()
    with pytest.raises(UsageError) as caught:
        evolkv.evaluate(*tiny, task=task, records=path, **METHODS)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_in_one_line(whole):
    records = read_records(whole[0])
    log = RecordLog(Records(records.settings), Path("r.jsonl"))
    log._file = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(RunError, match=r"records r\.jsonl cannot be written: No space left"):
            log.add(list(next(iter(records.examples.values())).values()))
        assert not log.records.examples
    finally:
        os.close(log._file)


def test_records_in_use_are_refused(tiny, task, whole, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(whole[0].read_bytes())
    # The child shares the modules that are loaded here, and computes nothing.
    context = multiprocessing.get_context("fork")
    holding, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(path, holding, release))
    process.start()
    try:
        assert holding.wait(60)
        with pytest.raises(UsageError, match="in use by another evaluation"):
            evolkv.evaluate(*tiny, task=task, records=path, **METHODS)
        # Whoever only reads need not wait.
        assert len(read_records(path).examples) == EXAMPLES
    finally:
        release.set()
        process.join()
    assert evolkv.evaluate(*tiny, task=task, records=path, **METHODS) == whole[1]


def _hold(path, holding, release):
    log = RecordLog.open(path, read_records(path).settings)
    holding.set()
    release.wait(60)
    log.close()


def test_chosen_examples_alone_are_evaluated(tiny, task, whole):
    _, records = lines(whole[0])
    chosen = ["letters 7", "letters 2"]
    rows = evolkv.evaluate(*tiny, task=task, sample_ids=chosen, **METHODS)
    for row in rows:
        scores = [
            each["score"]
            for each in records
            if (each["method"], each["budget"]) == (row["method"], row["budget"]) and each["example"] in chosen
        ]
        assert (row["n"], row["score"]) == (2, pytest.approx(np.mean(scores)))
    assert evolkv.evaluate(*tiny, task=task, sample_ids=",".join(chosen), **METHODS) == rows


def test_an_unknown_example_is_refused_with_the_nearest_one(tiny, task):
    with pytest.raises(UsageError) as caught:
        evolkv.evaluate(*tiny, task=task, sample_ids=["leters 7"], **METHODS)
    assert "unknown example 'leters 7'. Did you mean 'letters 7'?" in str(caught.value)
    assert f"--samples draws {EXAMPLES}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_examples_of_one_id_are_told_apart(tiny, tmp_path):
    data, path = tmp_path / "twins.jsonl", tmp_path / "r.jsonl"
    data.write_text("".join(json.dumps({"prompt": c * 60, "answer": c, "id": "same"}) + "\n" for c in "abc"))
    settings = {"task": f"jsonl:path={data},split=all", "methods": ["full"], "samples": 3, "records": path}
    rows = evolkv.evaluate(*tiny, **settings)
    assert {each["example"] for each in lines(path)[1]} == {"same", "same#2", "same#3"}
    assert evolkv.evaluate(*tiny, **settings) == rows


def test_texts_that_break_files_elsewhere_are_kept(tiny, task, whole, tmp_path):
    # Halves of characters, and separators that other readers take for the end of a line.
    text = "\ud83d \u2028 \x85 \r\n \x00 \u4e2d"
    records = read_records(whole[0])
    path = tmp_path / "r.jsonl"
    log = RecordLog.open(path, records.settings)
    first = next(iter(records.examples.values()))["full"]
    log.add([first.model_copy(update={"prediction": text})])
    log.close()
    assert next(iter(read_records(path).examples.values()))["full"].prediction == text


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The tiny model as a folder that the program can load."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    for part in tiny:
        part.save_pretrained(path)
    return path


def options(folder, task, out):
    return [
        *("eval", str(folder), "--dtype", "float32", "--device", "cpu", "--task", task, "--samples", str(EXAMPLES)),
        *("--method", "full", "streaming_llm", "snapkv", "--budget", "40,56", "--json", str(out)),
    ]


def start(*argv):
    # A shell that runs the tests in the background has its children ignore interrupts.
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    command = [sys.executable, "-m", "evolkv", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore)


@pytest.mark.slow
def test_a_killed_program_goes_on_to_the_same_result(folder, task, tmp_path):
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    assert start(*options(folder, task, whole)).wait() == 0
    records = killed.with_suffix(".records.jsonl")
    moment = random.randint(1, EXAMPLES * ROWS)
    process = start(*options(folder, task, killed))
    while process.poll() is None:
        if records.exists() and records.read_bytes().count(b"\n") >= moment:
            break
        time.sleep(0.001)
    process.kill()
    process.wait()
    held = records.read_bytes().count(b"\n") - 1
    again = start(*options(folder, task, killed))
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert json.loads(killed.read_text()) == json.loads(whole.read_text()), f"killed after {moment}, held {held} lines"
    assert re_recorded(err) == held // ROWS
    assert "score (95 %" in out
    assert sorted(records.read_text().splitlines()) == sorted(
        whole.with_suffix(".records.jsonl").read_text().splitlines()
    )


def re_recorded(err):
    said = [line for line in err.splitlines() if "on record" in line]
    return int(said[0].split()[1]) if said else 0


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_a_terminated_evaluation_keeps_what_is_finished_and_exits_143(folder, task, tmp_path):
    out = tmp_path / "r.1"
    process = start(*options(folder, task, out))
    records = tmp_path / "r.1.records.jsonl"
    while process.poll() is None and not (records.exists() and records.read_bytes().count(b"\n") > 1):
        time.sleep(0.001)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "the same command goes on from there" in err
    assert json.loads(out.read_text())["interrupted"] is True


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_program_prints_what_is_finished_and_exits_130(run, folder, task, tmp_path, monkeypatch):
    show = console.Progress.__call__

    def stop(self, stage, done, total, **more):
        show(self, stage, done, total, **more)
        if done == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(console.Progress, "__call__", stop)
    code, out, err = run(*options(folder, task, "r.json"))
    assert code == 130
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["interrupted"] is True
    n = results["rows"][0]["n"]
    assert 0 < n < EXAMPLES
    assert out.count(f" {n}  code_sim ") == ROWS
    assert f"interrupted after {n} of {EXAMPLES} examples; they are in r.records.jsonl" in err.splitlines()[-1]


def test_tables_are_written_for_terminal_markdown_and_json(run, folder, task, tmp_path, monkeypatch):
    code, out, _ = run(*options(folder, task, "r.json"), "--markdown", "r.md")
    assert code == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    text = (tmp_path / "r.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) == 2 + ROWS
    assert table[2].startswith("| full | – |")
    assert f"{rows[1]['score']:.3f}" in table[3]
    assert f"{rows[1]['score']:.3f}" in out
    assert run(*options(folder, task, "r.json"), "--markdown", "-")[1] == text
    code, out, _ = run("compare", "r.records.jsonl", "--a", "snapkv", "--b", "streaming_llm@40", "--budget", "40")
    assert code == 0
    found = evolkv.evaluation.paired_comparison(
        *(
            [each["score"] for each in ordered(tmp_path / "r.records.jsonl") if each["method"] == method]
            for method in ("snapkv", "streaming_llm")
        )
    )
    assert "a is snapkv@40, b is streaming_llm@40" in out
    assert f"{found.difference:+.3f} ({found.ci95[0]:+.3f} to {found.ci95[1]:+.3f})" in out
    assert f"{found.wins} / {found.ties} / {found.losses}" in out
    code, out, _ = run(
        *("compare", "r.records.jsonl", "--a", "snapkv@40", "--b", "full", "--json", "c.json", "--markdown", "-")
    )
    assert code == 0
    assert out.count("|\n") == 3
    assert json.loads((tmp_path / "c.json").read_text())["rows"][0]["n"] == EXAMPLES


def ordered(path):
    """Records at budget 40, by example."""
    return sorted((each for each in lines(path)[1] if each["budget"] == 40), key=lambda each: each["example"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--json", "r.json", "--records", "r.json"], "a file of its own"),
        (["--records", "folder"], "folder is a folder"),
        (["--json", "r.json", "--markdown", "r.json"], "a file of its own"),
        (["--records", "notes.txt"], "not a file of records"),
        (["--sample-ids", "letters 99,letters 1"], "Did you mean 'letters 9'"),
    ],
)
def test_outputs_that_cannot_be_are_refused_and_nothing_is_written(run, folder, task, tmp_path, argv, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("precious\n")
    common = ["eval", folder, "--task", task, "--method", "full", "--samples", EXAMPLES, "--dtype", "float32"]
    code, out, err = run(*common, *argv)
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert (tmp_path / "notes.txt").read_text() == "precious\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "notes.txt"]


def test_records_can_be_left_out_or_kept_without_results(run, folder, task, tmp_path):
    common = ["eval", folder, "--task", task, "--method", "full", "--samples", 2, "--dtype", "float32"]
    assert run(*common, "--json", "r.json", "--records", "none")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    chosen = [each.id for each in get_task(task).examples("report", 2, None)]
    assert run(*common, "--records", "sub/own.jsonl", "--sample-ids", *chosen[:1])[0] == 0
    assert [each["example"] for each in lines(tmp_path / "sub" / "own.jsonl")[1]] == chosen[:1]


def test_results_never_go_to_a_file_that_is_read(run, folder, task, tiny, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(Path(task.partition("path=")[2].partition(",")[0]).read_text())
    BudgetProfile.uniform(tiny[0], 40).save("p-40.json")
    BudgetProfile.uniform(tiny[0], 40).save("p.json")
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    common = ["eval", folder, "--task", "jsonl:path=rows.jsonl", "--samples", 1, "--dtype", "float32"]
    for method, out in (("p.json", "./p.json"), ("p-{}.json", "p-40.json"), ("full", "rows.jsonl")):
        code, _, err = run(*common, "--method", method, "--budget", 40, "--json", out)
        assert code == 2
        assert "but is read by this command" in err
    code, _, err = run("search", folder, "--task", "jsonl:path=rows.jsonl", "--budget", 40, "--out", "rows.jsonl")
    assert (code, "but is read by this command" in err) == (2, True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_examples_with_several_metrics_and_in_bins_of_length_are_told_apart(tiny, task, tmp_path):
    examples = get_task(task).examples("report", 4, tiny[1])
    metrics = ["contains", "qa_f1", "contains", "contains"]
    bins = ["4-8k", "0-4k", "4-8k", "8k+"]

    class Several(JsonLines):
        def examples(self, split, n, tokenizer, seed=0):
            return [
                replace(each, metric=metric, extra={"bin": name})
                for each, metric, name in zip(examples, metrics, bins, strict=True)
            ]

    path = tmp_path / "r.jsonl"
    found = evolkv.evaluate(
        *tiny, task=Several("x.jsonl"), methods=["full", "tova"], budgets=[40], samples=4, records=path
    )
    assert {row["metric"] for row in found} == {"contains+qa_f1"}
    assert [row["bins"].keys() for row in found] == [{"0-4k": 0, "4-8k": 0, "8k+": 0}.keys()] * 2
    for row in found:
        assert sum(each["n"] * each["score"] for each in row["bins"].values()) == pytest.approx(4 * row["score"])
    assert results_table(found).columns[5:9] == ["0-4k", "4-8k", "8k+", "KV MiB"]
    (compared,) = compare_records([path]).tasks
    assert compared.metric == "contains+qa_f1"


def test_an_example_that_its_metric_cannot_score_is_named_before_anything_is_computed(tiny, task):
    with pytest.raises(UsageError, match=r"example letters \d+: metric 'classification' needs the names"):
        evolkv.evaluate(*tiny, task=task, metric="classification", records="nowhere/r.jsonl", **METHODS)
    assert not Path("nowhere").exists()


def test_an_id_may_have_a_comma(tiny, task, tmp_path):
    rows = [json.loads(line) for line in Path(task.partition("path=")[2].partition(",")[0]).read_text().splitlines()]
    path = tmp_path / "commas.jsonl"
    path.write_text("".join(json.dumps({**row, "id": f"a, {i}"}) + "\n" for i, row in enumerate(rows)))
    settings = {"task": f"jsonl:path={path},split=all", "methods": ["full"], "samples": EXAMPLES}
    (row,) = evolkv.evaluate(*tiny, sample_ids=["a, 3", "a, 5"], **settings)
    assert row["n"] == 2
    with pytest.raises(UsageError, match="unknown example 'a'"):
        evolkv.evaluate(*tiny, sample_ids=["a, 77"], **settings)


def test_a_profile_evolved_on_rows_that_all_serve_is_pointed_out(tiny, task, tmp_path, caplog):
    spec = format_spec(get_task(task))
    BudgetProfile.from_budgets(tiny[0], np.full((4, 2), 40), search={"task": f"{spec} && niah"}).save(
        tmp_path / "p.json"
    )
    evolkv.evaluate(*tiny, task=task, methods=["full", str(tmp_path / "p.json")], samples=2)
    assert "p.json@40 was evolved on rows of jsonl" in caplog.text


def test_examples_that_a_search_saw_are_on_record_as_such(tiny, task, tmp_path, caplog):
    settings = {"task": task, "budget": 56, "train": 3, "val": 2, "max_evals": 6, "start": "uniform"}
    found = evolkv.search(*tiny, selector="streaming_llm", **settings)
    _, tokenizer = tiny
    examples = get_task(task).examples("report", EXAMPLES, tokenizer, 0)
    saw = {sha256(each.prompt)[:16] for each in examples} & set(found.profile.search["seen"])
    rows = evolkv.evaluate(
        *tiny, task=task, methods=["full", found.profile], samples=EXAMPLES, records=tmp_path / "seen.jsonl"
    )
    assert [row.get("seen") for row in rows] == [None, len(saw)]
    assert "held-out" not in results_table(rows).caption
    assert f"was evolved or chosen on {len(saw)} of the {EXAMPLES} examples" in results_note(rows)
    methods = read_records(tmp_path / "seen.jsonl").settings.methods
    (names,) = next(each.seen for label, each in methods.items() if label != "full").values()
    assert names == [each.id for each in examples if sha256(each.prompt)[:16] in saw]
    assert f"was evolved or chosen on {len(saw)} of the {EXAMPLES} examples" in caplog.text
    assert 0 < len(saw) <= 5


def test_ids_are_listed_as_other_options_are():
    assert for_typer(["eval", "m", "--sample-ids", "a", "b"]) == ["eval", "m", "--sample-ids", "a", "--sample-ids", "b"]


def needle(context, depth, score, number, label="snapkv@64"):
    method, _, budget = label.partition("@")
    return {
        "task": f"niah:context={context},needles=2",
        "example": f"niah-report-0-{number}",
        "prompt_sha256": f"{context} {number}",
        "prompt_tokens": context - 3,
        "method": method,
        "budget": int(budget) if budget else None,
        "metric": "contains",
        "protocol": "aware",
        "prediction": "",
        "first_line": False,
        "stop": [],
        "references": ["1"],
        "score": score,
        "kv_bytes": 1024,
        "mean_budget": 64.0,
        "extra": {"depth": depth},
    }


@pytest.fixture
def grid(whole, tmp_path):
    """Records of two methods on needles at two contexts, as another run may have left them."""
    header, _ = lines(whole[0])
    settings = header["settings"]
    settings["methods"] = {key: settings["methods"][key] for key in ("full",)} | {
        "snapkv@64": {**settings["methods"]["snapkv@40"], "budget": 64}
    }
    places = [(0.0, 1.0), (0.55, 0.0), (0.58, 1.0), (1.0, 1.0)]
    settings["tasks"] = {
        f"niah:context={context},needles=2": {
            "fingerprint": "0",
            "examples": [f"niah-report-0-{i}" for i in range(len(places))],
        }
        for context in (2000, 400)
    }
    records = [
        needle(context, depth, 1.0 if label == "full" else score * (context == 400), i, label)
        for context in (2000, 400)
        for i, (depth, score) in enumerate(places)
        for label in ("full", "snapkv@64")
    ]
    path = tmp_path / "needles.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [header, *records]))
    return path


def test_needles_are_shown_by_depth_and_context(grid):
    full, snapkv = needle_grids([read_records(grid)])
    assert (full.title, snapkv.title) == ("full", "snapkv@64")
    assert (snapkv.chart.columns, snapkv.chart.rows) == (2, 10)
    assert [tick.label for tick in snapkv.chart.x.ticks] == ["400", "2,000"]
    cells = {row[0]: row[1:] for row in snapkv.chart.table.rows}
    assert cells["0–10 %"] == ["1.00 (n = 1)", "0.00 (n = 1)"]
    assert cells["50–60 %"] == ["0.50 (n = 2)", "0.00 (n = 2)"]
    assert cells["90–100 %"] == ["1.00 (n = 1)", "0.00 (n = 1)"]
    assert cells["20–30 %"] == ["–", "–"]
    # Left column: bright at both ends, middling between; right column: darkest; the rest is empty.
    assert dict(snapkv.chart.paths) == {
        0: "M1 0h1v1h-1zM1 5h1v1h-1zM1 9h1v1h-1z",
        8: "M0 5h1v1h-1z",
        15: "M0 0h1v1h-1zM0 9h1v1h-1z",
    }
    assert "8 examples at 2 contexts: mean contains 0.38; lowest, 0.00, at depth 0–10 % of 2,000" in snapkv.finding
    assert "the same in every cell" in full.finding


def test_records_given_twice_or_with_their_results_count_once(grid, tmp_path):
    results, copy = tmp_path / "results.json", tmp_path / "copy.jsonl"
    copy.write_bytes(grid.read_bytes())
    results.write_text(json.dumps({"format": "evolkv.results/1", "rows": summarise(read_records(grid))}))
    sources = read_sources([str(results), str(grid), str(copy)])
    assert len(sources.rows) == 4
    assert [row for grid in needle_grids(sources.records) for row in grid.chart.table.rows] == [
        row for grid in needle_grids([read_records(grid)]) for row in grid.chart.table.rows
    ]
    # A folder is read for what is ours.
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    assert len(read_sources([str(tmp_path)]).records) == 2


def test_a_report_of_records_shows_scores_and_grids(run, grid, tmp_path):
    assert run("report", grid, "--out", "r.html")[0] == 0
    page = (tmp_path / "r.html").read_text()
    assert "Needles found, by depth and context" in page
    assert page.count("Heat map: score by depth of the needle and length of the prompt.") == 4
    assert "<script>alert" not in page
    grid.write_text(grid.read_text().splitlines()[0] + "\n")
    code, _, err = run("report", grid, "--out", "r.html")
    assert code == 2
    assert "no example is finished yet" in err


def test_needles_at_one_context_or_of_another_task_make_no_grid(grid, whole):
    assert needle_grids([read_records(whole[0])]) == []
    text = grid.read_text().replace("context=2000", "context=400")
    one = [line for number, line in enumerate(text.splitlines()) if number == 0 or number > 8]
    grid.write_text("\n".join(one) + "\n")
    assert needle_grids([read_records(grid)]) == []


@pytest.mark.slow
@pytest.mark.model
def test_needles_of_a_real_model_are_on_record_with_their_depths(smollm2, tmp_path):
    path = tmp_path / "r.jsonl"
    settings = {"task": "niah:context=160", "methods": ["full", "tova"], "budgets": [64], "samples": 3, "records": path}

    def stop(step):
        raise KeyboardInterrupt

    rows = evolkv.evaluate(*smollm2, **{**settings, "records": None})
    with pytest.raises(KeyboardInterrupt):
        evolkv.evaluate(*smollm2, on_progress=stop, **settings)
    assert evolkv.evaluate(*smollm2, **settings) == rows
    _, records = lines(path)
    assert len(records) == 6
    for each in records:
        assert 0 <= each["extra"]["depth"] <= 1
        assert 152 <= each["prompt_tokens"] <= 160
        assert each["score"] == float(each["references"][0] in each["prediction"])
    assert sum(each["score"] for each in records if each["method"] == "full") == 3


def test_log_probs_agree_to_the_last_bit_after_a_cut(small, tmp_path):
    # Prompts that share a prefix are not prefilled in one piece, and so a shard is prefilled again from its start.
    path = tmp_path / "r.jsonl"
    settings = {"task": "niah:context=200", "methods": ["full", "snapkv"], "budgets": [64], "samples": 5}
    rows = evolkv.evaluate(*small, metric="logprob", records=path, **settings)
    text = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(text[:5]) + text[5][:40])
    assert evolkv.evaluate(*small, metric="logprob", records=path, **settings) == rows
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(text)


def test_a_narrow_terminal_has_what_rows_share_in_headings_and_every_number_whole(capsys, monkeypatch):
    scored = {"n": 16, "metric": "logprob", "score": 0.5, "ci95": [0.25, 0.75], "kv_bytes": 2**20}
    tasks, methods = ("niah:context=3200", "ruler:task=niah_multiquery"), ("full", "adakv+snapkv")
    rows = [
        {
            **scored,
            "task": task,
            "method": method,
            "budget": None if method == "full" else budget,
            "mean_budget": 3987.7,
        }
        for task in tasks
        for method in methods
        for budget in (64, 128)
    ]
    table = results_table(rows)
    monkeypatch.setattr(console.OUT, "width", 80)
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "n = 16" in line] == [f"{task}, n = 16, metric logprob" for task in tasks]
    assert sum("0.500 (0.25–0.75)" in line for line in lines) == len(rows)
    assert max(map(len, lines)) <= 80
    monkeypatch.setattr(console.OUT, "width", 200)
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows)
    assert all("logprob" in line and "16" in line for line in lines[1:])
