"""The picture of servers under load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evolkv.palette import RAMP


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw requests per second over plain vLLM, and needles found, of each server by length of the answers.

    Args:
        result: of `serving.serve`, with plain vLLM among the contenders.
        path: the picture, in the format that its suffix names.
    """
    figure = Figure(figsize=(9, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _bars(left, result["rows"], "requests_per_second_over_plain", "requests per second, over plain vLLM", "{:.1f}")
    _bars(right, result["rows"], "score", "needles found", "{:.2f}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _bars(axes: Axes, rows: list[dict[str, Any]], what: str, title: str, form: str) -> None:
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lengths = list(dict.fromkeys(row["answer"] for row in rows))
    width = 0.8 / len(lengths)
    for number, length in enumerate(lengths):
        found = {row["contender"]: row[what] for row in rows if row["answer"] == length}
        places = [at + (number - (len(lengths) - 1) / 2) * width for at in range(len(names))]
        heights = [found[name]["median"] for name in names]
        reach = [
            [found[name]["median"] - found[name]["min"] for name in names],
            [found[name]["max"] - found[name]["median"] for name in names],
        ]
        colour = RAMP[5 + 10 * number // len(lengths)]
        bars = axes.bar(
            places, heights, 0.94 * width, yerr=reach, color=colour, ecolor="#555", label=f"answers of {length} tokens"
        )
        axes.bar_label(bars, [form.format(height) for height in heights], fontsize=8, padding=2)
    axes.set_xticks(range(len(names)), names)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
