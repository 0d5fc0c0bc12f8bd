"""RULER's `qa_1` (SQuAD) and `qa_2` (HotpotQA): a question among the documents of many (section 3.4 of the paper)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Annotated, Any

from pydantic import Field, Strict, model_validator

from evolkv.errors import TaskError
from evolkv.schemas import Schema, checked
from evolkv.tasks.base import Split, read_text
from evolkv.tasks.rows import AnyText, Row, Splitting, Text, check_split, digest, distinct, draw, of_split
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


class Question(Schema):
    """A question with its documents.

    Attributes:
        query: the question.
        answers: its answers, without repetition.
        needed: the documents that hold the answer.
        related: documents on the same matter, the first to be added.
    """

    query: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]
    related: tuple[str, ...]

    def row(self, where: str, group: str) -> Row[Question]:
        """Return the row of this question; its content is the question, its answers and what it needs."""
        content = digest(json.dumps([self.query, self.answers, self.needed]))
        return Row(where, where, self, group=group, content=content)


def question_puzzles(
    read: Callable[[str], Iterator[Row[Question]]], path: str, split: Split, n: int, splitting: Splitting, seed: int
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
    documents = sorted(
        {document for question in questions for document in question.fields.needed + question.fields.related}
    )
    drawn = draw(questions, split, n, splitting="all", seed=f"ruler-qa/{seed}", source=path, groups="questions")
    return [_puzzle(question.fields, documents, f"ruler-qa/{seed}/{question.content}") for question in drawn]


class _SquadAnswer(Schema):
    text: Text


class _SquadQuestion(Schema):
    question: Text
    answers: list[_SquadAnswer]
    is_impossible: bool = False

    @model_validator(mode="after")
    def _is_answered(self) -> _SquadQuestion:
        if not self.answers and not self.is_impossible:
            raise ValueError("an answer")
        return self


class _SquadParagraph(Schema):
    context: Text
    qas: list[_SquadQuestion]


class _SquadArticle(Schema):
    title: Text
    paragraphs: list[_SquadParagraph]


class _Squad(Schema):
    data: list[_SquadArticle]


def squad(path: str) -> Iterator[Row[Question]]:
    """Yield the answerable questions of a SQuAD file (`dev-v2.0.json`), an article being a group.

    Raises:
        TaskError: the file cannot be read, or is not in SQuAD's format.
    """
    for article in checked(_Squad, path, _load(path), TaskError).data:
        texts = [paragraph.context for paragraph in article.paragraphs]
        for paragraph in article.paragraphs:
            related = tuple(dict.fromkeys(text for text in texts if text != paragraph.context))
            for asked in paragraph.qas:
                if not asked.is_impossible:
                    answers = tuple(dict.fromkeys(answer.text for answer in asked.answers))
                    found = Question(
                        query=asked.question, answers=answers, needed=(paragraph.context,), related=related
                    )
                    yield found.row(path, article.title)


#: A pair in JSON is a list.
_Titled = Annotated[tuple[AnyText, list[AnyText]], Strict(False)]


class _HotpotQuestion(Schema):
    question: Text
    answer: Text
    context: Annotated[list[_Titled], Field(min_length=1)]
    supporting_facts: list[Annotated[tuple[str, Any], Strict(False)]]


def hotpotqa(path: str) -> Iterator[Row[Question]]:
    """Yield the questions of a HotpotQA file (`hotpot_dev_distractor_v1.json`), each a group.

    Raises:
        TaskError: the file cannot be read, or is not in HotpotQA's format.
    """
    rows = _load(path)
    if not isinstance(rows, list):
        raise TaskError(f"{path}: expected HotpotQA's list of questions, not a {type(rows).__name__}")
    for i, row in enumerate(rows):
        where = f"{path} [{i}]"
        asked = checked(_HotpotQuestion, where, row, TaskError)
        documents = {f"{title}\n{''.join(sentences)}": title for title, sentences in asked.context}
        named = {title for title, _ in asked.supporting_facts}
        # All of them where the facts name none: any might hold the answer.
        needed = tuple(document for document, title in documents.items() if title in named) or tuple(documents)
        related = tuple(document for document in documents if document not in needed)
        found = Question(query=asked.question, answers=(asked.answer,), needed=needed, related=related)
        yield found.row(where, asked.question)


def _puzzle(question: Question, documents: Sequence[str], name: str) -> Puzzle:
    def text(size: int) -> str:
        # Drawn anew for every size: that is cheap, and to keep the order would hold all documents for every question.
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
    except (ValueError, RecursionError) as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(f"{path}: not valid JSON ({error}); give the file as released") from None
