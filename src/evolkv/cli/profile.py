"""`evolkv profile`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from evolkv.cli import console
from evolkv.cli.command import Command, Group
from evolkv.cli.options import Attention, Device, Dtype, ModelOptions, Trust, one_of, to_read, to_write
from evolkv.cli.tables import budgets_picture
from evolkv.errors import UsageError

if TYPE_CHECKING:
    from evolkv.profile import BudgetProfile
    from evolkv.profile_file import Granularity

app = typer.Typer(
    cls=Group, help="Look at profiles, check them, carry them to another budget, or to a few different ones."
)

Path = Annotated[str, typer.Argument(metavar="PROFILE.json", callback=to_read, help="A profile.")]
NewProfile = Annotated[
    str, typer.Option("--out", "-o", metavar="Q.json", callback=to_write, help="Where the new profile goes.")
]


@app.command(cls=Command)
def show(
    path: Path, as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False
) -> None:
    """Show the budgets, where they come from, and how they scored."""
    profile = _load(path)
    if as_json:
        console.write_json("-", profile.to_dict())
        return
    by_head = profile.granularity == "head"
    console.OUT.print(budgets_picture(profile.budgets.tolist(), by_head, console.OUT.width, profile.unit))
    console.OUT.print()
    from evolkv.profile_card import generate_command, provenance, template_note

    for name, value in provenance(profile).items():
        console.OUT.print(f"{name:<12}{value}", soft_wrap=True)
    note = template_note(profile.search.get("task"))
    comment = f"  # {note[:1].lower()}{note[1:-1]}" if note else ""
    console.OUT.print(f"\n{generate_command(profile.model['name'], path, profile.search)}{comment}", soft_wrap=True)


@app.command(cls=Command)
def validate(
    path: Path,
    model: Annotated[str | None, typer.Option("--model", help="Also check that it belongs to this model.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
) -> None:
    """Check a profile; exit code 2 if it cannot be used."""
    profile = _load(path)
    if model is not None:
        loaded, _ = ModelOptions(dtype, device, attn_implementation, trust_remote_code).load(model, profiles=[profile])
        profile.check_model(loaded)
    where = f"fits {model}" if model is not None else f"for {profile.model['name']}"
    console.OUT.print(
        f"ok: {where}, {profile.num_layers} layers × {profile.num_kv_heads} KV heads, mean budget {_mean(profile)}",
        soft_wrap=True,
    )


@app.command(cls=Command)
def expand(
    path: Path,
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            "-b",
            metavar="C",
            help="The new mean budget, which may be smaller, or a share of each prompt (10%).",
        ),
    ],
    out: NewProfile,
) -> None:
    """Carry the allocation to another mean budget, in the same proportions."""
    from evolkv.budgets import read_budget
    from evolkv.whole_files import check_outputs

    check_outputs([out], [path])
    profile = _load(path).expand(read_budget(budget, "--budget"))
    profile.save(out)
    console.OUT.print(f"mean budget {_mean(profile)}; profile written to {out}", soft_wrap=True)


@app.command(cls=Command)
def classes(
    path: Path,
    out: NewProfile,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers", metavar="N", help="Into how many classes the layers go; those of a class share one budget."
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", metavar="N", help="Instead: into how many classes all KV heads go.")
    ] = None,
) -> None:
    """Bring layers, or KV heads, to a few classes of one size, at the same total: cheaper to serve."""
    from evolkv.whole_files import check_outputs

    count = layers if heads is None else heads
    what: Granularity = "layer" if heads is None else "head"
    if count is None or (layers is not None and heads is not None):
        raise UsageError("expected either --layers N or --heads N")
    check_outputs([out], [path])
    profile = _load(path).in_classes(count, what)
    profile.save(out)
    windows = profile.model.get("sliding_windows") or [None] * profile.num_layers
    full = profile.budgets[[window is None for window in windows]]
    budgets = ", ".join(f"{int(budget):,}" for budget in sorted({*full.flat}, reverse=True))
    console.OUT.print(
        f"{count} {'class' if count == 1 else 'classes'} of {what}s (budgets {budgets}), mean budget {_mean(profile)}; "
        f"profile written to {out}",
        soft_wrap=True,
    )


@app.command(cls=Command)
def export(
    path: Path,
    to: Annotated[
        str, typer.Option("--to", metavar="json|csv|kvpress", callback=one_of("format", ("json", "csv", "kvpress")))
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="F", callback=to_write, help="Where it goes. (default: standard output)"),
    ] = None,
) -> None:
    """Write the profile as JSON, its budgets as CSV (layer, head, budget), or a Python file with a press of kvpress."""
    from evolkv.whole_files import check_outputs, write_text

    if out is not None:
        check_outputs([out], [path])
    profile = _load(path)
    if to == "json":
        text = json.dumps(profile.to_dict(), indent=1, ensure_ascii=False) + "\n"
    elif to == "kvpress":
        text = _press(profile, out)
    else:
        cells = [
            f"{layer},{head},{budget}"
            for layer, row in enumerate(profile.budgets.tolist())
            for head, budget in enumerate(row)
        ]
        text = "\n".join(["layer,head,budget", *cells]) + "\n"
    if out is None:
        console.OUT.file.write(text)
    else:
        write_text(out, text)


def _press(profile: BudgetProfile, out: str | None) -> str:
    from pathlib import Path as File

    from evolkv.integrations.kvpress import held_by_press, press_source

    text = press_source(profile, "press" if out is None else File(out).stem)
    if (profile.budgets != profile.budgets[:, :1]).any():
        held = round(held_by_press(profile), 1)
        console.note(
            f"kvpress masks what single heads evict: it will hold {held:,.6g} entries per head on average, where "
            f"EvolKV holds {profile.mean_budget:,.6g}; the answers are those of the profile"
        )
    return text


def _load(path: str) -> BudgetProfile:
    from evolkv.profile import BudgetProfile

    return BudgetProfile.load(path)


def _mean(profile: BudgetProfile) -> str:
    return f"{profile.mean_budget:,.6g}" if profile.share is None else f"{profile.share} of each prompt"
