"""The budgets that a search may choose from: their shape and bounds, and allocations brought to a total."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from evolkv.allocators import expand, layout, lukv, non_increasing
from evolkv.budgets import Budget, Share
from evolkv.errors import BudgetError
from evolkv.evaluation.lengths import ByLength
from evolkv.evolution.bounds import check_bounds, default_floor
from evolkv.evolution.config import COMPUTED, LUKV, SearchConfig
from evolkv.models import describe_model, model_facts
from evolkv.profile import BudgetProfile
from evolkv.registry import unknown_name
from evolkv.selectors import Selector

log = logging.getLogger(__name__)

#: Allocations that need no search.
HEURISTICS = ("uniform", "pyramid")
#: The one of PyramidInfer, for selectors that prune the prefill.
COSINE = "cosine"
#: Name of the profile that a search started from.
START = "start"
#: What a result has to beat.
NOT_EVOLVED = (*HEURISTICS, COSINE, LUKV, START)
#: Where a search starts: a heuristic's name, a profile, or budgets ``[layers, kv_heads]``; None for uniform.
Start = str | BudgetProfile | np.ndarray | None


class SearchSpace:
    """The budgets that a search of a model may choose from.

    Args:
        model: the model.
        selector: which tokens a budget keeps.
        config: the settings of the search.
        longest: tokens of the longest training prompt.
        shortest: tokens of the shortest. Default: all are as long.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        selector: Selector,
        config: SearchConfig,
        longest: int,
        shortest: int | None = None,
    ):
        info = describe_model(model)
        self.model, self.selector, self.longest = model, selector, longest
        self.shortest = longest if shortest is None else shortest
        self.layers, self.heads = info.num_layers, info.num_kv_heads
        self.by_head = config.granularity == "head"
        self.floor = config.floor if config.floor is not None else default_floor(selector)
        most = min(longest, int(selector.held_under(np.array(longest))))
        self.ceiling = config.ceiling if config.ceiling is not None else most
        #: Of each layer: entries beyond its own window would never be held.
        self.ceilings = model_facts(model).most_held(self.ceiling)
        #: Of each layer: one whose window is below the floor holds its window.
        self.floors = np.minimum(self.floor, self.ceilings)

        #: The budgets of the longest training prompt that are searched at, and of which share each is; see `aim`.
        self.budgets: list[int] = []
        self.shares: dict[int, Share] = {}

    def aim(self, targets: Sequence[Budget]) -> list[int]:
        """Take what is searched at, and return the budgets of the longest training prompt, each checked.

        Raises:
            BudgetError: one that cannot be searched at, or two shares that come to the same.
        """
        self.budgets = [self.check(target) for target in targets]
        self.shares = {at: each for at, each in zip(self.budgets, targets, strict=True) if isinstance(each, Share)}
        if len(set(self.budgets)) < len(self.budgets):
            raise BudgetError(
                f"budgets {', '.join(map(str, targets))} of the longest prompt are {', '.join(map(str, self.budgets))} "
                "entries, of which some are the same; give shares further apart"
            )
        return self.budgets

    @property
    def by_length(self) -> ByLength | None:
        """Carries candidates to prompts of other lengths; None where budgets are the same for every prompt."""
        if not self.shares:
            return None
        return ByLength(tuple(self.shares.values()), self.longest, self.selector.min_budget, self.by_head)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is searched, ``(layers,)`` or ``(layers, kv_heads)``."""
        return (self.layers, self.heads) if self.by_head else (self.layers,)

    def check(self, target: Budget) -> int:
        """Return the mean budget of the longest training prompt, checked against the examples and the bounds.

        Args:
            target: the same number for every prompt, or a share of each.

        Raises:
            BudgetError: if it cannot be searched at.
        """
        least, most, selector = self.floor, self.ceiling, self.selector
        share = None
        if isinstance(target, Share):
            budget, share = target.of(self.longest), f"{target} of the {self.longest} tokens of the longest prompt"
            if target.of(self.shortest) < selector.min_budget < budget:
                log.warning(
                    "%s of the shortest training prompt is %d of %d tokens; %s always keeps %d, so such prompts teach "
                    "nothing; a smaller window may help",
                    *(target, target.of(self.shortest), self.shortest, selector.name, selector.min_budget),
                )
        else:
            budget = target
        check_bounds(budget, selector, least, None, share)
        if budget >= self.longest:
            raise BudgetError(
                f"the budget is {budget}, but the longest prompt of the task has {self.longest} tokens: nothing "
                f"would be evicted; use a --budget below {self.longest}"
            )
        check_bounds(budget, selector, least, most, share)
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
        """Return a candidate as ``[layers, kv_heads]``; the nearest that does not rise if the selector prunes."""
        column = candidate if candidate.ndim == 2 else candidate[:, None]
        if self.selector.prunes_prefill:
            full = np.array([window is None for window in model_facts(self.model).sliding_windows])
            column = column.copy()
            column[full, 0] = non_increasing(column[full, 0])
        return np.ascontiguousarray(np.broadcast_to(column, (self.layers, self.heads)))

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Floor and ceiling of each layer, so that they broadcast to `shape`."""
        floor, ceiling = (each[:, None] if self.by_head else each for each in (self.floors, self.ceilings))
        return floor, ceiling

    def by_variable(self, slope: np.ndarray) -> np.ndarray:
        """Return the derivatives with respect to what is searched, given those of heads, ``[…, layers, kv_heads]``."""
        return slope if self.by_head else slope.sum(axis=-1)

    def completed(self, budgets: np.ndarray, budget: int) -> np.ndarray:
        """Return budgets ``[layers, kv_heads]`` brought to exactly the total of another budget."""
        searched = budgets if self.by_head else budgets.mean(axis=1)
        return self.matrix(expand(searched, budget, self.floor, self.ceilings))

    def heuristics(self, budget: int) -> dict[str, np.ndarray]:
        """Return the allocations that a result has to beat, by name."""
        return {
            name: self.matrix(layout(name, self.shape, budget, self.selector, self.ceilings, self.floor))
            for name in (*HEURISTICS, *([COSINE] if self.selector.prunes_prefill else []))
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
            heuristics = self.heuristics(budget)
            if start not in heuristics:
                raise unknown_name("start", start, (*COMPUTED, *heuristics))
            budgets = heuristics[start]
        elif isinstance(start, BudgetProfile):
            start.check_model(self.model)
            budgets = self.completed(np.asarray(start.budgets), budget)
        else:
            budgets = self.completed(start, budget)
        return budgets if self.by_head else budgets[:, 0]
