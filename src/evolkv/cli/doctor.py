"""`evolkv doctor`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

from evolkv.cli import console
from evolkv.cli.options import files, json_option

if TYPE_CHECKING:
    from evolkv.doctor import Diagnosis


def doctor(
    json_out: Annotated[str | None, json_option("FILE|-", "the facts go")] = None,
) -> int:
    """Say what is installed, what the machine has, and what EvolKV would refuse; if anything, the exit code is 1."""
    from evolkv.whole_files import check_outputs

    console.keep_stdout_for_json(json_out)
    check_outputs(files(json_out), [])
    with console.busy("looking at the environment"):
        # transformers may be what is missing.
        with contextlib.suppress(Exception):
            console.quiet_libraries()
        from evolkv.doctor import diagnose

        found = diagnose()
    console.write_json(json_out, found.to_dict())
    for name, value in lines(found):
        console.OUT.print(f"{name:<14}{value}", soft_wrap=True)
    for problem in found.problems:
        console.OUT.print(f"{'refused':<14}{problem}", soft_wrap=True)
    if not found.problems:
        console.OUT.print("Nothing that EvolKV would refuse.")
    return 1 if found.problems else 0


def lines(found: Diagnosis) -> list[tuple[str, str]]:
    """Return names and values for a terminal."""
    from evolkv.report.words import gibibytes
    from evolkv.version import __version__

    facts: dict[str, Any] = found.facts
    python = facts["python"]
    needed = [each for each in found.packages if each.extra is None]
    shown = [
        ("evolkv", __version__),
        ("python", f"{python['version']} ({python['executable']})"),
        ("system", f"{python['system']}, {python['processor']}"),
    ]
    shown += [(each.name, f"{each.version or 'missing'}") for each in needed if each.name in ("torch", "transformers")]
    others = [f"{each.name} {each.version}" for each in needed if each.version and each.name not in dict(shown)]
    shown += [("packages", ", ".join(others))] if others else []
    extras: dict[str, list[str]] = {}
    for each in found.packages:
        if each.extra:
            extras.setdefault(each.extra, []).append(f"{each.name} {each.version or 'not installed'}")
    shown += [(f"[{extra}]", ", ".join(names)) for extra, names in extras.items()]
    if device := facts.get("device"):
        gpus = [
            f"{each['name']}, {gibibytes(each['free'])} of {gibibytes(each['bytes'])} GiB free"
            for each in device["gpus"]
        ]
        built = f"PyTorch for CUDA {device['cuda']}" if device["cuda"] else "PyTorch without CUDA"
        shown += [
            ("device", f"{device['default']}, in {device['dtype']}; {built}, {len(gpus)} GPUs"),
            *(("gpu", gpu) for gpu in gpus),
            ("memory", f"{gibibytes(facts['memory']['free'])} of {gibibytes(facts['memory']['bytes'])} GiB free"),
            ("threads", f"{facts['threads']['torch']} on {facts['threads']['cores']} cores"),
        ]
    names = {"converted": "converted", "hub": "downloaded"}
    shown += [
        (
            names[name],
            f"{each['path']} ({gibibytes(each['free'])} GiB free{'' if each['exists'] else '; not made yet'})",
        )
        for name, each in facts["folders"].items()
    ]
    models = [f"{name} ({'ready' if there else 'not installed'})" for name, there in facts.get("models", {}).items()]
    shown += [("aliases", ", ".join(models))] if models else []
    shown += [("environment", f"{name}={value}") for name, value in facts["environment"].items()]
    return shown
