"""Checks of budgets against selectors, floors and ceilings that need neither the model nor the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from evolkv.budgets import Budget, Share, size_of
from evolkv.errors import BudgetError
from evolkv.selectors import Selector, SelectorSpec, get_selector


def narrowed(spec: SelectorSpec, targets: Sequence[Budget]) -> SelectorSpec:
    """Return a selector, with a smaller window if it is given by name alone and its own does not suit several budgets.

    The window is halved until it leaves the smallest budget something to choose. At one budget it stays as it is.
    """
    smallest = min(targets, key=size_of)
    if len(targets) < 2 or isinstance(smallest, Share):
        return spec
    selector = get_selector(spec)
    window = selector.window
    if not isinstance(spec, str) or ":" in spec or not window or selector.min_budget < smallest:
        return spec
    while window > 1 and window >= smallest:
        window //= 2
    return {**selector.to_dict(), "window": window}


def default_floor(selector: Selector) -> int:
    """Return the least that a head gets where no floor is given."""
    return selector.min_budget + 1


def check_budgets(
    targets: Sequence[Budget], selectors: Sequence[SelectorSpec], floor: int | None, ceiling: int | None
) -> None:
    """Check the budgets of a search under each selector, as far as that takes neither model nor prompts.

    Args:
        targets: the budgets. What a share comes to depends on the prompts, so shares are not looked at.
        selectors: as they are given; their windows may shrink (see `narrowed`).
        floor: see `check_bounds`.
        ceiling: see `check_bounds`.

    Raises:
        BudgetError: as `check_bounds`.
    """
    for spec in selectors:
        selector = get_selector(narrowed(spec, targets))
        for target in targets:
            if not isinstance(target, Share):
                check_bounds(target, selector, floor, ceiling)


def check_bounds(
    budget: int, selector: Selector, floor: int | None, ceiling: int | None, share: str | None = None
) -> None:
    """Check a mean budget against the floor and the ceiling.

    Args:
        budget: cache entries per KV head.
        selector: which tokens a budget keeps.
        floor: the least a head may get; None for the default.
        ceiling: the most; None where that is not known yet.
        share: where the budget is a share, the words for it and for the prompt that it is of.

    Raises:
        BudgetError: if they do not go together.
    """
    least = default_floor(selector) if floor is None else floor
    of_share = "" if share is None else f"{share}, "
    if least < selector.min_budget:
        raise BudgetError(
            f"the floor is {least}, but {selector.name} always keeps {selector.min_budget} tokens; "
            f"use --floor {selector.min_budget} or more"
        )
    if budget < least:
        other = "a selector that always keeps fewer"
        window = min(selector.window, budget) // 2
        # The floor is one more than the window.
        if 0 < window < budget - 1 and "window" in selector.parameters():
            smaller = get_selector({**selector.to_dict(), "window": window})
            other = f"a smaller window, such as --selector {smaller.spec}"
        if least > default_floor(selector):
            other = f"a lower --floor ({selector.name} always keeps {selector.min_budget})"
        enough = f"--budget {least} or more" if share is None else "a larger share"
        raise BudgetError(f"the budget is {of_share}{budget}, below the floor of {least}; use {enough}, or {other}")
    if ceiling is not None and ceiling < budget:
        raise BudgetError(f"the ceiling is {ceiling}, below the budget of {of_share}{budget}; raise --ceiling")
