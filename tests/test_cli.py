import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import evolkv.models
from evolkv.cli import console, main
from evolkv.cli.app import app, no_interrupt_lost
from evolkv.cli.arguments import for_typer
from evolkv.cli.demo import _next_commands
from evolkv.cli.options import ModelOptions
from evolkv.cli.search_command import _verdict
from evolkv.cli.tables import print_table, print_whole, validation_table
from evolkv.demo import EFFORT, DemoFiles
from evolkv.errors import RunError
from evolkv.evaluation import ReplayEngine
from evolkv.evaluation.records import read_records
from evolkv.evaluation.summary import summarise
from evolkv.profile import BudgetProfile
from evolkv.report.tables import results_table
from evolkv.report.words import mebibytes
from tiny import tiny_model

MODEL = "smollm2-135m"
TASK = "niah:context=300"
#: For searches whose result does not matter: one selector and no descent, which are most of the default's time.
FROM_UNIFORM = ("--selector", "snapkv", "--start", "uniform")


def calling(model, monkeypatch, capsys, tmp_path):
    """The program in an empty folder, with a model already in memory: a call gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    load = evolkv.models.load_model
    loaded = lambda name, **options: model if name == MODEL else load(name, **options)  # noqa: E731
    monkeypatch.setattr(evolkv.models, "load_model", loaded)

    def call(*argv):
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run(small, monkeypatch, capsys, tmp_path):
    """The program, for which a random model goes by SmolLM2's name."""
    return calling(small, monkeypatch, capsys, tmp_path)


@pytest.fixture
def run_smollm2(smollm2, monkeypatch, capsys, tmp_path):
    return calling(smollm2, monkeypatch, capsys, tmp_path)


def program(*argv, **options):
    # A shell that runs the tests in the background has its children ignore interrupts.
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen(
        [sys.executable, "-m", "evolkv", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore,
        **options,
    )


@pytest.fixture
def without_weights(small, monkeypatch):
    """Has programs meet the random model's tokenizer and config alone."""

    def load_model(name, check, **options):
        check(small[1], small[0].config)
        raise AssertionError("the weights are read")

    monkeypatch.setattr(evolkv.models, "load_model", load_model)


def one_line(stderr):
    """The error, which must be the only line on stderr but for progress."""
    lines = [
        line
        for line in stderr.splitlines()
        if not re.match(r"(loading|prefill|search|examples|evolkv: warning:) ", line)
    ]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("evolkv: error: ")
    return lines[0]


def test_help_names_every_command_without_loading_torch():
    code = "import sys, evolkv.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("demo", "search", "eval", "generate", "profile", "list"))


def test_version_is_printed(run):
    assert run("--version") == (0, f"evolkv {evolkv.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["serch"], "'search'"),
        (["search", MODEL, "--tsk", "x"], "--task"),
        (["search", MODEL, "--task", TASK], "--budget"),
        (["search", MODEL, "--task", TASK, "--budget", "many"], "--budget"),
        (["search", MODEL, "--task", "niah:context=300,depht=0.5", "--budget", 64], "'depth'"),
        (["search", MODEL, "--task", "niha", "--budget", 64], "'niah'"),
        (["search", MODEL, "--task", TASK, "--budget", 64, "--first", "largest"], "--budget several, such as 32,64"),
        (["search", MODEL, "--task", TASK, "--budget", 64, "--group-size", 4], "--strategy evolkv"),
        (["search", MODEL, "--task", TASK, "--budget", 64, "--storage", "none", "--study", "x"], "--study names"),
        (["search", MODEL, "--task", TASK, "--budget", 64, "--strategy", "joined"], "'joint'"),
        (["search", MODEL, "--task", TASK, "--budget", 64, "--granularity", "heads"], "'head'"),
        (["search", MODEL, "--task", TASK, "--budget", 64, "--metric", "logprop"], "'logprob'"),
        # A preset's own --group-size is nothing to complain of under another strategy.
        (
            ["search", MODEL, "-t", TASK, "-b", 64, "--preset", "paper", "--strategy", "random", "--metric", "logprop"],
            "'logprob'",
        ),
        (["search", MODEL, "--task", TASK, "--budget", 64, "--population", 10**14], "at most 10,000"),
        (["search", MODEL, "--task", TASK, "--budget", 64, "--population", 50, "--max-evals", 40], "--max-evals 40"),
        (["search", MODEL, "--task", TASK, "--budget", 64, "--selector", "snapk"], "'snapkv'"),
        (["search", MODEL, "--task", TASK, "--budget", 64, "--selector", "snapkv:windo=3"], "'window'"),
        (["search", "smollm2-135", "--task", TASK, "--budget", 64], f"'{MODEL}'"),
        (["eval", MODEL, "--task", TASK, "--method", "pyramidvk", "--budget", 64], "'pyramidkv'"),
        (["eval", MODEL, "--task", TASK, "--method", "snapkv", "--budget", "64,x"], "'x'"),
        (["eval", MODEL, "--task", TASK, "--method", "snapkv"], "--budget"),
        (["eval", MODEL, "--task", TASK, "--method", "full", "--samples", 10**21], "1 to 100,000"),
        (["eval", MODEL, "--task", TASK, "--method", f"snapkv:kernel={10**20}", "--budget", 64], "1 to 65,535"),
        (["eval", MODEL, "--task", TASK, "--method", "cake:tau1=1e-300+snapkv", "--budget", 64], "cake: tau1"),
        (["list", "modls"], "'models'"),
        (["generate", MODEL, "--prompt", "x", "--temperature", 1, "--seed", 2**63], "--seed is 9223372036854775808"),
        (["compare", "a.jsonl", "--seed", 2**63], "--seed is 9223372036854775808"),
        (["profile"], "--help"),
        (["eval", "--model", MODEL], "the model is the first argument"),
        (["eval", MODEL, "--limit", 3], "here it is --samples"),
        (["eval", MODEL, "--output_path", "r.json"], "here it is --json"),
        (["eval", MODEL, "--batch_size", 3], "no such option --batch_size; none is needed here"),
        (["eval", MODEL, "--selector", "snapkv"], "here it is --method"),
        (["eval", MODEL, "--num_fewshot", 5], "such as --task gsm8k:shots=5"),
        (["eval", MODEL, "--model_args", "dtype=float32"], "the model is the first argument, and --dtype, --device"),
        (["search", MODEL, "--limit", 3], "no such option --limit; here it is --train and --val"),
        (["search", MODEL, "--samples=3"], "no such option --samples; here it is --train and --val"),
        (["search", MODEL, "--method", "snapkv"], "here it is --selector"),
        (["search", MODEL, "--n_jobs", 3], "here it is --workers"),
        (["plan", MODEL, "--num_workers", 3], "here it is --workers"),
        (["search", MODEL, "--n_trials", 3], "here it is --max-evals"),
        (["search", MODEL, "--max_evals", 3], "here it is --max-evals"),
        (["demo", "--budget", 4], "SnapKV, which the demo compares with, always keeps 32 tokens; use 32"),
        (["report", "r.json", "--out", "/typo/here/x.html"], "folder /typo/here does not exist"),
        (["report", "r.json", "-o", "/typo/x.html"], "folder /typo does not exist"),
        (["generate", MODEL], "--prompt"),
        (["generate", MODEL, "-", "--prompt", "x"], "once"),
        (["generate", MODEL, "--prompt", "  "], "empty"),
        (["generate", MODEL, "--prompt", "x", "--method", "cake+snapkv"], "needs a budget"),
        (["generate", "no/model", "--prompt", "x", "--max-new-tokens", 0], "--max-new-tokens is 0"),
        (["generate", "no/model", "--prompt", "x", "--temperature", "nan"], "--temperature is nan"),
        (["generate", "no/model", "--prompt", "x", "--prefill-chunk", 64], "need to know what to keep"),
        (["generate", "no/model", "--prompt", "x", "--method", "snapkv", "--budget", 4], "always keeps"),
        (
            ["generate", "no/model", "--prompt", "x", "--method", "tova", "--budget", 9, "--evict-every", 0],
            "evict_every is",
        ),
        (["generate", MODEL, "--prompt", "x", "--method", "snapkv", "--profile", "p.json"], "give one of them"),
        (["generate", MODEL, "--prompt", "x", "--budget", 8], "a method such as snapkv"),
        (["generate", MODEL, "--prompt", "x", "--prefill-chunk", 64], "--method snapkv"),
    ],
)
def test_bad_usage_is_one_line_that_says_what_to_do(run, tmp_path, argv, hint):
    code, out, err = run(*argv)
    assert code == 2
    assert hint in one_line(err)
    assert out == ""
    assert not list(tmp_path.iterdir())


BAD_INPUT = [
    ("jsonl:path=missing.jsonl", 64, "missing.jsonl does not exist"),
    ("jsonl:path=folder", 64, "folder is a folder"),
    ("jsonl:path=malformed.jsonl", 64, "malformed.jsonl line 2"),
    ("jsonl:path=empty.jsonl", 64, "empty.jsonl has no rows"),
    ("jsonl:path=long.jsonl,split=all", 64, "more than the model's context of 8192"),
    (TASK, 20, "below the floor of 33"),
    (TASK, 300, "nothing would be evicted"),
    (TASK, 0, "--budget is 0"),
]


@pytest.mark.parametrize("command", ["search", "eval"])
@pytest.mark.parametrize(("task", "budget", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_overwrites_nothing(run, tmp_path, command, task, budget, message):
    (tmp_path / "folder").mkdir()
    row = json.dumps({"prompt": "a b c", "answer": "d"})
    (tmp_path / "malformed.jsonl").write_text(f"{row}\n{{oops\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    rows = [json.dumps({"prompt": f"{first} " + "word " * 9000, "answer": "d"}) for first in "ab"]
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    (tmp_path / "profile.json").write_text("precious")
    (tmp_path / "rows.json").write_text("precious")
    method = ["--method", "snapkv"] if command == "eval" else ["--selector", "snapkv", "--train", "1", "--val", "1"]
    code, out, err = run(command, MODEL, "--task", task, "--budget", budget, *method, "--json", "rows.json")
    assert code == 2
    said = one_line(err)
    assert message in said or (command == "eval" and budget == 20 and "the budget is 20" in said)
    assert out == ""
    assert (tmp_path / "profile.json").read_text() == (tmp_path / "rows.json").read_text() == "precious"


@pytest.mark.parametrize("command", ["search", "eval"])
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("jsonl:path=bad.jsonl", "bad.jsonl line 1: prompt is missing"),
        ("longbench:subset=trec,path=bad.jsonl", "bad.jsonl line 1: input is missing"),
        ("gsm8k:path=bad.jsonl", "bad.jsonl line 1: question is missing"),
        ("gsm8k:path=good.jsonl,shots_path=bad.jsonl", "bad.jsonl line 1: question is missing"),
        ("ruler:task=vt,path=bad.jsonl", "bad.jsonl line 1: input is missing"),
        ("ruler:task=qa_2,path=bad.json", "bad.json [0]: question is missing"),
        ("ruler:task=niah_single_2,essays=missing.txt", "missing.txt does not exist"),
        ("niah:haystack=missing.txt", "missing.txt does not exist"),
        ("code:path=missing", "missing does not exist"),
        ("code:path=", "the path of the folder is empty"),
        ("longbench:subset=trec,path=", "path is empty"),
        ("gsm8k:path=", "the path of a file is empty"),
        ("gsm8k:path=good.jsonl", "shots=5, but good.jsonl (what of it serves train) has 0 problems"),
        ("ruler:task=qa_1,path=huge.json", "huge.json: not valid JSON"),
        ("ruler:task=qa_2,path=half.json", "half.json [0]: context[0][1][0]: '\\ud800' is half of a character"),
    ],
)
def test_bad_data_is_said_before_a_model_is_looked_for(run, tmp_path, command, task, message):
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "bad.json").write_text('[{"a": 1}]')
    (tmp_path / "huge.json").write_text(f'{{"data": {"9" * 5000}}}')
    question = {"question": "q", "answer": "a", "context": [["t", ["\ud800"]]], "supporting_facts": []}
    (tmp_path / "half.json").write_text(json.dumps([question]))
    (tmp_path / "good.jsonl").write_text('{"question": "2 and 2?", "answer": "4\\n#### 4"}\n')
    method = ["--method", "snapkv"] if command == "eval" else []
    code, _, err = run(command, "no-such-model", "--task", task, "--budget", 64, *method)
    assert code == 2
    assert message in one_line(err)


@pytest.mark.parametrize("command", ["search", "plan"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((4, "--selector", "snapkv"), "the budget is 4, below the floor of 33; use --budget 33 or more"),
        ((64, 20, "--selector", "snapkv:window=32"), "the budget is 20, below the floor of 33"),
        ((1,), "the budget is 1, below the floor of 3; use --budget 3 or more"),
        ((48, "--floor", 60), "the budget is 48, below the floor of 60; use --budget 60 or more, or a lower --floor"),
        ((48, "--floor", 8, "--selector", "snapkv"), "the floor is 8, but snapkv always keeps 32 tokens"),
        ((48, "--ceiling", 20), "the ceiling is 20, below the budget of 48; raise --ceiling"),
        ((48, "--population", 2), "population must be a whole number of at least 4, got 2"),
        ((48, "--sigma", -1), "sigma must be a positive number, got -1.0"),
    ],
)
def test_settings_that_no_model_can_serve_are_refused_before_one_is_looked_for(run, command, words, message):
    code, out, err = run(command, "no-such-model", "--task", TASK, "--budget", *words)
    assert (code, out) == (2, "")
    assert message in one_line(err)


@pytest.mark.parametrize(
    ("option", "path", "message"),
    [
        ("--out", "folder", "folder is a folder"),
        ("--out", "file/profile.json", "not a folder"),
        ("--out", "/dev/null", "not a regular file"),
        ("--json", "folder", "folder is a folder"),
        ("--json", "profile.json", "a file of its own"),
        ("--storage", "profile.json", "a file of its own"),
        ("--out", "hf://org/name", "an address on the Hub"),
        ("--json", "hf://org/name/r.json", "an address on the Hub"),
    ],
)
def test_search_refuses_unwritable_outputs_before_it_starts(run, tmp_path, option, path, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    code, _, err = run("search", MODEL, "--task", TASK, "--budget", 64, option, path)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_search_writes_to_the_home_folder_and_shares_no_study_with_another(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shared = ["--task", "niah:context=200", "--train", 1, "--val", 1, "--max-evals", 1, *FROM_UNIFORM]
    for budget, name in ((64, "run.1"), (72, "run.2")):
        code, _, err = run("search", MODEL, *shared, "--budget", budget, f"--out=~/{name}", f"--json=~/{name}.r.json")
        assert code == 0, err
    written = [f"run.{number}{ending}" for number in "12" for ending in ("", ".r.json", ".study.db")]
    # Libraries keep hidden folders of their own there.
    assert sorted(path.name for path in (tmp_path / "home").glob("[!.]*")) == written
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize(
    ("task", "option", "file"),
    [
        ("longbench:subset=trec,path=data", "--json", "data/trec.jsonl"),
        ("code:path=data", "--markdown", "data/deep/a.py"),
        ("longbench:subset=trec,path=data", "--out", "data/trec.jsonl"),
    ],
)
def test_files_in_a_folder_that_is_read_are_not_written_over(run, tmp_path, task, option, file):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / file).write_text("precious")
    command, method = ("search", []) if option == "--out" else ("eval", ["--method", "snapkv"])
    code, _, err = run(command, MODEL, "--task", task, "--budget", 64, *method, option, file)
    assert code == 2
    assert f"{file} would be written over, but is read" in one_line(err)
    assert (tmp_path / file).read_text() == "precious"


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--json", "", "the name of a file to write is empty"),
        ("--records", "", "the name of a file to write is empty"),
        ("--markdown", "", "the name of a file to write is empty"),
        ("--json", ".", ". is a folder"),
        ("--json", "/", "/ is a folder"),
    ],
)
def test_what_is_no_name_of_an_output_is_refused(run, option, name, message):
    code, _, err = run("eval", MODEL, "--task", TASK, "--method", "full", option, name)
    assert code == 2
    assert message in one_line(err)


def test_demo_refuses_a_file_as_its_folder(run, tmp_path):
    (tmp_path / "demo").write_text("precious")
    code, _, err = run("demo")
    assert code == 2
    assert "is a file" in one_line(err)
    assert (tmp_path / "demo").read_text() == "precious"


@pytest.mark.parametrize(
    ("out", "paper"),
    [
        ("demo", "demo-paper.json"),
        (".", "demo-paper.json"),
        ("..", "../demo-paper.json"),
        ("/", "/demo-paper.json"),
        ("a/b.1/", "a/b.1-paper.json"),
    ],
)
def test_demo_suggests_files_beside_any_folder(out, paper):
    result = SimpleNamespace(files=DemoFiles(Path(out)), task=TASK, answer="1")
    commands = dict(_next_commands(result, MODEL, 40, 1600, ModelOptions(None, None, None, False)))
    assert commands["the paper's own search strategy"].endswith(f"--strategy evolkv --out {paper}")


def test_demo_writes_the_contracts_results(demo):
    results = json.loads((demo / "results.json").read_text())
    assert results["format"] == "evolkv.results/1"
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["full", "snapkv", "pyramidkv", "chunkkv:window=2", "evolkv"]
    for row in rows.values():
        assert {"model", "task", "method", "budget", "n", "metric", "score", "ci95", "kv_bytes", "mean_budget"} <= set(
            row
        )
        assert (row["model"], row["n"], row["metric"]) == (MODEL, 2, "contains")
        assert row["task"] == f"{TASK},passages=2"
        low, high = row["ci95"]
        assert 0 <= low <= row["score"] <= high <= 1
    assert rows["full"]["score"] == 1
    held = {name: row["kv_bytes"] / (64 * 30 * 3 * 2 * 64 * 4) for name, row in rows.items() if name != "full"}
    # An evolved head may have more than a prompt has tokens, where it is shorter than those of the search.
    assert 0.99 < held.pop("evolkv") <= 1
    assert set(held.values()) == {1}
    assert rows["full"]["kv_bytes"] > 4 * rows["evolkv"]["kv_bytes"]
    assert summarise(read_records(demo / "records.jsonl")) == results["rows"]


def test_demo_writes_profile_search_and_picture(demo):
    profile = BudgetProfile.load(demo / "profile.json")
    assert profile.mean_budget == 64
    found = json.loads((demo / "search.json").read_text())
    assert found["format"] == "evolkv.search/1"
    assert found["evaluations"] == len(found["history"]) == 17
    assert (demo / "budgets.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_commands_that_the_demo_suggests_work(run_smollm2, demo):
    said = (demo.parent / "said.txt").read_text()
    commands = [shlex.split(line)[1:] for line in said.splitlines() if line.startswith("  evolkv ")]
    assert [command[0] for command in commands] == ["generate", "eval", "search", "demo"]
    generate, evaluate, search, again = commands
    number = re.search(r"hidden number is (\d{7})", said)[1]
    assert number in (demo / "prompt.txt").read_text()
    code, answer, _ = run_smollm2(*generate)
    assert code == 0
    # A number, though after so few candidates not always the right one.
    assert re.search(r"\d", answer)
    code, table, _ = run_smollm2(*evaluate, "--samples", 1)
    assert code == 0
    assert "tova" in table
    assert run_smollm2(*search, "--max-evals", 1, "--train", 1, "--val", 1)[0] == 0
    assert BudgetProfile.load(demo.parent / "demo-paper.json").search["strategy"] == "evolkv"
    assert run_smollm2(*again, "--max-evals", 1, "--train", 1, "--val", 1, "--samples", 1)[0] == 0
    assert BudgetProfile.load(demo.parent / "demo-half" / "profile.json").granularity == "head"


def test_interrupted_comparison_keeps_the_profile_and_drops_results_of_another(small, tmp_path):
    from evolkv.demo import run_demo

    (tmp_path / "results.json").write_text("of an earlier profile")

    def stop(step):
        raise KeyboardInterrupt

    result = run_demo(
        *small, out=tmp_path, context=300, budget=64, samples=1, train=1, val=1, max_evals=1, on_evaluation=stop
    )
    assert result.interrupted
    assert BudgetProfile.load(tmp_path / "profile.json") == result.search.profile
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "records.jsonl").exists()


def test_eval_takes_several_values_after_one_option(run_smollm2, demo, tmp_path):
    profile = demo / "profile.json"
    code, out, _ = run_smollm2(
        *("eval", MODEL, "--task", TASK, "niah:context=200", "--method", "full", "tova", profile),
        *("--budget", "64,48", "--samples", 1, "--json", "rows.json"),
    )
    assert code == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    seen = [(row["task"], row["method"], row["budget"]) for row in rows]
    methods = [("full", None), ("tova", 64), ("tova", 48), (str(profile), 64), (str(profile), 48)]
    assert seen == [(task, *rest) for task in (TASK, "niah:context=200") for rest in methods]
    assert "95 % interval" in out


@pytest.mark.parametrize(("failing", "other"), [("rows.json", "rows.md"), ("rows.md", "rows.json")])
def test_eval_prints_its_table_whatever_becomes_of_its_files(run, tmp_path, monkeypatch, failing, other):
    write = evolkv.whole_files.write_text

    def full(path, content):
        if path == failing:
            raise RunError(f"{path}: No space left on device")
        write(path, content)

    monkeypatch.setattr("evolkv.whole_files.write_text", full)
    files = ["--json", "rows.json", "--records", "none", "--markdown", "rows.md"]
    code, out, err = run("eval", MODEL, "--task", "niah:context=200", "--method", "full", "--samples", 1, *files)
    assert code == 1
    assert "No space left" in err
    assert "95 % interval" in out
    assert [path.name for path in tmp_path.iterdir()] == [other]


@pytest.mark.parametrize(
    ("out", "options"),
    [
        ("my profile.json", ["--budget", 64, "--engine", "naive", "--prefill-chunk", 64]),
        ("curve", ["--budget", "30%,40%", "--protocol", "agnostic", "--metric", "fidelity", "--dtype", "float32"]),
    ],
)
def test_commands_that_a_search_suggests_work(run, tmp_path, out, options):
    short = ["--train", 1, "--val", 1, "--max-evals", 1, *FROM_UNIFORM]
    code, said, _ = run("search", MODEL, "--task", "niah:context=200", *options, *short, "--out", out)
    assert code == 0
    generate, evaluate = [shlex.split(line)[1:] for line in said.splitlines() if line.startswith("  evolkv ")]
    assert [generate[0], evaluate[0]] == ["generate", "eval"]
    (tmp_path / "question.txt").write_text("The quick brown fox")
    assert run(*generate, "--max-new-tokens", 2)[0] == 0
    assert run(*evaluate, "--samples", 1, "--json", "rows.json")[0] == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    several = out == "curve"
    assert [row["method"] for row in rows].count("snapkv") == (2 if several else 1)
    assert {row["protocol"] for row in rows} == ({"agnostic"} if several else {"aware"})
    assert {row.get("prefill_chunk") for row in rows if row["budget"]} == ({None} if several else {64})


@pytest.mark.parametrize("budget", [64, "64,96"])
def test_search_prints_its_table_where_the_profile_cannot_be_written(run, tmp_path, monkeypatch, budget):
    def full(self, path):
        raise RunError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(BudgetProfile, "save", full)
    examples = ["--train", 1, "--val", 1, "--max-evals", 6, "--storage", "none", *FROM_UNIFORM]
    code, out, err = run("search", MODEL, "--task", "niah:context=200", "--budget", budget, *examples)
    assert code == 1
    assert "No space left" in err
    assert "95 % interval" in out
    assert not list(tmp_path.iterdir())


def test_a_file_that_others_may_not_read_stays_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{}")
    path.chmod(0o600)
    evolkv.whole_files.write_text(path, "[]")
    assert path.read_text() == "[]"
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_profile_of_another_model_is_refused_before_weights_are_read(run, without_weights, tmp_path):
    budgets = np.full((5, 2), 64)
    info = evolkv.models.ModelInfo("other", 5, 2, 8, 64, 4096, "0" * 16)
    for name in ("other.json", "oth64.json"):
        BudgetProfile.from_budgets(info, budgets).save(tmp_path / name)
    for argv in (
        ["eval", MODEL, "--task", TASK, "--method", "other.json", "--json", "rows.json"],
        ["eval", MODEL, "--task", TASK, "--method", "oth{}.json", "--budget", 64],
        ["search", MODEL, "--task", TASK, "--budget", 64, "--start", "other.json"],
        ["generate", MODEL, "--profile", "other.json", "--prompt", "hello"],
        ["profile", "validate", "other.json", "--model", MODEL],
    ):
        code, _, err = run(*argv)
        assert code == 2
        assert "for 5 layers" in one_line(err)
    assert not (tmp_path / "rows.json").exists()


def test_generate_reports_what_the_profile_saved(run_smollm2, demo):
    code, out, _ = run_smollm2(
        *("generate", MODEL, "--profile", demo / "profile.json", "--prompt-file", demo / "prompt.txt"),
        *("--raw", "--json", "--max-new-tokens", 4),
    )
    assert code == 0
    answer = json.loads(out)
    # A head may have more than this prompt, which is shorter than those of the search.
    assert 0.95 < answer["kv_bytes"] / (64 * 30 * 3 * 2 * 64 * 4) <= 1
    assert answer["full_kv_bytes"] == answer["prompt_tokens"] * 30 * 3 * 2 * 64 * 4
    assert 1 <= answer["new_tokens"] <= 4


def test_generate_takes_a_method_with_a_budget_and_expands_a_profile_to_it(run_smollm2, demo):
    prompt = ("generate", MODEL, "--prompt-file", demo / "prompt.txt", "--raw", "--json", "--max-new-tokens", 2)
    for given in (("--method", "adakv+snapkv"), ("--profile", demo / "profile.json")):
        code, out, _ = run_smollm2(*prompt, *given, "--budget", 48)
        assert code == 0
        assert json.loads(out)["kv_bytes"] == 48 * 30 * 3 * 2 * 64 * 4


def test_generate_reads_in_chunks_and_evicts_as_it_goes(run_smollm2, demo):
    prompt = ("generate", MODEL, "--prompt-file", demo / "prompt.txt", "--json", "--max-new-tokens", 4)
    keydiff = (*prompt, "--method", "keydiff", "--budget", 64)
    whole, chunked = (
        json.loads(run_smollm2(*keydiff, *extra)[1]) for extra in ((), ("--prefill-chunk", 100, "--evict-every", 2))
    )
    assert chunked["kv_bytes"] == whole["kv_bytes"]
    assert chunked["new_tokens"] == 4


def test_a_document_is_saved_once_and_asked_several_times(run):
    document = "The harbour has three piers. The keeper's name is Ulla. Ships come at noon."
    saving = ("generate", MODEL, "--method", "keydiff", "--budget", 24, "--save-cache", "d/document.cache")
    code, out, err = run(*saving, "--prompt", document)
    assert (code, out) == (0, "")
    assert "written to d/document.cache" in err
    _, out, _ = run(*saving, "--prompt", document, "--json")
    saved = json.loads(out)
    asking = ("generate", MODEL, "--cache", "d/document.cache", "--max-new-tokens", 4, "--json", "--prompt")
    answers = [json.loads(run(*asking, question)[1]) for question in ("Who?", "When do ships come?", "Who?")]
    assert answers[0]["text"] == answers[2]["text"]
    for answer in answers:
        assert saved["kv_bytes"] < answer["kv_bytes"] < answer["full_kv_bytes"]
    # With a budget that covers the document, the answer is that to the message as a whole.
    run("generate", MODEL, "--method", "keydiff", "--budget", 400, "--save-cache", "all.cache", "--prompt", document)
    asked = json.loads(run("generate", MODEL, "--cache", "all.cache", *asking[4:], "Who?")[1])
    whole = json.loads(run("generate", MODEL, *asking[4:], f"{document}\n\nWho?")[1])
    assert (asked["text"], asked["prompt_tokens"]) == (whole["text"], whole["prompt_tokens"])
    assert run(*saving, "--raw", "--prompt", document)[0] == 0
    code, _, err = run(*asking, "Who?")
    assert (code, "ask with --raw" in one_line(err)) == (2, True)
    assert run(*asking, "Who?", "--raw")[0] == 0


def test_a_saved_document_says_when_to_evict_again(run):
    document = "The harbour has three piers. The keeper's name is Ulla. Ships come at noon."
    held = {}
    for name, extra in (("once", ()), ("again", ("--evict-every", 3))):
        saving = ("generate", MODEL, "--method", "keydiff", "--budget", 24, "--save-cache", name, *extra)
        saved = json.loads(run(*saving, "--json", "--prompt", document)[1])
        asking = ("generate", MODEL, "--cache", name, "--max-new-tokens", 4, "--json", "--prompt", "Who?")
        held[name] = json.loads(run(*asking)[1])["kv_bytes"] - saved["kv_bytes"]
    # The question is cut down with the document, or kept whole.
    assert held["again"] == 0 < held["once"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cache", "b", "--prefill-chunk", 16], "has been read"),
        (["--cache", "b", "--evict-every", 4], "says itself"),
        (["--save-cache", "a"], "--profile FILE"),
        (["--save-cache", "a", "--cache", "b", "--method", "snapkv", "--budget", 64], "both given"),
        (["--cache", "b", "--method", "snapkv", "--budget", 64], "leave out"),
        (["--cache", "b"], "no such file"),
        (["--save-cache", ".", "--method", "snapkv", "--budget", 64], "is a folder"),
    ],
)
def test_generate_refuses_caches_that_make_no_sense(run, options, words):
    code, out, err = run("generate", MODEL, "--prompt", "x", *options)
    assert (code, out) == (2, "")
    assert words in one_line(err)


def test_a_cache_is_not_written_over_a_file_that_is_none(run, tmp_path, small_folder):
    saving = ("generate", small_folder, "--method", "keydiff", "--budget", 4, "--prompt", "A long document", "--raw")
    for name, content in (("p.json", b"{}"), ("new.cache", b"")):
        (tmp_path / name).write_bytes(content)
    code, _, err = run(*saving, "--save-cache", "p.json")
    assert (code, "p.json is there and is not a cache" in one_line(err)) == (2, True)
    assert (tmp_path / "p.json").read_bytes() == b"{}"
    for _ in range(2):
        assert run(*saving, "--save-cache", "new.cache")[0] == 0


def test_generate_streams_the_same_text_that_json_holds(run_smollm2):
    prompt = "Name the capital of France."
    _, streamed, err = run_smollm2("generate", MODEL, "--prompt", prompt, "--max-new-tokens", 12)
    _, out, _ = run_smollm2("generate", MODEL, "--prompt", prompt, "--max-new-tokens", 12, "--json")
    answer = json.loads(out)
    assert streamed.strip() == answer["text"].strip() != ""
    assert answer["kv_bytes"] == answer["full_kv_bytes"] == answer["prompt_tokens"] * 30 * 3 * 2 * 64 * 4
    assert "100.0%" in err


def test_generate_reads_standard_input(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Say hello.")))
    code, out, _ = run("generate", MODEL, "-", "--json", "--max-new-tokens", 2)
    assert code == 0
    _, same, _ = run("generate", MODEL, "--prompt", "Say hello.", "--json", "--max-new-tokens", 2)
    assert json.loads(out)["text"] == json.loads(same)["text"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    code, _, err = run("generate", MODEL, "-")
    assert code == 2
    assert "UTF-8" in one_line(err)


def test_generate_refuses_a_prompt_longer_than_the_context(run, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 9000)
    code, out, err = run("generate", MODEL, "--prompt-file", "long.txt")
    assert code == 2
    assert "8192" in one_line(err)
    assert out == ""


def test_raw_leaves_the_chat_template_out(run):
    chat = json.loads(run("generate", MODEL, "--prompt", "Hello", "--json", "--max-new-tokens", 1)[1])
    raw = json.loads(run("generate", MODEL, "--prompt", "Hello", "--json", "--max-new-tokens", 1, "--raw")[1])
    assert raw["prompt_tokens"] == 1 < chat["prompt_tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval", "--task", "niah:context=9000", "--method", "full"), "more than the model's context of 8192"),
        (("eval", "--task", TASK, "--method", "snapkv", "--budget", 8), "the budget is 8, but snapkv always keeps"),
        (("eval", "--task", "niah:context=20", "--method", "full"), "context=20 is too small"),
        (("demo", "--context", 20000), "more than the model's context of 8192"),
        (("eval", "--task", TASK, "--method", "full", "--metric", "classification"), "needs the names of all classes"),
        (
            ("eval", "--task", "jsonl:words.jsonl", "--method", "full", "--metric", "count"),
            "the answer 'seven' scores 0 under metric 'count'; correct the answer, or take another metric",
        ),
        (("search", "--task", TASK, "jsonl:words.jsonl", "--budget", 48, "--metric", "gsm8k"), "scores 0 under metric"),
        (("search", "--task", "jsonl:path=three.jsonl", "--budget", 48), "split 'train' is empty"),
        (("search", "--task", "niah:haystack=short.txt", "--budget", 48), "give a longer text"),
        (("search", "--task", "general:context=1000", "--budget", 100), "context=1000 gives dialogue"),
        (("search", "--task", TASK, "general", "--budget", 100, "--train", 1), "1 train examples cannot cover"),
        (("search", "--task", TASK, "general", "--budget", "auto", "--certify", 1), "1 report examples cannot cover"),
        (("eval", "--task", f"{TASK} && general", "--method", "full", "-n", 1), "1 report examples cannot cover"),
    ],
)
def test_examples_that_cannot_be_asked_are_refused_before_weights_are_read(
    run, without_weights, tmp_path, words, message
):
    (tmp_path / "words.jsonl").write_text("".join(f'{{"prompt": "p{i}", "answer": "seven"}}\n' for i in range(9)))
    (tmp_path / "three.jsonl").write_text("".join(f'{{"prompt": "p{i}", "answer": "a"}}\n' for i in range(3)))
    (tmp_path / "short.txt").write_text("It rained. " * 50)
    code, out, err = run(*words, "--model", MODEL) if words[0] == "demo" else run(words[0], MODEL, *words[1:])
    assert (code, out) == (2, "")
    assert message in one_line(err)


def test_a_chat_template_that_raises_is_one_line_that_names_raw(run, small, monkeypatch):
    monkeypatch.setattr(small[1], "chat_template", "{{ raise_exception('no users here') }}")
    for words in (("generate", MODEL, "--prompt", "x"), ("eval", MODEL, "--task", TASK, "--method", "full")):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert "chat template" in one_line(err)
        assert "--raw" in one_line(err)
    assert run("generate", MODEL, "--prompt", "x", "--raw", "--max-new-tokens", 1)[0] == 0


def test_profile_commands_show_expand_and_export(run_smollm2, demo, tmp_path):
    path = demo / "profile.json"
    profile = BudgetProfile.load(path)
    code, out, _ = run_smollm2("profile", "show", path)
    assert code == 0
    assert TASK in out
    assert all(re.search(rf"^ *{layer} +{row[0]} ", out, re.M) for layer, row in enumerate(profile.budgets))
    assert run_smollm2("profile", "expand", path, "-b", 96, "--out", "wide.json")[0] == 0
    assert BudgetProfile.load(tmp_path / "wide.json").mean_budget == 96
    assert run_smollm2("profile", "validate", "wide.json", "--model", MODEL)[1].startswith("ok")
    code, out, _ = run_smollm2("profile", "classes", path, "--layers", 5, "--out", "classes.json")
    assert (code, out.startswith("5 classes of layers (budgets ")) == (0, True)
    few = BudgetProfile.load(tmp_path / "classes.json")
    assert len(set(few.budgets[:, 0].tolist())) <= 5
    assert few.total == profile.total
    code, out, _ = run_smollm2("profile", "classes", path, "--heads", 6, "--out", "heads.json")
    assert (code, out.startswith("6 classes of heads (budgets ")) == (0, True)
    for options in ((), ("--layers", 5, "--heads", 6)):
        code, _, err = run_smollm2("profile", "classes", path, *options, "--out", "none.json")
        assert (code, err) == (2, "evolkv: error: expected either --layers N or --heads N\n")
    code, _, err = run_smollm2("profile", "classes", path, "--layers", 7, "--out", "seven.json")
    assert (code, "expected one of 1, 2, 3, 5, 6, 10, 15, 30" in err) == (2, True)
    lines = run_smollm2("profile", "export", path, "--to", "csv")[1].splitlines()
    assert lines[0] == "layer,head,budget"
    assert sum(int(line.split(",")[2]) for line in lines[1:]) == profile.total
    assert run_smollm2("profile", "export", path, "--to", "json", "--out", "copy.json")[0] == 0
    assert BudgetProfile.load(tmp_path / "copy.json") == profile
    generate = ("generate", MODEL, "--prompt", "x", "--profile", "copy.json", "--save-cache", "copy.json")
    export = ("profile", "export", "copy.json", "--to", "csv", "--out", "copy.json")
    expand = ("profile", "expand", "copy.json", "--budget", 48, "--out", "copy.json")
    search = ("search", MODEL, "--task", TASK, "--budget", 48, "--start", "copy.json", "--out", "copy.json")
    for words in (export, expand, search, generate):
        code, _, err = run_smollm2(*words)
        assert (code, "is read by this command" in err) == (2, True)
    assert BudgetProfile.load(tmp_path / "copy.json") == profile


def test_profile_show_prints_every_head(run, tmp_path):
    budgets = np.arange(40, 52).reshape(4, 3)
    info = evolkv.models.ModelInfo("other", 4, 3, 9, 64, 4096, "0" * 16)
    BudgetProfile.from_budgets(info, budgets).save(tmp_path / "heads.json")
    _, out, _ = run("profile", "show", "heads.json")
    assert re.search(r"^ *3 +49 +50 +51", out, re.M)


@pytest.mark.parametrize(
    ("task", "ending"),
    [
        (TASK, ""),
        ("jsonl:path=q.jsonl", " --raw"),
        ("prompts:path=q.jsonl", "  # add --raw for prompts without the chat template"),
    ],
)
def test_profile_show_says_how_to_use_it(run, tmp_path, task, ending):
    info = evolkv.models.ModelInfo("other", 4, 3, 9, 64, 4096, "0" * 16)
    BudgetProfile.from_budgets(info, np.full((4, 3), 40), search={"task": task}).save(tmp_path / "my p.json")
    _, out, _ = run("profile", "show", "my p.json")
    assert out.endswith(f"\nevolkv generate other --profile 'my p.json' --prompt-file question.txt{ending}\n")


def test_invalid_profile_is_refused_and_named(run, tmp_path):
    (tmp_path / "p.json").write_text('{"format": "evolkv.profile/1"}')
    for words in (
        ["show"],
        ["validate"],
        ["export", "--to", "csv"],
        ["expand", "--budget", 64, "--out", "q.json"],
        ["classes", "--layers", 5, "--out", "q.json"],
    ):
        code, _, err = run("profile", words[0], "p.json", *words[1:])
        assert code == 2
        assert "p.json: model is missing" in one_line(err)
    assert not (tmp_path / "q.json").exists()


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("models", [MODEL, "gemma3-270m"]),
        ("tasks", ["niah", "jsonl"]),
        ("metrics", ["contains", "logprob"]),
        ("selectors", ["snapkv", "tova"]),
        ("allocators", ["uniform", "pyramid", "cosine", "lukv"]),
        ("strategies", ["joint", "start", "evolkv", "random"]),
    ],
)
def test_list_describes_every_name(run, what, names):
    code, out, _ = run("list", what)
    assert code == 0
    rows = json.loads(run("list", what, "--json")[1])
    found = {row.get("name", row.get("alias")): row["description"] for row in rows}
    assert set(names) <= set(found)
    assert all(found.values())
    assert all(name in out for name in names)


def test_quiet_search_says_nothing_on_stderr(run, tmp_path):
    code, out, err = run(
        *("search", MODEL, "--task", TASK, "--budget", 64, "--max-evals", 1, "--train", 1, "--val", 2, "--quiet"),
        *("--json", "sub/found.json", *FROM_UNIFORM),
    )
    assert (code, err) == (0, "")
    assert "validation examples" in out
    found = json.loads((tmp_path / "sub" / "found.json").read_text())
    assert found["best"]["fitness"] == max(entry["fitness"] for entry in found["history"])
    assert BudgetProfile.load(tmp_path / "profile.json").search["evaluations"] == found["evaluations"]


@pytest.mark.parametrize(
    ("evolved", "strategy", "verdict"),
    [
        (0.347, "joint", "lukv (0.600) is ahead of the evolved budgets (0.347) on 24 validation examples: the "),
        (0.6, "joint", "lukv (0.600) is level with the evolved budgets (0.600) on 24 validation examples: the "),
        (0.7, "joint", "The evolved budgets (0.700) beat lukv (0.600) and uniform (0.084) on 24 validation examples. "),
        (0.7, "joint", "lukv is behind by 0.100 (paired 95 % interval +0.058 to +0.142)."),
        (0.61, "joint", "lukv is behind by 0.010 (paired 95 % interval -0.032 to +0.052), which may be chance."),
        (0.6, "joint", "holds 'lukv'. More --max-evals, --train or another --budget may help."),
        (0.6, "gradient", "holds 'lukv'. More --gradient-steps, --train or another --budget may help."),
    ],
)
def test_a_search_says_what_is_ahead_and_by_how_much(evolved, strategy, verdict):
    scores = {"lukv": 0.6, "best": evolved, "uniform": 0.084}
    rows = [
        {"name": name, "score": score, "evolved": name == "best", "n": 24, "scores": [score] * 24}
        for name, score in scores.items()
    ]
    rows[1]["scores"] = [evolved - 0.1, evolved + 0.1] * 12
    rows.sort(key=lambda row: (-row["score"], row["evolved"]))
    found = SimpleNamespace(
        validation=rows, chosen=rows[0]["name"], improved=rows[0]["evolved"], settings={"strategy": strategy}
    )
    assert verdict in _verdict(found)


def test_a_warning_that_several_searches_have_is_said_once(run):
    code, _, err = run(
        *("search", MODEL, "--task", TASK, "--budget", 64, "--max-evals", 1, "--train", 1, "--val", 1),
        *("--selector", "snapkv:window=8", "tova", "--start", "uniform"),
    )
    assert code == 0
    assert err.count("is less than one generation") == 1


def test_a_preset_fills_in_what_no_option_says(run, tmp_path):
    run(
        *("search", MODEL, "--task", TASK, "--budget", 64, "--max-evals", 1, "--train", 1, "--val", 1, "--quiet"),
        *("--preset", "paper", "--gamma", 0.5),
    )
    search = BudgetProfile.load(tmp_path / "profile.json").search
    assert {"strategy": "evolkv", "group_size": 8, "sigma": 0.3, "gamma": 0.5}.items() <= search.items()


def test_log_json_search_writes_only_json_on_stderr_and_results_on_stdout(run):
    code, out, err = run(
        *("search", MODEL, "--task", TASK, "--budget", 64, "--max-evals", 1, "--train", 1, "--val", 2, "--log-json"),
        *("--selector", "snapkv", "--gradient-steps", 4),
    )
    assert code == 0
    assert "validation examples" in out
    events = [json.loads(line) for line in err.splitlines()]
    steps = [event for event in events if event["event"] == "progress"]
    assert [step["stage"] for step in steps if step["done"] == step["total"]] == [
        "prefill",
        "gradient",
        "search",
        "validation",
    ]
    assert all(event["time"] for event in events)


@pytest.mark.parametrize(
    ("argv", "exit_code", "message"),
    [
        (["serch", "--log-json"], 2, "'search'"),
        (["--bogus", "--log-json"], 2, "--bogus"),
        (["profile", "show", "--log-json", "missing.json"], 2, "missing.json: no such file"),
        (["profile", "show", "missing.json", "--log-json", "--quiet"], 2, "missing.json: no such file"),
    ],
)
def test_log_json_errors_are_json_too(capsys, argv, exit_code, message):
    assert main(argv) == exit_code
    out, err = capsys.readouterr()
    error = json.loads(err)
    assert (error["event"], error["exit_code"], out) == ("error", exit_code, "")
    assert message in error["message"]


def test_log_json_traceback_is_json_too(capsys):
    main(["profile", "show", "missing.json", "--debug", "--log-json"])
    trace, error = map(json.loads, capsys.readouterr().err.splitlines())
    assert (trace["event"], error["event"]) == ("traceback", "error")
    assert trace["message"].startswith("Traceback")


def test_selector_parameters_reach_the_profile(run, tmp_path):
    code, _, _ = run(
        *("search", MODEL, "--task", TASK, "--budget", 24, "--selector", "snapkv:window=8,pooling=mean"),
        *("--max-evals", 1, "--train", 1, "--val", 1),
    )
    assert code == 0
    selector = BudgetProfile.load(tmp_path / "profile.json").selector
    assert selector == {"name": "snapkv", "window": 8, "kernel": 7, "pooling": "mean", "gqa": "mean"}


SIGNALS = pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
ENDLESS = ["--task", TASK, "--budget", 64, "--max-evals", 100000, "--train", 1, "--val", 1, "--json", "found.json"]
ENDLESS += ["--selector", "snapkv"]


def check_its_best_is_kept(folder):
    profile = BudgetProfile.load(folder / "profile.json")
    assert profile.search["interrupted"] is True
    assert profile.mean_budget == 64
    assert json.loads((folder / "found.json").read_text())["interrupted"] is True
    assert sorted(path.name for path in folder.iterdir()) == ["found.json", "profile.json", "profile.study.db"]


@pytest.mark.slow
@SIGNALS
def test_interrupted_or_terminated_search_keeps_its_best(run, monkeypatch, tmp_path, sent, code):
    calls = []

    def score(self, *arguments, scored=ReplayEngine.score):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(sent)
        return scored(self, *arguments)

    monkeypatch.setattr(ReplayEngine, "score", score)
    # A shell that runs the tests in the background has them ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended, _, err = run("search", MODEL, *ENDLESS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == code
    assert "interrupted" in err.splitlines()[-1]
    check_its_best_is_kept(tmp_path)


@pytest.mark.slow
@SIGNALS
def test_a_program_that_is_sent_a_signal_keeps_the_best_of_its_search(small_folder, tmp_path, sent, code):
    search = program("search", small_folder, *ENDLESS, "--device", "cpu", "--dtype", "float32", cwd=tmp_path)
    try:
        for line in search.stderr:
            if line.startswith("search "):
                break
        search.send_signal(sent)
        _, err = search.communicate(timeout=60)
    finally:
        search.kill()
    assert search.returncode == code
    assert "interrupted" in err.splitlines()[-1]
    check_its_best_is_kept(tmp_path)


@pytest.mark.slow
def test_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "evolkv", "list", "models"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


def test_debug_shows_where_an_error_came_from(run):
    _, _, err = run("profile", "show", "missing.json", "--debug")
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("evolkv: error: missing.json: no such file")


def test_global_flags_may_stand_anywhere_but_in_free_text():
    assert for_typer(["list", "models", "--quiet"]) == ["--quiet", "list", "models"]
    assert for_typer(["list", "--log-json", "models"]) == ["--log-json", "list", "models"]
    assert for_typer(["generate", "m", "--prompt", "--quiet"]) == ["generate", "m", "--prompt", "--quiet"]


def test_lists_are_spelt_out_for_the_options_that_take_several_values():
    assert for_typer(["search", "m", "--budget", "64", "-o", "p.json"]) == [
        "search",
        "m",
        "--budget",
        "64",
        "-o",
        "p.json",
    ]
    assert for_typer(["eval", "m", "--method", "a", "b", "--budget=1", "2", "--seed", "0"]) == (
        ["eval", "m", "--method", "a", "--method", "b", "--budget=1", "--budget", "2", "--seed", "0"]
    )
    searching = ["search", "m", "--task", "a", "b", "--budget", "1", "2"]
    expected = ["search", "m", "--task", "a", "--task", "b", "--budget", "1", "--budget", "2"]
    assert for_typer(searching) == expected
    short = ["eval", "m", "-t", "a", "-m", "b", "c", "-b", "1", "2"]
    assert for_typer(short) == ["eval", "m", "-t", "a", "-m", "b", "-m", "c", "-b", "1", "-b", "2"]
    assert for_typer(["generate", "m", "--task", "a", "b"]) == ["generate", "m", "--task", "a", "b"]


@pytest.mark.parametrize("after", [0.1, 0.4])
def test_an_interrupt_while_the_program_starts_is_no_traceback(after):
    with program("list", "models") as running:
        time.sleep(after)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate()
    # A fast machine may be through by then; Python itself says more only before the first line of the program.
    assert running.returncode in (0, 130)
    assert "Traceback" not in err


def test_an_interrupt_while_an_object_is_collected_still_ends_the_program(capsys):
    class Collected:
        def __del__(self):
            raise KeyboardInterrupt

    def wait():
        Collected()
        for _ in range(1000):
            time.sleep(0.01)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), no_interrupt_lost():
            wait()
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Make folders of a tiny model whose generation config and config say what is asked for."""
    # Printable ASCII alone, so that whatever is generated is text.
    letters = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter.isascii()]
    alphabet = ["<pad>", "<end>", "<start>", "Ġ", *sorted(letters)]
    letters = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    saved = tmp_path_factory.mktemp("published")
    PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<end>", bos_token="<start>"
    ).save_pretrained(saved)
    tiny_model("llama", vocab_size=len(alphabet), initializer_range=0.2).save_pretrained(saved)

    def make(folder, generation, **config):
        shutil.copytree(saved, folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0, **generation}))
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, **config}))
        return folder

    return make


QUESTION = ["--prompt", "A prompt of some length, of which little is kept.", "--max-new-tokens", 8, "--json"]
CUT = ["--method", "snapkv:window=4", "--budget", 16]


def said_by(run, model, *options):
    code, out, err = run("generate", model, *QUESTION, *options)
    assert code == 0, err
    return json.loads(out)["text"], err


@pytest.fixture(scope="module")
def greedy_texts(published, tmp_path_factory):
    """What a model says whose config asks for no decoding of its own: under its whole cache, and under a cut one."""
    plain, texts = published(tmp_path_factory.mktemp("plain") / "model", {}), []
    for options in ([], CUT):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main([str(word) for word in ("generate", plain, *QUESTION, *options)]) == 0
        texts.append(json.loads(said.getvalue())["text"])
    return texts


@pytest.mark.parametrize(
    "generation",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded", "cache_config": {"backend": "quanto"}},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"force_words_ids": [[5]]},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
        {"max_time": 1e-4},
        {"max_length": 5},
        {"max_new_tokens": 2},
        {"prefill_chunk_size": 8},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"output_attentions": True, "output_hidden_states": True},
        {"guidance_scale": 1.5},
        {"token_healing": True},
        {"use_mtp": True},
        {"is_assistant": True, "num_assistant_tokens": 5, "assistant_confidence_threshold": 0.4},
        {"prompt_lookup_num_tokens": 3},
        {"stop_strings": ["no such text"]},
        {"stop_strings": []},
        {"chat_format": "chatml", "max_window_size": 6144},
    ],
)
def test_generate_gives_the_greedy_text_whatever_decoding_a_model_was_published_with(
    run, published, greedy_texts, tmp_path, generation
):
    model = published(tmp_path / "model", generation)
    for options, greedy in zip(([], CUT), greedy_texts, strict=True):
        text, err = said_by(run, model, *options)
        assert text == greedy
        asked = {"num_beams", "penalty_alpha", "dola_layers", "force_words_ids", "guidance_scale", "token_healing"}
        assert ("generation config asks for" in err) == bool(asked & generation.keys())


def test_generate_samples_whatever_decoding_a_model_was_published_with(run, published, tmp_path):
    plain, model = published(tmp_path / "plain", {}), published(tmp_path / "model", {"num_beams": 4, "max_time": 1e-4})
    sampled = ["--temperature", 0.7, *CUT]
    assert said_by(run, model, *sampled)[0] == said_by(run, plain, *sampled)[0] != said_by(run, plain, *CUT)[0]


def test_generate_keeps_to_what_a_model_says_about_its_text(run, published, tmp_path):
    plain = said_by(run, published(tmp_path / "plain", {}), *CUT)[0]
    stopped = said_by(run, published(tmp_path / "stopped", {"stop_strings": [plain[2]]}), *CUT)[0]
    assert stopped == plain[: plain.index(plain[2]) + 1]
    penalised = said_by(run, published(tmp_path / "penalised", {"repetition_penalty": 3.0}), *CUT)[0]
    assert penalised != plain


@pytest.mark.parametrize("config", [{"use_cache": False}, {"output_attentions": True}, {"output_hidden_states": True}])
def test_generate_serves_a_model_whose_config_says_how_it_was_trained(run, published, tmp_path, config):
    plain, model = published(tmp_path / "plain", {}), published(tmp_path / "model", {}, **config)
    assert said_by(run, model, *CUT)[0] == said_by(run, plain, *CUT)[0]
    assert run("generate", model, "--prompt", "A document.", *CUT, "--save-cache", "d.cache")[0] == 0
    assert run("generate", model, "--prompt", "A question?", "--cache", "d.cache")[0] == 0


@pytest.mark.parametrize("generation", [{"bad_words_ids": [7]}, {"forced_eos_token_id": 900}, {"eos_token_id": "x"}])
def test_a_generation_config_that_makes_no_sense_is_one_line(run, published, tmp_path, generation):
    code, _, err = run("generate", published(tmp_path / "model", generation), "--prompt", "x" * 40, *CUT)
    assert code == 2
    assert "generation config cannot be used" in one_line(err)


@pytest.fixture
def questions(tmp_path):
    """A task of the reader's own with short prompts."""
    rows = [
        {"prompt": f"Question {number}: what is it, of all that was said before?", "answers": ["x"]}
        for number in range(8)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:path={tmp_path / 'q.jsonl'}"


def test_a_home_folder_is_found_after_an_equals_sign_too(run, published, questions, tmp_path, monkeypatch):
    model, home = published(tmp_path / "model", {}), tmp_path / "home"
    (home / "new").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    BudgetProfile.uniform(evolkv.models.load_model(model)[0], 16, selector="snapkv:window=4").save(home / "p.json")
    (home / "prompt.txt").write_text("A prompt of some length, of which little is kept.")
    for argv in (
        ["profile", "show", "~/p.json"],
        ["profile", "expand", "~/p.json", "--budget=20", "--out=~/new/20.json"],
        ["profile", "export", "~/p.json", "--to=csv", "--out=~/new/20.csv"],
        ["generate", model, "--profile=~/p.json", "--prompt-file=~/prompt.txt", "--max-new-tokens=1"],
        ["generate", model, "--method=~/p.json", "--prompt=A document", "--save-cache=~/x.cache"],
        ["generate", model, "--cache=~/x.cache", "--prompt=x", "--max-new-tokens=1"],
        ["eval", model, f"--task={questions}", "--method=full", "--method=~/p.json", "--samples=2", "--json=~/r.json"],
        ["eval", model, f"--task={questions}", "--method=~/new/{}.json", "--budget=20", "--samples=2", "--records=~/k"],
        ["compare", "~/r.records.jsonl", "--a=~/p.json", "--json=~/c.json"],
        ["report", "~/r.json", "--out=~/new/report.html"],
    ):
        code, _, err = run(*argv)
        assert code == 0, (argv, err)
    made = {"r.json", "r.records.jsonl", "k", "c.json", "x.cache"}
    assert made <= {path.name for path in home.iterdir()}
    assert {path.name for path in (home / "new").iterdir()} == {"20.json", "20.csv", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == {"home", "model", "q.jsonl"}


@pytest.mark.parametrize(
    "argv",
    [
        ["search", MODEL, "--task", TASK, "--budget", 64, "--out"],
        ["search", MODEL, "--task", TASK, "--budget", 64, "--json"],
        ["eval", MODEL, "--task", TASK, "--method", "full", "--json"],
        ["eval", MODEL, "--task", TASK, "--method", "full", "--records"],
        ["eval", MODEL, "--task", TASK, "--method", "full", "--markdown"],
        ["compare", "r.jsonl", "--json"],
        ["generate", MODEL, "--prompt", "x", "--method", "snapkv", "--budget", 64, "--save-cache"],
        ["profile", "expand", "p.json", "--budget", 80, "--out"],
        ["profile", "export", "p.json", "--to", "csv", "--out"],
        ["report", "r.json", "--out"],
        ["demo", "--out"],
    ],
)
def test_an_address_on_the_hub_is_no_output(run, tmp_path, argv):
    code, _, err = run(*argv, "hf://org/name")
    assert code == 2
    assert "hf://org/name is an address on the Hub" in one_line(err)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_loses_no_work(published, questions, tmp_path, closed):
    model, results = published(tmp_path / "model", {}), tmp_path / "r.json"
    words = ["eval", model, "--task", questions, "--method", "full", "--samples", 1, "--json", results]
    command = shlex.join([sys.executable, "-m", "evolkv", *map(str, words)])
    done = subprocess.run(["bash", "-c", f"{command} {closed}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(results.read_text())["rows"][0]["n"] == 1
    assert "Error" not in done.stderr


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "evolkv", "list", "metrics"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert one_line(done.stderr) == "evolkv: error: the output: No space left on device"


@pytest.mark.parametrize("columns", [1, 20, 45])
def test_numbers_are_whole_on_a_narrow_terminal(run, demo, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(console.OUT, "width", columns)
    rows = json.loads((demo / "results.json").read_text())["rows"]
    print_table(results_table(rows))
    row = {"name": "x", "evolved": True, "budgets": [[1]], "n": 24, "score": 0.5, "ci95": [0.25, 0.75]}
    print_whole(validation_table([row], "x"))
    _, out, _ = run("profile", "show", demo / "profile.json")
    numbers = {"0.500", "(0.25–0.75)", "24", *(f"{row['score']:.3f}" for row in rows)}
    numbers |= {mebibytes(row["kv_bytes"]) for row in rows}
    assert numbers <= set(out.split())
    assert "…" not in out


def test_json_on_standard_output_is_all_that_is_there(run, demo, published, questions, tmp_path):
    model = published(tmp_path / "model", {})
    task = ["--task", questions, "--budget", 20]
    code, out, err = run("eval", model, *task, "--method", "snapkv:window=4", "--samples", 2, "--json", "-")
    assert code == 0, err
    assert json.loads(out)["format"] == "evolkv.results/1"
    assert "snapkv:window=4" in err
    small = ["--selector", "snapkv:window=4", "--train", 1, "--val", 1, "--max-evals", 7]
    code, out, err = run("search", model, *task, *small, "--json=-", "--quiet")
    assert code == 0, err
    assert json.loads(out)["format"] == "evolkv.search/1"
    assert err == ""
    kept = ["--method", "full", "snapkv:window=4", "--samples", 2, "--records", "k.jsonl"]
    assert run("eval", model, *task, *kept)[0] == 0
    code, out, _ = run("compare", "k.jsonl", "--json", "-")
    assert code == 0
    assert json.loads(out)["rows"]
    code, out, _ = run("profile", "show", demo / "profile.json", "--json")
    assert json.loads(out) == json.loads((demo / "profile.json").read_text())


def test_help_is_written_as_in_the_docs(run):
    for command in (
        "demo",
        "search",
        "eval",
        "compare",
        "certify",
        "generate",
        "report",
        ["profile", "show"],
        ["list", "tasks"],
    ):
        code, out, _ = run(*([command] if isinstance(command, str) else command), "--help")
        assert code == 0
        assert not any(noise in out for noise in ("{MODEL", "{STUDY", "{RECORDS", "[[", "<bool>", "<int range"))
    assert "evolkv generate [OPTIONS] MODEL [-]" in run("generate", "--help")[1]


@pytest.mark.parametrize("words", [["search"], ["eval"], ["generate"], ["demo"], ["compare"], ["profile", "export"]])
def test_help_breaks_no_metavar_on_a_terminal_of_80_columns(run, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "80")
    out = run(*words, "--help")[1]
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    assert [each.metavar for each in command.params if each.metavar and each.metavar not in out] == []
    assert "Default:" not in out


def test_help_of_a_search_puts_last_what_few_people_set(run):
    out = run("search", "--help")[1]
    places = [out.index(f"─ {panel} ─") for panel in ("Objective", "Strategy", "Advanced", "Where it runs")]
    assert places == sorted(places)
    assert all(places[2] < out.index(option) < places[3] for option in ("--lam", "--gamma", "--sigma", "--floor"))


def test_help_of_the_demo_says_its_defaults(run):
    out = " ".join(run("demo", "--help")[1].replace("│", " ").split())
    head, layer = EFFORT["head"], EFFORT["layer"]
    assert f"scored on. (default: {head.train})" in out
    assert f"chosen on. (default: {head.val})" in out
    assert f"evaluate. (default: {head.max_evals}; by layer {layer.max_evals})" in out


def test_json_to_standard_output_may_be_spelled_alike_everywhere(run, demo):
    for words in (["list", "strategies"], ["profile", "show", demo / "profile.json"]):
        flag, *others = [run(*words, *given) for given in (["--json"], ["--json", "-"], ["--json=-"])]
        assert flag[0] == 0
        assert others == [flag, flag]
    asking = ["generate", "m", "--prompt", "x"]
    assert for_typer([*asking, "--json", "-", "--raw"]) == [*asking, "--json", "--raw"]
    # Here - is where the prompt is.
    assert for_typer(["generate", "m", "--json", "-"]) == ["generate", "m", "--json", "-"]


def test_a_shell_is_told_how_a_line_may_go_on():
    for words, place, answer in (("evolkv rep", 1, "report"), ("evolkv search m --gran", 3, "--granularity")):
        environment = {"_EVOLKV_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
        done = subprocess.run(
            [sys.executable, "-m", "evolkv"], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert done.stdout.split() == [answer]


def test_control_characters_of_a_file_do_not_reach_the_terminal(run, tmp_path):
    path = tmp_path / "profile.json"
    BudgetProfile.uniform(tiny_model(), 40).save(path)
    data = json.loads(path.read_text())
    data["model"]["name"] = "\x1b[31mred\x07"
    path.write_text(json.dumps(data))
    for command in ("show", "validate"):
        code, out, err = run("profile", command, path)
        assert code == 0, err
        assert r"\x1b[31mred\x07" in out
        assert "\x1b" not in out
    data["format"] = "\x1b[31m"
    path.write_text(json.dumps(data))
    assert "\x1b" not in run("profile", "show", path)[2]


def test_an_argument_that_no_file_can_hold_is_refused_at_once(run):
    code, _, err = run("eval", MODEL, "--task", "jsonl:q\udcff.jsonl", "--method", "full")
    assert code == 2
    assert r"the argument 'jsonl:q\udcff.jsonl' is not UTF-8" in one_line(err)


def test_a_model_that_an_option_took_is_missed_with_the_reason(run):
    code, _, err = run("eval", "--task", TASK, "--method", "full", MODEL)
    assert code == 2
    assert "missing argument 'MODEL'; give it first: options such as --budget take every value behind them" in err


def test_a_file_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"r\.json"):
        console.write_json(str(tmp_path / "r.json"), {})
