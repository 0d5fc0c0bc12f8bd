"""The calibration of LU-KV on the training examples of a search, and the budgets that follow from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from evolkv.errors import ModelError
from evolkv.evaluation.engine import Engine
from evolkv.evolution.config import LUKV, SearchConfig
from evolkv.evolution.result import as_lists
from evolkv.evolution.space import SearchSpace

if TYPE_CHECKING:
    from evolkv.evolution.study import Study

log = logging.getLogger(__name__)


class Calibration:
    """The utility of the training examples' entries, which serves all budgets and is computed when first needed.

    Args:
        config: the settings of the search.
        space: the budgets to choose from.
        scorer: the engine over the training examples.
    """

    def __init__(self, config: SearchConfig, space: SearchSpace, scorer: Callable[[], Engine]):
        self._config, self._space, self._scorer = config, space, scorer
        self._utility: np.ndarray | None = None

    def budgets(self, budget: int, study: Study | None) -> np.ndarray | None:
        """Return LU-KV's budgets, ``[layers, kv_heads]``; None where engine, metric or model have no calibration.

        They go on record, so that a search that is continued starts from the same.

        Args:
            budget: the target.
            study: of the search.

        Raises:
            ModelError: if the model has none, and the search starts from it.
        """
        if not self._config.calibrates:
            return None
        recorded = {} if study is None else study.get(LUKV, {})
        if str(budget) in recorded:
            return np.array(recorded[str(budget)])
        if self._utility is None:
            # Outside of the try block: an error of the examples is not one of the calibration.
            scorer = self._scorer()
            try:
                self._utility = scorer.utility()
            except ModelError as error:
                if self._config.begins_at == LUKV:
                    raise
                log.warning("lukv is not among the allocations to choose from: %s", error)
                return None
        found = self._space.by_utility(self._utility, budget)
        if study is not None:
            study.put(LUKV, {**recorded, str(budget): as_lists(found)})
        return found

    @staticmethod
    def forget(study: Study) -> None:
        """Take back what a search left that was stopped before its first generation: its settings may differ."""
        if study.get(LUKV) is not None:
            study.put(LUKV, {})
