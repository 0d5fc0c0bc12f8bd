"""The German grammar: articles and adjectives declined, the verb second, its prefix last."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal

from evolkv.tasks.prose.words import Noun, capitalised, nouns, phrases

Article = Literal["der", "ein", "unser"]
Case = Literal["NOM", "AKK", "DAT"]

# What follows a slash is added in every case but the nominative.
_PEOPLE = """
    der Bäcker|der Schreiner|die Lehrerin|der Fährmann|der Briefträger|die Ärztin|der Schäfer|die Schneiderin
    die Witwe|der Gastwirt|der Fischer|die Malerin|der Müller|der Anwalt|die Krankenschwester|der Imker
    der Schmied|der Schaffner|die Köchin|der Zahnarzt|die Bäuerin|die Händlerin|die Richterin|der Mechaniker
    die Bürgermeisterin|der Bergmann|die Musikerin|die Apothekerin|der Fotograf/en|die Pilotin|der Klempner
    der Drucker|der Matrose/n|die Bildhauerin|der Schuster|der Student/en|der Landvermesser|die Kellnerin
    der Uhrmacher|die Weberin|die Buchhändlerin|der Cellist/en|die Chemikerin|der Kutscher|der Radfahrer
    die Goldschmiedin|die Historikerin|der Journalist/en|der Gepäckträger|die Übersetzerin|der Gärtner
    der Metzger|der Förster|die Hebamme
"""
_PERSON_QUALITIES = """
    alt|jung|fröhlich|erschöpft|stur|geduldig|vorsichtig|zerstreut|pensioniert|großzügig|berühmt|schüchtern
    klug|höflich|einsam|sanft|nervös|gesprächig|linkshändig|nachdenklich|unruhig|freundlich|stolz|vergesslich
    neugierig|hilfsbereit|wortkarg|fleißig
"""
_THINGS = """
    das Fahrrad|die Leiter|die Teekanne|die Uhr|der Koffer|die Schubkarre|die Landkarte|der Regenschirm
    das Klavier|das Ruderboot|die Holzkiste|der Sattel|die Wiege|das Fernrohr|die Schreibmaschine
    der Wasserkessel|das Fischernetz|der Mantel|das Notizbuch|die Geige|das Gartentor|der Backofen
    die Nähmaschine|der Bilderrahmen|der Karren|der Brief|der Vogelkäfig|das Bücherregal|der Spiegel|das Fass
    der Teppich|die Decke|der Kerzenständer|das Schachbrett|der Kompass|das Wörterbuch|die Türklingel
    die Trommel|der Globus|der Hammer|der Krug|die Öllampe|das Fotoalbum|das Seil|der Herd|die Tischdecke
    die Trompete|der Kleiderschrank|der Fensterrahmen|der Schlitten|die Truhe|der Sessel|die Kaffeemühle
    der Werkzeugkasten|das Gemälde
"""
_THING_QUALITIES = """
    schwer|kaputt|geliehen|staubig|schön|rostig|klein|riesig|bemalt|billig|vergessen|glänzend|verbeult
    wertvoll|schief|unfertig|antik|handgefertigt|gewöhnlich|merkwürdig|verblichen|robust|nass|alt|zerkratzt
    hübsch|abgenutzt|neu
"""
_PLACES = """
    der Marktplatz|der Bahnhof|die Mühle|das Rathaus|die Bäckerei|die Bibliothek|der Schulhof|das Postamt
    das Krankenhaus|der Friedhof|der Fischmarkt|das Theater|der Kuhstall|die Steinbrücke|das Gerichtsgebäude
    das Bootshaus|der Fähranleger|die Bushaltestelle|das Museum|der Gemüsegarten|die Burgruine|die Scheune
    die Molkerei|die Feuerwache|das Gewächshaus|das Gästehaus|das Wirtshaus|die Wäscherei|das Kloster
    der Stadtpark|der Steinbruch|der Lesesaal|das Sägewerk|der Pferdestall|das Schwimmbad|die Teestube
    der Wasserturm|der Weinberg|der Dorfplatz|das Lagerhaus|der Brunnen|die Werkstatt|die Kapelle|das Zollhaus
    die Ziegelei|die Turnhalle|die Schmiede|das Forsthaus|die Brauerei|der Spielplatz|die Apotheke
    der Biergarten
"""
_PLACE_QUALITIES = """
    still|belebt|leer|eng|sonnig|verlassen|verschneit|entlegen|neu|schattig|klein|vernachlässigt|vertraut|kalt
    friedlich|laut|windig|menschenleer|gemütlich|zugig|alt|bekannt|prächtig|weitläufig
"""
# In these, AKK and DAT stand for a noun phrase in that case, * for an adverbial; the first word is the verb.
_TO_THINGS = """
    reparierte AKK *|bemalte AKK *|verkaufte AKK *|kaufte AKK *|verlor AKK *|vermaß AKK *|putzte AKK *
    versteckte AKK *|untersuchte AKK *|packte AKK * ein|bewunderte AKK *|zeichnete AKK *|wog AKK *
    besserte AKK * aus|packte AKK * aus|erbte AKK *|polierte AKK *|verlieh AKK *|verschenkte AKK *
    beschrieb AKK *|fotografierte AKK *|ließ AKK * fallen|fand AKK *|nahm AKK * auseinander
    brachte AKK * zurück|trug AKK * fort|suchte * nach DAT|betrachtete AKK *|probierte AKK * aus
    tauschte AKK * ein|räumte AKK * weg|holte AKK * ab
"""
_TO_PLACES = """
    ging * an DAT vorbei|besuchte AKK *|wartete * vor DAT|eilte * zu DAT|mied AKK *|fuhr * an DAT vorbei
    rastete * neben DAT|kehrte * zu DAT zurück|beschrieb AKK *|spazierte * um AKK herum|schlief * hinter DAT
    sang * vor DAT|stand * vor DAT|zeichnete AKK *|arbeitete * hinter DAT|suchte * nach DAT|träumte * von DAT
    kam * bei DAT an|hielt * bei DAT an|blieb * vor DAT stehen|lief * zu DAT|dachte * an AKK|erreichte AKK *
    entdeckte AKK *|fotografierte AKK *|näherte_sich * DAT
"""
_TO_PEOPLE = """
    dankte DAT *|wartete * auf AKK|stritt * mit DAT|winkte DAT * zu|schrieb * an AKK|vertraute DAT *
    lud AKK * ein|lachte * mit DAT|folgte DAT *|erkannte AKK *|half DAT *|unterrichtete AKK *|neckte AKK *
    hörte DAT * zu|entschuldigte_sich * bei DAT|zankte_sich * mit DAT|sprach * mit DAT|saß * neben DAT
    überraschte AKK *|grüßte AKK *|beneidete AKK *|reiste * mit DAT|spielte * mit DAT Karten|kochte * für AKK
    tröstete AKK *|begleitete AKK * nach Hause|rief AKK * an|verabschiedete_sich * von DAT|fragte * nach DAT
    lächelte DAT * zu
"""
_OPENERS = """
    am Morgen|später in der Woche|Jahre danach|ohne Vorwarnung|wie gewöhnlich|am Dienstag|gegen Mittag
    eines Abends|vor dem Frühstück|nach dem Sturm|in den Ferien|zuerst|am Ende|eines Herbstes
    zu unserer Überraschung|kurz vor Mitternacht|noch einmal|ein wenig später|auf dem Heimweg|im selben Winter
    zufällig|bald darauf|an einem regnerischen Nachmittag|im folgenden Frühling|vor langer Zeit|gegen Abend
    im Frühsommer|am Markttag|wortlos|eines Tages|im letzten Sommer|am nächsten Tag|an jenem Sonntag
    in der folgenden Woche
"""
_MANNERS = """
    ohne Eile|so sorgfältig wie möglich|trotz der Kälte|lächelnd|trotz aller Müdigkeit|ohne besonderen Grund
    nicht ohne Bedauern|gerade noch rechtzeitig|unter einem grauen Himmel|am letzten Tag des Monats
    in aller Ruhe|zur Freude der Kinder|heimlich|voller Neugier|bei schlechtem Wetter|vor aller Augen
    schweren Herzens|aus reiner Neugier|voller Geduld|im letzten Augenblick|auf Bitten der Nachbarn
    zum ersten Mal seit Jahren|sichtlich erfreut|nur widerwillig|wie verabredet|noch vor dem Essen
    im Schein der Lampen|ohne lange nachzudenken
"""
_CLOSERS = """
    , während die Glocken läuteten|, obwohl es schon spät war|, und alle lachten
    , als die Lampen angezündet wurden|, kurz bevor die Gäste kamen|, als die Sonne unterging
    , während die Suppe kochte|, aber niemand bemerkte es|, sobald der Schnee geschmolzen war
    , während die anderen schliefen|, bevor jemand widersprechen konnte|, während die Kinder zusahen
    , als der Wind nachließ|, noch ehe der Tee kalt war|, obwohl niemand damit gerechnet hatte
    , nachdem der Sturm vorüber war|, während im Haus jemand sang|, als gerade niemand hinsah
"""
_PERSON_CLOSERS = """
    , bevor der Regen begann|, weil es sonst nichts zu tun gab|, weil der Zug Verspätung hatte
    , ohne ein Wort zu sagen|, um sich die Zeit zu vertreiben|, denn der Laden war geschlossen
    , weil es so vereinbart war|, wie es der Brauch verlangte|, als hätte es nie Streit gegeben
    und sagte nichts dazu|und ging dann nach Hause|und fühlte sich danach viel besser
    und vergaß dabei die Zeit|und dachte noch lange daran
"""
_WEATHER = """
    der Regen|der Schnee|der Nebel|ein warmer Wind|der Duft von frischem Brot|der Klang der Kirchenglocken
    ein feiner Dunst|der Rauch aus den Schornsteinen|das Abendlicht|eine kalte Brise|der Lärm des Verkehrs
    der Geruch von Heu|das Morgenlicht|die Musik aus der Tanzschule
"""
_DRIFTED = """
    zog * über AKK|erfüllte AKK *|erreichte AKK *|legte_sich * über AKK|hing * über DAT
    breitete_sich * über DAT aus|kehrte * zu DAT zurück|kroch * auf AKK zu|schwebte * über DAT
    wanderte * an DAT vorbei|drang * bis zu DAT
"""
_WEATHER_MANNERS = """
    langsam|allmählich|wieder|plötzlich|unmerklich|endlich|ganz sacht|wie jedes Jahr um diese Zeit
"""

_GENDERS = {"der": "m", "die": "f", "das": "n"}
PEOPLE, THINGS, PLACES = (nouns(block, _GENDERS) for block in (_PEOPLE, _THINGS, _PLACES))
PERSON_QUALITIES, THING_QUALITIES = phrases(_PERSON_QUALITIES), phrases(_THING_QUALITIES)
PLACE_QUALITIES = phrases(_PLACE_QUALITIES)
TO_PEOPLE, TO_THINGS, TO_PLACES = phrases(_TO_PEOPLE), phrases(_TO_THINGS), phrases(_TO_PLACES)
OPENERS, MANNERS, CLOSERS = phrases(_OPENERS), phrases(_MANNERS), phrases(_CLOSERS)
PERSON_CLOSERS = CLOSERS + phrases(_PERSON_CLOSERS)
WEATHER, DRIFTED, WEATHER_MANNERS = phrases(_WEATHER), phrases(_DRIFTED), phrases(_WEATHER_MANNERS)

_DER = {
    "NOM": {"m": "der", "f": "die", "n": "das"},
    "AKK": {"m": "den", "f": "die", "n": "das"},
    "DAT": {"m": "dem", "f": "der", "n": "dem"},
}
_EIN_ENDINGS = {
    "NOM": {"m": "", "f": "e", "n": ""},
    "AKK": {"m": "en", "f": "e", "n": ""},
    "DAT": {"m": "em", "f": "er", "n": "em"},
}
_CONTRACTED = {"zu dem": "zum", "zu der": "zur", "von dem": "vom", "bei dem": "beim", "an dem": "am"}
_CONTRACTIBLE = re.compile(rf"\b({'|'.join(_CONTRACTED)})\b")


def sentence(rng: random.Random) -> str:
    """Return one sentence, drawn with `rng`."""
    kind = rng.random()
    if kind < 0.08:
        subject, manners, closers = rng.choice(WEATHER), WEATHER_MANNERS, CLOSERS
        predicate = _filled(rng, rng.choice(DRIFTED), "der", rng.choice(PLACES), PLACE_QUALITIES)
    else:
        manners, closers = MANNERS, PERSON_CLOSERS
        person, other = rng.sample(PEOPLE, 2)
        subject = _subject(rng, person)
        if kind < 0.45:
            article: Article = rng.choice(("der", "ein"))
            predicate = _filled(rng, rng.choice(TO_THINGS), article, rng.choice(THINGS), THING_QUALITIES)
        elif kind < 0.75:
            predicate = _filled(rng, rng.choice(TO_PLACES), "der", rng.choice(PLACES), PLACE_QUALITIES)
        else:
            article = rng.choice(("der", "ein", "unser"))
            predicate = _filled(rng, rng.choice(TO_PEOPLE), article, other, PERSON_QUALITIES)
    manner = rng.choice(manners) if rng.random() < 0.4 else ""
    verb, rest = predicate.replace("*", manner).split(maxsplit=1)
    verb = verb.replace("_", " ")
    if rng.random() < 0.35:
        words = f"{rng.choice(OPENERS)} {verb} {subject} {rest}"
    else:
        words = f"{subject} {verb} {rest}"
    if rng.random() < 0.5:
        words = f"{words} {rng.choice(closers)}"
    return f"{capitalised(' '.join(words.split()).replace(' ,', ','))}."


def _subject(rng: random.Random, person: Noun) -> str:
    if rng.random() < 0.2:
        neighbour = "meine Nachbarin" if person.gender == "f" else "mein Nachbar"
        return f"{neighbour}, {_noun(rng, 'der', person, PERSON_QUALITIES, 'NOM')},"
    article: Article = rng.choice(("der", "der", "ein", "unser"))
    return _noun(rng, article, person, PERSON_QUALITIES, "NOM")


def _filled(rng: random.Random, pattern: str, article: Article, noun: Noun, qualities: Sequence[str]) -> str:
    """Return a pattern's words, its noun phrase put in; * stays, but before what is new to the reader."""
    case: Case = "AKK" if "AKK" in pattern else "DAT"
    if article == "ein":
        pattern = pattern.replace(f"{case} *", f"* {case}")
    phrase = pattern.replace(case, _noun(rng, article, noun, qualities, case))
    return _CONTRACTIBLE.sub(lambda match: _CONTRACTED[match[0]], phrase)


def _noun(rng: random.Random, article: Article, noun: Noun, qualities: Sequence[str], case: Case) -> str:
    stem, _, suffix = noun.text.partition("/")
    words = [_DER[case][noun.gender] if article == "der" else article + _EIN_ENDINGS[case][noun.gender]]
    if rng.random() < 0.6:
        words.append(rng.choice(qualities) + _ending(article, noun.gender, case))
    words.append(stem if case == "NOM" else stem + suffix)
    return " ".join(words)


def _ending(article: Article, gender: str, case: Case) -> str:
    """Return an adjective's ending after `article`: weak, or strong where the article shows no gender."""
    if case == "DAT" or (case == "AKK" and gender == "m"):
        return "en"
    if article == "der" or gender == "f":
        return "e"
    return "er" if gender == "m" else "es"
