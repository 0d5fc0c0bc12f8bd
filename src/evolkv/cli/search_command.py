"""The work of `evolkv search`: check, load the model, search, write, print."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from evolkv.budgets import Budget, Share, read_budgets
from evolkv.cli import console
from evolkv.cli.arguments import sibling
from evolkv.cli.next_steps import as_command, suggest
from evolkv.cli.options import ModelOptions, accompanied, files
from evolkv.cli.tables import curve_table, print_whole, validation_table
from evolkv.errors import RunError, UsageError
from evolkv.evolution import CurveResult, OneBudget, SearchConfig, SearchResult, SeveralBudgets
from evolkv.evolution.config import COMPUTED
from evolkv.evolution.curve import run_curve
from evolkv.evolution.location import locate
from evolkv.evolution.one_budget import run_search
from evolkv.evolution.space import COSINE, HEURISTICS
from evolkv.evolution.strategies import STRATEGIES
from evolkv.profile import BudgetProfile
from evolkv.profile_card import eval_words, generate_words
from evolkv.report.words import candidates, counted, duration
from evolkv.selectors import get_selector
from evolkv.significance import paired_comparison
from evolkv.tasks import get_task
from evolkv.tasks.check import check_examples
from evolkv.whole_files import check_outputs

if TYPE_CHECKING:
    from evolkv.evaluation import EvaluationProgress
    from evolkv.evaluation.shards import Backend


def run(options: Mapping[str, Any]) -> int:
    """Search as the options of the command ask.

    Args:
        options: by the names of the command's parameters; most are those of the fields of `SearchConfig`.

    Returns:
        The exit code.
    """
    config, outs, model, tokenizer = prepare(options)
    if not isinstance(config, (OneBudget, SeveralBudgets)):
        return _auto(config, options, model, tokenizer)
    with console.Progress() as progress:
        config = replace(config, on_progress=progress.of_search)
        if isinstance(config, OneBudget):
            result: SearchResult | CurveResult = run_search(model, tokenizer, config)
        else:
            result = run_curve(model, tokenizer, config)
    write = _write_search if isinstance(result, SearchResult) else _write_curve
    code = write(result, outs, options["json_out"], config.storage)  # type: ignore[arg-type]
    if code == 0:
        first = result if isinstance(result, SearchResult) else result.results[0]
        suggest(_next_commands(first.profile, outs, options))
    return code


def _auto(config: SearchConfig, options: Mapping[str, Any], model: Any, tokenizer: Any) -> int:
    """Search for the smallest safe budget, write its profile, and say what was tried."""
    from evolkv.evolution.auto import run_auto
    from evolkv.report.tables import next_budget

    loss, confidence, out = options["loss"], options["confidence"], options["out"]
    with console.Progress() as progress:
        config = replace(config, on_progress=progress.of_search)

        def show(step: EvaluationProgress) -> None:
            progress("certification", step.done, step.total)

        found = run_auto(model, tokenizer, config, loss, confidence, options["certify"], show, options["first"])
    curve, certificate = found.curve, found.certificate
    try:
        found.profile.save(out)
        console.write_json(options["json_out"], found.to_dict(out))
    finally:
        if not curve.interrupted:
            _print_curve(curve)
    if found.failed is not None:
        console.say(f"evolkv: the searches are done, and {out} holds the largest budget; their certification failed")
        raise found.failed
    if certificate is None:
        console.say(f"evolkv: interrupted; the best so far is in {out}{_goes_on(config.storage)}")
        return 130
    tested = ", ".join(f"{each.budget} (loss {each.loss:.3f})" for each in certificate.tested)
    failed = f" {next_budget(certificate, loss)}." if not certificate.tested[-1].certified else ""
    verdict = (
        f"No budget is certified to lose less than {loss:g}; {out} holds the largest tried, {found.profile.budget}."
        if certificate.budget is None
        else f"{certificate.budget} is the smallest budget certified to lose less than {loss:g}, with confidence "
        f"{confidence:g}; its profile is in {out}."
    )
    console.OUT.print(
        f"\n{_stopped(curve, config.storage)}On {certificate.n} examples that no search saw: {tested}.\n"
        f"{verdict}{failed}\n{_took(curve)}{_on_record(config.storage)}",
        soft_wrap=True,
    )
    suggest(_next_commands(found.profile, {found.profile.target: out}, options))
    return 0


def prepare(options: Mapping[str, Any]) -> tuple[SearchConfig, dict[Budget, str], Any, Any]:
    """Check the options of a search, and load the model.

    Returns:
        The settings, which say no budgets where these are to be found; the path of the profile for each budget; the
        model and its tokenizer.
    """
    started = time.monotonic()
    auto = options["budget"] == ["auto"]
    budgets = [] if auto else read_budgets(options["budget"], "--budget")
    console.keep_stdout_for_json(options["json_out"])
    outs: dict[Budget, str] = {0: options["out"]} if auto else _outs(options["out"], budgets)
    _check_together(options, budgets)
    config = _config(options, budgets, outs)
    check = partial(
        check_examples,
        [get_task(config.task)],
        {
            "train": config.num_train,
            "validation": config.val,
            **({"report": options["certify"]} if auto else {}),
        },
        metric=config.metric,
        protocol=config.protocol,
        seed=config.seed,
    )
    start = config.start if isinstance(config.start, BudgetProfile) else None
    model, tokenizer = _model_options(options).load(options["model"], check, [start])
    if config.time_limit is not None:
        # The limit is for the whole command.
        config = replace(config, time_limit=_left(config.time_limit, time.monotonic() - started))
    if config.backend == "ray":
        config = replace(config, backend=_ray(model, tokenizer, options))
    return config, outs, model, tokenizer


def _model_options(options: Mapping[str, Any]) -> ModelOptions:
    """Return the options that say how the model is loaded."""
    return ModelOptions(**{field.name: options[field.name] for field in fields(ModelOptions)})


def _left(limit: float, seconds: float) -> float:
    """Return what is left of the time limit once the model is there."""
    if seconds >= limit:
        raise RunError(f"--time-limit {limit:g} is too short: loading the model took {seconds:.1f} s; allow more")
    return limit - seconds


def _outs(out: str, budgets: list[Budget]) -> dict[Budget, str]:
    """Return the path of the profile for each budget."""
    return {budget: out if len(budgets) == 1 else _path_at(out, budget) for budget in budgets}


def _path_at(out: str, budget: object) -> str:
    """Return the path of the profile for one of several budgets; ``{}`` stands for any."""
    ending = ".json" if out.endswith(".json") else ""
    return sibling(out, f"-{budget}{ending}")


def _check_together(options: Mapping[str, Any], budgets: list[Budget]) -> None:
    """Refuse options that do not go together, where the configuration cannot know that they were given."""
    of_ray = options["ray_address"] is not None or options["worker_gpus"] is not None or options["worker_cpus"] != 1
    if options["backend"] == "local" and of_ray:
        raise UsageError("--ray-address, --worker-cpus and --worker-gpus are for --backend ray")
    if options["first"] != "smallest" and len(budgets) == 1:
        several = "5%,10%" if isinstance(budgets[0], Share) else f"{budgets[0] // 2},{budgets[0]}"
        raise UsageError(f"--first says where a curve begins; give --budget several, such as {several}")
    if budgets and (options["loss"] != 0.05 or options["confidence"] != 0.95 or options["certify"] is not None):
        raise UsageError("--loss, --confidence and --certify are for --budget auto")
    if options["group_size"] is not None and options["strategy"] != "evolkv":
        raise UsageError("--group-size is for --strategy evolkv")
    if options["storage"] == "none" and options["study"] is not None:
        raise UsageError("--study names a study, but --storage none keeps none; leave one of them out")


def _config(options: Mapping[str, Any], budgets: list[Budget], outs: Mapping[Budget, str]) -> SearchConfig:
    """Return the settings, checked as far as they can be without the model; without budgets if none are given."""
    out, json_out, start = options["out"], options["json_out"], options["start"]
    storage = sibling(out, ".study.db") if options["storage"] is None else options["storage"]
    named = (None, *COMPUTED, *HEURISTICS, COSINE)
    task = get_task(options["task"])
    targets = [*outs.values(), *files(json_out)]
    check_outputs(targets, [*task.files(), *([] if start in named else [start])])
    selectors = accompanied(map(get_selector, options["selector"] or []), options.get("companion"))
    file = None if storage == "none" else locate(storage).path
    if file is not None and os.path.realpath(file) in map(os.path.realpath, targets):
        raise UsageError(f"--storage is {storage}, which the result would overwrite; give the study a file of its own")
    task.check_files()
    settings: dict[str, Any] = {
        **{field.name: options[field.name] for field in fields(SearchConfig) if options.get(field.name) is not None},
        "task": task,
        # Names are kept as they are, because the window of one that is given by name alone may shrink.
        "selector": selectors if options.get("companion") else options["selector"] or None,
        "start": start if start in named else BudgetProfile.load(start),
        "storage": None if storage == "none" else storage,
        "study": options["study"] or os.path.basename(sibling(out, "")),
    }
    if not budgets:
        from evolkv.evolution.auto import examples_to_certify

        examples_to_certify(options["loss"], options["confidence"], options["certify"])
        return SearchConfig(**settings)
    if len(budgets) == 1:
        return OneBudget(budget=budgets[0], **settings)
    return SeveralBudgets(budgets=budgets, first=options["first"], **settings)


def _ray(model: Any, tokenizer: Any, options: Mapping[str, Any]) -> Callable[[], Backend]:
    def start() -> Backend:
        from evolkv.evaluation.on_ray import RayBackend

        names = ("workers", "ray_address", "worker_cpus", "worker_gpus")
        ours = signal.getsignal(signal.SIGTERM)
        with console.busy("starting Ray workers"):
            backend = RayBackend(model, tokenizer, *(options[name] for name in names))
        # Ray's own would end the program before it has written its result.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)
        return backend

    return start


def _write_search(result: SearchResult, outs: Mapping[Budget, str], json_out: str | None, storage: str | None) -> int:
    (out,) = outs.values()
    try:
        result.profile.save(out)
        console.write_json(json_out, result.to_dict())
    finally:
        # A file that cannot be written must not take the numbers with it.
        if not result.interrupted:
            print_whole(validation_table(result.validation, result.chosen))
            console.OUT.print(f"\n{_verdict(result)}{_among_rivals(result)}", soft_wrap=True)
            console.OUT.print(_balance(result.settings), end="", soft_wrap=True)
            if result.train is not None:
                console.OUT.print(_gaps([result]), soft_wrap=True)
    if result.interrupted:
        done = counted(result.evaluations, "candidate")
        if not result.evaluations:
            done = counted(len(result.descent), "gradient step")
        chosen = f"{out} holds {result.chosen!r}, the last choice on validation examples"
        held = chosen if result.validation else f"the best so far is in {out}"
        console.say(f"evolkv: interrupted after {done}; {held}{_goes_on(storage)}")
        return 130
    console.OUT.print(
        f"{_stopped(result, storage)}{counted(_candidates(result), 'candidate')} in {duration(result.seconds)}; "
        f"profile written to {out}{_on_record(storage)}",
        soft_wrap=True,
    )
    return 0


def _write_curve(curve: CurveResult, outs: Mapping[Budget, str], json_out: str | None, storage: str | None) -> int:
    written = [outs[each.profile.target] for each in curve.results]
    try:
        for each, path in zip(curve.results, written, strict=True):
            each.profile.save(path)
        console.write_json(json_out, curve.to_dict(written))
    finally:
        if not curve.interrupted:
            _print_curve(curve)
    names = ", ".join(written)
    if curve.interrupted:
        console.say(f"evolkv: interrupted; the best so far is in {names}{_goes_on(storage)}")
        return 130
    console.OUT.print(
        f"\n{_stopped(curve, storage)}{_took(curve)}; profiles written to {names}{_on_record(storage)}",
        soft_wrap=True,
    )
    return 0


def _print_curve(curve: CurveResult) -> None:
    """Print the numbers of searches at several budgets."""
    print_whole(curve_table(curve.points))
    console.OUT.print(_balance(curve.results[0].settings), end="", soft_wrap=True)
    if all(each.train is not None for each in curve.results):
        console.OUT.print(f"\n{_gaps(curve.results)}", soft_wrap=True)


def _took(curve: CurveResult) -> str:
    """Say how many candidates were evaluated, and in what time."""
    return f"{counted(sum(map(_candidates, curve.results)), 'candidate')} in {duration(curve.seconds)}"


def _on_record(storage: str | None) -> str:
    """Say where every generation is, if they are kept."""
    return f", every generation to {storage}" if storage else ""


def _next_commands(
    profile: BudgetProfile, outs: Mapping[Budget, str], options: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return what to do with what was written, as (purpose, command) pairs; each command works when pasted.

    Args:
        profile: one that was written.
        outs: the path of the profile for each budget.
        options: those of the command.
    """
    model, path = options["model"], outs[profile.target]
    load = _model_options(options).given()
    written = path if len(outs) == 1 else _path_at(options["out"], "{}")
    compared = ["full", get_selector(profile.selector).spec, written]
    generate = generate_words(model, path, profile.search)
    evaluate = ["eval", model, "--task", *options["task"], "--budget", ",".join(map(str, outs)), "--method", *compared]
    if options["metric"] is not None:
        evaluate += ["--metric", options["metric"]]
    evaluate += eval_words(profile.search)
    return [
        ("text under the profile", as_command([*generate, *load])),
        (
            "other examples, under the profile, under equal budgets and with the full cache",
            as_command([*evaluate, *load]),
        ),
    ]


def _stopped(result: SearchResult | CurveResult, storage: str | None) -> str:
    """Say that the time limit ended the search, if it did."""
    return f"The {result.stopped} ended the search early{_goes_on(storage)}.\n" if result.stopped else ""


def _goes_on(storage: str | None) -> str:
    """Say how to continue a search that is on record."""
    return "; the same command goes on from there" if storage else ""


def _candidates(result: SearchResult) -> int:
    """Return how many were evaluated, under all selectors."""
    return candidates(result.evaluations, result.settings)


def _among_rivals(result: SearchResult) -> str:
    """Say how the other selectors did, where there were several."""
    if not result.rivals:
        return ""
    scores = sorted(((row["score"] or 0.0, get_selector(row["selector"]).spec) for row in result.rivals), reverse=True)
    listed = ", ".join(f"{name} {score:.3f}" for score, name in scores)
    return f" By selector: {listed}; the profile is under {get_selector(result.profile.selector).spec}."


def _gaps(results: Sequence[SearchResult]) -> str:
    """Say how far the scores on training examples are above those on validation examples, in one line."""
    gaps = [
        f"{each.gap:+.3f}{f' at {each.profile.target}' if len(results) > 1 else ''} "
        f"({each.train['score']:.3f} − {each.validation[0]['score']:.3f})"
        for each in results
        if each.train is not None and each.gap is not None
    ]
    n = next(each.train["n"] for each in results if each.train is not None)
    return f"Gap between the {n} training examples and the validation examples: {', '.join(gaps)}."


def _balance(settings: Mapping[str, Any]) -> str:
    """Say what balanced scores mean, in one line, where they are; see `evolkv.evaluation.balance`."""
    if not settings.get("balanced"):
        return ""
    return "Scores are balanced: on each example 0.5 is what uniform budgets do, and 1 what the full cache does.\n"


def _behind(evolved: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    """Say how far the best of what needs no evolution is behind, and whether that may be chance."""
    found = paired_comparison(evolved["scores"], best["scores"])
    low, high = found.ci95
    chance = ", which may be chance" if low <= 0 else ""
    return (
        f"{best['name']} is behind by {found.difference:.3f} (paired 95 % interval {low:+.3f} to {high:+.3f}){chance}."
    )


def _verdict(result: SearchResult) -> str:
    """Say whether evolution paid, in one line."""
    evolved = next((row for row in result.validation if row["evolved"]), None)
    heuristics = [row for row in result.validation if not row["evolved"]]
    if len(result.validation) == 1:
        (only,) = result.validation
        return f"The profile holds the start, {only['name']!r}: {only['score']:.3f} on {only['n']} validation examples."
    if result.improved and evolved is not None:
        *first, last = [f"{row['name']} ({row['score']:.3f})" for row in heuristics]
        others = f"{', '.join(first)} and {last}" if first else last
        beaten = f"The evolved budgets ({evolved['score']:.3f}) beat {others} on {evolved['n']} validation examples."
        return f"{beaten} {_behind(evolved, heuristics[0])}"
    best = next(row for row in result.validation if row["name"] == result.chosen)
    score = f"{result.chosen} ({best['score']:.3f})"
    if evolved is None:
        return f"The profile holds {score}, the best of what needs no evolution, on {best['n']} validation examples."
    level = "ahead of" if evolved["score"] < best["score"] else "level with"
    more = "--max-evals" if STRATEGIES[result.settings["strategy"]].searches else "--gradient-steps"
    return (
        f"{score} is {level} the evolved budgets ({evolved['score']:.3f}) on {best['n']} validation examples: the "
        f"profile holds {result.chosen!r}. More {more}, --train or another --budget may help."
    )
