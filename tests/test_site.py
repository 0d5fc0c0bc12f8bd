"""The documentation as a site: its pages, its reference, and, as a slow test, what a browser makes of it."""

from __future__ import annotations

import html.parser
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer
import yaml

import evolkv
from evolkv import evolution
from evolkv.cli.app import app
from test_docs import notebook_cells

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
#: Pages that the hooks make of what is elsewhere.
MADE = {"index.md", "cli.md", "records.md"}


def listed(nav):
    for entry in nav:
        for target in entry.values():
            if isinstance(target, str):
                yield target
            else:
                yield from listed(target)


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_navigation_lists_every_page_once():
    pages = list(listed(SETTINGS["nav"]))
    assert sorted(pages) == sorted({*(path.name for path in DOCS.glob("*.md")), *MADE})


def described():
    """What the Python reference describes: name, object, and the members that it leaves out (None: all of them)."""
    for page in sorted(DOCS.glob("python_*.md")):
        for name, options in re.findall(r"^::: (\S+)$((?:\n    .*)*)", page.read_text(encoding="utf-8"), re.M):
            module, _, attribute = name.rpartition(".")
            hidden = None if "members: false" in options else re.findall(r"!\^\((.*?)\)\$|!\^(\w\w+)\$", options)
            left_out = hidden and {each for match in hidden for each in "|".join(match).strip("|").split("|")}
            yield name, getattr(importlib.import_module(module), attribute), left_out


def public_packages():
    """EvolKV and each package in it that says what it exports; `evolkv.cli` is the program."""
    yield evolkv
    for found in pkgutil.walk_packages(evolkv.__path__, "evolkv."):
        if found.ispkg and found.name != "evolkv.cli":
            package = importlib.import_module(found.name)
            if hasattr(package, "__all__"):
                yield package


def test_the_python_reference_has_every_public_name():
    known = [each for _, each, _ in described()]
    missing = [
        f"{package.__name__}.{name}"
        for package in public_packages()
        for name in package.__all__
        if name != "__version__" and not any(getattr(package, name) is each for each in known)
    ]
    assert missing == []
    assert "`evolkv.__version__`" in (DOCS / "python_api.md").read_text(encoding="utf-8")


def test_what_the_python_reference_shows_says_what_its_arguments_are():
    for name, each, left_out in described():
        shown = {name: each} if inspect.isfunction(each) else {}
        if inspect.isclass(each) and left_out is not None:
            parts = {part: getattr(value, "__func__", value) for part, value in vars(each).items()}
            shown = {
                f"{name}.{part}": value
                for part, value in parts.items()
                if inspect.isfunction(value) and not part.startswith("_") and part not in left_out
            }
        for path, function in shown.items():
            text = inspect.getdoc(function) or ""
            for argument in set(inspect.signature(function).parameters) - {"self", "cls"}:
                assert re.search(rf"^ +(\w+, )*{argument}(, \w+)*: ", text, re.M) or "See `" in text, (path, argument)


def test_the_help_of_the_searches_is_one_docstring():
    for function in (evolkv.search, evolution.search_curve):
        text = inspect.getdoc(function)
        assert [text.count(f"{heading}:\n") for heading in ("Args", "Returns", "Raises")] == [1, 1, 1]
        assert "    config: " not in text


def test_the_table_of_errors_has_every_class():
    from evolkv import errors

    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    for name, error in vars(errors).items():
        if isinstance(error, type):
            parents = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
            assert f"| `{name}` | {parents} |" in page


def test_the_table_of_variables_has_all_that_evolkv_reads():
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert set(re.findall(r'environ(?:\.get\(|\[)"(EVOLKV_\w+)"', source)) <= set(re.findall(r"`(EVOLKV_\w+)`", page))


def test_the_table_of_formats_has_every_format():
    page = (DOCS / "file_formats.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    written = set(re.findall(r'^\w*FORMAT = "(evolkv\.\w+/1)"$', source, re.M))
    assert written
    assert written <= set(re.findall(r"`(evolkv\.\w+/1)`", page))


def commands(group, path):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_the_page_of_commands_has_every_option(hooks):
    sections = dict(re.findall(r"^##+ (evolkv .*?)$(.*?)(?=^##|\Z)", hooks.commands_page(), re.M | re.S))
    for name, command in commands(typer.main.get_command(app), "evolkv"):
        for param in command.get_params(typer.Context(command)):
            if param.param_type_name == "option":
                assert all(hooks.cell(option) in sections[name] for option in param.opts), (name, param.opts)


def test_a_default_of_nought_is_one(hooks):
    row = re.search(r"^\| <code>--seed N</code> .*$", hooks.commands_page(), re.M)[0]
    assert row.endswith("| `0` |")
    assert "| | meaning" not in hooks.commands_page()


def test_links_lead_into_the_site_and_name_its_pages(hooks):
    class Here:
        class file:  # noqa: N801
            src_uri = "results.md"

    class Config:
        nav = SETTINGS["nav"]

    text = "[all](../bench/records) [one](../bench/records/memory.json) [studies.md](studies.md#watching)"
    made = hooks.on_page_markdown(text, Here, Config, None)
    assert made == "[all](records.md) [one](records/memory.json) [Long searches](studies.md#watching)"
    assert hooks.on_page_markdown("[it](../README.md#try-it)", Here, Config, None) == "[it](index.md#try-it)"


def test_headings_have_githubs_anchors(hooks):
    text = "# A `plan`: 10 % of it\n\n## In short\n\n```\n# no heading\n```\n\n## In short\n"
    made = hooks.with_anchors(text)
    assert re.findall(r"\{ #(.*?) \}", made) == ["a-plan-10--of-it", "in-short", "in-short-1"]


class Resources(html.parser.HTMLParser):
    """What a page loads, and what it links to."""

    def __init__(self):
        super().__init__()
        self.loads, self.links, self.ids = [], [], set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id") or given.get("name"))
        if tag == "a":
            self.links.append(given.get("href") or "")
        elif tag == "link" and given.get("rel") != "canonical":
            self.loads.append(given["href"])
        elif given.get("src"):
            self.loads.append(given["src"])


def parsed(path):
    page = Resources()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="`make docs` installs what builds the site")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(built):
    for path in built.rglob("*.html"):
        assert [url for url in parsed(path).loads if re.match(r"(\w+:)?//", url)] == [], path.name


@pytest.mark.slow
def test_links_between_pages_lead_to_what_is_there(built):
    pages = {path: parsed(path) for path in built.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"\w+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / unquote(name)).resolve() if name else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (path.name, link)
            assert not anchor or target not in pages or unquote(anchor) in pages[target].ids, (path.name, link)


@pytest.mark.slow
def test_the_python_reference_describes_every_public_name(built):
    pages = [path.read_text(encoding="utf-8") for path in built.glob("python_*.html")]
    parts = {
        name: part
        for page in pages
        for name, part in re.findall(r'<h3 id="(evolkv[^"]*)"(.*?)(?=<h[23]|\Z)', page, re.S)
    }
    for name, each, _ in described():
        assert name in parts
        assert ("Source code in" in parts[name]) == (inspect.isfunction(each) or inspect.isclass(each)), name
    for name in ("evolkv.search", "evolkv.evolution.search_curve", "evolkv.evaluate", "evolkv.BudgetProfile"):
        assert "Parameters:" in parts[name]
        assert "Raises:" in parts[name]
    for name in ("evolkv.search", "evolkv.evolution.search_curve", "evolkv.evaluate"):
        assert "Returns:" in parts[name]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 800, 400])
def test_pages_fit_their_window_and_ask_nothing_of_the_network(built, width):
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api")
    asked, heard = [], []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": width, "height": 900})
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: heard.append(str(error)))
        for page in sorted(built.glob("*.html")):
            if page.name != "404.html":
                opened.goto(page.as_uri())
                wide = opened.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{page.name} is {wide} pixels wide"
        # Opened as a file, too, the search finds.
        opened.goto((built / "index.html").as_uri())
        opened.locator("label[for=__search]").first.dispatch_event("click")
        opened.keyboard.type("certify")
        opened.wait_for_selector(".md-search-result__item")
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
    assert heard == []


@pytest.mark.slow
@pytest.mark.model
def test_the_notebooks_cells_run(smollm2, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evolkv, "load_model", lambda name: smollm2)
    names = {}
    for cell in notebook_cells():
        exec(cell, names)
        assert capsys.readouterr().out.strip()
    _, equal, evolved = names["rows"]
    assert evolved["score"] > equal["score"]
