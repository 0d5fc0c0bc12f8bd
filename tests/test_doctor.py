"""`evolkv doctor`: what is installed, what the machine has, and what would be refused."""

from __future__ import annotations

import builtins
import json
from importlib import metadata

import pytest

from evolkv import doctor
from evolkv.cli import main
from evolkv.version import __version__


@pytest.fixture
def requirements(monkeypatch):
    """What the package needs, where it runs from a source tree too."""

    def need(*lines, extras=()):
        monkeypatch.setattr(doctor.metadata, "requires", lambda name: list(lines))
        facts = metadata.metadata("packaging")
        del facts["Provides-Extra"]
        for extra in extras:
            facts["Provides-Extra"] = extra
        monkeypatch.setattr(doctor.metadata, "metadata", lambda name: facts)

    return need


def call(capsys, *argv):
    code = main(["doctor", *argv])
    return code, *capsys.readouterr()


def test_a_good_environment_has_nothing_to_refuse(requirements, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLKV_CACHE", str(tmp_path / "not" / "yet"))
    requirements("torch>=2.0", "numpy>=1.0")
    code, out, _ = call(capsys)
    assert code == 0, out
    assert "Nothing that EvolKV would refuse." in out
    for name in ("evolkv", "python", "torch", "device", "memory", "threads", "converted", "aliases"):
        assert any(line.startswith(f"{name} ") for line in out.splitlines()), name
    assert f"EVOLKV_CACHE={tmp_path}" in out
    assert not (tmp_path / "not").exists()


def test_json_on_standard_output_is_json_alone(requirements, capsys):
    requirements("torch>=2.0")
    code, out, err = call(capsys, "--json", "-")
    found = json.loads(out)
    assert code == 0
    assert "device" in err
    assert found["format"] == "evolkv.doctor/1"
    assert found["evolkv"] == __version__
    assert found["problems"] == []
    assert 0 < found["memory"]["free"] <= found["memory"]["bytes"]
    assert found["threads"]["cores"] >= 1
    (torch,) = found["packages"]
    assert torch == {
        "name": "torch", "version": metadata.version("torch"), "needs": ">=2.0", "extra": None, "fits": True
    }  # fmt: skip


def test_a_version_that_is_too_old_is_named_with_the_command_that_helps(requirements, capsys):
    requirements("transformers>=999,<1000")
    code, out, _ = call(capsys)
    there = metadata.version("transformers")
    assert code == 1
    assert (
        f"transformers is {there}; EvolKV needs transformers<1000,>=999: pip install 'transformers<1000,>=999'" in out
    )


def test_a_missing_package_is_refused_and_a_missing_extra_is_not(requirements, capsys):
    lines = ["no-such-package>=1", 'also-missing>=2; extra == "ray"', 'numpy>=999; extra == "parquet"']
    lines += ['never>=1; python_version < "3"', 'no-tool; extra == "dev"']
    requirements(*lines, extras=["ray", "parquet", "dev"])
    code, out, _ = call(capsys)
    assert code == 1
    refused = [line for line in out.splitlines() if line.startswith("refused")]
    assert len(refused) == 2
    assert "no-such-package is missing; EvolKV needs no-such-package>=1" in refused[0]
    assert "the extra 'parquet' needs numpy>=999" in refused[1]
    assert "also-missing not installed" in out
    assert "never" not in out
    assert "no-tool" not in out


def test_a_library_that_does_not_load_is_a_problem_not_a_crash(requirements, capsys, monkeypatch):
    requirements("numpy>=1")
    load = builtins.__import__

    def fail(name, *rest):
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return load(name, *rest)

    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: fail(name))
    code, out, _ = call(capsys)
    assert code == 1
    assert "torch cannot be imported: OSError: libcudart.so.12: cannot open shared object file" in out


def test_a_folder_that_cannot_be_made_is_a_problem(requirements, capsys, monkeypatch, tmp_path):
    requirements("numpy>=1")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EVOLKV_CACHE", str(tmp_path / "file"))
    code, out, _ = call(capsys)
    assert code == 1
    assert f"{tmp_path / 'file'} cannot be written to; set EVOLKV_CACHE" in out


def test_what_the_package_really_needs_is_there():
    packages = doctor.diagnose().packages
    if not packages:
        pytest.skip("EvolKV is not installed as a package")
    assert {"torch", "transformers", "numpy"} <= {each.name for each in packages if each.extra is None}
    assert {"ray", "parquet", "lm-eval"} <= {each.extra for each in packages}
    assert all(each.fits for each in packages if each.extra is None)
