"""The colours of budgets, from few entries to many, in pictures and on pages alike."""

from __future__ import annotations

#: On a light ground, and on a dark one.
RAMP = (
    *("#f3f7e0", "#e7f3cf", "#d6ecbe", "#c0e3b5", "#a4d9b3", "#86ceb6", "#66c0ba", "#49b0bd"),
    *("#349dbd", "#2688b8", "#2072af", "#225ca3", "#244792", "#21357c", "#182563", "#0d1848"),
)
DARK_RAMP = (
    *("#1b2440", "#1d2f58", "#1e3b6f", "#204985", "#225897", "#2668a6", "#2b79b1", "#338ab8"),
    *("#409bbd", "#52abbf", "#68bbc0", "#82c9be", "#9fd6be", "#bbe2c1", "#d7ecca", "#f2f6d8"),
)


def ramp_css() -> str:
    """Return style rules that name the colours ``--q0`` to ``--q15``, by the reader's colour scheme."""
    light, dark = (
        ":root{" + "".join(f"--q{level}:{colour};" for level, colour in enumerate(ramp)) + "}"
        for ramp in (RAMP, DARK_RAMP)
    )
    return f"{light}@media screen and (prefers-color-scheme: dark){{{dark}}}\n"
