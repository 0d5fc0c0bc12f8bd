"""The kinds of examples that only the task `general` has, each as a puzzle whose context can have any size."""

from __future__ import annotations

import operator
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from evolkv.tasks.base import SPLITS, Split
from evolkv.tasks.prose import sentences
from evolkv.tasks.ruler.puzzle import belongs, fresh, lazily
from evolkv.tasks.ruler.vocabulary import words


@dataclass(frozen=True)
class Puzzle:
    """An example before it is fitted to a length.

    Args:
        turns: size → the messages of a conversation, the user's first and last, the assistant's between: longer for
            larger sizes, and always the same for the same size.
        asks: how the question begins, which ends the last message.
        prefix: where the answer begins.
        answer: the answer, which follows the prefix after a space.
        target: the text that the metric logprob looks for after the prefix. Default: a space and the answer.
        least: the smallest size that leaves the puzzle what it is.
        chat: whether the messages go into the model's chat template, where it has one.
        metric: name of the text metric.
        max_new_tokens: most tokens to generate.
        stop: texts that end the answer.
    """

    turns: Callable[[int], list[str]]
    asks: str
    prefix: str
    answer: str
    target: str = ""
    least: int = 1
    chat: bool = True
    metric: str = "contains"
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ()


def variables(rng: random.Random, split: Split) -> Puzzle:
    """Return a puzzle of two chains of assignments in prose, of which the last variable of one is asked for.

    After RULER's variable tracking (arXiv 2404.06654, sec. 3.2). Size: sentences of prose.
    """
    taken: set[str] = set()
    names = [fresh(lambda: "".join(rng.choices(string.ascii_uppercase, k=3)), split, taken) for _ in range(6)]
    values = [fresh(lambda: str(rng.randint(10_000, 99_999)), split, taken) for _ in range(2)]
    lines = []
    for chain, value in ((names[:3], values[0]), (names[3:], values[1])):
        sources = [value, *(f"VAR {name}" for name in chain)]
        lines.append([f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=False)])
    # The order within a chain stays.
    order = [0] * 3 + [1] * 3
    rng.shuffle(order)
    assignments = [lines[chain].pop(0) for chain in order]
    question = f"Question: What is the value of VAR {names[2]}?"
    text = _among(_prose(rng), assignments, sorted(rng.random() for _ in assignments))
    return Puzzle(
        turns=lambda size: [
            f"Some variables get their values in the following text. Keep track of them.\n\n{text(size)}\n\n{question}"
        ],
        asks=question,
        prefix=f"The value of VAR {names[2]} is",
        answer=values[0],
    )


def counting(rng: random.Random, split: Split) -> Puzzle:
    """Return a puzzle of a list of words, of which the one that occurs most often is asked for.

    After RULER's common words (arXiv 2404.06654, sec. 3.3). Size: words of the list; every fourth is the common one.
    """
    common = fresh(lambda: rng.choice(words()), split, set())
    others = [word for word in rng.sample(words(), len(words())) if word != common]
    name, question = rng.random(), "Question: Which word occurs most often in the list above?"

    def turns(size: int) -> list[str]:
        often = max(3, size // 4)
        listed = [common] * often + [others[i % len(others)] for i in range(size - often)]
        random.Random(f"{name}/{size}").shuffle(listed)
        return [f"One word occurs far more often than the others in this list:\n\n{', '.join(listed)}.\n\n{question}"]

    prefix = "The word that occurs most often in the list is"
    return Puzzle(turns, question, prefix, common, least=6)


_NAMES = "Anna Ben Clara David Emma Felix Grace Henry Irene Jack Laura Martin Nora Oliver Paula Robert"
_GOODS = "apples books candles stamps pencils eggs tickets shells buttons oranges postcards marbles"
#: A problem, its solution, and what of a, b and c makes the number in the middle and, with it, the result.
_SUMS: tuple[tuple[str, str, Callable[[int, int], int], Callable[[int, int], int]], ...] = (
    (
        "{name} has {a} {goods}. A friend brings {b} more, and then {name} gives {c} away. "
        "How many {goods} does {name} have now?",
        "With the new ones {name} has {a} + {b} = {m} {goods}. After giving some away {name} has {m} - {c} = {r}.",
        operator.add,
        operator.sub,
    ),
    (
        "{name} buys {a} boxes with {b} {goods} in each, and loses {c} {goods} on the way home. "
        "How many {goods} are left?",
        "The boxes hold {a} * {b} = {m} {goods}. After the loss there are {m} - {c} = {r}.",
        operator.mul,
        operator.sub,
    ),
    (
        "{name} sells {a} {goods} in the morning and {b} in the afternoon of each day. "
        "How many {goods} does {name} sell in {c} days?",
        "In a day {name} sells {a} + {b} = {m} {goods}. In {c} days {name} sells {m} * {c} = {r}.",
        operator.add,
        operator.mul,
    ),
)


def arithmetic(rng: random.Random, split: Split) -> Puzzle:
    """Return a puzzle of worked word problems and one to solve, in the form of the task `gsm8k`.

    The result of a problem serves one split alone. Size: worked problems.
    """
    asked, solution, result = _problem(rng, split)
    worked = lazily(lambda: "Question: {}\nAnswer: {}\n\n".format(*_problem(rng, split)[:2]))
    return Puzzle(
        turns=lambda size: [f"{''.join(worked(size))}Question: {asked}"],
        asks=f"Question: {asked}",
        prefix="Answer:",
        answer=result,
        target=f" {solution}",
        chat=False,
        metric="gsm8k",
        max_new_tokens=64,
        stop=("Question:",),
    )


def _problem(rng: random.Random, split: Split) -> tuple[str, str, str]:
    """Return a problem, its solution, and the number that the solution ends in."""
    while True:
        question, solution, first, second = rng.choice(_SUMS)
        a, b, c = rng.randint(6, 30), rng.randint(3, 12), rng.randint(2, 8)
        middle = first(a, b)
        result = second(middle, c)
        if belongs(str(result), split):
            break
    said = {"name": rng.choice(_NAMES.split()), "goods": rng.choice(_GOODS.split())}
    told = {**said, "a": a, "b": b, "c": c, "m": middle, "r": result}
    return question.format(**told), f"{solution.format(**told)}\n#### {result}", str(result)


#: What a user tells of themselves, what they ask later, how the answer begins, and what they may tell.
_FACTS = """
    My dog is called|What is my dog called?|Your dog is called|Bruno Rex Luna Oscar Daisy Toby Misty Sam Nero
    My sister is called|What is my sister called?|Your sister is called|Irene Paula Greta Sonia Alma Judith
    I was born in|Where was I born?|You were born in|Lisbon Oslo Vienna Dublin Prague Athens Turin Ghent Riga
    I work as a|What do I work as?|You work as a|pilot nurse baker lawyer farmer plumber painter judge cook
    My favourite colour is|What is my favourite colour?|Your favourite colour is|green blue red orange yellow black
    I am allergic to|What am I allergic to?|You are allergic to|peanuts milk shellfish wheat eggs soy
    I play the|Which instrument do I play?|You play the|cello piano flute violin trumpet harp drums oboe guitar
    My car is a|Which car do I have?|Your car is a|Volvo Toyota Fiat Ford Honda Skoda Renault Mazda Lancia
"""
_ANSWERS = (
    "That is good to know.",
    "Thank you for telling me.",
    "I see. Please go on.",
    "Interesting! What happened then?",
    "I will keep that in mind.",
    "That sounds like quite a day.",
)


def dialogue(rng: random.Random, split: Split) -> Puzzle:
    """Return a puzzle of a long conversation, in which the user asks for one of four facts told before.

    What is told in one split is told in no other. Size: exchanges without a fact.
    """
    chosen = rng.sample([line.strip().split("|") for line in _FACTS.strip().splitlines()], 4)
    told = [rng.choice(values.split()[SPLITS.index(split) :: len(SPLITS)]) for *_, values in chosen]
    facts = [f"{statement} {value}." for (statement, *_), value in zip(chosen, told, strict=True)]
    places, stream = sorted(rng.random() for _ in facts), _prose(rng)
    chat = lazily(lambda: (f"{next(stream)} {next(stream)}", rng.choice(_ANSWERS)))
    number = rng.randrange(len(facts))
    _, question, prefix, _ = chosen[number]

    def turns(size: int) -> list[str]:
        exchanges = list(chat(size + len(facts)))
        for place, fact in zip(places, facts, strict=True):
            at = round(place * (size + len(facts) - 1))
            exchanges[at] = (f"{exchanges[at][0]} {fact}", exchanges[at][1])
        return [message for exchange in exchanges for message in exchange] + [question]

    return Puzzle(turns, question, prefix, told[number], least=0)


def cloze(rng: random.Random, split: Split) -> Puzzle:
    """Return a puzzle of prose, of which one sentence is to be continued as it stands there. Size: sentences."""
    stream, middle = _prose(rng), rng.random()
    asked = next(sentence for sentence in stream if len(sentence.split()) >= 10)
    parts = asked.removesuffix(".").split()
    begun, rest = " ".join(parts[:6]), " ".join(parts[6:])
    others = (sentence for sentence in stream if not sentence.startswith(begun))
    question = f'Question: How does the sentence that begins with "{begun}" go on in the text above?'
    text = _among(others, [asked], [middle])
    return Puzzle(
        turns=lambda size: [f"Read the following text carefully.\n\n{text(size)}\n\n{question}"],
        asks=question,
        prefix=f"In the text it says: {begun}",
        answer=rest,
        max_new_tokens=32,
    )


def _prose(rng: random.Random) -> Iterator[str]:
    return sentences(f"general/{rng.random()}")


def _among(others: Iterator[str], told: Sequence[str], places: Sequence[float]) -> Callable[[int], str]:
    """Return a function from a size to a text of so many sentences, with what is told at its places, from 0 to 1."""
    around = lazily(lambda: next(others))

    def text(size: int) -> str:
        parts = list(around(size))
        for before, (place, sentence) in enumerate(zip(places, told, strict=True)):
            parts.insert(round(place * size) + before, sentence)
        return " ".join(parts)

    return text
