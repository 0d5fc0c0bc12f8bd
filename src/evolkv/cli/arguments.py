"""From what a shell passes to what Typer and the library take."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

#: They may stand anywhere.
GLOBAL_FLAGS = {"--debug", "--quiet", "--log-json"}
#: Options that take several values, by command.
_SEVERAL_VALUES = {
    "eval": {"--task", "-t", "--method", "-m", "--budget", "-b", "--sample-ids"},
    "search": {"--task", "-t", "--selector", "-s", "--budget", "-b"},
    "plan": {"--task", "-t", "--selector", "-s", "--budget", "-b"},
}
_JSON_IS_A_FLAG = {"generate", "list", "profile show"}
#: A prompt may look like anything.
_FREE_TEXT = {"--prompt"}


def for_typer(argv: Sequence[str]) -> list[str]:
    """Bring global flags to the front, where Typer expects them, and spell out the lists of options.

    Typer takes an option's values one by one: ``--method full snapkv`` becomes ``--method full --method snapkv``.

    Args:
        argv: the program's arguments.
    """
    front: list[str] = []
    rest: list[str] = []
    previous = ""
    for index, token in enumerate(argv):
        if token == "--":
            rest += argv[index:]
            break
        is_flag = token in GLOBAL_FLAGS and previous not in _FREE_TEXT
        (front if is_flag else rest).append(token)
        previous = token
    rest = _json_flag(rest)
    return front + _repeated(rest, _SEVERAL_VALUES.get("".join(rest[:1]), set()))


def takes_several(command: str) -> str:
    """Return an option of a command that takes several values, "" where there is none."""
    return next((each for each in sorted(_SEVERAL_VALUES.get(command, ())) if each.startswith("--")), "")


def _json_flag(argv: list[str]) -> list[str]:
    """Take ``--json -`` and ``--json=-`` for ``--json`` where that is a flag: elsewhere it is where the JSON goes."""
    command = "profile show" if argv[:2] == ["profile", "show"] else "".join(argv[:1])
    if command not in _JSON_IS_A_FLAG:
        return argv
    end = argv.index("--") if "--" in argv else len(argv)
    words = ["--json" if word == "--json=-" else word for word in argv[:end]]
    # To generate, - is also the place of the prompt.
    has_prompt = any(word.partition("=")[0] in ("--prompt", "--prompt-file") for word in words)
    if command != "generate" or has_prompt:
        words = [word for i, word in enumerate(words) if word != "-" or words[i - 1] != "--json"]
    return words + argv[end:]


def _repeated(argv: Sequence[str], several: Collection[str]) -> list[str]:
    result: list[str] = []
    option, filled = "", False
    for index, token in enumerate(argv):
        if token == "--":
            return result + list(argv[index:])
        name, equals, _ = token.partition("=")
        # "-" alone is a value, and so is a number below zero.
        if name.startswith("-") and name[1:] and not name[1].isdigit():
            option, filled = (name if name in several else ""), bool(equals)
            result.append(token)
        else:
            result += [option, token] if option and filled else [token]
            filled = True
    return result


def sibling(path: str, ending: str) -> str:
    """Return the name of a file that goes with another: of ``run.json`` it is ``run`` and the ending.

    Only ``.json`` is dropped, so that ``run.1`` and ``run.2`` have siblings of their own.
    """
    return path.rstrip(os.sep).removesuffix(".json") + ending
