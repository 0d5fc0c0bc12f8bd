"""The report: one page of HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined

from evolkv.palette import ramp_css
from evolkv.report import views
from evolkv.report.comparisons import comparisons, model_name
from evolkv.report.glossary import glossary
from evolkv.report.headline import headline
from evolkv.report.heatmaps import LEVELS
from evolkv.report.needles import needle_grids
from evolkv.report.recipes import recipes
from evolkv.report.sources import Sources
from evolkv.report.usage import usage
from evolkv.report.words import counted, short
from evolkv.version import __version__


def render(sources: Sources) -> str:
    """Make the page.

    Args:
        sources: at least one search, result, file of records, profile or curve.

    Returns:
        HTML that makes no request: styles, charts and script are in it. The script only adds reading of values by
        pointer and keyboard; everything shows without it.
    """
    groups = comparisons(sources.rows, sources.curves, sources.profiles)
    model, task = _model(sources), _task(sources)
    budgets = views.allocations(sources)
    sections = [
        ("use", "Use this profile", usage(sources, groups, model, task)),
        (
            "scores",
            "Score by method" if all(group.single for group in groups) else "Score against memory",
            [views.methods(each, sources.records) for each in groups],
        ),
        ("needles", "Needles found, by depth and context", needle_grids(sources.records)),
        ("budgets", "Budgets by layer" + " and head" * any(item.by_head for item in budgets), budgets),
        ("kept", "Prompt positions that are kept", [views.positions(s) for s in sources.searches if s.kept]),
        ("search", "How the search went", [views.course(s) for s in sources.searches if s.history or s.descent]),
        ("validation", "Choice in validation", [views.validation(s) for s in sources.searches if s.validation]),
        ("reproduce", "Settings, and how to reproduce", recipes(sources, groups, model)),
    ]
    script, style = _packaged("page.js"), _packaged("page.css")
    environment = Environment(
        loader=PackageLoader("evolkv.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"counted": counted, "short": short}
    page = environment.get_template("page.html").render(
        headline=headline(groups, sources, model, task),
        sections=[section for section in sections if section[2]],
        glossary=glossary(_terms(sources, task)),
        levels=LEVELS,
        sources=sources.names,
        version=__version__,
        # Nothing is loaded and no script but this one runs, whatever the data hold.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{_digest(script)}'",
        script=script,
        style=f"{ramp_css()}{style}",
    )
    # Names may hold halves of characters, which no file can.
    return page.encode("utf-8", "replace").decode()


def _model(sources: Sources) -> str:
    """The model that the report is about, or ""."""
    named = [s.profile.model.name if s.profile else model_name(s.settings) for s in sources.searches[:1]]
    others = [*(profile.model.name for profile in sources.profiles), *(row.model for row in sources.rows)]
    return next(filter(None, [*named, *others]), "")


def _task(sources: Sources) -> str:
    """The task that was evolved for, or ""."""
    settings = [search.settings for search in sources.searches] + [profile.search for profile in sources.profiles]
    return next((task for each in settings if isinstance(task := each.get("task"), str)), "")


def _terms(sources: Sources, task: str) -> str:
    """Names that a report speaks of."""
    rows = [f"{row.task} {row.metric} {row.protocol} {row.method}" for row in sources.rows]
    settings = [
        f"{search.settings.get(key)}" for search in sources.searches for key in ("metric", "protocol", "strategy")
    ]
    names = [entry.name for search in sources.searches for entry in search.validation]
    return " ".join([task, *rows, *settings, *names])


def _packaged(name: str) -> str:
    return resources.files("evolkv.report").joinpath("template", name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
