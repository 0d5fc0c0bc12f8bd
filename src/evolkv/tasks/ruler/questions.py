"""RULER's `qa_1` (SQuAD) and `qa_2` (HotpotQA): a question among the documents of many (section 3.4 of the paper)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from evolkv.errors import TaskError
from evolkv.tasks.base import Split, read_text
from evolkv.tasks.rows import Splitting, check_split, check_text, digest, distinct, draw, get_text, kind_of, of_split
from evolkv.tasks.ruler.puzzle import Family, Puzzle

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nThe following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {query}"
)
PREFIX = " Answer:"
DOCUMENT = "Document {number}:\n{document}"

# The references are several people's answers to the same question: any one of them is right.
FAMILY = Family(
    max_new_tokens=32, prefix=PREFIX, target=lambda answers: f" {answers[0]}", asks=("Question: ",), metric="ruler_part"
)


@dataclass(frozen=True)
class Question:
    """A question with its documents.

    Args:
        group: what must not be in two splits.
        query: the question.
        answers: its answers, without repetition.
        needed: the documents that hold the answer.
        related: documents on the same matter, the first to be added.
    """

    group: str
    query: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]
    related: tuple[str, ...]

    @property
    def content(self) -> str:
        """A hash of the question, its answers and what it needs."""
        return digest(json.dumps([self.query, self.answers, self.needed]))


def question_puzzles(
    read: Callable[[str], Iterator[Question]], path: str, split: Split, n: int, splitting: Splitting, seed: int
) -> list[Puzzle]:
    """Return n questions of a split in the seed's order; all of them, with a warning, if there are fewer.

    A puzzle's size is its number of documents: those that the question needs, then related ones, then others of
    the same split, in turn again where the split has no more.

    Raises:
        TaskError: the file cannot be read or is malformed, or the split has no questions.
    """
    every = distinct(read(path), path)
    questions = of_split(every, split, splitting)
    check_split(questions, every, split, path, "articles or questions")
    documents = sorted({document for question in questions for document in question.needed + question.related})
    drawn = draw(questions, split, n, splitting="all", seed=f"ruler-qa/{seed}", source=path, groups="questions")
    return [_puzzle(question, documents, f"ruler-qa/{seed}/{question.content}") for question in drawn]


def squad(path: str) -> Iterator[Question]:
    """Yield the answerable questions of a SQuAD file (`dev-v2.0.json`), an article being a group.

    Raises:
        TaskError: the file cannot be read, or is not in SQuAD's format.
    """
    for i, article in enumerate(_list(_load(path), "data", path)):
        where = f"{path} data[{i}]"
        title = get_text(_object(article, where), "title", where)
        paragraphs = _list(article, "paragraphs", where)
        texts = [
            get_text(_object(paragraph, f"{where}.paragraphs[{j}]"), "context", f"{where}.paragraphs[{j}]")
            for j, paragraph in enumerate(paragraphs)
        ]
        for j, paragraph in enumerate(paragraphs):
            for k, asked in enumerate(_list(paragraph, "qas", f"{where}.paragraphs[{j}]")):
                place = f"{where}.paragraphs[{j}].qas[{k}]"
                if _object(asked, place).get("is_impossible", False):
                    continue
                answers = [get_text(_object(answer, place), "text", place) for answer in _list(asked, "answers", place)]
                if not answers:
                    raise TaskError(f"{place}: 'answers' is empty; expected a list of objects with 'text'")
                related = dict.fromkeys(text for text in texts if text != texts[j])
                yield Question(title, get_text(asked, "question", place), _once(answers), (texts[j],), tuple(related))


def hotpotqa(path: str) -> Iterator[Question]:
    """Yield the questions of a HotpotQA file (`hotpot_dev_distractor_v1.json`), each a group.

    Raises:
        TaskError: the file cannot be read, or is not in HotpotQA's format.
    """
    rows = _load(path)
    if not isinstance(rows, list):
        raise TaskError(f"{path}: expected HotpotQA's list of questions, not {kind_of(rows)}")
    for i, row in enumerate(rows):
        where = f"{path} [{i}]"
        query, answer = (get_text(_object(row, where), key, where) for key in ("question", "answer"))
        documents = {}
        for entry in _list(row, "context", where):
            title, sentences = _pair(entry, "context", where)
            if not isinstance(sentences, list):
                raise TaskError(f"{where}: 'context' has a paragraph that is not a list of sentences")
            for text in (title, *sentences):
                check_text(text, "an entry of 'context'", where, blank=True)
            documents[f"{title}\n{''.join(sentences)}"] = title
        named = {_pair(fact, "supporting_facts", where)[0] for fact in _list(row, "supporting_facts", where)}
        if not documents:
            raise TaskError(f"{where}: 'context' is empty; expected a list of paragraphs")
        # All of them where the facts name none: any might hold the answer.
        needed = tuple(document for document, title in documents.items() if title in named) or tuple(documents)
        related = tuple(document for document in documents if document not in needed)
        yield Question(query, query, (answer,), needed, related)


def _puzzle(question: Question, documents: Sequence[str], name: str) -> Puzzle:
    def text(size: int) -> str:
        # Drawn anew for every size, which is cheap; kept, it would be all documents for every question.
        rng = random.Random(name)
        first = [*question.needed, *rng.sample(question.related, len(question.related))]
        taken = set(first)
        others = (document for document in _shuffled(documents, rng) if document not in taken)
        chosen = [*islice(first, size), *islice(others, max(0, size - len(first)))]
        chosen += islice(cycle(list(chosen)), size - len(chosen))
        random.Random(f"{name}/{size}").shuffle(chosen)
        numbered = (DOCUMENT.format(number=i, document=document) for i, document in enumerate(chosen, start=1))
        return TEMPLATE.format(context="\n\n".join(numbered), query=question.query)

    return Puzzle(text=text, prefix=PREFIX, answers=question.answers, least=len(question.needed))


def _shuffled(documents: Sequence[str], rng: random.Random) -> Iterator[str]:
    # As many as are taken, and no more: there may be 60,000.
    order: dict[int, int] = {}
    for i in range(len(documents)):
        j = rng.randrange(i, len(documents))
        order[i], order[j] = order.get(j, j), order.get(i, i)
        yield documents[order[i]]


def _load(path: str) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise TaskError(
            f"{path} line {error.lineno}: not valid JSON ({error.msg}); give the file as released"
        ) from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: not JSON that can be read ({error}); give the file as released") from None


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TaskError(f"{where}: expected an object, not {kind_of(value)}")
    return value


def _list(fields: object, key: str, where: str) -> list[Any]:
    value = _object(fields, where).get(key)
    if not isinstance(value, list):
        raise TaskError(f"{where}: {key!r} is {'missing' if value is None else kind_of(value)}; expected a list")
    return value


def _pair(value: object, key: str, where: str) -> tuple[str, Any]:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise TaskError(f"{where}: {key!r} has an entry that is not a title with what belongs to it")
    return value[0], value[1]


def _once(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
