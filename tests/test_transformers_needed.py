from __future__ import annotations

import subprocess
import sys

import pytest

from evolkv.cache.transformers_needed import check_transformers
from evolkv.errors import RunError
from test_certify import recorded

# What a plugin of a serving engine uses, which may pin a transformers that is too old for the cache.
WITHOUT_CACHE = """
import sys
import transformers
transformers.__version__ = "5.19.0"
import evolkv
from evolkv import BudgetProfile
from evolkv.methods import get_method
from evolkv.selectors import SELECTORS, get_selector
assert get_method("pyramidkv").selector == get_selector("snapkv")
assert [module for module in sys.modules if module.startswith("evolkv.cache")] == []
try:
    evolkv.compress
except evolkv.RunError as error:
    print(error)
"""


# What reads files or names, or looks at the environment.
COMMANDS = """
import sys
import transformers
transformers.__version__ = "5.19.0"
from evolkv.cli import main
records, out = sys.argv[1:]
for words in (["compare", records], ["certify", records], ["report", records, "--out", out], *(
    ["list", name] for name in ("models", "tasks", "metrics", "selectors", "allocators", "strategies")
)):
    assert main(words) == 0, words
assert [module for module in sys.modules if module.startswith("evolkv.cache.")] == []
assert main(["doctor"]) == 1
"""


@pytest.mark.parametrize("version", ["5.23.0", "5.19.2", "4.57.1", "5.9.0.dev0"])
def test_older_transformers_is_refused_with_both_versions(version):
    with pytest.raises(RunError, match=rf"needs transformers 5\.24 or later, but {version} is installed"):
        check_transformers(version)


@pytest.mark.parametrize("version", ["5.24.0", "5.24.0.dev0", "5.30.1", "6.0.0"])
def test_transformers_that_is_new_enough_is_accepted(version):
    assert check_transformers(version) is None


@pytest.mark.slow
def test_commands_that_compute_nothing_need_no_cache(tmp_path):
    columns = {"full": [1.0] * 60, "snapkv@64": [1.0] * 60}
    argv = [str(recorded(tmp_path / "r.jsonl", columns)), str(tmp_path / "r.html")]
    done = subprocess.run([sys.executable, "-c", COMMANDS, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused       EvolKV's compressed cache needs transformers 5.24 or later, but 5.19.0" in done.stdout
    assert "threads " in done.stdout


def test_profiles_and_selectors_need_no_cache():
    done = subprocess.run([sys.executable, "-c", WITHOUT_CACHE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("EvolKV's compressed cache needs transformers 5.24 or later, but 5.19.0")
    assert done.stdout.count("\n") == 1
