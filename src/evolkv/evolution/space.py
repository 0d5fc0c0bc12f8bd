"""The budgets that a search may choose from: their shape and bounds, and allocations brought to a total."""

from __future__ import annotations

import math

import numpy as np
from transformers import PreTrainedModel

from evolkv.allocators import expand, layout, lukv
from evolkv.errors import BudgetError
from evolkv.evolution.config import COMPUTED, LUKV, SearchConfig
from evolkv.models import describe_model, model_facts
from evolkv.profile import BudgetProfile
from evolkv.registry import unknown_name
from evolkv.selectors import Selector

#: Allocations that need no search.
HEURISTICS = ("uniform", "pyramid")
#: Name of the profile that a search started from.
START = "start"
#: What a result has to beat.
NOT_EVOLVED = (*HEURISTICS, LUKV, START)
#: Where a search starts: a heuristic's name, a profile, or budgets ``[layers, kv_heads]``; None for uniform.
Start = str | BudgetProfile | np.ndarray | None


class SearchSpace:
    """The budgets that a search of a model may choose from.

    Args:
        model: the model.
        selector: which tokens a budget keeps.
        config: the settings of the search.
        longest: tokens of the longest training prompt.
    """

    def __init__(self, model: PreTrainedModel, selector: Selector, config: SearchConfig, longest: int):
        info = describe_model(model)
        self.model, self.selector, self.longest = model, selector, longest
        self.layers, self.heads = info.num_layers, info.num_kv_heads
        self.by_head = config.granularity == "head"
        self.floor = config.floor if config.floor is not None else selector.min_budget + 1
        self.ceiling = config.ceiling if config.ceiling is not None else longest
        #: Of each layer: entries beyond its own window would never be held.
        self.ceilings = np.array([min(self.ceiling, w or self.ceiling) for w in model_facts(model).sliding_windows])
        #: Of each layer: one whose window is below the floor holds its window.
        self.floors = np.minimum(self.floor, self.ceilings)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is searched, ``(layers,)`` or ``(layers, kv_heads)``."""
        return (self.layers, self.heads) if self.by_head else (self.layers,)

    def check(self, budget: int) -> int:
        """Return a budget, checked against the examples and the bounds.

        Raises:
            BudgetError: if it cannot be searched at.
        """
        least, most, selector = self.floor, self.ceiling, self.selector
        if least < selector.min_budget:
            raise BudgetError(
                f"the floor is {least}, but {selector.name} always keeps {selector.min_budget} tokens; "
                f"use --floor {selector.min_budget} or more"
            )
        if budget < least:
            other = "a selector with a smaller window, such as --selector snapkv:window=16"
            if least > selector.min_budget + 1:
                other = f"a lower --floor ({selector.name} always keeps {selector.min_budget})"
            raise BudgetError(
                f"the budget is {budget}, below the floor of {least}; use --budget {least} or more, or {other}"
            )
        if budget >= self.longest:
            raise BudgetError(
                f"the budget is {budget}, but the longest prompt of the task has {self.longest} tokens: nothing "
                f"would be evicted; use a --budget below {self.longest}"
            )
        if most < budget:
            raise BudgetError(f"the ceiling is {most}, below the budget of {budget}; raise --ceiling")
        if self.ceilings.mean() < budget:
            raise BudgetError(
                f"the budget is {budget}, but with its sliding windows this model holds at most "
                f"{self.ceilings.mean():.0f} entries per head on average; use a smaller --budget"
            )
        if int(budget) * self.layers in (self.floors.sum(), self.ceilings.sum()):
            raise BudgetError(
                f"a budget of {budget} with floor {least} and ceiling {most} leaves one allocation "
                "and nothing to search; change the budget, the floor or the ceiling"
            )
        return int(budget)

    def matrix(self, candidate: np.ndarray) -> np.ndarray:
        """Return a candidate as ``[layers, kv_heads]``."""
        column = candidate if candidate.ndim == 2 else candidate[:, None]
        return np.ascontiguousarray(np.broadcast_to(column, (self.layers, self.heads)))

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Floor and ceiling of each layer, so that they broadcast to `shape`."""
        floor, ceiling = (each[:, None] if self.by_head else each for each in (self.floors, self.ceilings))
        return floor, ceiling

    def by_variable(self, slope: np.ndarray) -> np.ndarray:
        """Return the derivatives with respect to what is searched, given those of each head, ``[layers, kv_heads]``."""
        return slope if self.by_head else slope.sum(axis=1)

    def completed(self, budgets: np.ndarray, budget: int) -> np.ndarray:
        """Return budgets ``[layers, kv_heads]`` brought to exactly the total of another budget."""
        searched = budgets if self.by_head else budgets.mean(axis=1)
        return self.matrix(expand(searched, budget, self.floor, self.ceilings))

    def heuristics(self, budget: int) -> dict[str, np.ndarray]:
        """Return the allocations that a result has to beat, by name."""
        return {
            name: self.matrix(layout(name, self.shape, budget, self.selector, self.ceilings, self.floor))
            for name in HEURISTICS
        }

    def by_utility(self, utility: np.ndarray, budget: int) -> np.ndarray:
        """Return the allocation of LU-KV, ``[layers, kv_heads]``; a layer is worth what its heads are together.

        Args:
            utility: of the entry at each rank, ``[layers, kv_heads, ranks]``; see `Engine.utility`.
            budget: the target.
        """
        of_variable = utility if self.by_head else utility.sum(axis=1)
        return self.matrix(lukv(of_variable, budget * math.prod(self.shape), *self.bounds))

    def start(self, start: Start, budget: int) -> np.ndarray | None:
        """Return where a search at a budget starts, in `shape` and at the budget's total; None for uniform.

        Raises:
            UsageError: for an unknown name, or a profile of another model.
        """
        if start is None or (isinstance(start, str) and start == "uniform"):
            return None
        if isinstance(start, str):
            if start not in HEURISTICS:
                raise unknown_name("start", start, (*COMPUTED, *HEURISTICS))
            budgets = self.heuristics(budget)[start]
        elif isinstance(start, BudgetProfile):
            start.check_model(self.model)
            budgets = self.completed(np.asarray(start.budgets), budget)
        else:
            budgets = self.completed(start, budget)
        return budgets if self.by_head else budgets[:, 0]
