"""A search at one budget."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from evolkv.evolution.config import OneBudget
from evolkv.evolution.result import SearchResult
from evolkv.evolution.rivals import best_of, score_of, whole_search
from evolkv.evolution.run import Run


def run_search(model: PreTrainedModel, tokenizer: Any, config: OneBudget) -> SearchResult:
    """Evolve a profile: how many cache entries each layer (or KV head) needs for a task.

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        config: the settings, checked; `evolkv.search` takes them by keyword.

    Returns:
        The profile, every evaluation and the validation scores. KeyboardInterrupt during the search ends it early: the
        result then holds the fittest candidate so far (where generations are scored on different examples, the mean of
        the distribution), and says that it was interrupted.

    Raises:
        UsageError: for settings that cannot be used (`BudgetError`, `TaskError`, … name the kind); `StudyError` if the
            study was made with other settings, or another process is at it.
        RunError: if memory does not suffice, or what was found cannot be recorded.
        KeyboardInterrupt: if interrupted before the first step or generation was scored.
    """
    return whole_search(model, tokenizer, config, _under_one_selector, score_of, best_of)


def _under_one_selector(run: Run, config: OneBudget) -> SearchResult:
    (budget,) = run.open_study(config.targets)
    evolved = run.evolve(budget, config.begins_at)
    choices = run.choices(budget, evolved)
    validation = run.choose({str(budget): choices}, evolved.interrupted).get(str(budget), [])
    return run.result(budget, evolved, choices, validation, run.seconds + evolved.recorded_seconds)
