"""From what a user asks for to the rule that every process of a server follows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from evolkv.budgets import Budget, read_budget
from evolkv.errors import RunError, UsageError
from evolkv.methods import Method
from evolkv.models import describe_model, model_facts
from evolkv.profile_card import eval_words
from evolkv_vllm import checkpoint, checks
from evolkv_vllm.rule import BudgetRule
from evolkv_vllm.settings import Settings

logger = logging.getLogger("vllm.evolkv")

#: Where the rule stands in ``additional_config``, with which it reaches every process: beside what users write.
RULE = "evolkv_rule"
#: A window that no text outgrows. A model with one is handed the lengths of prompts, and evicts nothing by it.
_NO_WINDOW = 1 << 30


def rule_of(config: Any) -> BudgetRule | None:
    """Return the rule of a server, or None where it has no profile.

    Args:
        config: vLLM's `VllmConfig`.
    """
    additional = config.additional_config
    text = additional.get(RULE) if isinstance(additional, Mapping) else None
    return None if text is None else BudgetRule(text)


def configure(config: Any) -> None:
    """Check what is asked for against a configuration of vLLM, and note the rule in it.

    Args:
        config: vLLM's `VllmConfig`, complete; changed. One that has a rule stays as it is.

    Raises:
        RunError: the server cannot start as asked, with the reason and what to do.
    """
    if config.model_config is None or config.model_config.is_submodel_config or rule_of(config) is not None:
        return
    try:
        settings = Settings.read(config.additional_config)
        if settings is None:
            return
        checks.check_version()
        rule = _rule(settings, config)
    except UsageError as error:
        # vLLM's configuration takes a ValueError for one of its own and wraps it in a page of text.
        raise RunError(str(error)) from None
    config.additional_config = {**(config.additional_config or {}), RULE: rule.text}
    config.model_config.model_arch_config.rswa_window = _NO_WINDOW


def _rule(settings: Settings, config: Any) -> BudgetRule:
    method = settings.chosen()
    assert method.selector is not None
    checks.check_config(config, method.selector, classes=1)
    model = checkpoint.outline(config.model_config)
    facts = model_facts(model)
    budget = None if settings.budget is None else read_budget(settings.budget)
    method, budgets = _resolve(method, budget, model, config)
    # Heads of equal budgets share their layer's blocks.
    by_head = bool((budgets != budgets[:, :1]).any())
    budgets = budgets if by_head else budgets[:, :1]
    assert method.selector is not None
    if method.share is not None:
        heads = budgets.shape[1]
        rule = BudgetRule.of_share(method, facts.sliding_windows, facts.max_context, settings.exact, heads)
    else:
        allocator = method.allocator or "uniform"
        rule = BudgetRule.fixed(budgets, method.selector, facts.sliding_windows, settings.exact, allocator)
    checks.check_config(config, method.selector, classes=len(set(rule.classes)), by_head=by_head)
    longest = config.model_config.max_model_len
    if not rule.any_evicts(longest, config.cache_config.block_size or 1):
        logger.warning(
            "EvolKV: %s changes nothing: each layer has a sliding window, or a budget that covers the longest prompts "
            "(%d tokens); set a smaller budget, or leave the setting out",
            settings.source,
            longest,
        )
    return rule


def _resolve(method: Method, budget: Budget | None, model: Any, config: Any) -> tuple[Method, np.ndarray]:
    """Return a method and its budgets for a model, ``[layers, kv_heads]``; see `Method.resolve`."""
    if method.profile is None:
        return method.resolve(model, budget)
    if earlier := eval_words(method.profile.search):
        logger.warning(
            "EvolKV: the profile was evolved with %s, but vLLM compresses a prompt once, when it has been read to its "
            "end; see what that costs with evolkv eval without %s",
            " ".join(earlier),
            " and ".join(earlier[::2]),
        )
    folder = checkpoint.weights_folder(config.model_config, config.load_config.download_dir)
    try:
        if folder is None:
            raise checkpoint.MissingWeightsError("no safetensors files on this machine yet; the next start looks again")
        return method.resolve(checkpoint.with_weights(model, folder), budget)
    except checkpoint.MissingWeightsError as error:
        logger.warning(
            "EvolKV: the profile is for %s; the weights of %s cannot be compared with it (%s), so only the numbers of "
            "layers and KV heads are",
            method.profile.model["name"],
            config.model_config.model,
            error,
        )
    blank = checkpoint.without_weights(model)
    same = {**method.profile.model, "fingerprint": describe_model(blank).fingerprint}
    return replace(method, profile=replace(method.profile, model=same)).resolve(blank, budget)
