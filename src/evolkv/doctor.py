"""The state of the environment: what is installed, what the machine has, and what EvolKV would refuse.

Every library is imported where it is asked, because one that is missing or broken is what this is for.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from evolkv.errors import RunError
from evolkv.version import __version__

FORMAT = "evolkv.doctor/1"
#: Variables that change what EvolKV, or what it stands on, does; see docs/environment.md. Tokens are left out.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "EVOLKV_CACHE",
    "EVOLKV_TRITON",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "MALLOC_MMAP_THRESHOLD_",
    "OMP_NUM_THREADS",
)
#: Extras for work on EvolKV itself.
_OWN = ("dev", "docs")
#: Libraries that may be installed and yet not load, for want of a system library or another of their own parts.
_LOADED = ("torch", "transformers")


@dataclass(frozen=True)
class PackageState:
    """A package that EvolKV needs, or one of its extras does.

    Args:
        name: of the distribution.
        version: the version installed; None if it is not.
        needs: the versions that work, such as ``>=5.24,<6``; empty for any.
        extra: the extra that it belongs to; None if EvolKV needs it always.
        fits: whether the version is one that works; False if the package is missing.
    """

    name: str
    version: str | None
    needs: str
    extra: str | None
    fits: bool


@dataclass
class Diagnosis:
    """The state of the environment.

    Args:
        packages: what EvolKV and its extras need, and what is installed.
        facts: by topic (``python``, ``device``, ``memory``, ``threads``, ``folders``, ``models``, ``environment``),
            plain values. Bytes are whole numbers.
        problems: what EvolKV would refuse, one sentence each, with what to do.
    """

    packages: list[PackageState] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a ``--json`` file."""
        return {
            "format": FORMAT,
            "evolkv": __version__,
            **self.facts,
            "packages": [asdict(package) for package in self.packages],
            "problems": self.problems,
        }


def diagnose() -> Diagnosis:
    """Look at the environment. Nothing is written, and nothing is asked of the network.

    Returns:
        What there is, and what is wrong with it.
    """
    found = Diagnosis(packages=list(_packages()))
    found.problems += [problem for package in found.packages if (problem := _problem(package))]
    found.facts["python"] = {
        "version": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
    }
    broken = list(_that_do_not_load())
    found.problems += broken
    if not broken:
        try:
            _look_at_device(found)
            _look_at_models(found)
            importlib.import_module("evolkv.cache")
        except ImportError as error:
            found.problems.append(f"EvolKV cannot be imported with what is installed: {' '.join(str(error).split())}")
        except RunError as error:
            # transformers is too old. Where EvolKV is installed as a package, its requirements have said so.
            if not any(each.name == "transformers" and not each.fits for each in found.packages):
                found.problems.append(str(error))
    _look_at_folders(found)
    found.facts["environment"] = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if os.environ.get("EVOLKV_TRITON") == "1" and importlib.util.find_spec("triton") is None:
        found.problems.append("EVOLKV_TRITON is 1, but Triton is not installed; pip install 'evolkv[triton]'")
    return found


def _packages() -> Iterator[PackageState]:
    try:
        lines = metadata.requires("evolkv") or []
    except metadata.PackageNotFoundError:
        # A source tree on the path has no requirements on record.
        return
    for line in lines:
        wanted = Requirement(line)
        extras = [extra for extra in metadata.metadata("evolkv").get_all("Provides-Extra") or [] if extra not in _OWN]
        # Without an extra first: what is always needed belongs to none.
        extra = next(
            (name for name in [None, *extras] if not wanted.marker or wanted.marker.evaluate({"extra": name or ""})), ""
        )
        if extra == "":
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield PackageState(wanted.name, None, str(wanted.specifier), extra, fits=False)
            continue
        fits = wanted.specifier.contains(version, prereleases=True)
        yield PackageState(wanted.name, version, str(wanted.specifier), extra, fits)


def _problem(package: PackageState) -> str:
    """Return what is wrong with a package, with what to do; nothing for an extra that is not installed."""
    if package.fits or (package.version is None and package.extra):
        return ""
    needs = f"{package.name}{package.needs}"
    what = f"{package.name} is missing" if package.version is None else f"{package.name} is {package.version}"
    whose = f"the extra {package.extra!r}" if package.extra else "EvolKV"
    return f"{what}; {whose} needs {needs}: pip install '{needs}'"


def _that_do_not_load() -> Iterator[str]:
    for name in _LOADED:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken installation raises
            yield f"{name} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _look_at_device(found: Diagnosis) -> None:
    import psutil
    import torch

    from evolkv.evaluation.memory import free_on
    from evolkv.models.loading import default_dtype

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count() if cuda else 0)]
    device = torch.device("cuda" if cuda else "cpu")
    found.facts["device"] = {
        "default": str(device),
        "dtype": str(default_dtype(device)).removeprefix("torch."),
        "cuda": torch.version.cuda,
        "gpus": [
            {"name": each.name, "bytes": each.total_memory, "free": free_on(torch.device("cuda", index))}
            for index, each in enumerate(gpus)
        ],
    }
    found.facts["memory"] = {"bytes": psutil.virtual_memory().total, "free": free_on(torch.device("cpu"))}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found.facts["threads"] = {"torch": torch.get_num_threads(), "cores": cores}


def _look_at_models(found: Diagnosis) -> None:
    from evolkv.models import list_models

    found.facts["models"] = {each.alias: each.installed for each in list_models()}


def _look_at_folders(found: Diagnosis) -> None:
    folders: dict[str, Any] = {}
    try:
        from evolkv.models.gguf import cache_folder

        folders["converted"] = cache_folder()
    except Exception:  # the reason is among the problems already
        pass
    try:
        from huggingface_hub import constants

        folders["hub"] = Path(constants.HF_HUB_CACHE)
    except Exception:  # as above
        pass
    found.facts["folders"] = {}
    for name, folder in folders.items():
        # What is not there yet is made in the nearest folder that is.
        there = next((each for each in (folder, *folder.parents) if each.exists()), folder)
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        free = shutil.disk_usage(there).free if there.exists() else 0
        found.facts["folders"][name] = {"path": str(folder), "exists": folder.is_dir(), "free": free}
        if not writable:
            how = "EVOLKV_CACHE" if name == "converted" else "HF_HOME"
            found.problems.append(f"{there} cannot be written to; set {how} to a folder that can, instead of {folder}")
