"""The words of the needle task in each language: its needles, its question and the words its numbers belong to."""

from __future__ import annotations

from dataclasses import dataclass

from evolkv.registry import Registry


@dataclass(frozen=True)
class Wording:
    """The texts of one language.

    Args:
        instruction: stands before the haystack.
        needle: a sentence in the haystack, with {word} and {number}.
        question: stands after the haystack, with {word}.
        answer: where the answer begins, with {word}; the number follows, after a space in writing that has any.
        words: what numbers belong to. None occurs in the generated prose of the language. A place on the list
            means the same in every language, so the same example asks everywhere for the same thing.
    """

    instruction: str
    needle: str
    question: str
    answer: str
    words: tuple[str, ...]


_ENGLISH_WORDS = """
    crystal harbor violet engine maple cobalt lantern saffron granite willow ember quartz orchid
    falcon meadow copper velvet anchor thunder pebble amber basil canyon cedar comet coral desert
    dragon eagle emerald fable feather fossil galaxy ginger glacier hazel indigo island ivory
    jasmine jungle kingdom lagoon lemon lotus marble mercury nebula nectar ocean olive onyx opal
    panther paprika pearl phoenix planet prism puzzle raven rocket ruby sapphire silver sparrow
    spiral summit sunset thistle tiger topaz tulip turtle vanilla volcano walnut zebra
"""
_GERMAN_WORDS = """
    Kristall Hafen Veilchen Motor Ahorn Kobalt Laterne Safran Granit Weide Glut Quarz Orchidee
    Falke Wiese Kupfer Samt Anker Donner Kiesel Bernstein Basilikum Schlucht Zeder Komet Koralle Wüste
    Drache Adler Smaragd Fabel Feder Fossil Galaxie Ingwer Gletscher Haselnuss Indigo Insel Elfenbein
    Jasmin Dschungel Königreich Lagune Zitrone Lotus Marmor Quecksilber Sternennebel Nektar Ozean Olive
    Onyx Opal Panther Paprika Perle Phönix Planet Prisma Rätsel Rabe Rakete Rubin Saphir Silber Spatz
    Spirale Gipfel Abendrot Distel Tiger Topas Tulpe Schildkröte Vanille Vulkan Walnuss Zebra
"""
_FRENCH_WORDS = """
    cristal port violette moteur érable cobalt lanterne safran granit saule braise quartz orchidée
    faucon prairie cuivre velours ancre tonnerre galet ambre basilic canyon cèdre comète corail désert
    dragon aigle émeraude fable plume fossile galaxie gingembre glacier noisette indigo île ivoire
    jasmin jungle royaume lagune citron lotus marbre mercure nébuleuse nectar océan olive onyx opale
    panthère paprika perle phénix planète prisme énigme corbeau fusée rubis saphir argent moineau
    spirale sommet crépuscule chardon tigre topaze tulipe tortue vanille volcan noix zèbre
"""
_SPANISH_WORDS = """
    cristal puerto violeta motor arce cobalto farol azafrán granito sauce brasa cuarzo orquídea
    halcón prado cobre terciopelo ancla trueno guijarro ámbar albahaca cañón cedro cometa coral desierto
    dragón águila esmeralda fábula pluma fósil galaxia jengibre glaciar avellana índigo isla marfil
    jazmín selva reino laguna limón loto mármol mercurio nebulosa néctar océano aceituna ónice ópalo
    pantera pimentón perla fénix planeta prisma acertijo cuervo cohete rubí zafiro plata gorrión
    espiral cumbre ocaso cardo tigre topacio tulipán tortuga vainilla volcán nuez cebra
"""
_CHINESE_WORDS = """
    水晶 港口 紫罗兰 引擎 枫树 钴蓝 灯笼 藏红花 花岗岩 柳树 余烬 石英 兰花
    猎鹰 草地 黄铜 天鹅绒 船锚 雷霆 鹅卵石 琥珀 罗勒 峡谷 雪松 彗星 珊瑚 沙漠
    巨龙 老鹰 祖母绿 寓言 羽毛 化石 星系 生姜 冰川 榛子 靛青 岛屿 象牙
    茉莉 丛林 王国 潟湖 柠檬 莲花 大理石 水银 星云 花蜜 海洋 橄榄 玛瑙 蛋白石
    黑豹 辣椒粉 珍珠 凤凰 行星 棱镜 谜题 乌鸦 火箭 红宝石 蓝宝石 白银 麻雀
    螺旋 顶峰 晚霞 蓟草 老虎 黄玉 郁金香 乌龟 香草 火山 核桃 斑马
"""

# RULER's texts (arXiv 2404.06654, task `niah_single`); the other languages translate them. Their answers
# end in a colon, as the needles do: without it SmolLM2-135M gave 3 of 12 numbers in German instead of 12.
_ENGLISH = Wording(
    instruction="Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.",
    needle="One of the special magic numbers for {word} is: {number}.",
    question="What is the special magic number for {word} mentioned in the provided text?",
    answer="The special magic number for {word} mentioned in the provided text is",
    words=tuple(_ENGLISH_WORDS.split()),
)
_GERMAN = Wording(
    instruction="Im folgenden Text sind einige besondere magische Zahlen versteckt. Präge sie dir gut ein. "
    "Ich werde dich später nach den Zahlen fragen.",
    needle="Eine der besonderen magischen Zahlen für das Wort {word} lautet: {number}.",
    question="Wie lautet die besondere magische Zahl für das Wort {word}, die im obigen Text genannt wird?",
    answer="Die besondere magische Zahl für das Wort {word}, die im obigen Text genannt wird, lautet:",
    words=tuple(_GERMAN_WORDS.split()),
)
_FRENCH = Wording(
    instruction="Quelques nombres magiques spéciaux sont cachés dans le texte suivant. Mémorisez-les bien. "
    "Je vous interrogerai ensuite sur ces nombres.",
    needle="L'un des nombres magiques spéciaux associés au mot {word} est : {number}.",
    question="Quel est le nombre magique spécial associé au mot {word} mentionné dans le texte ci-dessus ?",
    answer="Le nombre magique spécial associé au mot {word} mentionné dans le texte ci-dessus est :",
    words=tuple(_FRENCH_WORDS.split()),
)
_SPANISH = Wording(
    instruction="Algunos números mágicos especiales están escondidos en el siguiente texto. Memorízalos bien. "
    "Después te preguntaré por los números.",
    needle="Uno de los números mágicos especiales para la palabra {word} es: {number}.",
    question="¿Cuál es el número mágico especial para la palabra {word} mencionado en el texto anterior?",
    answer="El número mágico especial para la palabra {word} mencionado en el texto anterior es:",
    words=tuple(_SPANISH_WORDS.split()),
)
_CHINESE = Wording(
    instruction="下面的文字中藏有一些特殊的神奇数字。请务必记住它们。稍后我会就这些数字向你提问。",
    needle="与“{word}”对应的特殊神奇数字之一是：{number}。",
    question="上面的文字中提到的与“{word}”对应的特殊神奇数字是多少？",
    answer="上面的文字中提到的与“{word}”对应的特殊神奇数字是：",
    words=tuple(_CHINESE_WORDS.split()),
)

WORDINGS: Registry[Wording] = Registry(
    "language", {"en": _ENGLISH, "de": _GERMAN, "fr": _FRENCH, "es": _SPANISH, "zh": _CHINESE}
)
