"""The commands, the Python and the links of README.md and docs/ are what the program and the library take."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import json
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

import evolkv
from evolkv.cli import main
from evolkv.models import loading

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What stands for something of the reader's own.
_PLACEHOLDERS = {"MODEL": "smollm2-135m", "TASK": "niah", "METHOD": "snapkv", "C": "128", "...": "niah"}
#: What examples call objects that they get from the library.
_NAMES = {"cache": evolkv.CompressedCache, "profile": evolkv.BudgetProfile, "evolkv": evolkv}


def blocks(page):
    """Yield (language, line number, text) of each fenced or indented block; an indented one has no language."""
    language, block, start = None, [], 0
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), ""], 1):
        if line.startswith("```"):
            if language is None:
                language, block, start = line[3:].strip(), [], number + 1
            else:
                yield language, start, "\n".join(block)
                language, block = None, []
        elif language is not None:
            block.append(line)
        elif line.startswith("    ") or (block and not line):
            start = start if block else number
            block.append(line)
        elif block:
            yield "", start, textwrap.dedent("\n".join(block))
            block = []
    if language is None and any(block):
        yield "", start, textwrap.dedent("\n".join(block))


def command_lines(program):
    """A test parameter for each line that calls a program, with what was continued by a backslash."""
    for page in PAGES:
        for _, start, text in blocks(page):
            joined = text.replace("\\\n", " ")
            for line in joined.splitlines():
                # test_extending.py runs those of the guide's own task.
                if line.startswith(f"{program} ") and "--task rivers" not in line:
                    number = start + text[: text.find(line[:30])].count("\n")
                    yield pytest.param(line, id=f"{page.name}:{number}")


def words(line):
    """The arguments of a line: with values for placeholders, the first of alternatives, and options out of brackets."""
    line = re.sub(r"\[(--[^\]]*)\]", r"\1", line)
    found = [word.removesuffix("...") or word for word in shlex.split(line, comments=True)[1:]]
    return [_PLACEHOLDERS.get(word, word.partition("|")[0] if "|" in word else word) for word in found]


class ModelWanted(BaseException):
    """All that was asked for has been looked at."""


@pytest.mark.parametrize("line", list(command_lines("evolkv")))
def test_a_documented_command_is_taken(line, tmp_path, monkeypatch, capsys):
    """Up to the loading of the model, or to a file that the reader has and this test has not."""

    def want(*arguments, **options):
        raise ModelWanted

    monkeypatch.setattr(evolkv.models, "load_model", want)
    monkeypatch.setattr(loading, "load_model", want)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    monkeypatch.chdir(tmp_path)
    argv = words(line)
    try:
        code = main(argv)
    except ModelWanted:
        return
    error = capsys.readouterr().err
    missing = re.search(r"([^\s']+?):? (?:does not exist|no such file)", error)
    assert code == 0 or (missing and any(missing[1] in word for word in argv)), error


def snippets():
    for page in PAGES:
        for language, start, text in blocks(page):
            if language == "python" or (not language and is_python(text)):
                yield pytest.param(text, id=f"{page.name}:{start}")


def notebook_cells():
    """The code of docs/tutorial.ipynb, cell by cell."""
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_uses_what_there_is():
    test_documented_python_uses_what_there_is("\n".join(notebook_cells()))


def is_python(text):
    try:
        return any(isinstance(node, ast.Attribute) for node in ast.walk(ast.parse(text)))
    except SyntaxError:
        return False


def resolved(node, names):
    """The object that a name with attributes stands for, or None where that is not known."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, names)
        if owner is None:
            return None
        known = hasattr(owner, node.attr) or node.attr in getattr(owner, "__annotations__", {})
        known = known or (inspect.isclass(owner) and f"self.{node.attr}" in inspect.getsource(owner))
        assert known, f"{owner.__name__} has no {node.attr}"
        return getattr(owner, node.attr, None)
    return None


@pytest.mark.parametrize("text", list(snippets()))
def test_documented_python_uses_what_there_is(text):
    tree, names = ast.parse(text), dict(_NAMES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            # Packages that have tests of their own, in other environments.
            for other in ("lm_eval", "vllm"):
                if module.endswith(other):
                    pytest.importorskip(other)
            imported = importlib.import_module(module)
            for name in node.names:
                own = getattr(imported, name.name) if isinstance(node, ast.ImportFrom) else imported
                names[name.asname or name.name] = own
    for node in ast.walk(tree):
        called = resolved(node.func, names) if isinstance(node, ast.Call) else resolved(node, names)
        if isinstance(node, ast.Call) and callable(called):
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            positional = [None for each in node.args if not isinstance(each, ast.Starred)]
            signature = inspect.signature(called)
            if next(iter(signature.parameters), "") == "self":
                positional = [None, *positional]
            signature.bind_partial(*positional, **keywords)


@pytest.mark.model
def test_the_readmes_first_lines_of_python_run(demo, smollm2, monkeypatch, capsys):
    first, profiles, later, *_ = (text for language, _, text in blocks(ROOT / "README.md") if language == "python")
    monkeypatch.chdir(demo.parent)
    monkeypatch.setattr(evolkv, "load_model", lambda name: smollm2)
    names = {}
    for text in (first, profiles):
        exec(text, names)
        assert capsys.readouterr().out.strip()
    document = "The harbour has three piers. The keeper's name is Ulla. Ships come at noon. " * 8
    for name, text in (("document_ids", document), ("question_ids", "Who keeps the harbour?")):
        names[name] = smollm2[1](text, return_tensors="pt").input_ids
    monkeypatch.chdir(demo.parent)
    exec(later, names)
    assert (demo.parent / "document.cache").is_file()


def anchors(page):
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    names = []
    for heading in re.findall(r"^#+ +(.*)$", text, re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        # A heading that there was already gets a number.
        before = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in names)
        names.append(f"{name}-{before}" if before else name)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_documentation_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def bench_help(script, monkeypatch, capsys, *command):
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setattr(sys, "argv", [str(script), *command, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    assert not left.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("script", sorted((ROOT / "bench").glob("*.py")), ids=lambda script: script.name)
def test_a_benchmark_says_what_it_does(script, monkeypatch, capsys):
    shown = bench_help(script, monkeypatch, capsys)
    assert f"bench/{script.name}" in shown
    assert "--help" in shown


@pytest.mark.parametrize("line", list(command_lines("python")))
def test_a_documented_benchmark_and_its_options_exist(line, monkeypatch, capsys):
    script, *given = shlex.split(line, comments=True)[1:]
    if script.startswith("bench/"):
        # The first word is one of the benchmark's own commands, unless it is for `evolkv`.
        command = [word for word in given[:1] if re.fullmatch(r"[a-z][a-z-]*", word)]
        shown = bench_help(ROOT / script, monkeypatch, capsys, *command)
        options = {word.partition("=")[0] for word in given if word.startswith("--")}
        assert options <= set(re.findall(r"--[\w-]+", shown))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_tests_exist(page):
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")}
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(test_\w+))?", page.read_text(encoding="utf-8")):
        assert not name or f"def {name}(" in files[file], f"{file}::{name}"
    for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
        assert any(f"def {name}(" in text for text in files.values()), name


#: Longest sentence of the documentation, tables and code left out.
_MOST_WORDS = 35


def sentences(page):
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    # A list item is a paragraph of its own, and a table or a block of code is none.
    for paragraph in re.split(r"\n\s*\n|\n(?=[*-] |\d+\. )", text):
        lines = [line for line in paragraph.splitlines() if not line.startswith(("|", "    ", "`python", "`evolkv"))]
        words = re.sub(r"`[^`]*`", "code", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(lines)))
        yield from re.split(r"(?<=[.!?:])\)?\s+(?=[A-Z*(“\"]|code|kvpress)", words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page):
    long = [each for each in sentences(page) if len(re.findall(r"[\w’'%-]+", each)) > _MOST_WORDS]
    assert long == []
