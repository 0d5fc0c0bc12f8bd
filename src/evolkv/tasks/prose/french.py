"""The French grammar: elision and contraction, adjectives before or after their noun, agreeing participles."""

from __future__ import annotations

import random
from collections.abc import Sequence

from evolkv.tasks.prose.words import Adjective, Noun, adjectives, capitalised, nouns, phrases

_PEOPLE = """
    un boulanger|un menuisier|une institutrice|un passeur|un facteur|un médecin|un berger|une couturière
    une veuve|un aubergiste|un pêcheur|une artiste|un meunier|une avocate|une infirmière|un apiculteur
    un forgeron|un contrôleur|une cuisinière|un dentiste|une fermière|un épicier|une juge|un mécanicien
    un maire|une musicienne|une pharmacienne|un photographe|une pilote|un plombier|un imprimeur|un marin
    une sculptrice|un cordonnier|une étudiante|un géomètre|une serveuse|un horloger|une tisserande
    une libraire|un violoncelliste|une chimiste|un cocher|un cycliste|un orfèvre|une historienne
    un journaliste|un porteur|une traductrice|un jardinier|une fleuriste|un ébéniste|une actrice|un ouvrier
"""
# Masculine/feminine, where these differ.
_PERSON_QUALITIES = """
    fatigué/fatiguée|têtu/têtue|patient/patiente|prudent/prudente|distrait/distraite|généreux/généreuse
    célèbre|timide|intelligent/intelligente|poli/polie|solitaire|nerveux/nerveuse|bavard/bavarde
    gaucher/gauchère|songeur/songeuse|inquiet/inquiète|aimable|fier/fière|étourdi/étourdie|joyeux/joyeuse
    curieux/curieuse|discret/discrète|serviable|maladroit/maladroite|souriant/souriante
    travailleur/travailleuse
"""
_THINGS = """
    un vélo|une échelle|une théière|une horloge|une valise|une brouette|une carte|un parapluie|un piano
    une barque|un coffre|une selle|un berceau|un télescope|une machine à écrire|une bouilloire
    un filet de pêche|un manteau|un carnet|un violon|un portail|un four à pain|une machine à coudre|un cadre
    une charrette|une lettre|une cage à oiseaux|une étagère|un miroir|un tonneau|un tapis|une couverture
    un chandelier|un échiquier|une boussole|un dictionnaire|une sonnette|un tambour|un globe|un marteau
    une cruche|une lampe à huile|un album de photos|une corde|un poêle|une nappe|une trompette|une armoire
    un volet|un hamac|une hache|un accordéon|un édredon|un fauteuil|un traîneau|une pendule|un arrosoir
"""
_THING_QUALITIES = """
    lourd/lourde|cassé/cassée|emprunté/empruntée|poussiéreux/poussiéreuse|rouillé/rouillée|énorme
    oublié/oubliée|verni/vernie|cabossé/cabossée|coûteux/coûteuse|tordu/tordue|inachevé/inachevée|ordinaire
    étrange|décoloré/décolorée|solide|mouillé/mouillée|usé/usée|précieux/précieuse|bleu/bleue|léger/légère
    pratique|fragile|élégant/élégante
"""
_PLACES = """
    une place du marché|une gare|un moulin|une mairie|une boulangerie|une bibliothèque|une cour d'école
    un bureau de poste|un hôpital|un cimetière|une poissonnerie|un théâtre|une étable|un pont de pierre
    un tribunal|un hangar|un embarcadère|un arrêt de bus|un musée|un potager|une plage|un château|une grange
    une laiterie|une caserne|une serre|une auberge|une blanchisserie|un monastère|un parc|une carrière
    une salle de lecture|une scierie|une écurie|une piscine|une taverne|un salon de thé|une tour|un vignoble
    un entrepôt|un atelier|une fontaine|une chapelle|une usine|une école|un hôtel|une halle|un jardin public
    un lavoir|un stade|un kiosque|une épicerie|une église
"""
_PLACE_QUALITIES = """
    tranquille|bondé/bondée|vide|étroit/étroite|ensoleillé/ensoleillée|abandonné/abandonnée|animé/animée
    lointain/lointaine|ombragé/ombragée|délabré/délabrée|familier/familière|froid/froide|paisible
    bruyant/bruyante|silencieux/silencieuse|isolé/isolée|accueillant/accueillante|obscur/obscure
    enneigé/enneigée|modeste|pittoresque|exposé au vent/exposée au vent
"""
# Before the noun: masculine/feminine/masculine before a vowel.
_PERSON_QUALITIES_BEFORE = "vieux/vieille/vieil|jeune|gentil/gentille|brave|excellent/excellente"
_THING_QUALITIES_BEFORE = """
    petit/petite|beau/belle/bel|vieux/vieille/vieil|grand/grande|joli/jolie|nouveau/nouvelle/nouvel|gros/grosse
"""
_PLACE_QUALITIES_BEFORE = """
    petit/petite|grand/grande|vieux/vieille/vieil|ancien/ancienne|nouveau/nouvelle/nouvel|joli/jolie
    beau/belle/bel
"""
# (e) is there for a feminine subject.
_TO_THINGS = """
    a réparé|a peint|a vendu|a acheté|a emprunté|a perdu|a mesuré|a nettoyé|a caché|a examiné|a emballé
    a admiré|a dessiné|a pesé|a restauré|a déballé|a hérité de|a astiqué|a prêté|a offert|a décrit
    a photographié|a laissé tomber|a retrouvé|a démonté|a rapporté|a déplacé|a transporté|a rangé|a choisi
    a rêvé de|s'est servi(e) de|a pris soin de
"""
_TO_PLACES = """
    est passé(e) devant|a visité|a attendu près de|a couru jusqu'à|a balayé|a évité
    s'est reposé(e) à côté de|est retourné(e) à|a décrit|s'est promené(e) autour de|a dormi derrière
    a chanté devant|est resté(e) devant|a dessiné|a travaillé près de|a quitté|a cherché|a rêvé de
    est arrivé(e) à|s'est arrêté(e) devant|s'est souvenu(e) de|a longé|a traversé|a photographié
    est revenu(e) de
"""
_TO_PEOPLE = """
    a remercié|a attendu|s'est disputé(e) avec|a fait signe à|a écrit à|a fait confiance à|a invité|a ri avec
    a suivi|a reconnu|a aidé|a taquiné|a écouté|a présenté ses excuses à|s'est marié(e) avec
    s'est assis(e) à côté de|a surpris|a salué|a envié|a voyagé avec|a joué aux cartes avec|a cuisiné pour
    a consolé|a accompagné|a téléphoné à|s'est moqué(e) de|a rendu visite à|a dit au revoir à|a parlé de
    s'est souvenu(e) de
"""
_OPENERS = """
    le matin|plus tard cette semaine-là|des années après|sans prévenir|comme d'habitude|mardi dernier|à midi
    un soir|avant le petit déjeuner|après la tempête|pendant les vacances|au début|à la fin|un automne
    à notre grande surprise|peu avant minuit|une fois de plus|un peu plus tard|sur le chemin du retour
    cet hiver-là|par hasard|peu après|par un après-midi pluvieux|au printemps suivant|il y a longtemps
    vers le soir|au début de l'été|le jour du marché|sans un mot|le lendemain|un dimanche|ce jour-là
    cette année-là|finalement|tôt le matin
"""
_CLOSERS = """
    pendant que les cloches sonnaient|alors qu'il était déjà tard|quand on a allumé les lampes
    peu avant l'arrivée des invités|et tout le monde a ri|malgré le froid|au coucher du soleil
    pendant que la soupe cuisait|et personne ne l'a remarqué|juste à temps|au moment de la fonte des neiges
    pendant que les autres dormaient|avant que quiconque puisse protester|sous un ciel gris
    sous les yeux des enfants|quand le vent est tombé|le dernier jour du mois|avant l'heure du dîner
    pendant qu'un orgue jouait au loin|comme on l'avait prévu
"""
_PERSON_CLOSERS = """
    avant que la pluie ne commence|parce qu'il n'y avait rien d'autre à faire
    parce que le train avait du retard|et n'en a parlé à personne|avec beaucoup de soin|sans se presser
    avec le sourire|après une longue conversation|en silence|sans raison particulière|avec un peu de regret
    pour passer le temps|malgré tout|puis a repris son travail|et n'a pas vu passer l'heure
    sans faire de bruit|à la demande des voisins|par simple curiosité|à contrecœur
    avec beaucoup de patience|en sifflotant|comme convenu|et n'a rien dit
"""
_WEATHER = """
    la pluie|la neige|le brouillard|le vent du sud|le parfum du pain frais|le son des cloches|la brume
    la fumée des cheminées|la lumière du soir|le froid de la nuit|le bruit des voitures|le parfum du foin
    la musique du bal|la rumeur de la foule|la clarté du matin
"""
_DRIFTED = """
    a envahi|est parvenu(e) jusqu'à|est arrivé(e) jusqu'à|a atteint|a gagné|a enveloppé
    est passé(e) au-dessus de|s'est répandu(e) autour de|s'est attardé(e) près de|s'est approché(e) de
"""


_INDEFINITE, _DEFINITE = {"un": "m", "une": "f"}, {"le": "m", "la": "f"}
PEOPLE, THINGS, PLACES = (nouns(block, _INDEFINITE) for block in (_PEOPLE, _THINGS, _PLACES))
PERSON_QUALITIES = adjectives(_PERSON_QUALITIES, _PERSON_QUALITIES_BEFORE, str)
THING_QUALITIES = adjectives(_THING_QUALITIES, _THING_QUALITIES_BEFORE, str)
PLACE_QUALITIES = adjectives(_PLACE_QUALITIES, _PLACE_QUALITIES_BEFORE, str)
TO_PEOPLE, TO_THINGS, TO_PLACES = phrases(_TO_PEOPLE), phrases(_TO_THINGS), phrases(_TO_PLACES)
WEATHER, DRIFTED = nouns(_WEATHER, _DEFINITE), phrases(_DRIFTED)
OPENERS, CLOSERS = phrases(_OPENERS), phrases(_CLOSERS)
PERSON_CLOSERS = CLOSERS + phrases(_PERSON_CLOSERS)

_VOWELS = "aàâeéèêëiîïoôuùûhœ"
_ASPIRATED = ("halle", "hamac", "hangar", "hache")


def sentence(rng: random.Random) -> str:
    """Return one sentence, drawn with `rng`."""
    kind = rng.random()
    if kind < 0.08:
        agent, closers = rng.choice(WEATHER), CLOSERS
        subject = _noun(rng, "le", agent, ())
        predicate = _joined(rng.choice(DRIFTED), _noun(rng, "le", rng.choice(PLACES), PLACE_QUALITIES))
    else:
        closers = PERSON_CLOSERS
        agent, other = rng.sample(PEOPLE, 2)
        subject = _subject(rng, agent)
        if kind < 0.45:
            thing = _noun(rng, rng.choice(("un", "le")), rng.choice(THINGS), THING_QUALITIES)
            predicate = _joined(rng.choice(TO_THINGS), thing)
        elif kind < 0.75:
            predicate = _joined(rng.choice(TO_PLACES), _noun(rng, "le", rng.choice(PLACES), PLACE_QUALITIES))
        else:
            person = _noun(rng, rng.choice(("un", "le", "notre")), other, PERSON_QUALITIES)
            predicate = _joined(rng.choice(TO_PEOPLE), person)
    text = f"{subject} {predicate.replace('(e)', 'e' if agent.gender == 'f' else '')}"
    shape = rng.random()
    if shape < 0.35:
        text = f"{rng.choice(OPENERS)}, {text}"
    if shape > 0.25:
        text = f"{text} {rng.choice(closers)}"
    return f"{capitalised(text)}."


def _subject(rng: random.Random, person: Noun) -> str:
    if rng.random() < 0.2:
        neighbour = "mon voisin" if person.gender == "m" else "ma voisine"
        return f"{neighbour}, {_noun(rng, 'le', person, PERSON_QUALITIES)},"
    article = rng.choice(("le", "le", "un", "notre"))
    return _noun(rng, article, person, PERSON_QUALITIES)


def _noun(rng: random.Random, article: str, noun: Noun, qualities: Sequence[Adjective]) -> str:
    text = noun.text
    if qualities and rng.random() < 0.6:
        quality = rng.choice(qualities)
        form = quality.feminine if noun.gender == "f" else quality.masculine
        if quality.before:
            text = f"{quality.elided if noun.gender == 'm' and _elides(text) else form} {text}"
        else:
            text = f"{text} {form}"
    if article == "le" and _elides(text):
        return f"l'{text}"
    if noun.gender == "f":
        article = {"le": "la", "un": "une"}.get(article, article)
    return f"{article} {text}"


def _joined(verb: str, phrase: str) -> str:
    """Verb and noun phrase, with the contractions of "à" and "de" between them."""
    if verb.endswith("à") and phrase.startswith("le "):
        return f"{verb[:-1]}au{phrase[2:]}"
    if verb.endswith(" de") and phrase.startswith("le "):
        return f"{verb[:-1]}u{phrase[2:]}"
    if verb.endswith(" de") and phrase.startswith("un"):
        return f"{verb[:-1]}'{phrase}"
    return f"{verb} {phrase}"


def _elides(text: str) -> bool:
    return text[0] in _VOWELS and not text.startswith(_ASPIRATED)
