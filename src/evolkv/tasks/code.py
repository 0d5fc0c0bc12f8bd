"""Code completion: the next line of a Python file, from a folder of sources or the standard library itself.

The prompt and the metric are those of LongBench's subset lcc (arXiv 2308.14508), after LCC (Guo et al., "LongCoder",
arXiv 2306.14893).
"""

from __future__ import annotations

import ast
import builtins
import logging
import os
import platform
import random
import re
import sysconfig
import tokenize
import warnings
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, ClassVar

from evolkv.errors import TaskError
from evolkv.tasks.base import Example, Split, Task, check_request, partition
from evolkv.tasks.prompts import encode_text
from evolkv.tasks.rows import digest

logger = logging.getLogger(__name__)

SLACK = 8
"""A prompt is at most this many tokens shorter than `context`, and never longer."""

RECENT = 32
"""A name that occurs in this many lines before the asked one could be had without a long context."""

LENGTHS = range(10, 121)
"""Characters of an asked line, without indentation."""

QUESTION = "Next line of code:\n"
PROMPT = f"Please complete the code given below. \n{{code}}{QUESTION}"
MAX_NEW_TOKENS = 64

# Tests and what is generated or not Python's own; `encodings` and `pydoc_data` are tables.
_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_bundled",
    "encodings",
    "pydoc_data",
}
_MOST_BYTES = 1_000_000

# The metric passes over lines with these, even where they are right.
_MARKS = ("`", "#", "//")
_WORD = re.compile(r"\w+")
_TYPES = (bool, bytearray, bytes, dict, float, int, list, set, str, tuple, BaseException)
_KNOWN = {"self", "cls", *dir(builtins), *(name for kind in _TYPES for name in dir(kind))}


@dataclass(frozen=True)
class CodeCompletion(Task):
    """Complete the next line of a Python file, by default of the standard library's own.

    A line is asked for if a name in it (of a variable, function, attribute or module) occurs as such further up in
    the prompt, but nowhere in its last `RECENT` = 32 lines (nor in its second half, where that is shorter).
    Builtins and the methods of built-in types do not count as names. The line is code, neither in a comment nor in
    a text that spans lines, has 10 to 120 characters, and none of "`", "#" and "//", which the metric ignores.

    Every file serves one split, whatever the settings: a quarter of them train, a quarter validation, half report.
    A draw takes one line of each file in the seed's order before it takes a second of any. `Example.extra` has
    the `file`, its `line` (from 1) and the version of `python`: the standard library differs between versions, so
    scores are comparable within one version only. Files are parsed, never executed.

    Args:
        context: length of a prompt in tokens; prompts are at most `SLACK` = 8 tokens shorter and never longer. The
            code begins with a whole line, not with the file. Default 1600.
        path: a folder of .py files, at any depth. Default None: Python's standard library. Folders called test,
            tests, idle_test, site-packages, dist-packages, _bundled, encodings, pydoc_data or __pycache__ and hidden
            ones are passed over; so are files above 1 MB, or that cannot be read or parsed.

    Raises:
        TaskError: a setting out of its range.
    """

    name: ClassVar[str] = "code"
    default_metric: ClassVar[str] = "code_sim"
    main_setting: ClassVar[str] = "path"

    context: int = 1600
    path: str | None = None

    def __post_init__(self) -> None:
        if self.context < 1:
            raise TaskError(f"code: context={self.context} is not a length; give the prompt's length in tokens")

    def examples(self, split: Split, n: int, tokenizer: Any, seed: int = 0) -> list[Example]:
        """Draw n lines of the split's files in the seed's order; all of them, with a warning, if there are fewer.

        Raises:
            TaskError: `context` cannot hold the instruction, or the folder is missing, has too few files, or no file
                of the split has a line to ask for after that much code.
        """
        check_request(split, n)
        prompts = _Prompts(tokenizer, self.context, _overhead(tokenizer))
        if prompts.room <= SLACK:
            raise TaskError(
                f"code: context={self.context} is too small for the instruction and code; "
                f"give at least {self.least_context(tokenizer)} tokens"
            )
        folder, names = self._folder, self._files(split)
        random.Random(f"code/{seed}/{split}").shuffle(names)
        streams = [_lines(folder, name, prompts, f"code/{seed}/{split}/{name}") for name in names]
        drawn = list(islice(_in_turn(streams), n))
        if not drawn:
            raise TaskError(
                f"code: none of the {len(names)} files of split {split!r} in {folder} has a line to ask for after "
                f"{self.context} tokens of code; give a smaller context, or path= a folder with longer files"
            )
        if len(drawn) < n:
            logger.warning("%s: split %r has %d lines to ask for; using all, not %d", folder, split, len(drawn), n)
        return drawn

    def least_context(self, tokenizer: Any) -> int:
        """Return the fewest tokens that hold the instruction and some code."""
        return _overhead(tokenizer) + SLACK + 1

    def files(self) -> list[str]:
        """Return the .py files of a folder that is the user's."""
        return [] if self.path is None else [str(self._folder / name) for name in _python_files(self._folder)]

    def check_files(self) -> None:
        """Look for the folder's files, without reading them."""
        self._files("report")

    @property
    def _folder(self) -> Path:
        if self.path == "":
            raise TaskError("code: the path of the folder is empty; give one, or leave path out")
        return Path(sysconfig.get_path("stdlib") if self.path is None else os.path.expanduser(self.path))

    def _files(self, split: Split) -> list[str]:
        """Return the files that serve a split, relative to the folder, with "/" between their parts."""
        folder = self._folder
        if not folder.is_dir():
            problem = "is a file" if folder.exists() else "does not exist"
            raise TaskError(f"code: folder {folder} {problem}; give path= a folder of .py files")
        names = sorted(_python_files(folder), key=digest)
        own = names[partition(len(names))[split]]
        if not own:
            raise TaskError(f"code: split {split!r} is empty: {folder} has {len(names)} .py files; give at least 4")
        return own


@dataclass(frozen=True)
class _Line:
    """A line that may be asked for.

    Args:
        index: its number in the file, from 0.
        seen: for each name in it that occurs further up as a name: the last line where it does, and the last line
            where the word occurs at all.
    """

    index: int
    seen: Sequence[tuple[int, int]]

    def reaches_back(self, start: int) -> bool:
        """Return whether a name of the line occurs after line `start`, but not in the lines just before."""
        recent = self.index - min(RECENT, (self.index - start) // 2)
        return any(start <= named and occurs < recent for named, occurs in self.seen)


@dataclass(frozen=True)
class _Source:
    """A file: its text, and the place in it where each line starts, the end of the text included."""

    text: str
    starts: Sequence[int]

    def between(self, start: int, end: int) -> str:
        """Lines start to end - 1, line breaks included."""
        return self.text[self.starts[start] : self.starts[end]]

    def before(self, end: int, characters: float) -> int:
        """Return the first line from which to line `end` there are at most that many characters."""
        return bisect_left(self.starts, self.starts[end] - characters)


@dataclass(frozen=True)
class _Prompts:
    """Fits prompts to `context` tokens, of which the instruction takes `overhead`."""

    tokenizer: Any
    context: int
    overhead: int

    @property
    def room(self) -> int:
        """Tokens for code."""
        return self.context - self.overhead

    def left(self, code: str) -> int:
        """Tokens by which a prompt with that code falls short of `context`; negative if it is longer."""
        return self.context - len(encode_text(self.tokenizer, PROMPT.format(code=code)))

    def start(self, source: _Source, end: int, guess: int) -> int | None:
        """Return the line from which code up to line `end` fills the prompt; None if no line will do."""
        low, high, probe = -1, end, guess
        # Invariant: from `low` (or before the file) there is too much, from `high` too little.
        while high - low > 1:
            if not low < probe < high:
                probe = (low + high) // 2
            code = source.between(probe, end)
            left = self.left(code)
            if 0 <= left <= SLACK:
                return probe
            if left < 0:
                low = probe
            else:
                high = probe
            per_token = len(code) / max(1, self.room - left)
            probe = source.before(end, (self.room - SLACK / 2) * per_token)
        return None


def _overhead(tokenizer: Any) -> int:
    """Return the tokens of a prompt without code."""
    return len(encode_text(tokenizer, PROMPT.format(code="")))


def _python_files(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith(".")]
        for file in files:
            name = Path(place, file).relative_to(folder).as_posix()
            # Not all file names are texts; those that are not cannot name an example.
            if file.endswith(".py") and name.isprintable():
                yield name


def _in_turn(streams: Sequence[Iterator[Example]]) -> Iterator[Example]:
    """Yield one example of each stream, then the next of each, until all are exhausted."""
    while streams:
        going = []
        for stream in streams:
            example = next(stream, None)
            if example is not None:
                going.append(stream)
                yield example
        streams = going


def _lines(folder: Path, name: str, prompts: _Prompts, seed: str) -> Iterator[Example]:
    """Yield the examples of a file in the seed's order; none if the file cannot be read or is too short."""
    text = _read(folder / name)
    # The beginning tells how many characters make a token.
    head = text[: 4 * prompts.context]
    per_token = len(head) / max(1, prompts.room - prompts.left(head))
    if len(text) < per_token * prompts.room:
        return
    lines = text.split("\n")
    source = _Source(text, [0, *accumulate(len(line) + 1 for line in lines)])
    candidates = _candidates(text, lines)
    random.Random(seed).shuffle(candidates)
    for line in candidates:
        guess = source.before(line.index, per_token * prompts.room)
        if guess == 0 or not line.reaches_back(guess):
            continue
        start = prompts.start(source, line.index, guess)
        if start is None or not line.reaches_back(start):
            continue
        prompt = PROMPT.format(code=source.between(start, line.index))
        yield Example(
            id=f"code-{name}:{line.index + 1}",
            prompt=prompt,
            references=(lines[line.index].rstrip(),),
            target=lines[line.index].rstrip(),
            max_new_tokens=MAX_NEW_TOKENS,
            metric=CodeCompletion.default_metric,
            question_at=len(prompt) - len(QUESTION),
            extra={"file": name, "line": line.index + 1, "python": ".".join(platform.python_version_tuple()[:2])},
        )


def _read(path: Path) -> str:
    """Return the text of a Python file in its own encoding; empty if it has none to read."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return ""
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, ValueError):
        return ""


def _candidates(text: str, lines: Sequence[str]) -> list[_Line]:
    """Return the lines that may be asked for, in their order; none if the text is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    names, texts = _names_and_texts(tree)
    candidates = []
    named: dict[str, int] = {}
    occurs: dict[str, int] = {}
    for index, line in enumerate(lines):
        words = set(_WORD.findall(line))
        # Where a node spans lines, or is within an f-string, its position need not be the name's.
        own = names[index] & words - _KNOWN
        seen = [(named[name], occurs[name]) for name in own if name in named]
        code = line.strip()
        if seen and index not in texts and len(code) in LENGTHS and not any(mark in code for mark in _MARKS):
            candidates.append(_Line(index, seen))
        named.update(dict.fromkeys(own, index))
        occurs.update(dict.fromkeys(words, index))
    return candidates


def _names_and_texts(tree: ast.Module) -> tuple[defaultdict[int, set[str]], set[int]]:
    """By line, from 0: the names in it; and the lines of docstrings and of texts that span lines."""
    names: defaultdict[int, set[str]] = defaultdict(set)
    texts: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
                texts.update(range(first - 1, last))
            case ast.Constant(value=str() | bytes(), lineno=first, end_lineno=int(last)) if last > first:
                texts.update(range(first - 1, last))
            case ast.JoinedStr(lineno=first, end_lineno=int(last)) if last > first:
                texts.update(range(first - 1, last))
            case ast.Name(id=name, lineno=line):
                names[line - 1].add(name)
            case ast.Attribute(attr=name, end_lineno=int(line)):
                names[line - 1].add(name)
            case (
                ast.FunctionDef(name=name, lineno=line)
                | ast.AsyncFunctionDef(name=name, lineno=line)
                | ast.ClassDef(name=name, lineno=line)
                | ast.alias(name=name, lineno=line)
            ):
                names[line - 1].add(name)
            case ast.arg(arg=name, lineno=line) | ast.keyword(arg=str(name), lineno=line):
                names[line - 1].add(name)
    return names, texts
