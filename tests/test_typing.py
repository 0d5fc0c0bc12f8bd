"""The public functions, as a user's type checker and editor see them."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import evolkv
from evolkv.evolution import OneBudget, SeveralBudgets, search_curve

PROGRAM = """
import evolkv
from evolkv.evolution import search_curve

model, tokenizer = evolkv.load_model("smollm2-135m")
profile = evolkv.BudgetProfile.load("profile.json")
with evolkv.compress(model, profile):
    model.generate(max_new_tokens=8)
cache = evolkv.CompressedCache(model, profile)
print(cache.positions, cache.kv_bytes)
result = evolkv.search(model, tokenizer, task="jsonl:path=questions.jsonl", budget=256, granularity="head")
result.profile.save("evolved.json")
reveal_type(evolkv.search(model=model, tokenizer=tokenizer, task="niah", budget=128))
reveal_type(search_curve(model, tokenizer, task="niah", budgets=[64, 128], first="largest").results)
reveal_type(evolkv.evaluate(model, tokenizer, task="niah", methods=["full", "snapkv"], budgets=[64, 128]))
"""
#: Of what other packages say about types only that they exist: reading PyTorch's takes a minute.
SETTINGS = """
[mypy]
strict = true
follow_imports = silent
[mypy-transformers.*,torch.*,numpy.*,optuna.*,sqlalchemy.*,pydantic.*]
follow_imports = skip
ignore_missing_imports = true
"""


def check(folder, program):
    (folder / "program.py").write_text(program)
    (folder / "mypy.ini").write_text(SETTINGS)
    source = str(Path(evolkv.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "program.py"],
        cwd=folder,
        env={**os.environ, "MYPYPATH": source},
        capture_output=True,
        text=True,
    )
    return done.stdout


@pytest.mark.slow
def test_a_users_program_is_typed(tmp_path):
    said = check(tmp_path, PROGRAM)
    assert "error:" not in said
    revealed = [line.split('"')[1] for line in said.splitlines() if "Revealed type" in line]
    assert revealed == [
        "evolkv.evolution.result.SearchResult",
        "list[evolkv.evolution.result.SearchResult]",
        "list[dict[str, Any]]",
    ]
    said = check(tmp_path, PROGRAM.replace("budget=256", "budgets=256").replace('"head"', '"heads"'))
    assert 'Unexpected keyword argument "budgets"' in said
    assert "incompatible type \"Literal['heads']\"" in said


@pytest.mark.parametrize(("search", "config"), [(evolkv.search, OneBudget), (search_curve, SeveralBudgets)])
def test_an_editor_sees_every_setting(search, config):
    assert inspect.isfunction(search)
    assert pickle.loads(pickle.dumps(search)) is search
    parameters = inspect.signature(search).parameters
    assert list(parameters)[:2] == ["model", "tokenizer"]
    assert set(parameters) == {"model", "tokenizer", *(each.name for each in fields(config))}
    defaults = {each.name: each.default for each in fields(config)}
    for name, parameter in list(parameters.items())[2:]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert (parameter.default is parameter.empty) == (name in ("task", "budget", "budgets"))
        assert parameter.default in (parameter.empty, defaults[name])
        assert f"{name}: " in search.__doc__
