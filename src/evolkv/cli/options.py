"""Options that several commands share, and the model they ask for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evolkv.cli import console
from evolkv.errors import UsageError
from evolkv.registry import unknown_name
from evolkv.whole_files import output_path

if TYPE_CHECKING:
    from evolkv.profile import BudgetProfile
    from evolkv.selectors import Selector


def one_of(kind: str, names: Sequence[str]) -> Callable[[str | None], str | None]:
    """Return a check that an option, if given, has one of these values, for Typer's `callback`."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise unknown_name(kind, value, names)
        return value

    return check


def to_read(value: Any) -> Any:
    """Expand ``~`` in a path, or in each of several, for Typer's `callback`: shells leave ``--cache=~/f`` as it is."""
    if isinstance(value, str):
        return os.path.expanduser(value)
    return value if value is None else [os.path.expanduser(each) for each in value]


def to_write(value: str | None) -> str | None:
    """Return the path of an output, for Typer's `callback`; see `output_path`."""
    if value is None:
        return None
    path = output_path(value)
    # Below the current folder one is made; elsewhere one that is missing is a slip of the fingers.
    if os.path.isabs(path) and not os.path.lexists(os.path.dirname(path)):
        raise UsageError(f"folder {os.path.dirname(path)} does not exist; make it, or give another path than {path}")
    return path


def to_write_or_print(value: str | None) -> str | None:
    """Return the path of an output, or ``-`` for standard output, for Typer's `callback`."""
    return value if value == "-" else to_write(value)


def files(*outs: str | None) -> list[str]:
    """Return the outputs that are files: neither left out nor standard output."""
    return [out for out in outs if out not in (None, "-")]


def valid_seed(value: int) -> int:
    """Check that torch and databases can hold a seed, for Typer's `callback`."""
    if not 0 <= value < 2**63:
        raise UsageError(f"--seed is {value}; expected a whole number from 0 to {2**63 - 1}")
    return value


def json_option(metavar: str, what: str) -> Any:
    """Return the option for a file of JSON, or standard output; `what` is for its help, such as "the rows go"."""
    said = f"Where {what}; - is standard output."
    return typer.Option("--json", metavar=metavar, callback=to_write_or_print, help=said)


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="An alias (evolkv list models), a folder, a .gguf file or a Hugging Face id."),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", callback=valid_seed, help="Draws other examples and candidates.")
]
Markdown = Annotated[
    str | None,
    typer.Option(
        "--markdown",
        metavar="FILE|-",
        callback=to_write_or_print,
        help="Where the table goes as Markdown; - is standard output.",
    ),
]
Protocol = Annotated[
    str,
    typer.Option(
        "--protocol",
        metavar="aware|agnostic",
        callback=one_of("protocol", ("aware", "agnostic")),
        help="Whether the question is in the prompt that is compressed, or is read after the context was.",
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option("--prefill-chunk", metavar="N", help="Read prompts in chunks of N tokens, evicting after each."),
]
Companion = Annotated[
    str | None,
    typer.Option(
        "--companion",
        metavar="MODEL",
        callback=to_read,
        help="The small model that reads along, for selector smallkv.",
    ),
]
Granularity = Annotated[
    str,
    typer.Option(
        "--granularity",
        metavar="layer|head",
        callback=one_of("granularity", ("layer", "head")),
        help="Evolve one budget per layer, or one per KV head.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16. (default: what is fast here)", rich_help_panel="Model"),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)", rich_help_panel="Model"),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attn-implementation", help="transformers' attention, such as sdpa or eager.", rich_help_panel="Model"
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel="Model"),
]


def accompanied(selectors: Iterable[Selector | None], companion: str | None) -> list[Selector | None]:
    """Return selectors, those that take a companion model with this one, or with their own where it is None.

    Raises:
        UsageError: if one needs a companion and has none, or no selector takes the one that is given.
    """
    from evolkv.selectors.smallkv import with_companion

    given = list(selectors)
    if companion is not None and all(each is None or each.companion is None for each in given):
        raise UsageError(f"--companion {companion} is for selector smallkv, which is not among what is asked for")
    return [None if each is None else with_companion(each, companion) for each in given]


@dataclass(frozen=True)
class ModelOptions:
    """Options for loading a model; see `evolkv.load_model`."""

    dtype: str | None = None
    device: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def given(self) -> list[str]:
        """Return the options that are not the default, as arguments of the program."""
        options = {"--dtype": self.dtype, "--device": self.device, "--attn-implementation": self.attn_implementation}
        words = [word for name, value in options.items() if value is not None for word in (name, value)]
        return words + ["--trust-remote-code"] * self.trust_remote_code

    def load(
        self,
        name: str,
        check: Callable[[Any, Any], None] | None = None,
        profiles: Iterable[BudgetProfile | None] = (),
    ) -> tuple[Any, Any]:
        """Return the model and its tokenizer.

        Args:
            name: of the model.
            check: as for `load_model`.
            profiles: those that are given have to fit the model's config.
        """
        given = [profile for profile in profiles if profile is not None]

        def check_all(tokenizer: Any, config: Any) -> None:
            for profile in given:
                profile.check_config(config)
            if check is not None:
                check(tokenizer, config)

        with console.busy(f"loading {name}"):
            console.quiet_libraries()
            from evolkv.models import load_model

            return load_model(
                name,
                dtype=self.dtype,
                device=self.device,
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
                check=check_all,
            )
