"""Profiles on the Hugging Face Hub, against a server on this machine that speaks the few calls they take."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

from evolkv import BudgetProfile
from evolkv.cli import main
from evolkv.errors import ProfileError, RunError, UsageError
from evolkv.hub import HubAddress
from evolkv.methods import get_method
from evolkv.models import ModelInfo
from evolkv.profile_card import card_text
from evolkv.profile_file import MAX_FILE_BYTES

INFO = ModelInfo("tiny", 3, 2, 4, 16, 512, "0123456789abcdef")


class Hub(ThreadingHTTPServer):
    """Repositories in memory: each branch is its files. A token that starts with "read" cannot write."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Calls)
        self.repos, self.asked, self.claimed_size = {}, [], None
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Calls(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.resolve()

    def do_GET(self):
        self.resolve()

    def resolve(self):
        self.server.asked.append(f"{self.command} {self.path}")
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        repo = self.server.repos.get(found[1]) if found else None
        if repo is None:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if found[2] not in repo:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if found[3] not in repo[found[2]]:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "c" * 40})
        content = repo[found[2]][found[3]]
        etag = hashlib.sha1(content).hexdigest()
        commit = hashlib.sha1(repr(repo[found[2]]).encode()).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        if self.server.claimed_size is not None:
            headers["X-Linked-Size"] = str(self.server.claimed_size)
        return self.answer(200, content, headers)

    def do_POST(self):
        self.server.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "read" in self.headers.get("Authorization", "read"):
            return self.answer(403, json.dumps({"error": "this token cannot write"}).encode())
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.server.repos:
                return self.answer(409, json.dumps({"error": "exists", "url": f"{self.server.url}/{name}"}).encode())
            self.server.repos[name] = {"main": {}}
            return self.answer(200, json.dumps({"url": f"{self.server.url}/{name}"}).encode())
        if self.path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.answer(200, json.dumps({"errors": [] if front["tags"] else ["no tags"]}).encode())
        repo, action, branch = re.match(r"/api/models/([^/]+/[^/]+)/(\w+)/(\w+)", self.path).groups()
        if action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, json.dumps({"files": files}).encode())
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repos[repo].setdefault(branch, {})[line["value"]["path"]] = content
            else:
                self.server.message = line["value"]["summary"]
        told = {"commitUrl": f"{self.server.url}/{repo}/commit/{'d' * 40}", "commitOid": "d" * 40}
        return self.answer(200, json.dumps(told).encode())

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that huggingface_hub takes for the real one, as HF_ENDPOINT would have it, and an empty cache."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "".join(template[1:]))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def profile():
    return BudgetProfile.from_budgets(INFO, [[40, 50], [60, 70], [33, 99]], search={"task": "niah"})


def test_a_profile_comes_back_as_it_was_pushed(hub, profile):
    url = profile.push_to_hub("org/name", token="hf_write")
    assert url == f"{hub.url}/org/name/commit/{'d' * 40}"
    assert hub.message == "EvolKV profile of tiny at mean budget 59"
    assert BudgetProfile.from_hub("org/name") == profile


def test_files_and_branches_are_told_apart(hub, profile):
    larger = profile.expand(128)
    profile.push_to_hub("org/name", "needles/64.json", token="hf_write", commit_message="Needles")
    larger.push_to_hub("org/name", "needles/64.json", revision="next", token="hf_write")
    assert BudgetProfile.from_hub("org/name", "needles/64.json") == profile
    assert BudgetProfile.from_hub("org/name", "needles/64.json", revision="next") == larger
    assert BudgetProfile.load("hf://org/name/needles/64.json") == profile
    assert BudgetProfile.load("hf://org/name@next/needles/64.json") == larger


def test_what_was_read_once_is_at_hand_without_the_hub(hub, profile, monkeypatch):
    profile.push_to_hub("org/name", token="hf_write")
    BudgetProfile.from_hub("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert BudgetProfile.from_hub("org/name") == profile


def test_addresses_serve_as_methods_also_one_for_each_budget(hub, profile):
    profile.push_to_hub("org/name", token="hf_write")
    for budget in (64, 128):
        profile.expand(budget).push_to_hub("org/name", f"{budget}.json", token="hf_write")
    assert get_method("hf://org/name").profile == profile
    assert get_method("hf://org/name/{}.json").at(128).profile == profile.expand(128)


def test_the_command_line_takes_addresses(hub, profile, capsys):
    profile.push_to_hub("org/name", token="hf_write")
    assert main(["profile", "validate", "hf://org/name"]) == 0
    assert "3 layers × 2 KV heads" in capsys.readouterr().out
    assert main(["profile", "validate", "hf://org/other"]) == 2
    assert main(["profile", "validate", "hf://nothing"]) == 2
    assert main(["profile", "validate", "hf://org/name/../x.json"]) == 2
    assert main(["profile", "expand", "hf://org/name", "--budget", "128", "--out", "hf://org/name"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("evolkv: error: ") for line in errors] == [True] * 4


def test_addresses_are_read_as_huggingface_writes_them():
    assert HubAddress.parse("hf://org/name") == HubAddress("org/name", "profile.json", None)
    assert HubAddress.parse("hf://org/name@v1/a/b.json") == HubAddress("org/name", "a/b.json", "v1")
    assert str(HubAddress("org/name", "a/b.json", "v1")) == "hf://org/name@v1/a/b.json"
    for text, revision in {
        "hf://org/name@refs/pr/1/a/b.json": "refs/pr/1",
        "hf://org/name@refs/convert/parquet/a/b.json": "refs/convert/parquet",
        "hf://org/name@user%2Ftopic/a/b.json": "user/topic",
        "hf://org/name@refs/a/b.json": "refs",
    }.items():
        assert HubAddress.parse(text) == HubAddress("org/name", "a/b.json", revision)
        assert str(HubAddress("org/name", "a/b.json", revision)) == text
    assert HubAddress.parse("hf://org/name@refs/pr/1") == HubAddress("org/name", "profile.json", "refs/pr/1")
    for wrong in ("hf://", "hf://name", "hf://org/", "hf:///name"):
        with pytest.raises(ProfileError, match="is no address"):
            HubAddress.parse(wrong)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("org/other",), "no such repository"),
        (("org/name", "other.json"), "no such file"),
        (("org/name", "profile.json", "other"), "no such revision"),
        (("a/b/c",), "Repo id must be"),
        (("org/name", "text.txt"), "not JSON"),
        (("org/name", "binary.bin"), "not text"),
        (("org/name", "other-format.json"), "not a profile"),
    ],
)
def test_what_is_not_there_or_no_profile_is_one_clear_line(hub, profile, arguments, words):
    profile.push_to_hub("org/name", token="hf_write")
    files = {"text.txt": b"hello", "binary.bin": b"\x80\x04\xff", "other-format.json": b'{"format": "x"}'}
    hub.repos["org/name"]["main"].update(files)
    with pytest.raises(ProfileError, match=words) as caught:
        BudgetProfile.from_hub(*arguments)
    assert str(caught.value).startswith("hf://")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_fetched(hub, profile):
    profile.push_to_hub("org/name", token="hf_write")
    hub.asked.clear()
    hub.claimed_size = 2**40
    with pytest.raises(ProfileError, match="larger than 64 MiB"):
        BudgetProfile.from_hub("org/name")
    assert [call.split()[0] for call in hub.asked] == ["HEAD"]


def test_a_hub_that_refuses_or_is_away_is_one_clear_line(hub, profile, monkeypatch):
    with pytest.raises(RunError, match="cannot write") as refused:
        profile.push_to_hub("org/name", token="hf_read")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="cannot be reached") as away:
        BudgetProfile.from_hub("org/name")
    with pytest.raises(RunError, match="hf://org/name") as unsent:
        profile.push_to_hub("org/name", token="hf_write")
    for caught in (refused, away, unsent):
        assert "\n" not in str(caught.value)


ROW = {"model": "tiny", "task": "niah", "method": "profile.json", "budget": 59, "n": 24, "metric": "contains"}


def made(**changes):
    """A profile as a search makes it."""
    search = {"task": "niah:context=1600", "haystack": "generated prose", "strategy": "joint", "metric": "logprob",
              "seed": 3, "evaluations": 900, "chosen": "best", "versions": {"evolkv": "0.1.0"}}  # fmt: skip
    scores = {"validation": {"best": 0.9132, "uniform": 0.25}, "ci95": {"best": [0.85, 0.96]}}
    given = {"search": search, "scores": scores, **changes}
    return BudgetProfile.from_budgets(INFO, [[40, 50], [60, 70], [33, 99]], **given)


def test_a_page_stands_beside_a_profile(hub):
    made().push_to_hub("org/name", token="hf_write")
    files = hub.repos["org/name"]["main"]
    page = files["README.md"].decode()
    # No index has the package.
    assert "pip install ." in page
    assert "pip install evolkv" not in page
    assert sorted(files) == ["README.md", "budgets.png", "profile.json"]
    assert files["budgets.png"].startswith(b"\x89PNG")
    assert page.startswith("---\nlibrary_name: evolkv\ntags:\n")
    assert "![Budgets by layer and KV head](budgets.png)" in page
    assert 'evolkv.BudgetProfile.load("hf://org/name")' in page
    assert "| evolved, the fittest candidate, **chosen** | 0.913 | 0.85–0.96 |" in page
    assert "| equal budgets | 0.250 | not kept |" in page
    assert "| task | niah:context=1600 |\n| haystack | generated prose |" in page
    assert "joint, 900 candidates, metric logprob, seed 3, chosen: best" in page


def test_the_page_and_the_command_show_the_same_facts(hub, capsys, tmp_path):
    profile = made()
    profile.save(tmp_path / "p.json")
    profile.push_to_hub("org/name", token="hf_write")
    page = hub.repos["org/name"]["main"]["README.md"].decode()
    assert main(["profile", "show", str(tmp_path / "p.json")]) == 0
    out = capsys.readouterr().out
    assert "best 0.913 (0.85–0.96), uniform 0.250" in out
    for line in out.split("\n\n")[1].splitlines():
        name, value = line.split(maxsplit=1)
        assert f"| {name} | {value} |" in page


def test_a_page_shows_the_results_of_an_evaluation(hub, tmp_path):
    rows = [{**ROW, "score": 0.875, "ci95": [0.69, 0.96]}, {**ROW, "method": "full", "budget": None, "score": 1.0,
            "ci95": [0.86, 1.0]}]  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps({"format": "evolkv.results/1", "rows": rows}))
    made().push_to_hub("org/name", token="hf_write", results=tmp_path / "r.json")
    page = hub.repos["org/name"]["main"]["README.md"].decode()
    assert "| niah | profile.json | 59 | 0.875 | 0.69–0.96 | 24 | contains |" in page
    assert "| niah | full |  | 1.000 | 0.86–1.00 | 24 | contains |" in page


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "not results of an evaluation"),
        (json.dumps({"format": "evolkv.results/1", "rows": [{**ROW, "score": "1"}]}), "not results of an evaluation"),
        (json.dumps({"format": "evolkv.results/1", "rows": [{**ROW, "model": "o", "score": 1, "ci95": [0, 1]}]}),
         "results of o, but the profile is for tiny"),
        ("no json", "not JSON"),
    ],
)  # fmt: skip
def test_results_that_are_none_are_refused_before_anything_is_sent(hub, tmp_path, content, words):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UsageError, match=words):
        made().push_to_hub("org/name", token="hf_write", results=tmp_path / "r.json")
    assert hub.repos == {}


def test_a_page_of_the_owner_stays_and_one_of_evolkv_is_renewed(hub, profile):
    profile.push_to_hub("org/name", token="hf_write")
    files = hub.repos["org/name"]["main"]
    profile.expand(128).push_to_hub("org/name", token="hf_write")
    assert "128 cache entries" in files["README.md"].decode()
    files["README.md"] = b"# My own words"
    profile.push_to_hub("org/name", token="hf_write")
    assert files["README.md"] == b"# My own words"
    assert BudgetProfile.from_hub("org/name") == profile


def test_a_page_too_large_to_read_is_not_replaced(hub, profile):
    profile.push_to_hub("org/name", token="hf_write")
    large = b"# My own words" + b" " * MAX_FILE_BYTES
    hub.repos["org/name"]["main"]["README.md"] = large
    with pytest.raises(ProfileError, match="page of one"):
        profile.push_to_hub("org/name", token="hf_write")
    assert hub.repos["org/name"]["main"]["README.md"] == large
    profile.push_to_hub("org/name", token="hf_write", card=False)


def test_no_page_is_written_where_none_is_wanted(hub, profile):
    profile.push_to_hub("org/name", token="hf_write", card=False)
    assert list(hub.repos["org/name"]["main"]) == ["profile.json"]


def test_names_on_a_page_cannot_break_it(hub, tmp_path):
    hostile = made(search={"task": "a|b\n<script>", "strategy": "joint"}, scores={})
    hostile.push_to_hub("org/name", "deep/64.json", revision="next", token="hf_write")
    page = hub.repos["org/name"]["next"]["README.md"].decode()
    assert "| task | a\\|b \\<script\\> |" in page
    assert 'load("hf://org/name@next/deep/64.json")' in page
    assert "None were measured." in page


@pytest.mark.parametrize("raw", [False, True])
def test_a_page_says_how_to_use_the_profile_with_the_template_of_its_search(raw):
    info = ModelInfo("org/model", 3, 2, 4, 16, 512, "0123456789abcdef")
    task = "jsonl:path=q.jsonl" if raw else "niah:context=400"
    budgets = np.full((3, 2), 64)
    page = card_text(BudgetProfile.from_budgets(info, budgets, search={"task": task}), HubAddress("me/profile"))
    assert ("--prompt-file question.txt --raw" in page) == raw
    assert ("apply_chat_template" in page) != raw
    program = page[page.index("```python") + 9 :].partition("```")[0]
    compile(program, "page", "exec")


def test_a_page_says_how_prompts_were_read():
    info = ModelInfo("org/model", 3, 2, 4, 16, 512, "0123456789abcdef")
    search = {"strategy": "joint", "protocol": "agnostic", "prefill_chunk": 32}
    page = card_text(BudgetProfile.from_budgets(info, np.full((3, 2), 64), search=search), HubAddress("me/profile"))
    assert "protocol agnostic, prompts in chunks of 32, seed" in page
    assert "--prompt-file question.txt --prefill-chunk 32" in page
    assert "evolkv.compress(model, profile, prefill_chunk=32):" in page
    assert "--budget 64 --protocol agnostic --prefill-chunk 32`" in page


def test_a_page_names_the_base_model_where_the_hub_has_it():
    info = ModelInfo("org/model", 3, 2, 4, 16, 512, "0123456789abcdef")
    page = card_text(BudgetProfile.uniform(info, 64), HubAddress("me/profile"))
    assert "base_model: org/model\n" in page
