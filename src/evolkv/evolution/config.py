"""The settings of a search, typed once and checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from evolkv.budgets import Budget, BudgetSpec, read_budget, read_budgets, size_of
from evolkv.errors import BudgetError, UsageError
from evolkv.evaluation.scoring import has_slope, reads_answer
from evolkv.evaluation.shards import Backend
from evolkv.evolution.bounds import check_budgets
from evolkv.evolution.objective import fitness
from evolkv.evolution.progress import OnProgress, SearchProgress
from evolkv.evolution.strategies import STRATEGIES
from evolkv.evolution.strategies.base import positive_number, whole_number
from evolkv.numbers import is_several, is_whole, plain
from evolkv.profile import BudgetProfile
from evolkv.registry import unknown_name
from evolkv.selectors import Selector, SelectorSpec, get_selector
from evolkv.tasks import Task, get_task
from evolkv.tasks.metrics import check_metric
from evolkv.tasks.protocol import AGNOSTIC, AWARE, PROTOCOLS

BackendName = Literal["local", "ray"]
EngineName = Literal["replay", "naive"]
Granularity = Literal["layer", "head"]
Order = Literal["smallest", "largest"]
#: Of one generation, where a search's length is not said.
MOST_POPULATION = 10_000
_SMOOTH = ("logprob", "fidelity")
#: Examples that a generation of `joint` is scored on, all of them in turn: with the metric logprob few are enough to
#: learn from. Text metrics are coarse: a few examples would leave most candidates equal.
MINIBATCH = 2
#: The start, and the strategy, that follow the slope of the loss.
GRADIENT = "gradient"
#: The start that goes by the utility of each entry; see `evolkv.allocators.lukv`.
LUKV = "lukv"
#: Starts that are computed from the training examples, at each budget anew.
COMPUTED = (GRADIENT, LUKV)
#: The strategy that takes the start as it is.
START_ONLY = "start"
#: Selectors that compete where none is given, by protocol. Small windows leave small budgets most to choose; on code
#: the larger one is ahead; and where the question is not known, no window says what it will ask.
COMPETING = {
    AWARE: ("chunkkv:window=2", "snapkv:window=8", "snapkv:window=32"),
    AGNOSTIC: ("keydiff", "chunkkv:window=8", "snapkv:window=32"),
}
#: The selector where none is given and each would get a whole search.
ALONE = "snapkv"


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The settings of a search at any number of budgets; `OneBudget` and `SeveralBudgets` say which.

    Args:
        task: a task or its spec, such as ``"niah:context=1600"``; of several, each gives as many examples.
        selector: which tokens a budget keeps; a name, or a mapping with the name and parameters. Of several each gets
            a descent, and evolution goes on under the one that does best on the validation examples; each gets a whole
            search where there is no descent. The result lists them as `rivals`. Default: that of the profile to start
            from; without one `COMPETING`, those that fit the budget, where there is a descent, else `ALONE`.
        strategy: "joint" (one CMA-ES at exactly the target memory), "gradient" (the gradient start alone), "start"
            (the `start` as it is, even if a heuristic does better), "evolkv" (the paper's Algorithm 1) or "random".
        granularity: "layer" (one budget per layer) or "head" (one per KV head; not for "evolkv"). Default: "head" where
            the strategy can.
        metric: what to maximise: "logprob" (smooth; the default where the task has answers), "fidelity" (smooth, and
            needs no answers; the default where there are none), "agreement", or a text metric.
        protocol: "aware" (the question is in the prompt that is compressed; the default) or "agnostic" (the context is
            compressed before the question is seen); see `evolkv.tasks.protocol`.
        train: examples that candidates are scored on. Default: what the task says (`Task.train_examples`), 24
            of most.
        val: examples, none of them seen in training, that the result is chosen on.
        max_evals: candidates to evaluate at most. A search ends with its last whole generation; if it may not evaluate
            a whole one, it evaluates part of the first. Default: the generations that 16 candidates per variable take,
            or 1,200 candidates if that is less; for "evolkv" 10 generations per group.
        minibatch: training examples that each generation of "joint" is scored on, all of them in turn. Default: 2 with
            the smooth metrics, logprob and fidelity, else all.
        population: candidates per generation. Default: 4 + ⌊3 ln n⌋ for n variables.
        sigma: initial step. Default 0.3 (in units of the budget) for "evolkv", 0.5 (in log budgets) for "joint",
            0.7 with head granularity.
        group_size: layers per group of "evolkv".
        lam: weight λ of the cache score in the fitness.
        gamma: discount γ for budgets below the target.
        floor: the least a head may get. Default: one more than the tokens the selector always keeps.
        ceiling: the most a head may get. Default: the longest training prompt.
        start: allocation that "joint" starts from: "gradient" (what `gradient_steps` along the slope of the loss come
            to; see `evolkv.evolution.gradient`), "lukv" (LU-KV,
            calibrated on the training examples), "uniform", "pyramid", or a profile, which is brought to the budget.
            Default: "gradient" where the metric has a slope and the engine is "replay", else "uniform".
        gradient_steps: steps of the gradient start, of two training examples each, there and back.
        time_limit: seconds after which the search ends with what it has come to. It keeps room for the choice on the
            validation examples, so that all is done in about that time. Searches at several budgets and under several
            selectors share it. One that goes on counts anew. Default: none.
        seed: of the examples and the strategy. The same seed on the same machine gives the same history.
        engine: "replay" (prefill once per example) or "naive" (once per candidate and example).
        prefill_chunk: tokens of the chunks in which prompts are read, evicting after each, as `CompressedCache` does:
            for a model that will be run so. Needs engine "naive", and so as many prefills as there are candidates and
            examples: start from a profile that was found without. Default: all at once.
        backend: where replay runs: "local" (threads of this process), "ray" (see
            `evolkv.evaluation.on_ray.RayBackend`), or a function that makes a backend.
        workers: threads, or Ray workers. Default: one per core, or one per GPU.
        storage: an Optuna storage URL, or the path of a file, in which every generation is recorded. A search whose
            study is there already goes on where it was left, and comes to the same result. Default: none.
        study: name of the study in the storage.
        on_progress: called as the search goes on; `evolkv.progress_bar()` draws it.
        preset: what settings are that are not given: "best" (the defaults here) or "paper" (Algorithm 1 with the
            paper's hyper-parameters); see `PRESETS`. The classes themselves, which cannot tell what was given, take
            "best" alone.

    Raises:
        UsageError: a setting that no search can use, or two that do not go together.
    """

    task: str | Task | Sequence[str | Task]
    selector: SelectorSpec | Sequence[SelectorSpec] | None = None
    strategy: str = "joint"
    granularity: Granularity | None = None
    metric: str | None = None
    protocol: str = AWARE
    train: int | None = None
    val: int = 24
    max_evals: int | None = None
    minibatch: int | None = None
    population: int | None = None
    sigma: float | None = None
    group_size: int = 8
    lam: float = 0.3
    gamma: float = 0.2
    floor: int | None = None
    ceiling: int | None = None
    start: str | BudgetProfile | None = None
    gradient_steps: int = 48
    time_limit: float | None = None
    seed: int = 0
    engine: EngineName = "replay"
    prefill_chunk: int | None = None
    backend: BackendName | Callable[[], Backend] = "local"
    workers: int | None = None
    storage: str | None = None
    study: str = "search"
    on_progress: OnProgress | None = field(default=None, repr=False)
    preset: str = "best"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain(value))
        if preset_settings(self.preset):
            raise UsageError(
                f"preset {self.preset!r} is for evolkv.search and search_curve; give a {type(self).__name__} its "
                f"settings: **evolkv.evolution.config.preset_settings({self.preset!r})"
            )
        self._fill_in()
        self._check_values()
        self._check_strategy()
        self._check_start()
        self._check_engine()

    def _fill_in(self) -> None:
        """Fill in the defaults that depend on other settings."""
        if self.selector is None and isinstance(self.start, BudgetProfile):
            object.__setattr__(self, "selector", self.start.selector)
        if self.granularity is None:
            layers_only = STRATEGIES[self.strategy].layers_only or self._pruning is not None
            object.__setattr__(self, "granularity", "layer" if layers_only else "head")
        if self.metric is None:
            object.__setattr__(self, "metric", "logprob" if get_task(self.task).labelled else "fidelity")

    def _check_values(self) -> None:
        """Check each setting by itself."""
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known and not (name == "backend" and callable(value)):
                raise unknown_name(name, value, known)
        for name, noun in _COUNTS.items():
            value = getattr(self, name)
            # None stands for a default that depends on other settings, where there is one.
            if value is None and getattr(SearchConfig, name) is None:
                continue
            if not is_whole(value) or value < 1:
                least = f", at least one{noun and f' {noun}'}"
                raise UsageError(f"--{name.replace('_', '-')} is {value!r}; use a whole number{least}")
        seconds = self.time_limit
        if seconds is not None and not (isinstance(seconds, (int, float)) and 0 < seconds < math.inf):
            raise UsageError(f"--time-limit is {self.time_limit!r}; use a number of seconds above 0, such as 600")
        if not is_whole(self.seed) or self.seed < 0:
            raise UsageError(f"--seed is {self.seed!r}; use a whole number, at least 0")
        if self.sigma is not None:
            positive_number("sigma", self.sigma)
        if self.population is not None:
            whole_number("population", self.population, STRATEGIES[self.strategy].least_population)
        if self.population is not None and self.population > (self.max_evals or MOST_POPULATION):
            raise UsageError(
                f"--population is {self.population}, more than all candidates of the search ("
                f"{f'--max-evals {self.max_evals}' if self.max_evals else f'at most {MOST_POPULATION:,}'}); "
                "a search wants many generations: leave --population out, or raise --max-evals"
            )
        check_metric(self.metric)
        if not self.selectors:
            raise UsageError("no selector is given; give at least one, such as snapkv")
        # Called for its checks of lam and gamma, long before the first candidate.
        fitness(0.0, 1.0, 1.0, lam=self.lam, gamma=self.gamma)

    def _check_strategy(self) -> None:
        """Check what goes with the strategy."""
        strategy = STRATEGIES[self.strategy]
        if self.minibatch is not None and not strategy.mean_first:
            raise UsageError(
                f"strategy {self.strategy!r} compares candidates of different generations, which needs them all scored "
                "on the same examples; leave --minibatch out, or use --strategy joint"
            )
        if self.granularity == "head" and strategy.layers_only:
            raise UsageError(
                f"strategy {self.strategy!r} searches layers only; use --strategy joint for granularity 'head'"
            )
        if self.granularity == "head" and self._pruning is not None:
            raise UsageError(
                f"selector {self._pruning!r} drops tokens from whole layers, so budgets are by layer; use "
                "--granularity layer"
            )
        if self.start not in (None, "uniform") and not strategy.starts_anywhere:
            raise UsageError(
                f"strategy {self.strategy!r} starts from uniform budgets; leave --start out, or use 'joint'"
            )
        if self.strategy == GRADIENT and not self.follows_slope:
            raise UsageError("strategy 'gradient' is the gradient start alone; leave --start out, or use 'joint'")

    def _check_start(self) -> None:
        """Check what a computed start needs."""
        if (uncut := self._uncut) and self.begins_at in COMPUTED:
            raise UsageError(
                f"under {uncut} budgets say what is read: that has no slope, and lukv lays out what is held; use "
                "--start uniform with --strategy joint"
            )
        if self.follows_slope and not self.has_slope:
            lacking = f"engine {self.engine!r}" if has_slope(self.metric) else f"metric {self.metric!r}"
            raise UsageError(
                f"{lacking} has no slope for a gradient to follow; use --start uniform with "
                "--strategy joint, or --metric logprob with --engine replay"
            )
        if self.begins_at == LUKV and not self.calibrates:
            lacking = f"engine {self.engine!r}" if self.engine != "replay" else f"metric {self.metric!r}"
            raise UsageError(
                f"{lacking} reads no answer for lukv to be calibrated on; use --start uniform, or --metric logprob "
                "with --engine replay"
            )

    def _check_engine(self) -> None:
        """Check what goes with the engine."""
        if self.engine == "naive" and self.backend != "local":
            raise UsageError("engine 'naive' runs on the local backend only; use --engine replay with --backend ray")
        if self.engine == "replay" and self.prefill_chunk is not None:
            raise UsageError(
                "engine 'replay' cuts prompts that were read at once, and --prefill-chunk evicts while they are read; "
                "add --engine naive, which reads each prompt for each candidate"
            )
        if self.engine == "replay":
            for spec in self.selectors.values():
                get_selector(spec).check_replay()

    @property
    def _given(self) -> list[Selector]:
        given = self.selector if isinstance(self.selector, (list, tuple)) else [self.selector]
        return [get_selector(cast(SelectorSpec, each)) for each in given if each is not None]

    @property
    def _pruning(self) -> str | None:
        """The name of a selector that prunes the prefill, if one is given."""
        return next((each.name for each in self._given if each.prunes_prefill), None)

    @property
    def _uncut(self) -> str | None:
        """The spec of a selector whose budgets do not say what is held, if one is given."""
        return next((each.spec for each in self._given if not each.budgets_cut), None)

    @property
    def selectors(self) -> dict[str, SelectorSpec]:
        """The selectors by their specs, each once; those that compete by default all, whether or not they fit."""
        by_default = COMPETING[self.protocol] if self.follows_slope else ALONE
        given = by_default if self.selector is None else self.selector
        several = given if isinstance(given, (list, tuple)) else [cast(SelectorSpec, given)]
        return {get_selector(each).spec: each for each in several}

    def _check_budgets(self, targets: Sequence[Budget]) -> None:
        # Of the default selectors only the first has to fit: `settled` leaves out others that do not.
        asked = [*self.selectors.values()][: 1 if self.selector is None else None]
        check_budgets(targets, asked, self.floor, self.ceiling)

    @property
    def begins_at(self) -> str | BudgetProfile:
        """The allocation that the search starts from: `start`, or its default."""
        if self.start is not None:
            return self.start
        by_default = STRATEGIES[self.strategy].starts_anywhere and self.has_slope
        return GRADIENT if by_default or self.strategy == GRADIENT else "uniform"

    @property
    def has_slope(self) -> bool:
        """Return True if there is a slope that a search could follow."""
        return self.engine == "replay" and has_slope(self.metric) and self._uncut is None

    @property
    def follows_slope(self) -> bool:
        """Return True if the search starts with a descent."""
        return self.begins_at == GRADIENT

    @property
    def competes(self) -> bool:
        """Return True if of several selectors only the one whose descent does best goes on to evolve."""
        return self.follows_slope and self.strategy not in (GRADIENT, START_ONLY)

    @property
    def calibrates(self) -> bool:
        """Return True if LU-KV can be calibrated, and so is among what the search chooses from."""
        return self.engine == "replay" and reads_answer(self.metric) and self._uncut is None

    def evaluations(self, shape: tuple[int, ...], searches: int = 1) -> int:
        """Return how many candidates a search evaluates: whole generations, or part of one.

        Args:
            shape: of the budgets.
            searches: that divide `max_evals`, of which this is one.
        """
        strategy = STRATEGIES[self.strategy]
        if self.max_evals is None or not strategy.searches:
            return strategy.default_evaluations(self, shape, searches)
        asked, whole = self.max_evals // searches, strategy.smallest(self, shape)
        return asked // whole * whole or max(1, asked)

    @property
    def num_train(self) -> int:
        """The number of training examples."""
        return self.train or get_task(self.task).train_examples

    @property
    def examples_per_generation(self) -> int:
        """The number of training examples that each generation is scored on."""
        by_mean = STRATEGIES[self.strategy].mean_first and self.metric in _SMOOTH
        return min(self.minibatch or (MINIBATCH if by_mean else self.num_train), self.num_train)

    def report(self, progress: SearchProgress) -> None:
        """Say how the search goes on, if anyone listens."""
        if self.on_progress is not None:
            self.on_progress(progress)


#: Settings that are one of a few words, and settings that count something.
_CHOICES = {
    "granularity": get_args(Granularity),
    "engine": get_args(EngineName),
    "backend": get_args(BackendName),
    "protocol": PROTOCOLS,
}
_COUNTS = {
    "minibatch": "example",
    "max_evals": "candidate",
    "gradient_steps": "step",
    "group_size": "layer",
    "workers": "",
    "train": "example",
    "val": "example",
    "floor": "entry",
    "ceiling": "entry",
}


@dataclass(frozen=True, kw_only=True)
class OneBudget(SearchConfig):
    """A search at one budget.

    Args:
        budget: target, in cache entries per KV head, averaged over layers and heads; or a share of each prompt, such as
            ``"10%"``. At a share, candidates are the budgets of the longest training prompt, and every other example is
            scored at its own share, in the same proportions.
    """

    budget: BudgetSpec

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.budget
        if "," in given if isinstance(given, str) else is_several(given):
            raise BudgetError(f"the budget is {given!r}; evolkv.search takes one, evolkv.search_curve takes several")
        self._check_budgets(self.targets)

    @property
    def targets(self) -> list[Budget]:
        """The budget alone, as a number or a share."""
        return [read_budget(self.budget)]


@dataclass(frozen=True, kw_only=True)
class SeveralBudgets(SearchConfig):
    """Searches at several budgets, as one.

    `max_evals` is for the first budget; all others together get as many again. `start` is what the first one starts
    from. The window of a selector that is given by name alone is halved until it leaves the smallest budget something
    to choose.

    Args:
        budgets: the targets, at least two; all of them numbers, or all of them shares.
        first: whether to begin with the "smallest" or the "largest" budget.
    """

    budgets: BudgetSpec | Iterable[BudgetSpec]
    first: Order = "smallest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first not in get_args(Order):
            raise unknown_name("order", self.first, get_args(Order))
        # A generator can be read only once.
        object.__setattr__(self, "budgets", tuple(read_budgets(self.budgets)))
        kinds = {type(each) for each in self.targets}
        if len(kinds) > 1:
            raise UsageError(
                f"budgets are {', '.join(map(str, self.targets))}; give numbers of cache entries, or shares of each "
                "prompt, not both"
            )
        if len(self.targets) < 2:
            raise UsageError(f"a curve needs at least two budgets, got {self.targets}; use evolkv.search for one")
        self._check_budgets(self.targets)

    @property
    def targets(self) -> list[Budget]:
        """The budgets as numbers or shares, smallest first."""
        return sorted(read_budgets(self.budgets), key=size_of)


#: Settings by the name of a preset, without those that are the defaults. The paper's hyper-parameters are those of its
#: section 4.1, of which groups of 8 layers, lam 0.3 and gamma 0.2 are the defaults.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "best": {},
    "paper": {
        "strategy": "evolkv",
        "granularity": "layer",
        "selector": "snapkv:window=32",
        "start": "uniform",
        "sigma": 0.3,
    },
}


def preset_settings(name: str) -> dict[str, Any]:
    """Return the settings of a preset that are not the defaults.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return dict(PRESETS[name])
