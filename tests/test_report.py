import html.parser
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer

import evolkv
from evolkv.cli import main
from evolkv.cli.app import app
from evolkv.errors import UsageError
from evolkv.profile_file import unit_of
from evolkv.report import headline
from evolkv.report.axes import Scale, linear_ticks, log_ticks
from evolkv.report.charts import course_chart, score_chart
from evolkv.report.comparisons import comparisons
from evolkv.report.differences import in_validation
from evolkv.report.page import render
from evolkv.report.recipes import recipes
from evolkv.report.schemas import Search
from evolkv.report.sources import read_sources
from evolkv.report.tables import results_note
from evolkv.report.views import validation

LAYERS, HEADS = 12, 2
MODEL, TASK = "smollm2-135m", "niah:context=1600"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='alert(3)"
SECTIONS = ["use", "scores", "budgets", "kept", "search", "validation", "reproduce", "words"]


def allocation(budget, seed=0):
    """Budgets by head with exactly the total of a mean budget."""
    rng = random.Random(seed)
    flat = [budget] * (LAYERS * HEADS)
    for _ in range(60):
        a, b = rng.sample(range(len(flat)), 2)
        moved = min(rng.randint(0, budget), flat[a] - 33)
        flat[a], flat[b] = flat[a] - moved, flat[b] + moved
    return [flat[i : i + HEADS] for i in range(0, len(flat), HEADS)]


def search(budget=128, generations=8, **changes):
    rng = random.Random(budget)
    history = []
    for i in range(generations * 6):
        score = 1 - math.exp(-(1 + i) / 20) * rng.uniform(0.8, 1)
        entry = {"fitness": 1.3 * score, "score": score, "cache_score": 1.0, "generation": i // 6}
        history.append({"budgets": allocation(budget, i % 50), **entry})
    best = max(history, key=lambda entry: entry["fitness"])
    uniform = [[budget] * HEADS] * LAYERS
    result = {
        "format": "evolkv.search/1",
        "evaluations": len(history),
        "seconds": 84.3,
        "interrupted": False,
        "chosen": "best",
        "improved": True,
        "best": best,
        "settings": {
            "task": TASK,
            "metric": "logprob",
            "strategy": "joint",
            "seed": 0,
            "max_evals": len(history),
            "lam": 0.3,
            "train": {"n": 6, "fingerprint": "86d832cd6ac8d877"},
            "validation": {"n": 7, "fingerprint": "ada86fe3e88a8ed7"},
            "versions": {"evolkv": "0.1.0", "torch": "2.13.0"},
        },
        "history": history,
        "validation": [
            scored("best", 0.887, budgets=best["budgets"], evolved=True),
            scored("uniform", 0.316, budgets=uniform, evolved=False),
        ],
    }
    return {**result, **changes}


def scored(name, score, n=7, **more):
    return {"name": name, "score": score, "ci95": [max(0, score - 0.1), min(1, score + 0.1)], "n": n, **more}


def row(method, budget, score, **changes):
    entries = budget or 1596.5
    sizes = {"kv_bytes": entries * 46080.0, "mean_budget": float(entries)}
    common = {"model": MODEL, "task": TASK, "metric": "contains", "budget": budget, "seed": 0}
    return {**common, "method": method, **sizes, **scored(method, score, 50), **changes}


def results(budgets=(128,)):
    scores = {"evolkv": 0.96, "snapkv": 0.08, "pyramidkv": 0.06}
    rows = [row(method, budget, score) for method, score in scores.items() for budget in budgets]
    return {"format": "evolkv.results/1", "rows": [row("full", None, 1.0), *rows]}


def profile(budget=128, budgets=None, **changes):
    return {
        "format": "evolkv.profile/1",
        "model": {"name": MODEL, "num_layers": LAYERS, "num_kv_heads": HEADS, "fingerprint": "8ddd4c3ff7cbce9e"},
        "budget": budget,
        "granularity": "head",
        "budgets": budgets or allocation(budget),
        "selector": {"name": "snapkv", "window": 32, "kernel": 7, "pooling": "max"},
        "search": {},
        "scores": {},
        **changes,
    }


def kept():
    rng = random.Random(0)
    share = [[1.0 if i == 49 else rng.choice([0, 0, 0.25, 1]) for i in range(50)] for _ in range(LAYERS)]
    return {"example": "niah-validation-0-3", "tokens": 1596, "bin": 32, "share": share}


def curve(budgets=(64, 128, 256)):
    points = [
        {"budget": b, "profile": f"p{b}.json", "score": b / 300, "ci95": [0, 1], "n": 7, "metric": "logprob"}
        | {
            "kv_bytes": b * 46080.0,
            "mean_budget": float(b),
            "source": "search",
            "evaluations": 48,
            "on_front": b != 128,
        }
        for b in budgets
    ]
    return {"format": "evolkv.curve/1", "points": points, "searches": [search(b) for b in budgets]}


@pytest.fixture
def write(tmp_path):
    def write_file(name, data):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return write_file


@pytest.fixture
def demo(write, tmp_path):
    """A folder as the demo leaves it."""
    found = search(kept=kept())
    write("demo/search.json", found)
    write("demo/results.json", results())
    write("demo/profile.json", profile(budgets=found["best"]["budgets"]))
    write("demo/prompt.txt", "no result")
    write("demo/other.json", {"format": "something else"})
    return tmp_path / "demo"


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: elements, attributes, text by element id, headings."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.sections, self.headings = [], [], [], []
        self.text, self._open = "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.text += " " * (tag in ("td", "th"))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append(int(tag[1]))
        if tag == "h2":
            self.sections.append(dict(attrs)["id"])

    def handle_data(self, data):
        if self._open[-1:] not in (["style"], ["script"]):
            self.text += data

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass


def page(*paths, **options):
    return Page(render(read_sources(paths, **options)))


def run(capsys, *argv):
    code = main(["report", *map(str, argv)])
    return code, *capsys.readouterr()


def test_report_of_a_demo_has_every_section(demo, tmp_path, capsys):
    code, out, err = run(capsys, demo, "--out", tmp_path / "r.html")
    assert (code, err) == (0, "")
    assert str(tmp_path / "r.html") in out
    found = Page((tmp_path / "r.html").read_text())
    assert found.sections == SECTIONS
    assert found.headings[0] == 1
    assert max(b - a for a, b in zip(found.headings, found.headings[1:], strict=False)) == 1


def test_others_files_that_cannot_be_read_are_no_part_of_a_folder(demo, write, capsys, tmp_path):
    write("demo/trainer_state.json", '{"loss": NaN}')
    write("demo/tsconfig.json", "{ // no JSON\n}")
    assert run(capsys, demo, "--out", tmp_path / "r.html")[0] == 0
    write("demo/search.json", json.dumps(search())[:-100])
    code, _, err = run(capsys, demo, "--out", tmp_path / "r.html")
    assert code == 2
    assert "search.json: not JSON" in err


def test_an_evaluation_that_went_on_stands_for_what_it_was_when_interrupted(write):
    partial = {**results(), "interrupted": True}
    for row in partial["rows"]:
        row["n"] = 8
    write("r/a.json", partial)
    alone = read_sources([write("r/a.json", partial)])
    assert [row.n for row in alone.rows] == [8] * len(partial["rows"])
    assert "(interrupted after 8 examples)" in alone.names[0]
    whole = write("r/b.json", results())
    both = read_sources([whole.parent])
    assert both.rows == read_sources([whole]).rows
    assert not any("interrupted" in name for name in both.names)


@pytest.mark.parametrize(
    ("data", "sections"),
    [
        (profile(), ["use", "budgets", "reproduce"]),
        (results((64, 128)), ["scores", "reproduce"]),
        (results(), ["scores", "reproduce"]),
        (search(), ["use", "budgets", "search", "validation", "reproduce"]),
        (search(validation=[], interrupted=True), ["budgets", "search", "reproduce"]),
        (search(kept=kept()), ["use", "budgets", "kept", "search", "validation", "reproduce"]),
        (curve(), ["use", "scores", "budgets", "search", "validation", "reproduce"]),
    ],
    ids=["profile", "results", "one memory", "search", "interrupted", "kept", "curve"],
)
def test_a_section_is_there_only_if_its_data_are(write, data, sections):
    assert page(write("data.json", data)).sections == [*sections, "words"]


def test_headline_says_score_memory_and_what_they_compare_to(demo):
    text = page(demo).text
    title = text[: text.index("EvolKV")]
    assert "smollm2-135m scores 0.96 on niah with 8.0\u202f% of its KV cache" in title
    assert "the full cache of 1,596 scores 1.00" in text
    assert "the best of 2 methods that need no search, snapkv, scores 0.08." in text
    assert "48 candidates in 8 generations" in text
    assert "The search took 1 min 24 s" in text


def test_headline_says_so_if_evolution_gained_nothing(write):
    data = search(chosen="uniform", improved=False)
    data["validation"].reverse()
    assert "no evolved budgets beat uniform" in page(write("s.json", data)).text


def test_headline_names_what_is_ahead_of_the_evolved_budgets_and_not_what_they_beat(write):
    names = {"lukv": 0.6, "best": 0.347, "uniform": 0.084}
    rows = [
        scored(name, score, budgets=allocation(128, i), evolved=name == "best")
        for i, (name, score) in enumerate(names.items())
    ]
    text = page(write("s.json", search(chosen="lukv", improved=False, validation=rows))).text
    assert "validation examples lukv (0.60) is ahead of the evolved budgets (0.35). The profile holds lukv." in text
    assert "uniform (0.08)" not in text


@pytest.mark.parametrize("method", ["evolkv", "out/p.json"])
@pytest.mark.parametrize("known", ["profile", "search"])
def test_headline_calls_evolved_only_what_was(write, method, known):
    table = results()
    table["rows"][1]["method"] = method
    made = profile(search={"chosen": "lukv"})
    found = search(
        chosen="lukv", improved=False, validation=[scored("lukv", 0.6, budgets=made["budgets"], evolved=False)]
    )
    # Another profile, of the same size.
    write("out/q.json", profile(search={"chosen": "best"}))
    paths = [write("r.json", table), write("out/p.json", made) if known == "profile" else write("s.json", found)]
    text = page(*paths).text
    assert "the profile scores 0.96" in text
    assert "It holds the budgets of lukv, not evolved ones." in text
    assert "evolved budgets score" not in text
    assert (
        "the evolved budgets score 0.96" in page(paths[0], write("out/p.json", profile(search={"chosen": "best"}))).text
    )


def test_the_report_and_the_search_agree_on_what_is_not_evolved():
    from evolkv.evolution import space

    assert set(headline.NOT_EVOLVED) == set(space.NOT_EVOLVED)


def test_a_profile_with_a_suffix_in_capitals_is_a_profile(write):
    table = results()
    table["rows"][1]["method"] = "PU.JSON"
    found = page(write("r.json", table))
    assert "use" in found.sections
    assert "methods compared" not in found.text


def test_numbers_of_charts_stand_in_tables(demo):
    found = page(demo)
    best = json.loads((demo / "search.json").read_text())["best"]
    cells = re.findall(r"[^\s]+", found.text)
    assert f"{best['score']:.3f}" in cells
    assert all(f"{budget:,}" in cells for line in best["budgets"] for budget in line)
    assert "0.87–0.99" not in cells
    assert "0.86–1.00" in cells
    tables = [value for tag, name, value in found.attributes if (tag, name) == ("table", "id")]
    plots = {value for tag, name, value in found.attributes if name == "data-table"}
    assert plots <= set(tables)


def test_charts_are_named_for_those_who_do_not_see_them(demo):
    attributes = page(demo).attributes
    plots = [value for tag, name, value in attributes if tag == "div" and name == "aria-label" and "table" not in value]
    assert len(plots) >= 4
    assert all(len(name) > 30 for name in plots if name.startswith(("Heat", "Bars", "Score")))
    assert ("html", "lang", "en") in attributes


@pytest.mark.parametrize("where", ["task", "model", "method", "name", "settings", "kept", "metric"])
def test_names_are_shown_but_never_become_markup(write, where):
    found, table, made = search(kept=kept()), results((64, 128)), profile()
    if where == "task":
        found["settings"]["task"] = table["rows"][1]["task"] = HOSTILE
    elif where == "model":
        made["model"]["name"] = HOSTILE
        table["rows"] = [{**each, "model": HOSTILE} for each in table["rows"]]
    elif where == "method":
        table["rows"][2]["method"] = table["rows"][3]["method"] = HOSTILE
    elif where == "name":
        found["chosen"] = found["validation"][0]["name"] = HOSTILE
    elif where == "settings":
        found["settings"] |= {HOSTILE: {HOSTILE: [HOSTILE, {"deep": HOSTILE}]}, "strategy": HOSTILE, "lam": "x"}
    elif where == "kept":
        found["kept"]["example"] = HOSTILE
    else:
        found["settings"]["metric"] = table["rows"][1]["metric"] = HOSTILE
    paths = [write("s.json", found), write("r.json", table), write("p.json", made)]
    harmless, hostile = page(write("clean.json", search())), page(*paths)
    assert "alert(1)" in hostile.text
    assert hostile.tags.count("script") == 1
    assert "img" not in hostile.tags
    assert {name for _, name, _ in hostile.attributes if name.startswith("on")} == set()
    assert {tag for tag in hostile.tags if tag not in harmless.tags} <= {
        "use",
        "small",
        "h3",
        "b",
        "i",
        "span",
        "figcaption",
    }


def test_page_asks_for_nothing(demo):
    text = render(read_sources([demo]))
    attributes = Page(text).attributes
    links = [value for _, name, value in attributes if name in ("src", "href", "action", "srcset", "data", "poster")]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"https?:|@import|url\(", text)
    policy = next(value for _, _, value in attributes if value.startswith("default-src"))
    assert policy.startswith("default-src 'none';")


def test_page_of_a_long_search_stays_small(write):
    text = render(read_sources([write("s.json", search(generations=200, kept=kept()))]))
    dots = re.search(r'data-points d="([^"]*)"', text)[1]
    assert dots.count("M") == 1200
    assert len(text.encode()) < 400_000


def test_reading_files_takes_no_torch(demo, tmp_path):
    code = "import sys, evolkv.cli as c; assert c.main(sys.argv[1:]) == 0; sys.exit('torch' in sys.modules)"
    argv = ["report", str(demo), "--out", str(tmp_path / "r.html")]
    assert subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"format": "evolkv.search/1", "evaluations": NaN}', "NaN"),
        ("[1]", '"format"'),
        ({"format": 3}, '"format"'),
        ({"format": "evolkv.serach/1"}, "evolkv.search/1"),
        ({"format": "evolkv.search/9"}, "evolkv.search/1"),
        ({"format": "evolkv.search/1"}, "evaluations is missing"),
        (search(history=[{**search()["history"][0], "score": 1.5}]), "history[0].score is 1.5"),
        (search(history=[{**search()["history"][0], "budgets": [[1], [1, 2]]}]), "history[0].budgets"),
        (search(history=[{**search()["history"][0], "budgets": []}]), "history[0].budgets"),
        (search(kept={**kept(), "bin": 31}), "kept should have 52 shares per layer"),
        (search(settings="joint"), "settings is 'joint', expected a valid dictionary"),
        (search(settings={"budgets": [64, "10%"]}), "settings should have budgets that are a list of whole numbers"),
        (json.dumps(results()).replace("0.96", "1e999"), "rows[1].score is inf"),
        ({**results(), "rows": [row("full", None, 1.0, kv_bytes=0)]}, "rows[0].kv_bytes is 0"),
        ({**results(), "rows": []}, "rows"),
        ({**results(), "rows": [row("full", None, 1.0, ci95=[1])]}, "rows[0].ci95 has 1 entry, expected at least 2"),
        ({**curve(), "points": []}, "points"),
        (profile(budgets=[["many"]]), "budgets[0][0] is 'many'"),
    ],
)
def test_what_cannot_be_used_gets_one_line_and_changes_nothing(write, tmp_path, capsys, content, hint):
    path, out = write("bad.json", content), write("r.html", "what was there")
    code, said, err = run(capsys, path, "--out", out)
    assert (code, said) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("evolkv: error: ")
    assert str(path) in err
    assert hint in err
    assert out.read_text() == "what was there"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad.json", "r.html"]


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["missing.json"], "missing.json: no such file"),
        (["empty"], "empty: no results in this folder"),
        (["image.bin"], "image.bin: not text"),
        (["/dev/zero"], "error: /dev/zero: not a regular file"),
        (["s.json", "--out", "s.json"], "s.json would be written over"),
        (["s.json", "--out", "empty"], "empty is a folder"),
        (["s.json", "--study", "x"], "--study is 'x'"),
        ([], "missing argument"),
    ],
)
def test_bad_arguments_get_one_line(write, tmp_path, capsys, monkeypatch, argv, hint):
    monkeypatch.chdir(tmp_path)
    write("s.json", search())
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.bin").write_bytes(b"\x89PNG\xff\xfe")
    before = (tmp_path / "s.json").read_text()
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert err.count("\n") == 1
    assert hint in err
    assert (tmp_path / "s.json").read_text() == before
    assert not (tmp_path / "report.html").exists()


def test_nothing_that_a_folder_holds_is_written_over(demo, capsys):
    before = (demo / "search.json").read_bytes()
    code, _, err = run(capsys, demo, "--out", demo / "search.json")
    assert (code, "is read by this command" in err) == (2, True)
    assert (demo / "search.json").read_bytes() == before


def test_a_file_counts_once_however_often_it_is_named(demo):
    found = read_sources([demo, demo / "results.json", demo / "search.json"])
    assert (len(found.rows), len(found.searches), len(found.profiles)) == (4, 1, 1)


def _words(code):
    text = html.unescape(re.sub("<[^>]+>", "", code))
    return shlex.split(text) if text.startswith("evolkv ") else []


def test_command_of_a_search_is_one_that_the_program_takes(demo, write, tmp_path):
    commands = re.findall(r"<code>(.*?)</code>", render(read_sources([demo])), re.S)
    words = next(words for words in map(_words, commands) if words[:2] == ["evolkv", "search"])
    assert words[:3] == ["evolkv", "search", MODEL]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    expected = {"--task": TASK, "--budget": "128", "--granularity": "head", "--train": "6", "--val": "7"}
    assert given.items() >= {**expected, "--selector": "snapkv:window=32,kernel=7,pooling=max", "--lam": "0.3"}.items()
    command = typer.main.get_command(app)
    with command.make_context("evolkv", words[1:]) as context:
        name, sub, rest = command.resolve_command(context, words[1:])
        assert sub.make_context(name, rest, parent=context).params["max_evals"] == 48


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"minibatch": 1, "start": "uniform"},
        {"metric": "contains"},
        {"strategy": "gradient", "gradient_steps": 1},
        {"strategy": "start", "start": "lukv"},
        {"strategy": "evolkv", "group_size": 2},
        {"strategy": "random"},
        {"preset": "paper", "selector": "snapkv:window=8", "group_size": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "best",
)
def test_the_command_finds_the_same_budgets_again(options, small, write, tmp_path, monkeypatch):
    common = {"task": "niah:context=120", "budget": 20, "train": 2, "val": 2, "max_evals": 12, "gradient_steps": 2}
    settings = {**common, "selector": "snapkv:window=8", "seed": 3}
    found = evolkv.search(*small, **{**settings, **options})
    path = write("s.json", {**found.to_dict(), "profile": None} | {"format": "evolkv.search/1"})
    found.profile.save(tmp_path / "first.json")
    (recipe,) = recipes(read_sources([path, tmp_path / "first.json"]), [], "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evolkv.cli.options.ModelOptions.load", lambda *_: small)
    assert main([*shlex.split(" ".join(recipe.command))[1:], "--storage", "none", "--quiet"]) == 0
    assert json.loads((tmp_path / "profile.json").read_text())["budgets"] == found.profile.to_dict()["budgets"]


def test_paths_with_spaces_survive_the_command(write):
    data = search()
    data["settings"]["task"] = "jsonl:path=my questions.jsonl"
    assert "'jsonl:path=my questions.jsonl'" in page(write("s.json", data)).text


def test_profiles_of_one_budget_each_make_one_line_in_the_chart():
    budgets = (64, 128, 256)
    rows = [{**row(f"out/p{b}.json", b, b / 300)} for b in budgets] + [row("snapkv", b, b / 600) for b in budgets]
    (group,) = comparisons(_rows(rows), [], [])
    assert {series.name: len(series.marks) for series in score_chart(group).series} == {"profiles": 3, "snapkv": 3}


def test_a_profile_expanded_to_many_budgets_is_a_line_of_its_own():
    rows = [row(f"{name}/p.json", b, b / 300) for name in "ab" for b in (64, 128)]
    (group,) = comparisons(_rows(rows), [], [])
    assert {series.name for series in score_chart(group).series} == {"a/p.json", "b/p.json"}


def test_only_scores_of_the_same_examples_are_compared():
    rows = [row("snapkv", 64, 0.1), row("snapkv", 64, 0.1, task="other"), row("snapkv", 64, 0.1, n=49)]
    rows += [row("snapkv", 64, 0.1, seed=1), row("snapkv", 64, 0.1, protocol="agnostic")]
    rows += [row("snapkv", 64, 0.1, prefill_chunk=512), row("snapkv", 64, 0.1, haystack="generated prose")]
    assert len(comparisons(_rows(rows), [], [])) == 7


def test_protocols_are_named_and_stand_apart(write):
    rows = [row("full", None, 1.0), row("evolkv", 128, 0.9), row("snapkv", 128, 0.1)]
    aware = write("a.json", {"format": "evolkv.results/1", "rows": [{**each, "protocol": "aware"} for each in rows]})
    later = [{**each, "protocol": "agnostic", "score": 0.05, "ci95": [0.0, 0.1]} for each in rows]
    text = page(aware, write("b.json", {"format": "evolkv.results/1", "rows": later})).text
    assert "snapkv, which needs no search, scores 0.10." in text
    assert "protocol aware" in text
    assert "protocol agnostic" in text
    assert "--protocol agnostic" in text


def test_the_headline_counts_the_candidates_of_all_selectors(write):
    rivals = [{"selector": {"name": name}, "evaluations": 48, "score": 0.5} for name in ("snapkv", "knorm")]
    found = search()
    text = page(write("s.json", {**found, "settings": {**found["settings"], "rivals": rivals}})).text
    assert "All selectors together took 96 candidates" in text


def test_a_gradient_start_and_the_candidates_after_it_share_one_axis(write, tmp_path):
    found = search()
    steps = [
        {**entry, "generation": i, "scores": [entry["score"] if i % 2 == j else None for j in range(2)]}
        for i, entry in enumerate(found["history"][:4])
    ]
    both = Search.model_validate({**found, "descent": steps})
    chart = course_chart(both)
    assert [stage.name for stage in chart.stages] == ["gradient start", "evolution"]
    assert chart.stages[0].end == chart.stages[1].begin == round(100 * 4 / 52, 3)
    assert len(chart.table.rows) == 52
    text = page(write("s.json", {**found, "descent": steps})).text
    assert "4 steps along the slope of the loss, each on 1 of 2 training examples" in text
    assert "gradient steps and candidates" in text
    assert "gradient start" not in page(write("t.json", found)).text
    write_studies(tmp_path / "s.db", "search")
    assert "2 steps along the slope of the loss" in page(tmp_path / "s.db").text


def test_scores_are_drawn_and_fitness_is_named_only_where_it_says_something_else(write):
    found = search()
    assert "fitness" not in page(write("s.json", found)).text
    found["history"][3]["cache_score"] = 0.9
    assert "fitness" in page(write("t.json", found)).text


def test_budgets_of_two_names_are_shown_once(write):
    found = search(chosen="gradient")
    twice = {**found["validation"][0], "name": "gradient"}
    found["validation"].insert(1, twice)
    assert [entry.name for entry in Search.model_validate(found).allocations] == ["gradient", "uniform"]
    assert "chosen, also best" in page(write("s.json", found)).text


def test_methods_stand_from_the_highest_score_down(write):
    text = page(write("r.json", results())).text
    table = text[text.index("95 % interval)".replace(" %", "\u202f%")) :]
    names = ["full cache", "evolkv", "snapkv", "pyramidkv"]
    places = [table.index(name) for name in names]
    assert places == sorted(places)


def test_a_choice_is_compared_pair_by_pair_with_what_it_was_chosen_from(write):
    found = search()
    assert "pair by pair" not in page(write("s.json", found)).text
    for entry, scores in zip(found["validation"], ([0.9] * 6 + [0.8], [0.3] * 7), strict=True):
        entry["scores"] = scores
    (difference,) = in_validation(Search.model_validate(found))
    assert (difference.name, difference.other) == ("best", "uniform")
    assert difference.result.difference == pytest.approx((6 * 0.6 + 0.5) / 7)
    text = page(write("t.json", found)).text
    assert "best − uniform" in text
    assert "+0.586" in text


@pytest.mark.parametrize(("scores", "sure"), [([0.9, 0.8, 0.7, 0.3, 0.3, 0.3], False), ([0.9] * 5 + [0.8], True)])
def test_a_difference_is_coloured_only_where_interval_and_p_agree(write, scores, sure):
    found = search()
    for entry, each in zip(found["validation"], (scores, [0.3] * 6), strict=True):
        entry["scores"] = each
    (line,) = validation(Search.model_validate(found)).differences.lines
    assert (line.style == 1) == sure
    assert line.interval.startswith("+")
    assert ("go by p" in page(write("s.json", found)).text) != sure


def test_the_answer_is_marked_where_the_prompt_says_it(write):
    answer = {"start": 1290, "end": 1297, "text": "…the number is 1234567…"}
    text = render(read_sources([write("s.json", search(kept={**kept(), "answers": [answer]}))]))
    assert "Around the answer, at tokens 1,290 to 1,296, they keep" in text
    assert "the number is 1234567" in text
    # 50 bins of 32 tokens.
    assert f'x1="{100 * 1293.5 / 1600:.3f}' in text
    with pytest.raises(UsageError, match="answers within its 1596 tokens"):
        read_sources([write("t.json", search(kept={**kept(), "answers": [{**answer, "end": 2000}]}))])


def test_a_profile_whose_budgets_say_what_is_read_is_shown_so(write, capsys):
    path = write("p.json", profile(selector={"name": "rocketkv", "window": 32, "kernel": 63, "held": 512, "read": 0}))
    found = page(path)
    assert found.text.count("entries read by a token") >= 5
    assert "cache entries" not in found.text.replace("budgetcache entries (tokens)", "")
    assert main(["profile", "show", str(path)]) == 0
    assert capsys.readouterr().out.startswith("layer  entries read by a token per head\n")


def test_the_report_and_the_selectors_agree_on_what_budgets_count():
    from evolkv.selectors import SELECTORS, get_selector

    for spec in [*SELECTORS, "rocketkv:held=512"]:
        selector = get_selector(spec)
        assert unit_of(selector.to_dict()) == selector.unit


def test_the_largest_heads_are_named_with_their_numbers(write):
    made = profile()
    text = page(write("p.json", made)).text
    most, layer, head = max((v, i, j) for i, row in enumerate(made["budgets"]) for j, v in enumerate(row))
    listed = text[text.index("The 10 largest heads") :]
    assert listed.index(f"layer {layer}, head {head}") < listed.index(f"{most}")
    flat = profile(budgets=[[128] * HEADS] * LAYERS)
    assert "largest heads" not in page(write("q.json", flat)).text


def test_the_profile_that_the_headline_names_is_the_one_to_use(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for budget in (64, 128, 256):
        write(f"p{budget}.json", profile(budget))
    text = page("curve.json" if write("curve.json", curve()) else "").text
    assert f"evolkv generate {MODEL} --profile p256.json --prompt-file question.txt" in text
    assert 'evolkv.BudgetProfile.load("p256.json")' in text


@pytest.mark.parametrize(
    ("task", "raw"), [("jsonl:path=q.jsonl", True), ("jsonl:path=q.jsonl,chat=true", False), (TASK, False)]
)
def test_a_profile_is_to_be_used_with_the_chat_template_of_its_search(write, task, raw):
    found = search()
    found["settings"]["task"] = task
    for path in (write("s.json", found), write("p.json", profile(search={"task": task}))):
        text = page(path).text
        assert ("--prompt-file question.txt --raw" in text) == raw
        assert ("apply_chat_template" in text) != raw


def test_how_prompts_were_read_is_named(write):
    rows = [row("full", None, 1.0, prefill_chunk=512), row("snapkv", 128, 0.1, prefill_chunk=512)]
    text = page(write("a.json", {"format": "evolkv.results/1", "rows": rows})).text
    assert "prompts read in chunks of 512" in text
    assert "--prefill-chunk 512" in text


def test_what_needles_hide_in_is_named_where_it_is_known(write):
    rows = [row("full", None, 1.0), row("snapkv", 128, 0.1)]
    assert "haystack" not in page(write("a.json", {"format": "evolkv.results/1", "rows": rows})).text
    rows = [{**each, "haystack": "essays.txt, sha256 0123"} for each in rows]
    text = page(write("b.json", {"format": "evolkv.results/1", "rows": rows})).text
    assert "haystack essays.txt, sha256 0123" in text


@pytest.mark.parametrize(
    ("haystacks", "note"),
    [
        ({}, ""),
        ({"niah": "generated prose"}, "Haystack: generated prose."),
        ({"niah": "a.txt", "ruler": "generated prose"}, "Haystack: niah a.txt; ruler generated prose."),
    ],
)
def test_the_note_of_a_table_names_the_haystack(haystacks, note):
    rows = [{"task": "gsm8k"}, *({"task": task, "haystack": used} for task, used in haystacks.items())]
    assert results_note([{**each, "ci95": [0.1, 0.2]} for each in rows]) == note


def test_what_is_read_stands_beside_what_is_held_where_a_method_reads_less(write):
    rows = [row("full", None, 1.0), row("snapkv", 128, 0.1)]
    text = page(write("a.json", {"format": "evolkv.results/1", "rows": rows})).text
    assert "read MiB" not in text
    rows.append(row("rocketkv", 128, 0.5, read_bytes=3.5 * 2**20))
    text = page(write("b.json", {"format": "evolkv.results/1", "rows": rows})).text
    assert "read MiB" in text
    assert "3.50" in text


def test_marks_of_a_score_stand_where_its_number_says():
    rows = _rows([row("evolkv", 64, 0.25), row("evolkv", 256, 1.0), row("full", None, 1.0)])
    (group,) = comparisons(rows, [], [])
    chart = score_chart(group)
    low, high = chart.series[0].marks
    assert (low.y, high.y) == (75, 0)
    assert 0 < low.x < high.x < 100
    assert (low.top, low.bottom) == (65, 85)
    assert chart.band == (0, 0, 10)


def test_curve_shows_its_points_beside_the_heuristics_of_its_searches(write):
    write("p64.json", profile(64))
    path = write("curve.json", curve())
    found = read_sources([path])
    assert [each.budget for each in found.profiles] == [64]
    (group,) = comparisons(found.rows, found.curves, found.profiles)
    names = {entry.name for entry in group.entries}
    assert names == {"evolkv", "uniform"}
    hollow = [mark.hollow for series in score_chart(group).series for mark in series.marks if series.name == "evolkv"]
    assert hollow == [False, True, False]
    text = page(path).text
    assert "--budget 64,128,256" in text
    assert "Search at 3 budgets" in text


def evaluated():
    """What `eval` measured on held-out examples of the profiles of a curve."""
    rows = [row(f"p{b}.json", b, s, n=8) for b, s in ((64, 0.12), (128, 0.25), (256, 0.5))]
    rows += [row("snapkv", b, s, n=8) for b, s in ((64, 0.0), (128, 0.05), (256, 0.2))]
    return {"format": "evolkv.results/1", "rows": [row("full", None, 1.0, n=8), *rows]}


def test_held_out_scores_are_the_headline_and_a_curves_points_are_called_validation(write):
    text = page(write("curve.json", curve()), write("r.json", evaluated())).text
    title, rest = text[: text.index("EvolKV")], text
    assert "scores 0.50 on niah with 16\u202f%" in title
    assert "validation" not in title
    assert "on 8 held-out examples" in rest
    assert "7 validation examples that the choice of budgets was made on" in rest
    assert "7 held-out" not in rest


def test_examples_that_a_search_saw_are_not_called_held_out(write):
    rows = [row("p.json", 64, 0.9, n=8, seen=6), row("snapkv", 64, 0.1, n=8)]
    text = page(write("r.json", {"format": "evolkv.results/1", "rows": rows})).text
    assert "held-out" not in text
    assert "on 8 examples, 6 of which a search saw" in text
    assert "scores are too high: evaluate the profile on others" in text


def test_a_curve_alone_says_that_its_scores_are_of_validation(write):
    text = page(write("curve.json", curve())).text
    title = text[: text.index("EvolKV")]
    assert "scores 0.85 on niah in validation" in title
    assert "on 7 validation examples" in text
    assert "The budgets were chosen on these examples, so scores on others may be lower" in text
    assert "held-out" not in text


def test_a_search_alone_says_that_its_score_is_of_examples_that_it_chose_on(write):
    text = page(write("s.json", search())).text
    assert "held-out" not in text
    assert "7 validation examples decided which allocation the search returned" in text


def test_a_start_that_nothing_evolved_from_is_not_said_to_have_won(write):
    only = scored("lukv", 0.6, budgets=[[128] * HEADS] * LAYERS, evolved=False)
    text = page(write("s.json", search(improved=False, chosen="lukv", validation=[only]))).text
    assert "lukv scores 0.60 with 128 entries per KV head" in text
    assert "Nothing was evolved: the profile holds the start, lukv." in text
    assert "no evolved budgets" not in text


def test_a_chart_is_drawn_only_for_several_budgets_and_every_mark_stands_at_its_own(write):
    assert not any(name == "data-row" for _, name, _ in page(write("one.json", results())).attributes)
    (group,) = comparisons(read_sources([write("several.json", evaluated())]).rows, [], [])
    chart = score_chart(group)
    places = {}
    for series in chart.series:
        for mark in series.marks:
            places.setdefault(group.entries[mark.row].row.kv_bytes, set()).add(mark.x)
    assert len(places) == 3
    assert all(len(at) == 1 for at in places.values())
    assert [(tick.label, tick.note) for tick in chart.x.ticks[::-1]] == [
        ("64", "2.81 MiB"),
        ("128", "5.62 MiB"),
        ("256", "11.2 MiB"),
    ]


def test_curve_reads_no_profile_outside_its_folder(write, tmp_path):
    write("secret.json", profile(64))
    data = curve()
    data["points"][0]["profile"] = "../secret.json"
    data["points"][1]["profile"] = str(tmp_path / "secret.json")
    assert read_sources([write("inner/curve.json", data)]).profiles == []


def test_search_of_examples_in_turn_is_followed_by_the_mean_of_its_distribution():
    def entry(generation, scores, fitness):
        seen = [score for score in scores if score is not None]
        score = sum(seen) / len(seen)
        return {"budgets": [[64]], "fitness": fitness, "score": score, "cache_score": 1.0} | {
            "generation": generation,
            "scores": scores,
        }

    history = [entry(0, [0.2, None], 0.26), entry(0, [0.9, None], 1.17), entry(1, [None, 0.6], 0.78)]
    found = Search.model_validate({"evaluations": 3, "history": history})
    assert found.rotating
    assert [(done, round(score, 9)) for done, score in found.course()] == [(2, 0.2), (3, 0.4)]
    assert found.leader.fitness == 0.78


def test_a_profile_under_an_unknown_selector_is_refused_in_one_line(write, capsys):
    path = write("p.json", profile(selector={"name": "snapkw"}))
    code, _, err = run(capsys, path)
    assert code == 2
    assert err.count("\n") == 1
    assert "selector: unknown selector 'snapkw'. Did you mean 'snapkv'?" in err


def test_best_so_far_never_falls():
    found = Search.model_validate(search())
    course = found.course()
    scores = [value for _, value in course]
    assert scores == sorted(set(scores))
    assert scores[-1] == max(entry.score for entry in found.history)


@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_round_and_within_the_axis(log):
    rng = random.Random(0)
    for _ in range(300):
        low = 10 ** rng.uniform(-3, 6)
        high = low * 10 ** rng.uniform(0.02, 5)
        ticks = (log_ticks if log else linear_ticks)(Scale(low, high, log))
        assert 2 <= len(ticks) <= 7
        assert all(-0.01 <= tick.at <= 100.01 for tick in ticks)
        assert len({tick.label for tick in ticks}) == len(ticks)


def write_studies(storage, *names, budgets=(64,)):
    from evolkv.evolution.result import Evaluation
    from evolkv.evolution.study import Study
    from evolkv.selectors import SELECTORS
    from evolkv.specs import parse_named

    settings = {"model": {"name": MODEL}, "task": TASK, "strategy": "joint", "budgets": list(budgets)}
    for number, name in enumerate(names):
        settings["selector"] = parse_named(name.rpartition("/")[2] if "/" in name else "snapkv", "selector", SELECTORS)
        with Study.open(str(storage), name, settings) as study:
            study.put("max_evals", 12)
            validation = {}
            for place, budget in enumerate(budgets):
                for step in range(2):
                    slope = [[0.1] * len(each) for each in allocation(budget, step)]
                    taken = Evaluation(allocation(budget, step), 0.3, 0.3, 1.0, step, [0.3], 0.5, slope)
                    study.record(f"gradient {budget}", step, [taken])
                for generation in range(3):
                    entries = [
                        Evaluation(allocation(budget, i + number), 0.5, 0.4, 1.0, generation, [0.4], 0.5)
                        for i in range(4)
                    ]
                    study.record(f"budget {budget}", generation, entries)
                found = search(budget)["validation"]
                gain = number / 50 - place / 10
                validation[str(budget)] = [{**each, "score": each["score"] + gain} for each in found]
            study.put("validation", validation)


def test_study_is_read_from_its_file_by_name(tmp_path, capsys):
    storage, out = tmp_path / "s.db", tmp_path / "r.html"
    write_studies(storage, "one", "two")
    code, _, err = run(capsys, storage, "--out", out)
    assert code == 2
    assert err.count("\n") == 1
    assert "one" in err
    assert "two" in err
    assert run(capsys, storage, "--study", "two", "--out", out)[0] == 0
    text = Page(out.read_text()).text
    assert "12 candidates in 3 generations" in text
    assert "evolved budgets score 0.91 with 64 entries per KV head" in text
    assert f"evolkv search {MODEL} --task {TASK} --budget 64" in text
    assert "--max-evals 12" in text


def test_a_study_does_not_know_how_long_its_search_took(tmp_path, write):
    storage = tmp_path / "s.db"
    write_studies(storage, "one")
    alone = page(storage).text
    assert not re.search(r"took|candidates in \d+ s", alone)
    (of_study,) = read_sources([storage]).searches
    found = search(history=[each.model_dump() for each in of_study.history], evaluations=12)
    path = write("s.json", found)
    for order in ([storage, path], [path, storage]):
        assert "candidates in 1 min 24 s" in page(*order).text


def test_a_study_names_the_haystack_that_its_search_used(tmp_path, small):
    storage, size = tmp_path / "s.db", {"train": 2, "val": 2, "max_evals": 8, "gradient_steps": 2}
    evolkv.search(*small, task="niah:context=200", budget=48, selector="snapkv", storage=str(storage), **size)
    assert re.search(r"haystack\s*generated prose", page(storage).text)


def test_studies_of_several_selectors_are_shown_together_by_name(tmp_path, capsys):
    storage, out = tmp_path / "s.db", tmp_path / "r.html"
    write_studies(storage, "search/snapkv:window=8", "search/keydiff")
    assert run(capsys, storage, "--out", out)[0] == 0
    text = Page(out.read_text()).text
    assert "Budget 64, snapkv:window=8" in text
    assert "Budget 64, keydiff" in text
    # That of the one which did best.
    assert "evolved budgets score 0.91 with 64 entries per KV head" in text
    assert text.count(f"evolkv search {MODEL}") == 1
    assert "--selector snapkv:window=8 keydiff" in text


def test_study_of_a_curve_names_first_what_does_almost_as_well_as_the_best(tmp_path):
    storage = tmp_path / "s.db"
    write_studies(storage, "search", budgets=(256, 128, 64))
    text = page(storage).text
    assert "evolved budgets score 0.89 with 256 entries per KV head" in text
    assert "--budget 256,128,64" in text
    assert "--first largest" in text


def _rows(rows):
    from evolkv.report.schemas import Row

    return [Row.model_validate(each) for each in rows]


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens the report of some files; fails at the end if the browser had anything to complain or to ask for."""
    heard, asked, contexts = [], [], []

    def open_page(*paths, **options):
        out = tmp_path / "report.html"
        out.write_text(render(read_sources(paths)))
        contexts.append(browser.new_context(**options))
        opened = contexts[-1].new_page()
        opened.on("console", lambda message: heard.append(message.text))
        opened.on("pageerror", lambda error: heard.append(str(error)))
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(out.as_uri())
        return opened

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


#: For each chart: its width, and how many marks have a colour and a place within it.
MARKS = """plots => plots.map(plot => {
    const box = plot.getBoundingClientRect();
    const marks = [...plot.querySelectorAll("path:not(.gaps), rect:not(.ground, .band), use")].filter(mark => {
        const { fill, stroke } = getComputedStyle(mark);
        const place = mark.getBoundingClientRect();
        const inside = place.left >= box.left - 15 && place.right <= box.right + 15
            && place.top >= box.top - 15 && place.bottom <= box.bottom + 15;
        return inside && place.width + place.height > 0 && (fill !== "none" || stroke !== "none");
    });
    return [box.width, marks.length];
})"""


def test_every_chart_has_marks(show, demo):
    opened = show(demo)
    charts = opened.locator(".plot").evaluate_all(MARKS)
    assert len(charts) == 4
    assert all(width > 300 for width, _ in charts)
    assert all(count > 0 for _, count in charts)
    assert [charts[i][1] for i in (0, 3)] == [LAYERS, 2]
    assert opened.locator("#search-1 tbody tr").count() == 48


def test_charts_of_a_curve_have_marks(show, write):
    opened = show(write("curve.json", curve()))
    charts = opened.locator(".plot").evaluate_all(MARKS)
    assert len(charts) == 1 + 2 * 3 + 3
    assert all(count > 0 for _, count in charts)


#: Luminance contrast of text and marks against the page, as WCAG defines it.
CONTRAST = """() => {
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const paper = light(parse(getComputedStyle(document.body).backgroundColor));
    const ratio = colour => { const ink = light(parse(colour));
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); };
    const of = (selector, property) => ratio(getComputedStyle(document.querySelector(selector))[property]);
    return {
        paper, ink: of("h1", "color"), quiet: of(".quiet", "color"), link: of("a[href='#scores']", "color"),
        axis: of(".axis text", "fill"), bars: of(".bars rect", "fill"), best: of("path.course", "stroke"),
    };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_follows_the_colour_scheme_and_can_be_read_in_it(show, demo, scheme):
    found = show(demo, color_scheme=scheme).evaluate(CONTRAST)
    assert (found.pop("paper") > 0.5) == (scheme == "light")
    graphics = {"bars", "best"}
    assert all(value >= (3 if name in graphics else 4.5) for name, value in found.items()), found


def test_page_fits_a_phone_whatever_the_names(show, write, demo):
    data = results((64, 128))
    data["rows"] = [{**each, "task": "t" * 300, "method": each["method"] + "m" * 200} for each in data["rows"]]
    opened = show(demo, write("long.json", data), viewport={"width": 360, "height": 740})
    assert opened.evaluate("document.documentElement.scrollWidth") == 360
    assert opened.locator(".plot").evaluate_all("plots => plots.every(plot => plot.clientWidth > 200)")
    opened.locator("summary").evaluate_all("all => all.forEach(each => each.click())")
    assert opened.evaluate("document.documentElement.scrollWidth") == 360


def test_values_can_be_read_by_keyboard(show, demo):
    opened = show(demo)
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.className") == "skip"
    opened.get_by_role("group", name="Heat map: budgets").focus()
    tip = opened.locator("#tip")
    budgets = json.loads((demo / "search.json").read_text())["best"]["budgets"]
    for key, layer, head in [("ArrowRight", 0, 0), ("ArrowRight", 1, 0), ("ArrowDown", 1, 1), ("End", LAYERS - 1, 1)]:
        opened.keyboard.press(key)
        assert tip.inner_text() == f"layer {layer}, head {head}: {budgets[layer][head]:,}"
    opened.keyboard.press("Escape")
    assert not tip.is_visible()


def test_values_can_be_read_by_pointing(show, write):
    opened = show(write("results.json", results((64, 128))))
    plot = opened.get_by_role("group", name="Score against mean budget")
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] - 30, "y": 10})
    tip = opened.locator("#tip").inner_text()
    assert "method evolkv" in tip
    assert "score 0.960" in tip


def test_print_shows_charts_whole_and_no_controls(show, demo):
    opened = show(demo, viewport={"width": 700, "height": 1000}, color_scheme="dark")
    opened.emulate_media(media="print")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.locator("figure").first.evaluate("figure => getComputedStyle(figure).breakInside") == "avoid"
    assert not opened.locator("summary").first.is_visible()
    assert not opened.locator("nav").is_visible()
    assert opened.evaluate("document.documentElement.scrollWidth") <= 700
    assert opened.pdf(format="A4").startswith(b"%PDF")
