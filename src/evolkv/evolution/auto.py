"""The smallest budget that is safe: a curve over several budgets, certified on examples that no search saw."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from evolkv.errors import BudgetError, EvolKVError, UsageError
from evolkv.evaluation.certify import Certificate, certify_records, check_bounds, examples_needed
from evolkv.evaluation.evaluation import MOST_SAMPLES, EvaluationProgress, evaluate
from evolkv.evaluation.records import digest_of, read_records
from evolkv.evolution.config import Order, SearchConfig, SeveralBudgets
from evolkv.evolution.curve import CurveResult, run_curve
from evolkv.evolution.rivals import longest_prompt
from evolkv.evolution.space import SearchSpace
from evolkv.methods import Method, get_method
from evolkv.numbers import is_whole
from evolkv.profile import BudgetProfile
from evolkv.selectors import get_selector
from evolkv.tasks import get_task

#: The budgets that are tried, as shares of the longest training prompt.
GRID = (0.025, 0.05, 0.1, 0.2, 0.4)
#: Mean loss, as a share of the bound, that the examples suffice to certify by default, if all scores are 0 or 1.
_CERTIFIABLE = 0.25


@dataclass(frozen=True)
class AutoResult:
    """A search for the smallest safe budget.

    Args:
        curve: the searches at all budgets that were tried.
        certificate: of their profiles; None if there was an interruption or an error before it.
        profile: the one certified, with the certificate among its scores, or, if none is, that of the largest budget.
        failed: the error that ended the certification, which does not take the searches with it; None without.
    """

    curve: CurveResult
    certificate: Certificate | None
    profile: BudgetProfile
    failed: EvolKVError | None = None

    @property
    def interrupted(self) -> bool:
        """Return whether the searches or the certification were stopped before their end."""
        return self.certificate is None and self.failed is None

    def to_dict(self, path: str) -> dict[str, Any]:
        """Return the content of a ``--json`` file; `path` is that of the profile."""
        certificate = None if self.certificate is None else self.certificate.to_dict()
        stopped = {"interrupted": self.interrupted}
        return {**self.curve.to_dict(), **stopped, "certificate": certificate, "profile": path}


def run_auto(
    model: PreTrainedModel,
    tokenizer: Any,
    config: SearchConfig,
    loss: float = 0.05,
    confidence: float = 0.95,
    samples: int | None = None,
    on_example: Callable[[EvaluationProgress], None] | None = None,
    first: Order = "smallest",
) -> AutoResult:
    """Find the smallest budget whose expected loss against the full cache is below a bound; see `certify`.

    Profiles for 2.5, 5, 10, 20 and 40 % of the longest training prompt are evolved as one search. Then all of them and
    the full cache answer examples of the split "report", which no search sees. Only the budget is chosen on them, and
    the profile at that budget names them among those that it saw.

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        config: the settings of the search.
        loss: the bound, in the task's own metric, or in `config.metric` if that is not logprob.
        confidence: of the certificate.
        samples: examples to certify on. Default: as many as certify a mean loss of a quarter of the bound where all
            scores are 0 or 1; of graded scores they certify a little less.
        on_example: called as these are evaluated.
        first: whether the searches begin with the "smallest" or the "largest" budget.

    Returns:
        The searches, and the certificate. Where KeyboardInterrupt or an error ends the certification there is none,
        and the profile is that of the largest budget.

    Raises:
        UsageError: for settings that cannot be used.
        RunError: if memory does not suffice for the searches, or what was found cannot be recorded.
        KeyboardInterrupt: if interrupted before the first step or generation was scored.
    """
    samples = examples_to_certify(loss, confidence, samples)
    curve = run_curve(model, tokenizer, several(model, tokenizer, config, first))
    profiles: dict[Any, BudgetProfile] = {result.profile.budget: result.profile for result in curve.results}
    largest = profiles[max(profiles)]
    if curve.interrupted:
        return AutoResult(curve, None, largest)
    try:
        with tempfile.TemporaryDirectory() as folder:
            records = Path(folder) / "records.jsonl"
            evaluate(
                model,
                tokenizer,
                task=get_task(config.task),
                methods=[get_method("full"), *(Method.of_profile(each, "evolved") for each in profiles.values())],
                samples=samples,
                seed=config.seed,
                metric=None if config.metric == "logprob" else config.metric,
                protocol=config.protocol,
                prefill_chunk=config.prefill_chunk,
                records=records,
                on_progress=on_example,
            )
            ((*_, certificate),) = certify_records(records, loss, confidence).rows
            answered = read_records(records).examples.values()
            asked = {record.prompt_sha256 for by_method in answered for record in by_method.values()}
    except KeyboardInterrupt:
        return AutoResult(curve, None, largest)
    except EvolKVError as error:
        return AutoResult(curve, None, largest, error)
    if certificate.budget is None:
        return AutoResult(curve, certificate, largest)
    profile = profiles[certificate.budget]
    passed = next(test for test in certificate.tested if test.budget == certificate.budget)
    said = {"loss": loss, "confidence": confidence, "n": certificate.n, "observed": passed.loss, "p": passed.p}
    # From here on the profile is one that was chosen on these examples.
    seen = sorted({*profile.search["seen"], *map(digest_of, asked)})
    chosen = replace(profile, search={**profile.search, "seen": seen}, scores={**profile.scores, "certified": said})
    return AutoResult(curve, certificate, chosen)


def examples_to_certify(loss: float, confidence: float, samples: int | None = None) -> int:
    """Return how many examples to certify on, of which none has been seen; see `run_auto`.

    Raises:
        UsageError: for a bound, a confidence or a number of examples that is out of its range.
    """
    check_bounds(loss, confidence)
    if samples is not None:
        if not is_whole(samples) or not 1 <= samples <= MOST_SAMPLES:
            raise UsageError(f"--certify is {samples!r}; expected 1 to {MOST_SAMPLES:,} examples")
        return samples
    needed = examples_needed(_CERTIFIABLE * loss, loss, confidence, exact=True)
    if needed is None or needed > MOST_SAMPLES:
        raise UsageError(
            f"to certify a loss below {loss:g} with confidence {confidence:g} takes more than {MOST_SAMPLES:,} "
            "examples; use a larger --loss, or say with --certify how many to use"
        )
    return needed


def several(model: PreTrainedModel, tokenizer: Any, config: SearchConfig, first: Order = "smallest") -> SeveralBudgets:
    """Return the settings with the budgets to try: those of `GRID` that leave every selector something to choose.

    Raises:
        BudgetError: fewer than two do.
    """
    longest = longest_prompt(tokenizer, config)
    spaces = [SearchSpace(model, get_selector(each), config, longest) for each in config.selectors.values()]
    # Of those that compete by default, the ones that do not fit stay out.
    choose = min if config.selector is None else max
    floor, most = choose(space.floor for space in spaces), min(space.ceilings.mean() for space in spaces)
    budgets = [budget for budget in (round(share * longest) for share in GRID) if floor < budget < most]
    if len(set(budgets)) < 2:
        raise BudgetError(
            f"the longest prompt has {longest} tokens, no head may get less than {floor}, and heads hold at most "
            f"{most:.0f} on average, which leaves --budget auto less than two budgets to try; give a selector with a "
            "smaller window, or the budgets"
        )
    settings = {field.name: getattr(config, field.name) for field in fields(SearchConfig)}
    return SeveralBudgets(budgets=budgets, first=first, **settings)
