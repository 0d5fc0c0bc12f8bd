"""Two methods on the same examples: values by exhaustive counting, by hand, and by simulation."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest

import evolkv
from evolkv.errors import UsageError
from evolkv.evaluation import paired_comparison
from evolkv.evaluation.compare import compare_records
from evolkv.intervals import bootstrap95
from evolkv.report.comparisons import comparisons
from evolkv.report.differences import held_out
from evolkv.report.sources import read_sources
from evolkv.report.tables import comparison_note, comparison_table


def by_counting(a, b):
    """p of the sign-flip test in exact arithmetic, over every sign of every example, ties among them."""
    differences = [Fraction(x) - Fraction(y) for x, y in zip(a, b, strict=True)]
    observed, extreme, total = abs(sum(differences)), 0, 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        extreme += abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed
        total += 1
    return extreme / total


@pytest.mark.parametrize("seed", range(6))
def test_p_of_few_examples_counts_every_flip(seed):
    random = np.random.default_rng(seed)
    # Eighths have no rounding, so that equal sums are equal in floating point, too.
    a, b = (random.integers(0, 9, size=10) / 8 for _ in range(2))
    found = paired_comparison(a, b)
    assert found.exact
    assert found.p == by_counting(a, b)


def test_p_of_sixteen_wins_in_a_row_is_that_of_a_coin():
    found = paired_comparison([1.0] * 16, [0.0] * 16)
    assert (found.p, found.exact) == (2 / 2**16, True)
    assert (found.wins, found.ties, found.losses) == (16, 0, 0)


def test_rounding_does_not_make_equal_sums_unequal():
    # 0.1 + 0.2 − 0.3 is 5.6e-17, and no flip of the signs is nearer to 0.
    found = paired_comparison([0.1, 0.2, 0.0], [0.0, 0.0, 0.3])
    assert found.p == 1.0


def test_ties_change_nothing_about_p_but_count_in_the_difference():
    few = paired_comparison([1, 1, 1, 0], [0, 0, 0, 1])
    many = paired_comparison([1, 1, 1, 0] + [1] * 96, [0, 0, 0, 1] + [1] * 96)
    assert few.p == many.p == by_counting([1, 1, 1, 0], [0, 0, 0, 1])
    assert many.exact
    assert (many.n, many.wins, many.ties, many.losses) == (100, 3, 96, 1)
    assert many.difference == pytest.approx(0.02)


def test_p_of_many_examples_is_near_the_binomial_one():
    # 30 examples differ by one, 20 of them for a: the sign-flip test is then McNemar's exact (binomial) test.
    a = [1.0] * 20 + [0.0] * 10
    found = paired_comparison(a, [1 - x for x in a])
    exact = 2 * sum(_choose(30, k) for k in range(20, 31)) / 2**30
    assert not found.exact
    # Three standard errors of 20,000 draws.
    assert found.p == pytest.approx(exact, abs=3 * (exact * (1 - exact) / 20_000) ** 0.5)
    assert found == paired_comparison(a, [1 - x for x in a])
    assert found.p != paired_comparison(a, [1 - x for x in a], seed=1).p


def _choose(n, k):
    result = 1
    for i in range(k):
        result = result * (n - i) // (i + 1)
    return result


def test_p_is_never_zero_however_clear_the_difference():
    found = paired_comparison(np.linspace(0.9, 1.0, 60), np.linspace(0.0, 0.1, 60))
    assert found.p == 1 / 20_001


def test_interval_of_three_values_is_that_of_all_resamples():
    # All 27 resamples of −1, 0, 1: no skew and no bias, so BCa is the percentile interval. The means ±1 have a chance
    # of 1/27 = 3.7 % each, which is more than 2.5 %.
    found = paired_comparison([0, 0, 1], [1, 0, 0])
    assert found.ci95 == (-1.0, 1.0)
    assert found.difference == 0


def test_bca_levels_follow_efrons_formula():
    # Nine zeros and a one: the mean of a resample is K/10 with K binomial(10, 0.1), so the exact distribution is known.
    values = np.array([0.0] * 9 + [1.0])
    from statistics import NormalDist

    normal, chance = NormalDist(), [_choose(10, k) * 0.1**k * 0.9 ** (10 - k) for k in range(11)]
    bias = normal.inv_cdf(chance[0] + chance[1] / 2)
    deviations = values - 0.1
    acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    expected = []
    for z in (normal.inv_cdf(0.025), normal.inv_cdf(0.975)):
        level = normal.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        expected.append(next(k / 10 for k in range(11) if sum(chance[: k + 1]) >= level))
    assert bootstrap95(values) == pytest.approx(expected)


def test_rounding_does_not_move_the_interval_of_a_mean():
    # Many resamples have the mean of all values. Thirds in another order add up to a little less or more.
    assert bootstrap95(np.repeat([1, 2], 6) / 3) == pytest.approx(np.array(bootstrap95(np.repeat([1, 2], 6))) / 3)


def test_interval_holds_the_true_difference_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        b = random.beta(2, 3, size=30)
        a = np.clip(b + random.choice([0.0, 0.0, 0.3, -0.1], size=30), None, 2.0)
        low, high = paired_comparison(a, b).ci95
        hits += low <= 0.05 <= high
    # 95 of 100 expected; fewer than 88 have a chance of 0.4 %.
    assert hits >= 88


def test_p_is_uniform_where_both_methods_are_the_same():
    random = np.random.default_rng(1)
    ps = [paired_comparison(*random.random((2, 12))).p for _ in range(200)]
    assert 0.02 <= np.mean(np.array(ps) <= 0.1) <= 0.18


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([1.0], [1.0, 0.0]), ([[1.0]], [[1.0]]), ([float("nan")], [0.0])], ids=str
)
def test_scores_that_are_no_pairs_are_refused_in_one_line(a, b):
    with pytest.raises(UsageError) as caught:
        paired_comparison(a, b)
    assert "\n" not in str(caught.value)


def test_the_package_offers_it():
    assert evolkv.evaluation.paired_comparison is paired_comparison


def header(methods, tasks, **changes):
    model = {"name": "tiny", "fingerprint": "0" * 16, "dtype": "float32", "attention": "sdpa", "device": "cpu"}
    settings = {
        "model": {**model, **changes.pop("model", {})},
        "metric": None,
        "protocol": "aware",
        "seed": 0,
        "samples": 3,
        "sample_ids": None,
        "methods": {
            label: {
                "method": label.partition("@")[0],
                "budget": int(label.partition("@")[2]) if "@" in label else None,
                "budgets_sha256": changes.pop("budgets_sha256", label) if "@" in label else None,
                "selector": changes.pop("selector", None),
                "expanded_from": None,
            }
            for label in methods
        },
        "tasks": {task: {"fingerprint": "0" * 16, "examples": names} for task, names in tasks.items()},
        "versions": {},
    }
    return {"format": "evolkv.records/1", "settings": {**settings, **changes}}


def line(label, example, score, task="niah", **changes):
    method, _, budget = label.partition("@")
    return {
        "task": task,
        "example": example,
        "prompt_sha256": f"{task} {example}",
        "prompt_tokens": 100,
        "method": method,
        "budget": int(budget) if budget else None,
        "metric": "contains",
        "protocol": "aware",
        "prediction": "",
        "first_line": False,
        "stop": [],
        "references": ["x"],
        "score": score,
        "kv_bytes": 1024,
        "mean_budget": 64.0,
        "extra": {},
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    def write_file(name, *lines):
        path = tmp_path / name
        path.write_text("".join(json.dumps(each) + "\n" for each in lines))
        return path

    return write_file


THREE = ["e0", "e1", "e2"]


def test_methods_of_several_files_and_tasks_are_paired_by_example(write):
    tasks = {"niah": THREE, "gsm8k": THREE, "code": THREE}
    first = write(
        "a.jsonl",
        header(["snapkv@64", "tova@64"], tasks),
        *(line("snapkv@64", e, 1.0, task="code") for e in THREE),
        *(line("snapkv@64", e, s) for e, s in zip(THREE, (1.0, 0.0, 1.0), strict=True)),
        *(line("snapkv@64", e, 0.0, task="gsm8k") for e in THREE),
    )
    second = write(
        "b.jsonl",
        header(["full"], tasks),
        # In another order, and with one example that the other file lacks nothing of.
        *(line("full", e, 1.0) for e in reversed(THREE)),
        line("full", "e1", 0.5, task="gsm8k"),
    )
    found = compare_records([first, second], "snapkv", "full")
    assert (found.a, found.b, found.model) == ("snapkv@64", "full", "tiny")
    niah, gsm8k = found.tasks
    assert niah.result == paired_comparison([1, 0, 1], [1, 1, 1])
    assert (gsm8k.result.n, gsm8k.result.difference, gsm8k.unpaired) == (1, -0.5, 2)
    assert found.overall == paired_comparison([1, 0, 1, 0], [1, 1, 1, 0.5])
    data = json.loads(json.dumps(found.to_dict()))
    assert data["format"] == "evolkv.comparison/1"
    assert [row["task"] for row in data["rows"]] == ["niah", "gsm8k"]
    assert data["all"]["losses"] == 2
    table = comparison_table(found)
    assert [row[0] for row in table.rows] == ["niah", "gsm8k", "all"]
    assert table.rows[0][2:5] == ["3", "0.667", "1.000"]
    assert "Left out: 2 examples, code on record for only one." in comparison_note(found)
    assert data["left_out"] == ["code"]


def test_examples_that_a_profile_was_chosen_on_are_pointed_out(write, caplog):
    evolved = header(["full", "evolved@64"], {"niah": THREE})
    evolved["settings"]["methods"]["evolved@64"]["seen"] = {"niah": ["e0", "e2"]}
    lines = [line(label, e, 1.0) for e in THREE[:2] for label in ("full", "evolved@64")]
    compare_records([write("a.jsonl", evolved, *lines)])
    assert "evolved@64 was evolved or chosen on 1 of the 2 examples of niah" in caplog.text


@pytest.mark.parametrize(
    ("a", "b", "budget", "expected"),
    [
        ("tova@64", "snapkv@64", None, ("tova@64", "snapkv@64")),
        ("snapkv@64", "snapkv@128", None, ("snapkv@64", "snapkv@128")),
        ("tova", "snapkv", 64, ("tova@64", "snapkv@64")),
        ("snapkv", None, 128, ("snapkv@128", "full")),
        (None, "full", 128, ("snapkv@128", "full")),
        (None, None, 128, ("full", "snapkv@128")),
    ],
)
def test_methods_are_found_by_name_and_budget(write, a, b, budget, expected):
    labels = ["full", "snapkv@64", "snapkv@128", "tova@64"]
    path = write("r.jsonl", header(labels, {"niah": ["e0"]}), *(line(label, "e0", 1.0) for label in labels))
    found = compare_records([path], a, b, budget)
    assert (found.a, found.b) == expected


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ("snapkv", "full", "on record as snapkv@64, snapkv@128"),
        ("snapvk@64", "full", "Did you mean 'snapkv@64'"),
        ("full", "full", "both full"),
        ("full", None, "is open"),
        (None, None, "is open"),
    ],
)
def test_methods_that_are_not_clear_are_refused_in_one_line(write, a, b, words):
    labels = ["full", "snapkv@64", "snapkv@128"]
    path = write("r.jsonl", header(labels, {"niah": ["e0"]}), *(line(label, "e0", 1.0) for label in labels))
    with pytest.raises(UsageError) as caught:
        compare_records([path], a, b)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "record", "words"),
    [
        ({"model": {"fingerprint": "1" * 16}}, {}, "model 0000000000000000 there, 1111111111111111 here"),
        ({"model": {"dtype": "float16"}}, {}, "dtype float32 there"),
        ({"protocol": "agnostic"}, {}, "protocol aware there, agnostic here"),
        ({"prefill_chunk": 512}, {}, "prefill_chunk None there, 512 here"),
        ({}, {"prompt_sha256": "another"}, "their prompts differ"),
        ({}, {"metric": "qa_f1"}, "metric contains, then qa_f1"),
        ({}, {"example": "e1"}, "no example in common"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_in_one_line(write, settings, record, words):
    first = write("a.jsonl", header(["snapkv@64"], {"niah": THREE}), line("snapkv@64", "e0", 1.0))
    second = write("b.jsonl", header(["full"], {"niah": THREE}, **settings), {**line("full", "e0", 1.0), **record})
    with pytest.raises(UsageError) as caught:
        compare_records([first, second])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_method_with_two_allocations_or_two_scores_is_refused(write):
    tasks = {"niah": THREE}
    first = write("a.jsonl", header(["p@64", "full"], tasks), line("p@64", "e0", 1.0), line("full", "e0", 1.0))
    other = write("b.jsonl", header(["p@64"], tasks, budgets_sha256="another"), line("p@64", "e1", 1.0))
    with pytest.raises(UsageError, match="other budgets"):
        compare_records([first, other])
    ranked = write("r.jsonl", header(["p@64"], tasks, selector={"name": "knorm"}), line("p@64", "e1", 1.0))
    with pytest.raises(UsageError, match="another selector"):
        compare_records([first, ranked])
    changed = write("c.jsonl", header(["p@64"], tasks), line("p@64", "e0", 0.0))
    with pytest.raises(UsageError, match="not as in the files before"):
        compare_records([first, changed])
    again = write("d.jsonl", header(["p@64"], tasks), line("p@64", "e0", 1.0))
    assert compare_records([first, again]).overall.n == 1


@pytest.mark.parametrize(
    ("a", "words"),
    [
        ("tova", "tova is on record as tova@64, not at this budget"),
        ("tova@64", "tova@64 is not at the budget of --budget"),
    ],
)
def test_a_method_that_is_on_record_at_another_budget_is_said_to_be(write, a, words):
    labels = ["full", "snapkv@128", "tova@64"]
    path = write("r.jsonl", header(labels, {"niah": ["e0"]}), *(line(label, "e0", 1.0) for label in labels))
    with pytest.raises(UsageError, match=words):
        compare_records([path], a, "full", 128)


@pytest.mark.parametrize(
    ("settings", "task", "record"),
    [
        ({"model": {"dtype": "float16"}}, {}, {}),
        ({}, {"haystack": "essays.txt"}, {}),
        ({"metric": "logprob"}, {}, {"metric": "logprob"}),
    ],
    ids=["dtype", "haystack", "metric"],
)
def test_a_report_pairs_no_scores_of_another_comparison(write, settings, task, record):
    labels = ["a/p.json@64", "full"]
    other = header(labels, {"niah": THREE}, **settings)
    other["settings"]["tasks"]["niah"] |= task
    paths = [
        write("a.jsonl", header(labels, {"niah": THREE}), *(line(each, e, 1.0) for each in labels for e in THREE)),
        write("b.jsonl", other, *(line(each, e, 0.5 * (each == "full"), **record) for each in labels for e in THREE)),
    ]
    sources = read_sources(paths)
    found = [held_out(group, sources.records) for group in comparisons(sources.rows, [], [])]
    assert [difference.result.difference for (difference,) in found] == [0.0, -0.5]
