"""Profiles as presses of kvpress: the source that is written. `bench/kvpress.py export` runs it."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from evolkv.cli import main
from evolkv.errors import UsageError
from evolkv.integrations.kvpress import held_by_press, press_source
from evolkv.models import ModelInfo
from evolkv.profile import BudgetProfile
from evolkv.selectors import SELECTORS

INFO = ModelInfo("tiny", 2, 2, 4, 16, 512, "0123456789abcdef")
HEADS = [[40, 50], [60, 70]]


def names(source):
    """What a Python file assigns, by name, as source."""
    tree = ast.parse(source)
    return {node.targets[0].id: ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)}


@pytest.mark.parametrize(
    ("selector", "press"),
    [
        ("snapkv", "WindowPress(window_size=32, kernel_size=7, pooling='max', gqa='mean')"),
        ("tova", "TOVAPress()"),
        ("streaming_llm", "SinksPress(n_sink=4)"),
        ("knorm", "KnormPress()"),
        ("keydiff", "KeyDiffPress()"),
        (
            "expected_attention",
            "ExpectedAttentionPress(n_future_positions=512, n_sink=4, use_covariance=True, use_vnorm=True)",
        ),
    ],
)
def test_the_press_has_the_budgets_and_the_selector(selector, press):
    found = names(press_source(BudgetProfile.from_budgets(INFO, HEADS, selector)))
    assert found["BUDGETS"] == str(HEADS)
    assert found["press"] == f"BudgetsPress({press}, BUDGETS)"


@pytest.mark.parametrize("selector", ["h2o", "chunkkv"])
def test_selectors_that_kvpress_does_not_have_are_refused(selector):
    assert selector in SELECTORS
    with pytest.raises(UsageError, match=f"as '{selector}' does"):
        press_source(BudgetProfile.from_budgets(INFO, HEADS, selector))


def test_profiles_of_models_with_sliding_windows_are_refused():
    profile = BudgetProfile.from_budgets(INFO, HEADS, "knorm")
    profile = replace(profile, model=profile.model | {"sliding_windows": [None, 128]})
    with pytest.raises(UsageError, match="tiny has layers with sliding windows, which kvpress cannot cut"):
        press_source(profile)


def test_export_says_what_masking_costs(tmp_path, capsys):
    by_head = BudgetProfile.from_budgets(INFO, HEADS, "keydiff")
    by_head.save(tmp_path / "p.json")
    assert held_by_press(by_head) == 60
    export = ["profile", "export", str(tmp_path / "p.json"), "--to", "kvpress"]
    assert main([*export, "--out", str(tmp_path / "a.py")]) == 0
    assert "60 entries per head on average, where EvolKV holds 55" in capsys.readouterr().err
    assert "from a import press" in (tmp_path / "a.py").read_text()
    # Budgets by head that are alike in each layer mask nothing.
    BudgetProfile.from_budgets(INFO, [40, 60], "keydiff", granularity="head").save(tmp_path / "p.json")
    assert main([*export, "--out", str(tmp_path / "a.py")]) == 0
    assert capsys.readouterr().err == ""
    BudgetProfile.from_budgets(INFO, [40, 60], "keydiff").save(tmp_path / "p.json")
    assert main(export) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert names(out)["BUDGETS"] == "[[40, 40], [60, 60]]"


def test_a_models_name_cannot_become_code():
    hostile = ModelInfo('x"""\nimport os\nos.abort()\n"""\\', 2, 2, 4, 16, 512, "0123456789abcdef")
    source, harmless = (press_source(BudgetProfile.from_budgets(info, HEADS, "knorm")) for info in (hostile, INFO))
    kinds, expected = ([type(node) for node in ast.parse(text).body] for text in (source, harmless))
    assert kinds == expected
    assert "import os\n" not in source


@pytest.mark.parametrize("name", ["my press", "2024", "class"])
def test_a_file_that_python_cannot_import_is_refused(tmp_path, capsys, name):
    BudgetProfile.from_budgets(INFO, HEADS, "keydiff").save(tmp_path / "p.json")
    out = tmp_path / f"{name}.py"
    assert main(["profile", "export", str(tmp_path / "p.json"), "--to", "kvpress", "--out", str(out)]) == 2
    assert f"cannot import a file called {name}.py" in capsys.readouterr().err
    assert not out.exists()


def test_the_press_refuses_sliding_windows(monkeypatch):
    base = type("BasePress", (), {"post_init_from_model": lambda self, model: None})
    parts = {
        "kvpress": {"KeyDiffPress": base},
        "kvpress.presses": {},
        "kvpress.presses.base_press": {"BasePress": base},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    written = ModuleType("press")
    monkeypatch.setitem(sys.modules, "press", written)
    exec(press_source(BudgetProfile.from_budgets(INFO, HEADS, "keydiff")), vars(written))
    config = SimpleNamespace(num_hidden_layers=2, num_key_value_heads=2, _attn_implementation="sdpa")
    config.get_text_config = lambda: config
    written.press.post_init_from_model(SimpleNamespace(config=config))
    config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding windows"):
        written.press.post_init_from_model(SimpleNamespace(config=config))
