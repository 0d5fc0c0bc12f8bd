"""Pictures of budgets."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from evolkv.palette import RAMP
from evolkv.whole_files import write_with

if TYPE_CHECKING:
    from evolkv.profile import BudgetProfile

_COLOURS = LinearSegmentedColormap.from_list("budgets", RAMP)
_MOST_LABELS = 64
_MOST_NUMBERS = 160


def budgets_heatmap(profile: BudgetProfile, path: str | os.PathLike[str]) -> None:
    """Draw a profile's budgets: a heat map of layers × heads, under bars per layer where all heads are alike.

    Colours and bars are on one logarithmic scale, labelled with what budgets count. Nothing but the file is touched:
    no window opens, and matplotlib's own state stays as it is.

    Args:
        profile: what to draw.
        path: the picture, in the format that its suffix names (PNG, SVG, PDF, …).

    Raises:
        OSError: the file cannot be written.
    """
    figure = _figure(profile)
    write_with(path, lambda partial: figure.savefig(partial))


def budgets_png(profile: BudgetProfile) -> bytes:
    """Return the picture of `budgets_heatmap` as the content of a PNG file."""
    content = io.BytesIO()
    _figure(profile).savefig(content, format="png")
    return content.getvalue()


def _figure(profile: BudgetProfile) -> Figure:
    by_head = profile.granularity == "head" and profile.num_kv_heads > 1
    map_height = 0.28 * min(profile.num_kv_heads, 40)
    figure = Figure(figsize=(10, (2.6 if by_head else 3.8) + map_height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if by_head:
        bottom = top = figure.add_subplot()
        _heads(figure, bottom, profile)
    else:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.3, max(map_height, 0.3)])
        _layers(top, profile)
        _heads(None, bottom, profile)
    bottom.set_xlabel("layer")
    top.set_title(_title(profile), fontsize=11, loc="left", pad=8)
    bottom.xaxis.set_major_locator(FixedLocator(_ticks(profile.num_layers)))
    return figure


def _heads(figure: Figure | None, axes: Axes, profile: BudgetProfile) -> None:
    """The heat map; with numbers and a colour bar where it stands alone in `figure`."""
    budgets = profile.budgets.T
    low, high = _range(profile)
    norm = LogNorm(low, high)
    picture = axes.imshow(budgets, aspect="auto", cmap=_COLOURS, norm=norm, interpolation="nearest")
    axes.set_ylabel("KV head")
    axes.yaxis.set_major_locator(FixedLocator(_ticks(profile.num_kv_heads)))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if budgets.size <= _MOST_LABELS * 8:
        # Thin gaps between cells make single heads easy to follow.
        axes.set_xticks(np.arange(1, profile.num_layers) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, profile.num_kv_heads) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="minor", length=0)
    if figure is None:
        return
    if budgets.size <= _MOST_NUMBERS:
        size = float(np.clip(230 / profile.num_layers, 6, 10))
        for (head, layer), budget in np.ndenumerate(budgets):
            colour = "white" if float(norm(float(budget))) > 0.6 else "black"
            axes.text(layer, head, str(budget), ha="center", va="center", fontsize=size, color=colour)
    bar = figure.colorbar(picture, ax=axes, pad=0.01, aspect=14)
    bar.set_label(f"{profile.unit} (log scale)")
    _log_ticks(bar.ax.yaxis, low, high)


def _layers(axes: Axes, profile: BudgetProfile) -> None:
    budgets = profile.budgets[:, 0]
    low, high = _range(profile)
    norm = LogNorm(low, high)
    colours = _COLOURS(np.asarray(norm(budgets)))
    axes.bar(np.arange(len(budgets)), budgets, color=colours, width=0.84)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.5, high * 1.6)
    axes.set_xlim(-0.7, len(budgets) - 0.3)
    axes.set_ylabel(f"{profile.unit} per KV head (log scale)")
    _log_ticks(axes.yaxis, low, high)
    axes.axhline(profile.mean_budget, color="0.25", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(
        f"mean {profile.mean_budget:,.4g}",
        (1.005, profile.mean_budget),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=9,
        color="0.25",
    )
    axes.spines[["top", "right"]].set_visible(False)
    if len(budgets) <= _MOST_LABELS // 2 + 8:
        for layer, budget in enumerate(budgets):
            axes.annotate(str(budget), (layer, budget), (0, 2), textcoords="offset points", ha="center", fontsize=8)


def _range(profile: BudgetProfile) -> tuple[float, float]:
    low, high = float(profile.budgets.min()), float(profile.budgets.max())
    # A scale needs some width, also where all budgets are equal.
    return low, max(high, low * 1.25)


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """Label a logarithmic axis with round numbers between its ends: 50, 100, 200, 500, …"""
    decades = 10.0 ** np.arange(0, 11)
    steps = (1, 2, 5) if high / low > 4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    numbers = np.unique(np.outer(decades, steps))
    inside = numbers[(numbers >= low) & (numbers <= high)]
    axis.set_major_locator(FixedLocator(inside.tolist() if len(inside) > 1 else [low, high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _ticks(count: int) -> list[int]:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000, 10**6) if count / s <= 32)
    return list(range(0, count, step))


def _title(profile: BudgetProfile) -> str:
    parts = [profile.model["name"]]
    if task := profile.search.get("task"):
        parts.append(str(task))
    parts.append(f"mean budget {profile.mean_budget:,.4g} per KV head")
    # Dollar signs would start mathematical notation.
    return " · ".join(parts).replace("$", r"\$")
