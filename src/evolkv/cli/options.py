"""Options that several commands share, and the model they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from evolkv.cli import console
from evolkv.registry import unknown_name


def one_of(kind: str, names: Sequence[str]) -> Callable[[str], str]:
    """A check that an option has one of these values, for Typer's `callback`."""

    def check(value: str) -> str:
        if value not in names:
            raise unknown_name(kind, value, names)
        return value

    return check


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="An alias (evolkv list models), a folder, a .gguf file or a Hugging Face id."),
]
# What torch takes, and databases.
MOST_SEED = 2**63 - 1
Seed = Annotated[int, typer.Option("--seed", help="Seed of examples and search.", min=0, max=MOST_SEED)]
Markdown = Annotated[
    str | None,
    typer.Option("--markdown", metavar="FILE|-", help="Where the table goes as Markdown; - is standard output."),
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


@dataclass(frozen=True)
class ModelOptions:
    """How a model is to be loaded; see `evolkv.load_model`."""

    dtype: str | None = None
    device: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def given(self) -> list[str]:
        """What of this is not the default, as arguments of the program."""
        options = {"--dtype": self.dtype, "--device": self.device, "--attn-implementation": self.attn_implementation}
        words = [word for name, value in options.items() if value is not None for word in (name, value)]
        return words + ["--trust-remote-code"] * self.trust_remote_code

    def load(self, name: str, check: Callable[[Any, Any], None] | None = None) -> tuple[Any, Any]:
        """Return the model and its tokenizer; `check` is as for `load_model`."""
        with console.busy(f"loading {name}"):
            console.quiet_libraries()
            from evolkv.models import load_model

            return load_model(
                name,
                dtype=self.dtype,
                device=self.device,
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
                check=check,
            )
