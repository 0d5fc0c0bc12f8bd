from __future__ import annotations

import json
import os
import re
from dataclasses import FrozenInstanceError
from dataclasses import replace as replace_field
from pathlib import Path

import numpy as np
import pytest
import torch

from evolkv import CompressedCache, compress
from evolkv.errors import BudgetError, ProfileError, RunError, UsageError
from evolkv.methods import get_method
from evolkv.models import ModelInfo, describe_model
from evolkv.profile import BudgetProfile
from evolkv.report.sources import read_sources
from evolkv.selectors import SnapKV
from tiny import tiny_model


def tiny_llama(layers=2, kv_heads=2, seed=0):
    return tiny_model(num_hidden_layers=layers, num_key_value_heads=kv_heads, seed=seed)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def profile(model):
    return BudgetProfile.from_budgets(
        model, [[40, 216], [64, 192]], search={"task": "niah", "seed": 3}, scores={"validation": 0.75}
    )


@pytest.fixture
def saved(profile, tmp_path):
    path = tmp_path / "profile.json"
    profile.save(path)
    return path


def set_at(data, keys, value):
    """Set data[k0][k1]… to value, or delete it where value is `...`."""
    *parents, last = keys
    for key in parents:
        data = data[key]
    if value is ...:
        del data[last]
    else:
        data[last] = value


def test_uniform_gives_every_head_the_budget(model):
    profile = BudgetProfile.uniform(model, 128)
    assert profile.budgets.tolist() == [[128, 128], [128, 128]]
    assert (profile.budget, profile.mean_budget, profile.total) == (128, 128.0, 512)
    assert profile.granularity == "layer"
    assert (profile.num_layers, profile.num_kv_heads) == (2, 2)
    info = describe_model(model)
    assert profile.model == {
        "name": info.name,
        "num_layers": 2,
        "num_kv_heads": 2,
        "fingerprint": info.fingerprint,
    }
    assert profile.selector["name"] == "snapkv"
    assert profile.selector["window"] == 32


def test_layer_budgets_are_repeated_for_the_heads(model):
    profile = BudgetProfile.from_budgets(model, [40, 216])
    assert profile.granularity == "layer"
    assert profile.budgets.tolist() == [[40, 40], [216, 216]]
    assert profile.budget == 128
    assert BudgetProfile.from_budgets(model, np.array([[40, 40], [216, 216]])) == profile


def test_head_budgets_are_kept_as_they_are(profile):
    assert profile.granularity == "head"
    assert profile.budgets.tolist() == [[40, 216], [64, 192]]
    assert profile.budgets.dtype == np.int64
    assert profile.mean_budget == 128.0


def test_a_model_info_serves_as_well_as_the_model(model):
    assert BudgetProfile.uniform(describe_model(model), 64) == BudgetProfile.uniform(model, 64)


def test_selector_parameters_are_recorded(model):
    profile = BudgetProfile.uniform(model, 64, selector={"name": "snapkv", "window": 16})
    assert profile.selector["window"] == 16
    assert profile.selector["kernel"] == 7


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([128], "budgets has 1 rows, expected one for each of the model's 2 layers"),
        ([[128, 128], [128]], r"budgets\[1\] has 1 entries, expected one for each of the 2 KV heads"),
        ([[128, 128, 128]] * 2, r"budgets\[0\] has 3 entries"),
        ([128, [128, 128]], r"budgets\[0\] has 1 entries"),
        ([128.0, 128.5], "whole numbers"),
        ([True, True], "whole numbers"),
        (["a", "b"], "whole numbers"),
        ([2**70, 2**70], "whole numbers"),
        (128, "one row per layer"),
        (np.array(128), "one row per layer"),
        (torch.tensor(128), "one row per layer"),
        ([128, 1], r"budgets\[1\]\[0\] is 1, expected at least"),
        ([128, -5], r"budgets\[1\]\[0\] is -5"),
        ([128, 2**31 + 1], "expected at most 2147483648"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(model, budgets, message):
    with pytest.raises(ProfileError, match=message):
        BudgetProfile.from_budgets(model, budgets)


def test_a_profile_cannot_be_changed_in_place(profile):
    with pytest.raises(ValueError, match="read-only"):
        profile.budgets[0, 0] = 1
    with pytest.raises(FrozenInstanceError):
        profile.budget = 3


def test_a_profile_is_not_tied_to_the_array_it_was_made_from(model):
    budgets = np.array([[40, 216], [64, 192]])
    profile = BudgetProfile.from_budgets(model, budgets)
    budgets[:] = 99
    assert profile.budgets.tolist() == [[40, 216], [64, 192]]


def test_profiles_are_equal_by_content(model, profile):
    same = BudgetProfile.from_dict(profile.to_dict())
    assert same == profile
    assert hash(same) == hash(profile)
    assert len({same, profile}) == 1
    assert replace_field(profile, scores={}) != profile
    assert BudgetProfile.uniform(model, 128) != BudgetProfile.uniform(model, 129)
    assert profile != "profile"


def test_saved_profiles_load_as_they_were(profile, saved):
    assert BudgetProfile.load(saved) == profile
    assert BudgetProfile.load(str(saved)).search == {"task": "niah", "seed": 3}


def test_the_file_has_the_documented_fields_and_one_layer_per_line(profile, saved):
    data = json.loads(saved.read_text())
    assert data == profile.to_dict()
    assert list(data) == [
        "format",
        "model",
        "budget",
        "granularity",
        "budgets",
        "selector",
        "search",
        "scores",
    ]
    assert data["format"] == "evolkv.profile/1"
    lines = [line.strip() for line in saved.read_text().splitlines()]
    assert "[40, 216]," in lines
    assert "[64, 192]" in lines


def test_numpy_values_in_provenance_are_written_as_plain_numbers(profile, tmp_path):
    measured = replace_field(profile, scores={"mean": np.float64(0.5), "all": np.arange(3)})
    measured.save(tmp_path / "p.json")
    assert BudgetProfile.load(tmp_path / "p.json").scores == {"mean": 0.5, "all": [0, 1, 2]}


def test_provenance_that_json_cannot_hold_is_refused_and_the_file_stays(profile, saved):
    before = saved.read_bytes()
    for scores in ({"mean": float("nan")}, {"what": object()}):
        with pytest.raises(ProfileError, match="finite JSON values"):
            replace_field(profile, scores=scores).save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_provenance_that_no_file_can_hold_is_refused(profile, tmp_path):
    with pytest.raises(ProfileError, match="is half of a character"):
        replace_field(profile, search={"task": "\ud800"}).save(tmp_path / "p.json")
    assert not list(tmp_path.iterdir())


def test_saving_replaces_the_file_and_leaves_nothing_else(profile, saved):
    replace_field(profile, scores={"new": 1}).save(saved)
    assert BudgetProfile.load(saved).scores == {"new": 1}
    assert os.listdir(saved.parent) == [saved.name]
    nested = saved.parent / "a" / "b.json"
    profile.save(nested)
    assert BudgetProfile.load(nested) == profile


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(profile, saved, monkeypatch):
    before = saved.read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunError, match="No space left on device"):
        profile.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_saving_over_a_folder_is_refused(profile, tmp_path):
    with pytest.raises(ProfileError, match="is a folder"):
        profile.save(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: .* at line 1, column 1"),
        (b'{\n  "format": "evolkv.profile/1",\n  oops\n}', "not JSON: .* at line 3, column 3"),
        (b"\xff\xfe\x00GGUF", "not text"),
        (b'{"format": "evolkv.pro', "not JSON: Unterminated string starting at line 1, column 12"),
        (b'{"budget": 64, "budget": 32}', "key 'budget' is given twice; give it once"),
        (b"[1, 2]", "not a profile"),
        (b'"evolkv.profile/1"', "not a profile"),
        (b"{}", 'expected a JSON object with "format"'),
        (b'{"format": 1}', "not a profile"),
        (b'{"format": "evolkv.results/1", "rows": []}', "not a profile: the format is 'evolkv.results/1'"),
        (
            b'{"format": "evolkv.profile/2"}',
            "'evolkv.profile/2', this version reads 'evolkv.profile/1'; upgrade",
        ),
        (b'{"format": "evolkv.profile/1"}', "model is missing"),
        (b'{"format": NaN}', "NaN is not a JSON number"),
        (rb'{"format": "evolkv.profile/1", "search": {"task": "\ud800"}}', r"'\\ud800' is half of a character"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b'{"format": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_files_that_are_no_profiles_are_refused(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=message) as caught:
        BudgetProfile.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(ProfileError, match="no such file"):
        BudgetProfile.load(tmp_path / "none.json")
    with pytest.raises(ProfileError, match="is a folder"):
        BudgetProfile.load(tmp_path)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["budgets", 1, 0], 64.0, r"budgets\[1\]\[0\] is 64.0, expected a valid integer"),
        (["budgets", 1, 0], True, r"budgets\[1\]\[0\] is True, expected a valid integer"),
        (["budgets", 1, 0], "64", r"budgets\[1\]\[0\] is '64', expected a valid integer"),
        (["budgets", 1, 0], None, r"budgets\[1\]\[0\] is None"),
        (["budgets", 1], 64, r"budgets\[1\] is 64, expected a valid list"),
        (["budgets"], {}, "budgets is {}, expected a valid list"),
        (["budgets"], [], "budgets has 0 rows, expected one for each of the model's 2 layers"),
        (["budgets", 1], [64], r"budgets\[1\] has 1 entries, expected one for each of the 2 KV heads"),
        (["budgets", 1, 1], -4, r"budgets\[1\]\[1\] is -4, expected at least"),
        (["budgets", 1, 1], 0, r"budgets\[1\]\[1\] is 0, expected at least"),
        (["budgets", 1, 1], 2**40, r"budgets\[1\]\[1\] is 1099511627776, expected at most"),
        (["budgets", 1, 1], 2**80, "fit 64 bits"),
        (["budget"], 0, "budget is 0, expected at least"),
        (["budget"], "128", "budget is '128', expected a valid integer"),
        (["budget"], ..., "budget is missing"),
        (["granularity"], "layer", r"budgets\[0\] differ among heads"),
        (["granularity"], "token", "granularity is 'token', expected 'layer' or 'head'"),
        (["model", "num_layers"], 3, "budgets has 2 rows, expected one for each of the model's 3 layers"),
        (["model", "num_layers"], 0, "model.num_layers is 0"),
        (["model", "num_kv_heads"], 3, r"budgets\[0\] has 2 entries"),
        (["model", "fingerprint"], ..., "model.fingerprint is missing"),
        (["model", "fingerprint"], 7, "model.fingerprint is 7, expected a valid string"),
        (["model"], "llama", "model is 'llama', expected"),
        (["selector", "name"], "snapkw", "selector: unknown selector 'snapkw'. Did you mean 'snapkv'"),
        (["selector", "windoww"], 3, "selector: .*windoww"),
        (["selector"], {}, "selector"),
        (["selector", "name"], ["snapkv"], "selector"),
        (["search"], [], "search is"),
        (["scores"], 0.5, "scores is 0.5, expected"),
    ],
)
def test_the_first_wrong_field_is_named(saved, keys, value, message):
    data = json.loads(saved.read_text())
    set_at(data, keys, value)
    saved.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=message) as caught:
        BudgetProfile.load(saved)
    assert "\n" not in str(caught.value)


def test_fields_this_version_does_not_know_are_ignored(profile, saved):
    data = json.loads(saved.read_text())
    data["comment"] = "made by hand"
    del data["search"]
    saved.write_text(json.dumps(data), encoding="utf-8-sig")
    assert BudgetProfile.load(saved) == replace_field(profile, search={})


def test_check_model_accepts_the_model_it_was_made_for(model, profile):
    profile.check_model(model)
    profile.check_model(tiny_llama())


def test_check_model_says_what_does_not_fit(profile):
    with pytest.raises(ProfileError, match=r"for 2 layers .* has 3"):
        profile.check_model(tiny_llama(layers=3))
    with pytest.raises(ProfileError, match=r"for 2 KV heads per layer .* has 4"):
        profile.check_model(tiny_llama(kv_heads=4))
    other = tiny_llama(seed=1)
    mine, theirs = profile.model["fingerprint"], describe_model(other).fingerprint
    with pytest.raises(ProfileError, match=f"{mine}.*{theirs}.*from_budgets") as caught:
        profile.check_model(other)
    # What the message advises is a way.
    advice = re.search(r"BudgetProfile\.from_budgets\(.*\)", str(caught.value))[0]
    made = eval(advice, {"BudgetProfile": BudgetProfile, "model": other, "profile": profile})
    made.check_model(other)
    assert made.budgets.tolist() == profile.budgets.tolist()
    assert made.selector == profile.selector


def test_expansion_scales_head_budgets_to_the_new_mean(profile):
    larger = profile.expand(256)
    assert larger.budgets.tolist() == [[80, 432], [128, 384]]
    assert (larger.budget, larger.mean_budget) == (256, 256.0)
    assert larger.search == {"task": "niah", "seed": 3, "expanded_from": 128}
    assert larger.scores == {}
    assert profile.mean_budget == 128.0
    assert larger.expand(512).search["expanded_from"] == 128


def test_expansion_keeps_the_rows_of_a_layer_wise_profile_constant(model):
    profile = BudgetProfile.from_budgets(model, [41, 216])
    larger = profile.expand(333)
    assert larger.granularity == "layer"
    assert larger.total == 333 * 4
    assert (larger.budgets[:, 0] == larger.budgets[:, 1]).all()


def test_expansion_stays_between_what_the_selector_keeps_and_the_ceiling(profile):
    smaller = profile.expand(64)
    assert smaller.mean_budget == 64
    assert smaller.budgets.min() >= 32
    assert profile.expand(256, ceiling=300).budgets.max() == 300
    per_layer = profile.expand(256, ceiling=[200, 600])
    assert per_layer.budgets[0].max() <= 200
    assert per_layer.mean_budget == 256
    layer_wise = replace_field(profile, budgets=np.array([[40, 40], [216, 216]]), granularity="layer")
    assert layer_wise.expand(256, ceiling=[[300, 500], [400, 400]]).budgets.tolist() == [
        [112, 112],
        [400, 400],
    ]


def test_expansion_gives_a_layer_no_more_than_its_sliding_window_holds(profile):
    windowed = replace_field(profile, model={**profile.model, "sliding_windows": [200, None]})
    larger = windowed.expand(256)
    assert larger.mean_budget == 256
    assert larger.budgets[0].max() == 200
    everywhere = replace_field(profile, model={**profile.model, "sliding_windows": [200, 200]})
    assert everywhere.expand(150).budgets.max() == 200
    # No layer can hold so much.
    assert everywhere.expand(256).budgets.tolist() == profile.expand(256).budgets.tolist()


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (1, "at least 32 entries per head, which snapkv always keeps"),
        (10**12, "expected a whole number of cache entries"),
    ],
)
def test_expansion_out_of_reach_is_refused(profile, budget, words):
    with pytest.raises(BudgetError, match=words):
        profile.expand(budget)


@pytest.mark.parametrize("ceiling", ["300", 300.0, [300.0, 300.0], [300] * 3, None])
def test_a_ceiling_of_another_kind_is_refused_by_its_name(profile, ceiling):
    with pytest.raises(BudgetError, match=r"ceiling .*(whole number|does not fit)"):
        profile.expand(200, [None] if ceiling is None else ceiling)


def test_a_mean_of_numpys_type_is_a_number_like_others(model):
    profile = BudgetProfile.from_budgets(model, [128, 128], budget=np.int64(128))
    assert profile == BudgetProfile.uniform(model, 128)
    assert CompressedCache(model, profile).kv_layers[0].budgets.tolist() == [128, 128]


@pytest.mark.parametrize("share", [0.1, 10, torch.tensor(0.1)])
def test_a_share_that_is_no_text_is_refused(model, share):
    with pytest.raises(BudgetError, match=r"the share is .*such as 10%"):
        BudgetProfile.from_budgets(model, [128, 128], share=share)


def test_every_error_is_a_usage_error(model):
    with pytest.raises(UsageError):
        BudgetProfile.uniform(model, 0)
    with pytest.raises(UsageError, match="Did you mean 'snapkv'"):
        BudgetProfile.uniform(model, 128, selector="snapkw")


@pytest.mark.parametrize("selector", ["snapkv:window=8", {"name": "snapkv", "window": 8}, SnapKV(window=8)])
def test_a_selector_is_the_same_in_every_form(model, selector):
    profile = BudgetProfile.from_budgets(model, [10, 20], selector)
    assert profile.selector == SnapKV(window=8).to_dict()
    assert BudgetProfile.uniform(model, np.int64(15), selector) == BudgetProfile.uniform(model, "15", selector)
    with compress(model, selector, 15):
        assert CompressedCache(model, profile).positions is not None


def test_a_tilde_is_the_home_folder(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    profile.save("~/p.json")
    assert (tmp_path / "p.json").is_file()
    for path in ("~/p.json", Path("~/p.json")):
        assert BudgetProfile.load(path) == get_method(path).profile == profile


@pytest.mark.parametrize("path", ["hf://org/name", Path("hf://org/name")])
def test_a_profile_is_not_saved_to_an_address(profile, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProfileError, match="is an address on the Hub; use push_to_hub"):
        profile.save(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["search", "seed"], "3", "search.seed is '3', expected a valid integer"),
        (["search", "task"], ["niah"], r"search.task is \['niah'\], expected a valid string"),
        (["search", "versions"], {"torch": 2}, "search.versions.torch is 2, expected a valid string"),
        (["scores", "validation"], {"uniform": 1.5}, "scores.validation should have scores from 0 to 1"),
        (["scores", "train"], 0.5, "scores.train is 0.5, expected a valid dictionary"),
        (["budgets", 1], [64], r"budgets\[1\] has 1 entries, expected one for each of the 2 KV heads"),
        (["budgets", 1, 1], 0, r"budgets\[1\]\[1\] is 0, expected at least 1"),
        (["budget"], 12, "the mean of budgets is .*, expected no more than budget, which is 12"),
        (["model", "sliding_windows"], [24], "model.sliding_windows has 1 entries, expected 2, one per layer"),
    ],
)
def test_a_report_refuses_the_files_that_a_profile_is_not_read_from(saved, keys, value, message):
    data = json.loads(saved.read_text())
    set_at(data, keys, value)
    saved.write_text(json.dumps(data))
    for read in (BudgetProfile.load, lambda path: read_sources([path])):
        with pytest.raises(UsageError, match=message) as caught:
            read(saved)
        assert str(caught.value).startswith(f"{saved}: ")
        assert "\n" not in str(caught.value)


def test_what_could_not_be_read_again_is_not_saved(profile, tmp_path):
    with pytest.raises(ProfileError, match=r"search.seed is 3.5, expected a valid integer"):
        replace_field(profile, search={"seed": 3.5}).save(tmp_path / "p.json")
    assert not list(tmp_path.iterdir())


def info_of(layers, kv_heads=2):
    return ModelInfo("m", layers, kv_heads, 4, 8, 4096, "0" * 16)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12])
def test_classes_are_of_one_size_in_order_and_keep_the_total(count):
    budgets = np.random.default_rng(0).integers(32, 600, size=12)
    budgets[0] += -budgets.sum() % 12
    profile = BudgetProfile.from_budgets(info_of(12), budgets, "snapkv:window=8", scores={"old": 1})
    few = profile.in_classes(count)
    values, sizes = np.unique(few.budgets[:, 0], return_counts=True)
    assert len(values) == count
    assert set(sizes.tolist()) == {12 // count}
    assert few.total == profile.total
    assert (few.granularity, few.scores, few.search["classes"]) == ("layer", {}, count)
    assert (np.diff(few.budgets[np.argsort(budgets, kind="stable"), 0]) >= 0).all()
    assert (count < 12) or np.array_equal(few.budgets, profile.budgets)


def test_classes_of_a_profile_by_head_go_by_the_mean_of_each_layer():
    budgets = [[10, 30], [100, 140], [20, 20], [140, 100]]
    few = BudgetProfile.from_budgets(info_of(4), budgets, "snapkv:window=8").in_classes(2)
    assert few.budgets.tolist() == [[20, 20], [120, 120], [20, 20], [120, 120]]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_classes_of_heads_are_of_one_size_and_keep_the_total(count):
    budgets = np.array([[8, 30], [100, 140], [20, 21], [231, 90]])
    profile = BudgetProfile.from_budgets(info_of(4), budgets, "snapkv:window=8")
    few = profile.in_classes(count, "head")
    values, sizes = np.unique(few.budgets, return_counts=True)
    assert (len(values), set(sizes.tolist())) == (count, {8 // count})
    assert (few.granularity, few.total) == ("head", profile.total)
    assert (np.diff(few.budgets.flat[np.argsort(budgets, axis=None, kind="stable")]) >= 0).all()
    with pytest.raises(UsageError, match="3 classes of 8 heads cannot be of one size; expected one of 1, 2, 4, 8"):
        profile.in_classes(3, "head")


def test_layers_with_a_sliding_window_are_in_no_class():
    info = info_of(4)
    model = {"name": "m", "num_layers": 4, "num_kv_heads": 2, "fingerprint": info.fingerprint}
    model["sliding_windows"] = [24, None, 24, None]
    budgets = np.array([[24, 24], [100, 140], [24, 24], [20, 40]])
    profile = BudgetProfile(model, 50, "head", budgets, {"name": "snapkv", "window": 8})
    assert profile.in_classes(1).budgets.tolist() == [[24, 24], [75, 75], [24, 24], [75, 75]]
    assert profile.in_classes(2, "head").budgets.tolist() == [[24, 24], [120, 120], [24, 24], [30, 30]]
    with pytest.raises(UsageError, match="4 classes of 2 layers without a sliding window cannot be of one size"):
        profile.in_classes(4)


def test_classes_leave_what_the_selector_always_keeps():
    few = BudgetProfile.from_budgets(info_of(4), [32, 32, 33, 1000]).in_classes(2)
    assert few.budgets[:, 0].min() == 32
    # Of 1,097 entries per head two layers a class can share 1,096.
    assert few.total == 2 * 1096


@pytest.mark.parametrize("count", [0, 5, 13, -1, True, 2.0])
def test_classes_that_cannot_be_of_one_size_are_refused(count):
    profile = BudgetProfile.from_budgets(info_of(12), [64] * 12)
    with pytest.raises(UsageError, match="expected one of 1, 2, 3, 4, 6, 12"):
        profile.in_classes(count)
