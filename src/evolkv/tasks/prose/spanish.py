"""The Spanish grammar: articles and adjectives that agree, contractions, and "a" before a person."""

from __future__ import annotations

import random
from collections.abc import Sequence

from evolkv.tasks.prose.words import Adjective, Noun, adjectives, capitalised, nouns, phrases

_PEOPLE = """
    un panadero|un carpintero|una maestra|un barquero|un cartero|una médica|un pastor|un sastre|una viuda
    una posadera|un pescador|una pintora|un molinero|una abogada|una enfermera|un apicultor|un herrero
    un revisor|una cocinera|un dentista|una granjera|un tendero|una jueza|un mecánico|una alcaldesa|un minero
    un músico|una farmacéutica|un fotógrafo|una piloto|un fontanero|un impresor|un marinero|una escultora
    un zapatero|una estudiante|un topógrafo|una camarera|un relojero|una tejedora|una librera
    un violonchelista|una química|un cochero|una ciclista|un orfebre|una historiadora|un periodista|un portero
    una traductora|un jardinero|una florista|un leñador|una costurera
"""
# The feminine stands after a slash, unless -o becomes -a or both are the same.
_PERSON_QUALITIES = """
    cansado|terco|paciente|prudente|distraído|jubilado|generoso|famoso|tímido|listo|amable|solitario|nervioso
    hablador/habladora|zurdo|pensativo|inquieto|simpático|orgulloso|olvidadizo|alegre|curioso|elegante
    trabajador/trabajadora|servicial|callado|risueño|cortés
"""
_THINGS = """
    una bicicleta|una escalera|una tetera|un reloj|una maleta|una carretilla|un mapa|un paraguas|un piano
    una barca de remos|un baúl|una silla de montar|una cuna|un telescopio|una máquina de escribir|un hervidor
    una red de pesca|un abrigo|un cuaderno|un violín|un portón|un horno de pan|una máquina de coser|un marco
    un carro|una carta|una jaula|una estantería|un espejo|un barril|una alfombra|una manta|un candelabro
    un tablero de ajedrez|una brújula|un diccionario|un timbre|un tambor|un globo terráqueo|un martillo
    una jarra|una lámpara de aceite|un álbum de fotos|una cuerda|una estufa|un mantel|una trompeta|un armario
    una ventana|una guitarra|un trineo|un sillón|una regadera|un cofre|un sombrero
"""
_THING_QUALITIES = """
    pesado|roto|prestado|polvoriento|oxidado|enorme|barato|olvidado|pulido|abollado|caro|torcido|inacabado
    antiguo|corriente|extraño|descolorido|resistente|mojado|gastado|valioso|ligero|azul|frágil|elegante|útil
"""
_PLACES = """
    una plaza del mercado|una estación de tren|un molino|un ayuntamiento|una panadería|una biblioteca
    un patio de la escuela|una oficina de correos|un hospital|un cementerio|una lonja|un teatro|un establo
    un puente de piedra|un juzgado|un cobertizo|un embarcadero|una parada de autobús|un museo|una huerta
    una playa|un castillo|un granero|una lechería|un cuartel de bomberos|un invernadero|una posada
    una lavandería|un monasterio|un parque|una cantera|una sala de lectura|un aserradero|una cuadra
    una piscina|una taberna|un salón de té|una torre|un viñedo|un almacén|un taller|una fuente|una capilla
    una fábrica|una escuela|un hotel|una catedral|un mirador|una ermita|un balneario|una bodega|un quiosco
    una herrería|una imprenta
"""
_PLACE_QUALITIES = """
    tranquilo|abarrotado|vacío|estrecho|soleado|abandonado|animado|lejano|sombrío|descuidado|familiar|frío
    apacible|ruidoso|silencioso|acogedor/acogedora|nevado|modesto|pintoresco|solitario|oscuro|concurrido
"""
# These stand before their noun.
_PERSON_QUALITIES_BEFORE = "viejo|joven|buen/buena|gran|pobre"
_THING_QUALITIES_BEFORE = "pequeño|viejo|hermoso|nuevo|gran"
_PLACE_QUALITIES_BEFORE = "pequeño|viejo|antiguo|nuevo|hermoso|gran"
_TO_THINGS = """
    reparó|pintó|vendió|compró|perdió|midió|limpió|escondió|examinó|empaquetó|admiró|dibujó|pesó|restauró
    desenvolvió|heredó|sacó brillo a|prestó|regaló|describió|fotografió|dejó caer|encontró|desmontó|devolvió
    arrastró|guardó|eligió|soñó con|buscó|cargó con|probó|se llevó|se olvidó de|señaló
"""
_TO_PLACES = """
    pasó por delante de|visitó|recordó|esperó cerca de|corrió hasta|barrió|evitó|descansó junto a|regresó a
    describió|paseó alrededor de|durmió detrás de|cantó frente a|se quedó delante de|dibujó
    trabajó detrás de|abandonó|buscó|soñó con|llegó a|se detuvo delante de|se acercó a|cruzó|rodeó
    fotografió|volvió de|preguntó por
"""
_TO_PEOPLE = """
    dio las gracias a|esperó a|discutió con|saludó a|escribió a|confió en|invitó a|se rio con|siguió a
    reconoció a|ayudó a|bromeó con|escuchó a|pidió perdón a|se peleó con|se casó con|se sentó junto a
    sorprendió a|envidió a|viajó con|jugó a las cartas con|cocinó para|consoló a|acompañó a
    llamó por teléfono a|se despidió de|visitó a|habló de|pensó en|sonrió a
"""
_OPENERS = """
    por la mañana|aquella semana|años después|sin previo aviso|como de costumbre|el martes|al mediodía
    una tarde|antes del desayuno|después de la tormenta|durante las vacaciones|al principio|al final
    un otoño|para nuestra sorpresa|poco antes de la medianoche|una vez más|un poco más tarde|de camino a casa
    aquel mismo invierno|por casualidad|poco después|una tarde lluviosa|la primavera siguiente
    hace mucho tiempo|al anochecer|a principios del verano|el día de mercado|sin decir palabra
    al día siguiente|un domingo|aquel año|por fin|muy temprano
"""
_CLOSERS = """
    mientras sonaban las campanas|aunque ya era tarde|cuando se encendieron las lámparas
    poco antes de que llegaran los invitados|y todo el mundo se rio|a pesar del frío|al ponerse el sol
    mientras se cocía la sopa|y nadie se dio cuenta|justo a tiempo|en cuanto se derritió la nieve
    mientras los demás dormían|bajo un cielo gris|ante la mirada de los niños|cuando amainó el viento
    el último día del mes|antes de que nadie pudiera protestar|mientras alguien cantaba a lo lejos
    a la hora de la siesta|cuando nadie lo esperaba
"""
_PERSON_CLOSERS = """
    antes de que empezara a llover|porque el tren llevaba retraso|porque no había nada más que hacer
    y no dijo nada|y luego se fue a casa|con mucho cuidado|sin ninguna prisa|con una sonrisa
    después de una larga conversación|en completo silencio|sin ningún motivo en particular
    con cierta tristeza|para pasar el rato|y después se sintió mucho mejor|y perdió la noción del tiempo
    de todos modos|lo mejor que pudo|a petición de los vecinos|por pura curiosidad|de mala gana
    con mucha paciencia|tal como había prometido|sin hacer ruido
"""
_WEATHER = """
    la lluvia|la nieve|la niebla|el viento cálido|el olor a pan recién hecho|el sonido de las campanas
    la bruma|el humo de las chimeneas|la luz del atardecer|la brisa fresca|el ruido del tráfico
    el aroma del heno|la música de la orquesta|la luz del alba|el rumor de la multitud
"""
_DRIFTED = """
    llenó|alcanzó|envolvió|llegó hasta|se extendió por|flotó sobre|se quedó sobre|regresó a|avanzó hacia
    pasó lentamente sobre|rodeó|se acercó a
"""


def _feminine(masculine: str) -> str:
    return f"{masculine[:-1]}a" if masculine.endswith("o") else masculine


_INDEFINITE, _DEFINITE = {"un": "m", "una": "f"}, {"el": "m", "la": "f"}
PEOPLE, THINGS, PLACES = (nouns(block, _INDEFINITE) for block in (_PEOPLE, _THINGS, _PLACES))
PERSON_QUALITIES = adjectives(_PERSON_QUALITIES, _PERSON_QUALITIES_BEFORE, _feminine)
THING_QUALITIES = adjectives(_THING_QUALITIES, _THING_QUALITIES_BEFORE, _feminine)
PLACE_QUALITIES = adjectives(_PLACE_QUALITIES, _PLACE_QUALITIES_BEFORE, _feminine)
TO_PEOPLE, TO_THINGS, TO_PLACES = phrases(_TO_PEOPLE), phrases(_TO_THINGS), phrases(_TO_PLACES)
WEATHER, DRIFTED = nouns(_WEATHER, _DEFINITE), phrases(_DRIFTED)
OPENERS, CLOSERS = phrases(_OPENERS), phrases(_CLOSERS)
PERSON_CLOSERS = CLOSERS + phrases(_PERSON_CLOSERS)

_FEMININE = {"el": "la", "un": "una", "nuestro": "nuestra"}


def sentence(rng: random.Random) -> str:
    """Return one sentence, drawn with `rng`."""
    kind = rng.random()
    if kind < 0.08:
        subject, closers = _noun(rng, "el", rng.choice(WEATHER), ()), CLOSERS
        predicate = _joined(rng.choice(DRIFTED), _noun(rng, "el", rng.choice(PLACES), PLACE_QUALITIES))
    else:
        closers = PERSON_CLOSERS
        agent, other = rng.sample(PEOPLE, 2)
        subject = _subject(rng, agent)
        if kind < 0.45:
            thing = _noun(rng, rng.choice(("un", "el")), rng.choice(THINGS), THING_QUALITIES)
            predicate = _joined(rng.choice(TO_THINGS), thing)
        elif kind < 0.75:
            predicate = _joined(rng.choice(TO_PLACES), _noun(rng, "el", rng.choice(PLACES), PLACE_QUALITIES))
        else:
            person = _noun(rng, rng.choice(("un", "el", "nuestro")), other, PERSON_QUALITIES)
            predicate = _joined(rng.choice(TO_PEOPLE), person)
    text = f"{subject} {predicate}"
    shape = rng.random()
    if shape < 0.35:
        text = f"{rng.choice(OPENERS)}, {text}"
    if shape > 0.25:
        text = f"{text} {rng.choice(closers)}"
    return f"{capitalised(text)}."


def _subject(rng: random.Random, person: Noun) -> str:
    if rng.random() < 0.2:
        neighbour = "mi vecino" if person.gender == "m" else "mi vecina"
        return f"{neighbour}, {_noun(rng, 'el', person, PERSON_QUALITIES)},"
    article = rng.choice(("el", "el", "un", "nuestro"))
    return _noun(rng, article, person, PERSON_QUALITIES)


def _noun(rng: random.Random, article: str, noun: Noun, qualities: Sequence[Adjective]) -> str:
    text = noun.text
    if qualities and rng.random() < 0.6:
        quality = rng.choice(qualities)
        form = quality.feminine if noun.gender == "f" else quality.masculine
        text = f"{form} {text}" if quality.before else f"{text} {form}"
    return f"{_FEMININE[article] if noun.gender == 'f' else article} {text}"


def _joined(verb: str, phrase: str) -> str:
    """Verb and noun phrase, with "a" and "de" contracted before "el"."""
    if verb.endswith((" a", " de")) and phrase.startswith("el "):
        return f"{verb}{phrase[1:]}"
    return f"{verb} {phrase}"
