"""The English grammar."""

from __future__ import annotations

import random
from collections.abc import Sequence

from evolkv.tasks.prose.words import phrases

_PEOPLE = """
    baker|carpenter|schoolteacher|ferryman|postman|doctor|shepherd|tailor|widow|innkeeper|fisherman
    painter|miller|lawyer|nurse|beekeeper|blacksmith|conductor|cook|dentist|farmer|grocer|judge|mechanic
    mayor|miner|musician|pharmacist|photographer|pilot|plumber|printer|sailor|sculptor|shoemaker|student
    surveyor|waiter|watchmaker|weaver|bookseller|cellist|chemist|coachman|cyclist|goldsmith|historian
    journalist|porter|translator
"""
_PERSON_QUALITIES = """
    old|young|cheerful|tired|stubborn|patient|careful|absent-minded|retired|generous|famous|shy|clever
    polite|lonely|gentle|nervous|talkative|left-handed|thoughtful|restless|kind|proud|forgetful
"""
_THINGS = """
    bicycle|ladder|teapot|clock|suitcase|wheelbarrow|map|umbrella|piano|rowing boat|wooden chest|saddle
    cradle|telescope|typewriter|kettle|fishing net|overcoat|notebook|fiddle|garden gate|bread oven
    sewing machine|picture frame|cart|letter|birdcage|bookcase|mirror|barrel|rug|pair of boots|blanket
    candlestick|chessboard|compass|dictionary|doorbell|drum|globe|hammer|jug|oil lamp|photograph album
    rope|stove|tablecloth|trumpet|wardrobe|window frame
"""
_THING_QUALITIES = """
    heavy|broken|borrowed|dusty|beautiful|rusty|small|enormous|painted|cheap|forgotten|polished|battered
    expensive|crooked|unfinished|antique|handmade|ordinary|curious|faded|sturdy|wet|spare
"""
_PLACES = """
    market square|railway station|old mill|town hall|riverbank|bakery|library|schoolyard|post office
    hospital|churchyard|fish market|theatre|cattle shed|stone bridge|courthouse|boathouse|ferry landing
    bus stop|museum|vegetable garden|beach|castle ruin|barn|courtyard|dairy|fire station|greenhouse
    guesthouse|hayloft|inn|kitchen|laundry|monastery|park|pine forest|quarry|reading room|sawmill|stable
    swimming pool|tavern|tea room|tower|valley|vineyard|village green|warehouse|water pump|workshop
"""
_PLACE_QUALITIES = """
    quiet|crowded|empty|narrow|sunny|abandoned|busy|distant|new|shady|little|neglected|familiar|cold
    peaceful|noisy|windy|deserted|cosy|draughty
"""
_TO_THINGS = """
    repaired|painted|sold|bought|borrowed|lost|measured|cleaned|hid|examined|packed|admired|drew|weighed
    mended|unwrapped|inherited|polished|lent out|gave away|described|photographed|dropped|wanted|found
    dragged|took apart|brought back
"""
_TO_PLACES = """
    walked past|visited|remembered|waited near|hurried to|swept|avoided|drove by|rested beside
    returned to|described|wandered around|slept behind|sang in front of|stood outside|drew|worked behind
    left|looked for|dreamed about|arrived at|stopped at
"""
_TO_PEOPLE = """
    thanked|waited for|argued with|waved to|wrote to|trusted|invited|laughed with|followed|recognised
    helped|taught|teased|listened to|apologised to|quarrelled with|married|sat beside|surprised|greeted
    envied|travelled with|played cards with|cooked for
"""
_OPENERS = """
    In the morning|Later that week|Years afterwards|Without warning|As usual|On Tuesday|At noon
    One evening|Before breakfast|After the storm|During the holidays|At first|In the end|Every autumn
    To our surprise|Just before midnight|Once again|A little later|On the way home|That same winter
    By chance|Soon afterwards|On a rainy afternoon|The following spring|For a whole year|Long ago
    Towards evening|In early summer|On market day|Without a word
"""
_CLOSERS = """
    before the rain began|while the bells were ringing|and said nothing about it
    although it was getting late|when the lamps were lit|until the guests arrived|and everybody laughed
    in spite of the cold|with great care|without any hurry|because there was nothing else to do
    as the sun went down|and then went home|for the second time|with a smile|after a long conversation
    while the soup was cooking|in complete silence|and nobody noticed|just in time
    for no particular reason|as soon as the snow had melted|with some regret|while the others slept
    to pass the time|because the train was delayed|and felt much better afterwards
    before anyone could object|under a grey sky|as the children watched|with both hands
    and forgot the time|when the wind dropped|all the same|as carefully as possible
    on the last day of the month
"""
_WEATHER = """
    The rain|The snow|The fog|A warm wind|The smell of fresh bread|The sound of church bells|A thin mist
    The smoke from the chimneys|The evening light|A cold breeze|The noise of the traffic|The scent of hay
"""
_DRIFTED = """
    drifted over|filled|reached|settled on|lingered around|spread across|came back to|crept towards
    hung over|moved slowly past
"""

PEOPLE, THINGS, PLACES = phrases(_PEOPLE), phrases(_THINGS), phrases(_PLACES)
PERSON_QUALITIES, THING_QUALITIES = phrases(_PERSON_QUALITIES), phrases(_THING_QUALITIES)
PLACE_QUALITIES = phrases(_PLACE_QUALITIES)
TO_PEOPLE, TO_THINGS, TO_PLACES = phrases(_TO_PEOPLE), phrases(_TO_THINGS), phrases(_TO_PLACES)
OPENERS, CLOSERS = phrases(_OPENERS), phrases(_CLOSERS)
WEATHER, DRIFTED = phrases(_WEATHER), phrases(_DRIFTED)


def sentence(rng: random.Random) -> str:
    """Return one sentence, drawn with `rng`."""
    text = _clause(rng)
    shape = rng.random()
    if shape < 0.35:
        text = f"{rng.choice(OPENERS)}, {text[0].lower()}{text[1:]}"
    if shape > 0.25:
        text = f"{text} {rng.choice(CLOSERS)}"
    return f"{text}."


def _clause(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.08:
        return f"{rng.choice(WEATHER)} {rng.choice(DRIFTED)} {_noun(rng, 'the', PLACE_QUALITIES, PLACES)}"
    article = rng.choice(("The", "The", "A", "Our", "My neighbour, the"))
    subject = _noun(rng, article, PERSON_QUALITIES, PEOPLE) + ("," if article.startswith("My") else "")
    if kind < 0.45:
        thing = _noun(rng, rng.choice(("a", "the")), THING_QUALITIES, THINGS)
        return f"{subject} {rng.choice(TO_THINGS)} {thing}"
    if kind < 0.75:
        return f"{subject} {rng.choice(TO_PLACES)} {_noun(rng, 'the', PLACE_QUALITIES, PLACES)}"
    person = _noun(rng, rng.choice(("a", "the", "our")), PERSON_QUALITIES, PEOPLE)
    return f"{subject} {rng.choice(TO_PEOPLE)} {person}"


def _noun(rng: random.Random, article: str, qualities: Sequence[str], nouns: Sequence[str]) -> str:
    noun = rng.choice(nouns)
    if rng.random() < 0.6:
        noun = f"{rng.choice(qualities)} {noun}"
    if article.lower() == "a" and noun[0] in "aeiou":
        article += "n"
    return f"{article} {noun}"
