"""Hooks of MkDocs: pages made of README.md, the commands and the records; links and headings as on GitHub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "bench" / "records"
_FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
_WIDE, _HIGH, _APART = 124, 30, 66


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that are not in docs/."""
    from mkdocs.structure.files import File

    made = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "cli.md": commands_page(),
        "records.md": records_page(),
        **{f"records/{path.name}": path.read_text(encoding="utf-8") for path in records()},
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make of a page as GitHub shows it one that MkDocs shows alike."""
    markdown = re.sub(r"\]\((?:\.\./)?bench/records/?\)", "](records.md)", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?bench/records/([\w.-]+)\)", r"](records/\1)", markdown)
    markdown = markdown.replace("](../README.md", "](index.md")
    if page.file.src_uri == "index.md":
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    titles = {name: title for title, name in _titles(config.nav or [])}
    # A file's name says little to readers of a site.
    markdown = re.sub(
        r"\[(?:docs/)?([\w-]+\.md)\]\(\1(#[^)]*)?\)",
        lambda link: f"[{titles.get(link[1], link[1])}]({link[1]}{link[2] or ''})",
        markdown,
    )
    return with_anchors(markdown)


def _titles(nav: list[Any]) -> Iterator[tuple[str, str]]:
    for entry in nav:
        for title, target in entry.items():
            if isinstance(target, str):
                yield title, target
            else:
                yield from _titles(target)


def with_anchors(markdown: str) -> str:
    """Give every heading the anchor that GitHub gives it, and draw the graphs."""
    counts: dict[str, int] = {}
    parts, end = [], 0

    def anchored(heading: re.Match[str]) -> str:
        if heading[0].endswith("}"):
            return heading[0]
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[2])
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        counts[name] = counts.get(name, -1) + 1
        return f"{heading[1]} {heading[2]} {{ #{name}{f'-{counts[name]}' if counts[name] else ''} }}"

    for fence in [*_FENCED.finditer(markdown), None]:
        start = fence.start() if fence else len(markdown)
        parts.append(re.sub(r"^(#+) +(.*)$", anchored, markdown[end:start], flags=re.M))
        if fence:
            end = fence.end()
            parts.append(graph(fence[0]) if fence[0].startswith("```mermaid") else fence[0])
    return "".join(parts)


def graph(fence: str) -> str:
    """Return a picture of a graph in Mermaid's language, ``a --> b & c``. Mermaid itself comes from another host."""
    edges = []
    for line in fence.splitlines()[2:-1]:
        groups = [[name.strip() for name in group.split("&")] for group in line.split("-->")]
        edges += [(a, b) for left, right in pairwise(groups) for a in left for b in right]
    names = dict.fromkeys(name for edge in edges for name in edge)
    floors = dict.fromkeys(names, 0)
    for _ in names:
        for a, b in edges:
            floors[b] = max(floors[b], floors[a] + 1)
    rows = [[name for name in names if floors[name] == floor] for floor in range(max(floors.values()) + 1)]
    # What only leads down stands right above what it leads to.
    for name in [name for name in names if not any(b == name for _, b in edges)]:
        below = min(floors[b] for a, b in edges if a == name) - 1
        rows[floors[name]].remove(name)
        floors[name] = below
        rows[below].append(name)
    width = max(map(len, rows)) * (_WIDE + 30)
    places = {
        name: (round((i + 0.5) * width / len(row)), floor * _APART + 1)
        for floor, row in enumerate(rows)
        for i, name in enumerate(row)
    }
    lines = [
        f'<path d="M{places[a][0]} {places[a][1] + _HIGH}C{places[a][0]} {places[a][1] + _HIGH + 24} '
        f'{places[b][0]} {places[b][1] - 28} {places[b][0]} {places[b][1] - 3}" marker-end="url(#arrow)"/>'
        for a, b in edges
    ]
    boxes = [
        f'<rect x="{x - _WIDE // 2}" y="{y}" width="{_WIDE}" height="{_HIGH}" rx="4"/>'
        f'<text x="{x}" y="{y + 20}">{escape(name)}</text>'
        for name, (x, y) in places.items()
    ]
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>'
    )
    label = "; ".join(f"{a} imports {b}" for a, b in edges)
    return (
        f'<svg class="graph" viewBox="0 0 {width} {len(rows) * _APART}" role="img" aria-label="{escape(label)}">'
        f"{arrow}{''.join(lines)}{''.join(boxes)}</svg>"
    )


def records() -> list[Path]:
    """Return the files of records."""
    return sorted(RECORDS.glob("*.json"))


def records_page() -> str:
    """Return the list of records, each with its command and machine."""
    rows = []
    for path in records():
        record = json.loads(path.read_text(encoding="utf-8"))
        machine, command = record["machine"], record["command"]
        command = command if isinstance(command, str) else " ".join(command)
        date = (record["date"] or "not kept")[:10]
        rows.append(
            f"| [{path.stem}](records/{path.name}) | {cell(machine['processor'])} | {date} "
            f'| <code class="command">{cell(command)}</code> |'
        )
    return (
        "# Records\n\nEvery table of measurements is written from one of these files. Each holds a command, the "
        "machine that ran it, the versions and all numbers, also those that a table leaves out.\n\n"
        "| record | processor | measured | command |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )


def commands_page() -> str:
    """Return a page with every command, argument and option, read from the commands themselves."""
    import typer

    from evolkv.cli.app import app

    program = typer.main.get_command(app)
    shared = "\n".join(options_tables(program.get_params(typer.Context(program, info_name="evolkv"))))
    sections = "\n\n".join(command_sections(program, "evolkv"))
    return (
        "# Command line\n\nThis page is made from the commands when the site is built, and says what "
        f"`evolkv COMMAND --help` says.\n\n## evolkv\n\n{cell(program.help)} `--debug`, `--quiet` and `--log-json` "
        f"may stand anywhere on the line.\n\n{shared}\n\n{sections}\n"
    )


def command_sections(group: Any, path: str) -> Iterator[str]:
    """Yield a section for each command of a group, and of the groups in it."""
    import typer

    for name, command in group.commands.items():
        full = f"{path} {name}"
        context = typer.Context(command, info_name=full)
        if hasattr(command, "commands"):
            yield f"## {full}\n\n{cell(command.help)}"
            yield from command_sections(command, full)
            continue
        level = "##" if path == "evolkv" else "###"
        usage = " ".join([full, *command.collect_usage_pieces(context)])
        text = "\n\n".join(cell(part) for part in re.split(r"\n\s*\n", (command.help or "").replace("\b", "")))
        tables = "\n".join(options_tables(command.get_params(context)))
        yield f"{level} {full}\n\n{text}\n\n    {usage}\n\n{tables}"


def options_tables(params: list[Any]) -> Iterator[str]:
    """Yield a table of parameters for each panel of the help."""
    panels: dict[str, list[Any]] = {}
    for param in params:
        if not getattr(param, "hidden", False):
            kind = "Arguments" if param.param_type_name == "argument" else "Options"
            panels.setdefault(getattr(param, "rich_help_panel", None) or kind, []).append(param)
    for panel, shown in panels.items():
        rows = "\n".join(option_row(param) for param in shown)
        heading = "argument" if panel == "Arguments" else "option"
        yield f"**{panel}**\n\n| {heading} | meaning | default |\n| --- | --- | --- |\n{rows}\n"


def option_row(param: Any) -> str:
    """Return the row of one argument or option."""
    if param.param_type_name == "argument":
        names = param.metavar or str(param.name).upper()
    else:
        kind = getattr(getattr(param, "type_descriptor", None), "annotation", str)
        metavar = "" if param.is_flag else f" {param.metavar or ('TEXT' if kind is str else 'N')}"
        names = ", ".join([*param.opts, *param.secondary_opts]) + metavar
    text = cell(param.help or "")
    if found := re.search(r"\s*\(default: (.*)\)$", text):
        text, default = text[: found.start()], found[1]
    elif param.required:
        default = "required"
    elif param.default is None or param.default is False or param.default in ((), []) or callable(param.default):
        default = ""
    else:
        default = (
            f"`{param.default}`" if not isinstance(param.default, list) else f"`{' '.join(map(str, param.default))}`"
        )
    return f"| <code>{cell(names)}</code> | {text} | {default} |"


def cell(text: str) -> str:
    """Return a text as it can stand in a cell of a table."""
    plain = " ".join(str(text).split())
    return re.sub(r"([\[\]*_`\\~])", r"\\\1", escape(plain, quote=False)).replace("|", "&#124;")
