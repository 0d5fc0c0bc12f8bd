"""The wheel: built, installed where no source tree is, and used."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def call(*argv, **options):
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def run(wheel, tmp_path):
    """Run a program of an environment that has the wheel, in an empty folder."""
    environment, folder = tmp_path / "environment", tmp_path / "work"
    folder.mkdir()
    venv.create(environment)
    programs = environment / "bin"
    call(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps", wheel)
    # The dependencies are those of this environment. What its own .pth files add, such as a source tree, is not.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return lambda program, *argv: call(programs / program, *argv, cwd=folder, env=clean)


def test_an_installed_wheel_evaluates_and_reports(run, small_folder, tmp_path):
    where = Path(run("python", "-c", "import evolkv; print(evolkv.__file__)").strip())
    assert where.is_relative_to(tmp_path)
    assert re.fullmatch(r"evolkv \d+\.\d+\.\d+\S*\n", run("evolkv", "--version"))
    evaluation = ("--task", "niah:context=200", "--method", "full", "tova", "--budget", "64", "--samples", "1")
    assert "tova" in run("evolkv", "eval", small_folder, *evaluation, "--json", "r.json")
    run("evolkv", "report", "r.json", "--out", "r.html")
    assert "<svg" in (tmp_path / "work" / "r.html").read_text()


def test_a_wheel_declares_what_it_imports(wheel):
    imported = set()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                for node in ast.walk(ast.parse(archive.read(name))):
                    if isinstance(node, ast.Import):
                        imported |= {each.name.partition(".")[0] for each in node.names}
                    elif isinstance(node, ast.ImportFrom):
                        imported.add(node.module.partition(".")[0])
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        declared = {
            line.partition(":")[2].strip().lower().replace("_", "-")
            for line in archive.read(about).decode().splitlines()
            if line.startswith("Requires-Dist:") and not re.search(r"extra == .dev", line)
        }
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in declared}
    providers = packages_distributions()
    for module in imported - set(sys.stdlib_module_names) - {"evolkv"}:
        assert {each.lower().replace("_", "-") for each in providers.get(module, [module])} & names, module
