from __future__ import annotations

import hashlib
import re
from itertools import islice

import pytest

from evolkv.errors import UsageError
from evolkv.tasks.prose import SENTENCES, chinese, english, french, gap, german, prose, sentences, spanish
from evolkv.tasks.wording import WORDINGS

LANGUAGES = tuple(SENTENCES)
STOP = {"zh": "。"}


def drawn(language, count=1500, seed="grammar"):
    return list(islice(sentences(seed, language), count))


def alternatives(texts):
    """A pattern for any of the texts, the longest that fits."""
    return "|".join(sorted(map(re.escape, texts), key=len, reverse=True))


@pytest.mark.parametrize(
    ("seed", "characters", "digest"),
    [
        ("hash", 50_000, "efb9bf2689ff795a206d598be1bcfd2def1b21bbd5f1007c87fed5ae50f16731"),
        (0, 20_000, "dd76b4272f9275b3b574dcd4149877c5056d1bb06f0a90505fbded78bbca7149"),
    ],
)
def test_english_is_the_default_and_stays_as_published(seed, characters, digest):
    assert hashlib.sha256(prose(seed, characters).encode()).hexdigest() == digest
    assert prose(seed, characters, language="en") == prose(seed, characters)


@pytest.mark.parametrize("language", LANGUAGES)
def test_prose_follows_its_seed_and_is_long_enough(language):
    assert prose(1, 500, language) == prose(1, 500, language) != prose(2, 500, language)
    for characters in (1, 40, 500):
        text = prose(3, characters, language)
        assert characters <= len(text) <= characters + 250
        assert text.endswith(STOP.get(language, "."))


@pytest.mark.parametrize("language", LANGUAGES)
def test_prose_is_its_sentences(language):
    text = prose("parts", 5000, language)
    parts = []
    for sentence in sentences("parts", language):
        parts.append(sentence)
        if gap(language).join(parts) == text:
            break
        assert len(parts) < 500


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_whole_and_hardly_ever_repeat(language):
    found = drawn(language, 1000)
    assert len(set(found)) >= 950
    stop = STOP.get(language, ".")
    for sentence in found:
        assert sentence.count(stop) == 1
        assert sentence.endswith(stop)
        assert sentence[0].isupper() or language == "zh"
        assert sentence == " ".join(sentence.split())
        assert not re.search(r"\d|[{}*_|/()]| ,|,,|，，", sentence)


@pytest.mark.parametrize("language", LANGUAGES)
def test_prose_never_mentions_what_needles_are_made_of(language):
    text = prose("needles", 300_000, language).lower()
    words = {word.lower() for word in WORDINGS[language].words}
    if language == "zh":
        assert not [word for word in words if word in text]
    else:
        assert not set(re.findall(r"\w+", text)) & words
    assert not re.search(r"\d|magi|mágic|神奇|spe[cz]ial|especial|特殊", text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_everything_on_the_lists_is_used(language):
    grammar = {"en": english, "de": german, "fr": french, "es": spanish, "zh": chinese}[language]
    text = prose("needles", 300_000, language).lower()
    for phrase in (*grammar.OPENERS, *grammar.CLOSERS):
        assert phrase.lower().strip(", ") in text, phrase
    for noun in (*grammar.PEOPLE, *grammar.THINGS, *grammar.PLACES):
        word = getattr(noun, "noun", None) or getattr(noun, "text", noun)
        assert word.partition("/")[0].lower() in text, word


def test_unknown_language_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"unknown language 'deu'. Did you mean 'de'\? Known: de, en, es, fr, zh"):
        prose(0, 10, "deu")


# German, from a school grammar: article and adjective ending after it, by case and gender.
GERMAN_PHRASES = {
    ("NOM", "m"): {("der", "e"), ("ein", "er"), ("unser", "er")},
    ("NOM", "f"): {("die", "e"), ("eine", "e"), ("unsere", "e")},
    ("NOM", "n"): {("das", "e"), ("ein", "es"), ("unser", "es")},
    ("AKK", "m"): {("den", "en"), ("einen", "en"), ("unseren", "en")},
    ("AKK", "f"): {("die", "e"), ("eine", "e"), ("unsere", "e")},
    ("AKK", "n"): {("das", "e"), ("ein", "es"), ("unser", "es")},
    ("DAT", "m"): {("dem", "en"), ("einem", "en"), ("unserem", "en"), ("zum", "en"), ("vom", "en"), ("beim", "en")}
    | {("am", "en")},
    ("DAT", "f"): {("der", "en"), ("einer", "en"), ("unserer", "en"), ("zur", "en")},
    ("DAT", "n"): {("dem", "en"), ("einem", "en"), ("unserem", "en"), ("zum", "en"), ("vom", "en"), ("beim", "en")}
    | {("am", "en")},
}
GERMAN_BEFORE = {
    "DAT": ["nach", "mit", "von", "bei", "neben", "hinter", "zum", "zur", "vom", "beim", "am"],
    "AKK": ["auf", "für", "um"],
}
GERMAN_DIRECT = ["bemalte", "verkaufte", "putzte", "erbte", "polierte", "grüßte", "neckte", "besuchte", "lud", "ließ"]
GERMAN_GENDERS = {
    "m": "Bäcker Anwalt Student Cellist Koffer Sattel Teppich Brief Kompass Herd Marktplatz Bahnhof Weinberg Brunnen",
    "f": "Ärztin Witwe Hebamme Leiter Uhr Wiege Geige Trommel Decke Truhe Mühle Bibliothek Kapelle Scheune Brauerei",
    "n": "Fahrrad Klavier Fernrohr Fass Seil Gemälde Wörterbuch Rathaus Theater Museum Kloster Sägewerk Schwimmbad",
}
GERMAN_WEAK = "Fotograf Matrose Student Cellist Journalist"


def german_phrases():
    """Every noun phrase of the lexicon in drawn sentences: (sentence, start, article, ending or None, noun, base)."""
    forms = {}
    for noun in (*german.PEOPLE, *german.THINGS, *german.PLACES):
        stem, _, suffix = noun.text.partition("/")
        forms |= {stem: noun, stem + suffix: noun}
    stems = alternatives((*german.PERSON_QUALITIES, *german.THING_QUALITIES, *german.PLACE_QUALITIES))
    articles = "der|die|das|den|dem|eine[nmr]?|ein|unser(?:e[nmr]?)?|zum|zur|vom|beim|am"
    phrase = re.compile(rf"\b({articles}) (?:(?:{stems})(e[nrs]?) )?({alternatives(forms)})\b", re.IGNORECASE)
    for sentence in drawn("de", 4000):
        for match in phrase.finditer(sentence):
            article, ending, word = match.groups()
            yield sentence, match.start(), article.lower(), ending, word, forms[word]


def test_german_noun_phrases_agree_in_every_sentence():
    seen = set()
    for sentence, _, article, ending, word, noun in german_phrases():
        stem, _, weak = noun.text.partition("/")
        cases = ("NOM", "AKK", "DAT")
        if weak:
            cases = ("NOM",) if word == stem else ("AKK", "DAT")
        allowed = {pair for case in cases for pair in GERMAN_PHRASES[case, noun.gender]}
        if ending is None:
            assert article in {first for first, _ in allowed}, sentence
        else:
            assert (article, ending) in allowed, sentence
            seen.add((article, ending))
    # "unser" stands with persons only, and none of them is neuter.
    assert seen == {pair for pairs in GERMAN_PHRASES.values() for pair in pairs} - {("unser", "es")}


def test_german_subjects_are_nominative_and_prepositions_take_their_case():
    counted = {"NOM": 0, "DAT": 0, "AKK": 0}
    people = {noun.text.partition("/")[0] for noun in german.PEOPLE}
    for sentence, start, article, ending, _, noun in german_phrases():
        before = sentence[:start].split()
        last = article if article in ("zum", "zur", "vom", "beim", "am") else before[-1] if before else ""
        cases = [case for case, words in GERMAN_BEFORE.items() if last in words]
        if not before or last in ("Nachbar,", "Nachbarin,"):
            cases = ["NOM"]
        # Where no person stands before the verb, an opener does, and the subject follows.
        if last in GERMAN_DIRECT:
            cases = ["AKK"] if before[-2].strip(",") in people else ["NOM"]
        if not cases:
            continue
        counted[cases[0]] += 1
        allowed = GERMAN_PHRASES[cases[0], noun.gender]
        assert article in {first for first, _ in allowed}, sentence
        assert ending is None or (article, ending) in allowed, sentence
    assert min(counted.values()) > 100


def test_german_genders_and_weak_nouns_are_right():
    genders = {noun.text.partition("/")[0]: noun.gender for noun in (*german.PEOPLE, *german.THINGS, *german.PLACES)}
    for gender, words in GERMAN_GENDERS.items():
        assert [genders[word] for word in words.split()] == [gender] * len(words.split())
    for word, gender in genders.items():
        if re.search("(in|ei|ung|schine|kiste|brücke|mühle|schwester)$", word):
            assert gender == "f", word
        if re.search("(mann|macher|träger|meister|platz|hof|bruch|garten|kasten|käfig|stall|turm)$", word):
            assert gender == "m", word
        if re.search("(haus|bad|werk|boot|regal|brett|buch|tor)$", word):
            assert gender == "n", word
    assert {noun.text.partition("/")[0] for noun in german.PEOPLE if "/" in noun.text} == set(GERMAN_WEAK.split())
    text = prose("weak", 300_000, "de")
    oblique = rf"\b(?:den|dem|einen|einem|unseren|unserem) (?:\w+en )?(?:{GERMAN_WEAK.replace(' ', '|')})"
    assert not re.search(rf"{oblique}\b", text)
    assert len(re.findall(rf"{oblique}e?n\b", text)) > 50


def test_german_verb_stands_second():
    verbs = {
        pattern.split()[0].partition("_")[0]
        for patterns in (german.TO_THINGS, german.TO_PLACES, german.TO_PEOPLE, german.DRIFTED)
        for pattern in patterns
    }
    openers = re.compile(rf"({alternatives(german.OPENERS)}) ", re.IGNORECASE)
    opened = 0
    for sentence in drawn("de", 2000):
        match = openers.match(sentence)
        if match:
            opened += 1
            assert sentence[match.end() :].split()[0] in verbs, sentence
    assert opened > 500


def test_german_separable_prefixes_close_the_main_clause():
    prefixes = {"packte": "ein|aus", "besserte": "aus", "lud": "ein", "hörte": "zu", "winkte": "zu", "räumte": "weg"}
    seen = set()
    for sentence in drawn("de", 4000):
        for verb, prefix in prefixes.items():
            if re.search(rf"\b{verb}\b", sentence):
                seen.add(verb)
                assert re.search(rf"\b{verb}\b.* ({prefix})(,|\.| und )", sentence), sentence
    assert seen == set(prefixes)


def test_german_contracts_prepositions():
    assert not re.search(r"\b(zu|von|bei|an) dem\b|\bzu der\b", prose("contractions", 200_000, "de"))


# French
FRENCH_VOWEL = "[aàâeéèêëiîïoôuùûœ]"
FRENCH_GENDERS = {
    "m": "boulanger médecin horloger vélo piano miroir hamac parapluie moulin hôpital musée monastère entrepôt stade",
    "f": "infirmière veuve avocate échelle horloge valise nappe hache armoire gare mairie grange école église halle",
}


def french_phrases():
    """Noun phrases of the lexicon: (sentence, article, adjective before, noun, adjective after)."""
    nouns = {noun.text: noun for noun in (*french.PEOPLE, *french.THINGS, *french.PLACES)}
    adjectives = (*french.PERSON_QUALITIES, *french.THING_QUALITIES, *french.PLACE_QUALITIES)
    first = alternatives({form for a in adjectives if a.before for form in (a.masculine, a.feminine, a.elided)})
    last = alternatives({form for a in adjectives if not a.before for form in (a.masculine, a.feminine)})
    articles = "le |la |l'|un |une |notre |du |au "
    phrase = re.compile(
        rf"(?<![\w'])(?:d'|de |à )?({articles})(?:({first}) )?({alternatives(nouns)})\b(?: ({last})\b)?", re.IGNORECASE
    )
    for sentence in drawn("fr", 4000):
        for match in phrase.finditer(sentence):
            article, before, word, after = match.groups()
            yield sentence, article.lower().strip(), before, nouns[word], after


def test_french_articles_and_adjectives_agree_in_every_sentence():
    masculine, feminine = {"le", "un", "du", "au"}, {"la", "une"}
    only = {"m": set(), "f": set()}
    for quality in (*french.PERSON_QUALITIES, *french.THING_QUALITIES, *french.PLACE_QUALITIES):
        if quality.masculine != quality.feminine:
            only["m"] |= {quality.masculine, quality.elided}
            only["f"].add(quality.feminine)
    count = 0
    for sentence, article, before, noun, after in french_phrases():
        wrong_articles, wrong_forms = (feminine, only["f"]) if noun.gender == "m" else (masculine, only["m"])
        assert article not in wrong_articles, sentence
        assert before not in wrong_forms, sentence
        assert after not in wrong_forms, sentence
        count += bool(before or after)
    assert count > 1000


def test_french_feminines_are_formed_by_rule():
    """Feminine from masculine by the rules of a school grammar, with the irregular ones by hand."""
    irregular = {"vieux": "vieille", "beau": "belle", "nouveau": "nouvelle", "gros": "grosse", "gentil": "gentille"}
    irregular |= {"discret": "discrète", "inquiet": "inquiète", "ancien": "ancienne", "travailleur": "travailleuse"}
    irregular |= {"exposé au vent": "exposée au vent"}
    rules = [("eux", "euse"), ("eur", "euse"), ("er", "ère"), ("e", "e"), ("", "e")]
    for quality in (*french.PERSON_QUALITIES, *french.THING_QUALITIES, *french.PLACE_QUALITIES):
        ending, feminine = next(rule for rule in rules if quality.masculine.endswith(rule[0]))
        expected = quality.masculine.removesuffix(ending) + feminine
        assert quality.feminine == irregular.get(quality.masculine, expected)


def test_french_genders_are_right():
    genders = {noun.text: noun.gender for noun in (*french.PEOPLE, *french.THINGS, *french.PLACES)}
    for gender, words in FRENCH_GENDERS.items():
        assert [genders[word] for word in words.split()] == [gender] * len(words.split())


def test_french_elides_before_vowels_and_only_there():
    text = prose("elision", 300_000, "fr").lower()
    assert not re.search(rf"\b(le|la|de|du|au|que|je|ne|se|jusque) {FRENCH_VOWEL}", text)
    assert not re.search(r"\b(le|la|de|du|au) (horlog|hôpit|hôtel|huil|heure)", text)
    assert not re.search(rf"\b(l|d|qu|n|s|jusqu)' ?(?!{FRENCH_VOWEL}|h|y)", text)
    assert not re.search(r"\b[ld]'(hamac|hache|hangar|halle)", text)
    assert {"le hamac", "la hache", "l'horloge", "d'un", "l'école"} <= set(re.findall(r"\b[ld][ea]?[ ']\w+", text))


def test_french_contracts_articles_and_uses_the_form_before_a_vowel():
    text = prose("contractions", 300_000, "fr").lower()
    assert not re.search(r"\b(de|à) les?\b", text)
    assert not re.search(rf"\b(beau|nouveau|vieux) (?:{FRENCH_VOWEL}|hôp|hôt|horl)", text)
    assert not re.search(r"\b(bel|nouvel|vieil) (?:[bcdfgjklmnpqrstvwz]|ham|han)", text)
    assert {"bel", "nouvel", "vieil"} <= set(re.findall(r"\w+", text))


def test_french_participles_agree_with_their_subject():
    text = " ".join(drawn("fr", 5000))
    people = {noun.text: noun.gender for noun in french.PEOPLE}
    subject = rf"(?:Notre|Le|La|L'|Un|Une) ?({alternatives(people)}) (?:est|s'est) (\w+)"
    pairs = re.findall(subject, text)
    assert len(pairs) > 100
    for noun, participle in pairs:
        assert participle.endswith("e") == (people[noun] == "f") or participle in {"servi", "servie"}, (
            noun,
            participle,
        )
        assert not (participle == "servi" and people[noun] == "f")


# Spanish
SPANISH_GENDERS = {
    "m": "panadero dentista mapa reloj paraguas abrigo violín hospital puente parque taller hotel",
    "f": "maestra jueza piloto bicicleta red carta manta estación torre fuente capilla",
}


def spanish_phrases():
    """Noun phrases of the lexicon: (sentence, article, adjective before, noun, adjective after)."""
    nouns = {noun.text: noun for noun in (*spanish.PEOPLE, *spanish.THINGS, *spanish.PLACES)}
    adjectives = (*spanish.PERSON_QUALITIES, *spanish.THING_QUALITIES, *spanish.PLACE_QUALITIES)
    first = alternatives({form for a in adjectives if a.before for form in (a.masculine, a.feminine)})
    last = alternatives({form for a in adjectives if not a.before for form in (a.masculine, a.feminine)})
    phrase = re.compile(
        rf"\b(el|la|una?|nuestr[oa]|al|del) (?:({first}) )?({alternatives(nouns)})\b(?: ({last})\b)?", re.IGNORECASE
    )
    for sentence in drawn("es", 4000):
        for match in phrase.finditer(sentence):
            article, before, word, after = match.groups()
            yield sentence, article.lower(), before, nouns[word], after


def test_spanish_articles_and_adjectives_agree_in_every_sentence():
    articles = {"m": {"el", "un", "nuestro", "al", "del"}, "f": {"la", "una", "nuestra"}}
    count = 0
    for sentence, article, before, noun, after in spanish_phrases():
        assert article in articles[noun.gender], sentence
        for adjective in filter(None, (before, after)):
            count += 1
            if adjective[-1] in "oa" or adjective in ("buen", "hablador", "trabajador", "acogedor"):
                assert adjective.endswith("a") == (noun.gender == "f"), sentence
    assert count > 1000


def test_spanish_genders_are_right():
    every = (*spanish.PEOPLE, *spanish.THINGS, *spanish.PLACES)
    genders = {noun.text.split()[0]: noun.gender for noun in every}
    for gender, words in SPANISH_GENDERS.items():
        assert [genders[word] for word in words.split()] == [gender] * len(words.split())
    for word, gender in genders.items():
        if word.endswith("o") and word != "piloto":
            assert gender == "m", word
        if word.endswith(("a", "ión")) and word not in ("dentista", "periodista", "violonchelista", "mapa"):
            assert gender == "f", word
        # A feminine noun that begins with a stressed a takes "el".
        assert not (gender == "f" and re.match("á|h?a(gua|lma|rma|ula|guila|cha)$", word)), word


def test_spanish_contracts_and_marks_persons_with_a():
    text = prose("contractions", 300_000, "es")
    assert not re.search(r"\b(a|de) el\b", text)
    people = alternatives(noun.text for noun in spanish.PEOPLE)
    noun_phrase = rf"(?:\w+ )?(?:el|la|una?|nuestr[oa]) (?:\w+ )?(?:{people})"
    direct = "saludó|siguió|reconoció|ayudó|escuchó|invitó|envidió|consoló|acompañó|sorprendió|esperó"
    assert not re.search(rf"\b(?:{direct}) (?!al? ){noun_phrase}", text)
    assert len(re.findall(rf"\b(?:{direct}) (?:al|a (?:la|una?|nuestr[oa])) ", text)) > 100


# Chinese
MEASURES = {
    "个": "操场 市场 鱼市 渡口 公交车站 院子 采石场 游泳池 广场 池塘 摇篮 相框 书架 烛台 指南针 门铃 地球仪 火炉 衣柜",
    "座": "磨坊 图书馆 火车站 石桥 城堡 教堂 花园 博物馆 钟楼",
    "家": "面包店 医院 旅馆 酒馆 工厂 书店",
    "把": "梯子 茶壶 雨伞 水壶 小提琴 锤子 椅子 剪刀 吉他",
    "张": "地图 渔网 书桌",
    "条": "小船 毯子 围巾",
    "辆": "自行车 手推车 马车",
    "架": "钢琴 望远镜",
    "台": "打字机 缝纫机 收音机",
    "本": "日记 词典 相册",
    "副": "马鞍 象棋 眼镜",
    "只": "闹钟 手提箱 木箱 鸟笼 木桶 水罐 花瓶",
    "扇": "木门 窗户",
    "面": "镜子 鼓",
    "块": "地毯 桌布",
    "支": "小号 钢笔",
    "位": "面包师 木匠 医生 厨师",
}


def test_chinese_has_full_width_punctuation_and_nothing_latin():
    text = prose("script", 200_000, "zh")
    assert re.fullmatch(r"[\u4e00-\u9fff，。]+", text)
    assert not re.search("，。|。，|的的|了了|地地|着着", text)
    assert gap("zh") == ""


def test_chinese_nouns_have_their_measure_word():
    nouns = {counted.noun: counted.measure for counted in (*chinese.PEOPLE, *chinese.THINGS, *chinese.PLACES)}
    for measure, words in MEASURES.items():
        assert [nouns[word] for word in words.split()] == [measure] * len(words.split())
    qualities = alternatives((*chinese.PERSON_QUALITIES, *chinese.THING_QUALITIES, *chinese.PLACE_QUALITIES))
    text = prose("measures", 200_000, "zh")
    found = re.findall(rf"[那一](\w)(?:(?:{qualities})的)?({alternatives(nouns)})", text)
    assert len(found) > 5000
    assert all(nouns[noun] == measure for measure, noun in found)


def test_chinese_moves_only_definite_objects_before_the_verb():
    text = prose("definite", 200_000, "zh")
    moved = re.findall(r"把([那一])(\w)[^，。]*?(?:搬进了屋里|送给了亲戚|放回了原处|拆了开来)", text)
    assert len(moved) > 50
    assert {determiner for determiner, _ in moved} == {"那"}
