"""A synthetic German-English parallel corpus, made by a small synchronous grammar.

Each construction builds both sides from one derivation, so a source sentence has exactly one translation.
A model has to learn case and adjective endings, agreement, verb-second and verb-final order, separable
verbs, irregular forms, do-support and stranded prepositions:

    heute ruft der kleine junge seine tante nicht an .
    today the small boy does not call his aunt .

    weil mein lehrer einkauft , wacht ein koch auf .
    because my teacher shops , a cook wakes up .

    sie vergessen , dass du kein fenster aufmachen sollst .
    they forget that you should not open a window .

Sentences have at most ten tokens, so that a small model gets to translate them within minutes.
Where German leaves two readings open, only one is generated: a subject precedes full objects, "sie" and
"es" are subjects, "ihr" is "you", and an object relative clause has to show that it is one (see `relative`).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import namedtuple
from dataclasses import dataclass, field
from itertools import islice
from typing import Iterator, NamedTuple, Sequence

MIN_TOKENS, MAX_TOKENS = 4, 10

# gender singular plural english[/plural]; w: masculine, weak declension; places add both prepositions
NOUNS = {
    "person": """m mann männer man/men; f frau frauen woman/women; n kind kinder child/children;
m koch köche cook; w junge jungen boy; n mädchen mädchen girl; m lehrer lehrer teacher;
f ärztin ärztinnen doctor; m freund freunde friend; w nachbar nachbarn neighbour; f tante tanten aunt;
m onkel onkel uncle; m bruder brüder brother; f schwester schwestern sister; f mutter mütter mother;
m vater väter father; w student studenten student; f königin königinnen queen; w bauer bauern farmer""",
    "animal": """m hund hunde dog; f katze katzen cat; n pferd pferde horse; m vogel vögel bird;
f kuh kühe cow; w bär bären bear; w affe affen monkey; n schaf schafe sheep/sheep; f maus mäuse mouse/mice;
w elefant elefanten elephant""",
    "food": """m apfel äpfel apple; n ei eier egg; f kartoffel kartoffeln potato/potatoes;
f torte torten cake; f suppe suppen soup; m fisch fische fish/fish; f birne birnen pear""",
    "readable": """n buch bücher book; m brief briefe letter; f zeitung zeitungen newspaper;
n gedicht gedichte poem; m bericht berichte report""",
    "object": """m tisch tische table; f lampe lampen lamp; f uhr uhren clock; n fahrrad fahrräder bicycle;
n auto autos car; m hut hüte hat; m mantel mäntel coat; m schlüssel schlüssel key; m ball bälle ball;
n bild bilder picture; n messer messer knife/knives; m regenschirm regenschirme umbrella;
f blume blumen flower; n geschenk geschenke present""",
    "hinged": """f tür türen door; n fenster fenster window; f tasche taschen bag; m koffer koffer suitcase;
n paket pakete parcel""",
    "location": """m garten gärten garden in in; f küche küchen kitchen in in;
f schule schulen school in at; n haus häuser house in in; m bahnhof bahnhöfe station an at;
m park parks park in in; f stadt städte city in in; m wald wälder forest in in; n dorf dörfer village in in;
m markt märkte market auf at; m strand strände beach an on; n büro büros office in in""",
    "event": """n spiel spiele game; n konzert konzerte concert; m film filme film; n fest feste party;
f reise reisen trip; f hochzeit hochzeiten wedding; f prüfung prüfungen exam""",
}
# german[/stem before an ending] english, then the initials of the noun classes it fits
ADJECTIVES = """klein small pafrohle; groß big pafrohle; alt old parohl; schön beautiful parohle;
neu new rohl; lang long re; teuer/teur expensive rohl; billig cheap froh; schwer heavy oh; rot red foh;
blau blue oh; grün green foh; schwarz black aoh; weiß white aoh; braun brown aoh; müde/müd tired pa;
hungrig hungry pa; traurig sad pare; glücklich happy pa; klug clever pa; fleißig diligent p;
freundlich friendly pa; krank sick pa; leer empty hl; stark strong pa; frisch fresh f; süß sweet f;
ruhig quiet pal; dunkel/dunkl dark l; schmutzig dirty paohl; interessant interesting re;
langweilig boring re"""
# [particle|]infinitive[/er-form/participle], * for the auxiliary sein; english[/past]; subjects; frames:
# i(ntransitive); t:accusative; d:dative; g:accusative (gives x y); G:accusative (explains y to x);
# p:preposition:case:english:object; c:conjunctions of a complement clause; k (copula)
VERBS = """sein/ist/gewesen* be/was pafrohle k; schlafen/schläft/geschlafen sleep/slept pa i;
lachen laugh p i p:über:acc:at:paroe; weinen cry p i; arbeiten work p i; tanzen dance pa i;
singen/singt/gesungen sing/sang p i; schwimmen/schwimmt/geschwommen* swim/swam pa i;
auf|wachen* wake_up/woke pa i; auf|stehen/steht/aufgestanden* get_up/got pa i;
ein|schlafen/schläft/eingeschlafen* fall_asleep/fell pa i; ein|kaufen shop/shopped p i;
an|kommen/kommt/angekommen* arrive pa i; hören hear/heard pa t:pa c:dass;
sehen/sieht/gesehen see/saw pa t:pafrohl c:dass; kennen/kennt/gekannt know/knew p t:parl;
lieben love pa t:pafrol; suchen look_for pa t:pafroh; finden/findet/gefunden find/found pa t:pafrohl;
kaufen buy/bought p t:afroh; lesen/liest/gelesen read/read p t:r;
schreiben/schreibt/geschrieben write/wrote p t:r; zeichnen draw/drew p t:pafohl;
essen/isst/gegessen eat/ate p t:f; tragen/trägt/getragen carry p t:afroh;
waschen/wäscht/gewaschen wash p t:pafo; besuchen/besucht/besucht visit p t:pl;
vergessen/vergisst/vergessen forget/forgot p t:pfroe c:dass; reparieren/repariert/repariert repair p t:oh;
treffen/trifft/getroffen meet/met p t:p; ab|holen fetch p t:paroh; an|rufen/ruft/angerufen call p t:p;
ein|laden/lädt/eingeladen invite p t:p; auf|machen open pa t:h; zu|machen close p t:h;
mit|bringen/bringt/mitgebracht bring/brought p t:afroh; kennen|lernen get_to_know/got p t:p;
an|sehen/sieht/angesehen look_at pa t:pafrohl; weg|werfen/wirft/weggeworfen throw_away/threw p t:froh;
helfen/hilft/geholfen help pa d:pa; danken thank p d:p; folgen* follow pa d:pa; zu|hören listen_to pa d:p;
antworten answer p d:p; glauben believe p d:p c:dass; geben/gibt/gegeben give/gave p g:afroh;
zeigen show p g:pafrohl; schicken send/sent p g:froh; leihen/leiht/geliehen lend/lent p g:aroh;
vor|lesen/liest/vorgelesen read/read p g:r; erklären/erklärt/erklärt explain p G:re;
zurück|geben/gibt/zurückgegeben return p G:aroh; vor|stellen introduce p G:pa;
warten wait pa p:auf:acc:for:paroe; denken/denkt/gedacht think/thought p p:an:acc:of:pafrohle;
sprechen/spricht/gesprochen talk p p:mit:dat:to:pa; spielen play pa p:mit:dat:with:ao;
sagen say/said p c:dass; träumen dream p p:von:dat:of:pafole; fragen ask p p:nach:dat:about:parole c:ob;
hoffen hope p c:dass; wissen/weiß/gewusst know/knew p c:dass,ob"""
# kind german english [the only tense]; S sentence, T time, F frequency, M manner, P place
ADVERBS = """S leider unfortunately; S vielleicht perhaps; S natürlich of_course; S plötzlich suddenly;
T heute today; T gestern yesterday perfect; T jetzt now present; T morgen tomorrow modal; T bald soon modal;
T nachts at_night; T abends in_the_evening; F oft often; F immer always; F selten rarely; M schnell quickly;
M leise quietly; M laut loudly; P hier here; P dort there; P draußen outside"""
# the sets of adverbials that a clause may draw
ADVERBIALS = ["", "", "", "T", "T", "P", "F", "M", "TP", "TP", "TM", "FP", "S", "SP"]
MODALS = """kann kannst kann können könnt können=can; soll sollst soll sollen sollt sollen=should;
werde wirst wird werden werdet werden=will; muss musst muss müssen müsst müssen=have to;
will willst will wollen wollt wollen=want to; darf darfst darf dürfen dürft dürfen=may;
möchte möchtest möchte möchten möchtet möchten=would like to"""
TENSES = ("present", "perfect", "modal")  # the perfect becomes the English simple past
CONJUNCTIONS = {
    "dass": "that",
    "ob": "whether",
    "weil": "because",
    "obwohl": "although",
    "wenn": "if",
    "während": "while",
}


def rows(table: str) -> dict[str, list[str]]:
    """Reads "nom der die; acc den die" as {"nom": ["der", "die"], ...}; "-" stands for an empty form."""
    lines = [line.split() for line in table.split(";")]
    return {key: [form.strip("-") for form in forms] for key, *forms in lines}


PRESENT = rows(
    "sein bin bist ist sind seid sind; haben habe hast hat haben habt haben; wissen weiß weißt weiß wissen wisst wissen"
)
BE = rows("present am are is are are are; perfect was were was were were were")
# determiners and endings for masculine, feminine, neuter, plural
ARTICLE = rows("nom der die das die; acc den die das die; dat dem der dem den")
RELATIVE = {**ARTICLE, **rows("dat dem der dem denen")}
EIN = rows("nom - e - e; acc en e - e; dat em er em en")
WEAK = rows("nom e e e en; acc en e e en; dat en en en en")
MIXED = rows("nom er e es en; acc en e es en; dat en en en en")
STRONG = rows("nom er e es e; acc en e es e; dat em er em en")
POSSESSIVES = [("mein", "my"), ("dein", "your"), ("sein", "his"), ("unser", "our"), ("euer", "your")]
SUBJECTS = [
    [("ich", "i")],
    [("du", "you")],
    [("er", "he"), ("sie", "she"), ("es", "it")],
    [("wir", "we")],
    [("ihr", "you")],
    [("sie", "they")],
]
OBJECTS = [
    ("mich", "mir", "me"),
    ("dich", "dir", "you"),
    ("ihn", "ihm", "him"),
    ("uns", "uns", "us"),
    ("euch", "euch", "you"),
]
CONTRACTIONS = {"in dem ": "im ", "an dem ": "am ", "von dem ": "vom "}

Noun = namedtuple("Noun", "cls gender sg pl en en_pl prep en_prep")
Verb = namedtuple("Verb", "inf particle er participle aux en past")
Frame = namedtuple("Frame", "verb kind roles prep conjunctions")  # roles: {role: noun classes}
Adverb = namedtuple("Adverb", "kind de en")
NO_ADVERB = Adverb("", "", "")


class NP(NamedTuple):
    nom: str = ""
    acc: str = ""
    dat: str = ""
    en: str = ""
    en_object: str = ""
    person: int = 2  # an index into ich du er wir ihr sie
    cls: str = "p"
    pronoun: bool = False
    negative: bool = False  # kein
    relative: bool = False  # has a relative clause
    marked: bool = False  # the nominative cannot be an accusative


NO_NP = NP()


@dataclass
class Clause:
    frame: Frame
    subject: NP
    tense: str  # present, perfect (English past), modal
    modal: tuple[list[str], str]
    negated: bool
    objects: dict[str, NP] = field(default_factory=dict)
    adverbs: list[Adverb] = field(default_factory=list)
    front: Adverb = NO_ADVERB
    predicate: tuple[str, str] = ("", "")
    complement: tuple[str, Clause] | None = None


class Dice(random.Random):
    """Draws with random() alone, whose sequence for a seed is the same in every Python version."""

    terse = False  # sentences of two clauses do without adjectives and adverbs, or few would be short enough

    def pick(self, items: Sequence):
        return items[int(self.random() * len(items))]

    def chance(self, p: float) -> bool:
        return self.random() < p


def join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def add_s(words: str) -> str:
    """The -s of plurals and third persons, on the first word of "get up"; have is the one exception."""
    word, _, rest = words.partition(" ")
    if word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "ie"
    elif word.endswith(("s", "x", "ch", "sh")):
        word += "e"
    return join("has" if word == "have" else word + "s", rest)


def add_ed(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "i"
    return word + ("d" if word.endswith("e") else "ed")


def add_t(stem: str) -> str:
    return stem + ("et" if stem.endswith(("t", "d", "chn")) else "t")


def entries(table: str) -> list[list[str]]:
    return [[word.replace("_", " ") for word in entry.split()] for entry in table.split(";")]


def read_noun(cls: str, gender: str, sg: str, pl: str, en: str, prep: str = "", en_prep: str = "") -> Noun:
    en, _, en_pl = en.partition("/")
    return Noun(cls[0], gender, sg, pl, en, en_pl or add_s(en), prep, en_prep)


def read_verb(german: str, english: str, subjects: str, *patterns: str) -> Iterator[Frame]:
    lemma, *forms = german.rstrip("*").split("/")
    particle, _, inf = lemma.rpartition("|")
    regular = add_t(inf[:-2])
    er, participle = forms or (regular, particle + "ge" + regular)
    en, _, past = english.partition("/")
    first, _, rest = en.partition(" ")
    past = join(past or add_ed(first), rest)
    verb = Verb(inf, particle, er, participle, "sein" if german.endswith("*") else "haben", en, past)
    for pattern in patterns:
        kind, *rest = pattern.split(":")
        last = rest[-1] if rest else ""
        roles = {"t": {"acc": last}, "d": {"dat": last}, "g": {"dat": "p", "acc": last}, "p": {"prep": last}}
        roles = {"subject": subjects, **roles.get(kind.lower(), {})}
        yield Frame(verb, kind, roles, rest[:3], last.split(","))


LEXICON = {cls[0]: [read_noun(cls, *entry) for entry in entries(table)] for cls, table in NOUNS.items()}
FRAMES = [frame for entry in entries(VERBS) for frame in read_verb(*entry)]
BY_KIND = {kind: [frame for frame in FRAMES if frame.kind == kind] for kind in "itdgGpck"}
ADJECTIVE_LIST, ADVERB_LIST = entries(ADJECTIVES), entries(ADVERBS)
MODAL_LIST = [(de.split(), en) for de, en in (entry.split("=") for entry in MODALS.split(";"))]


# ---- noun phrases


def noun_phrase(dice: Dice, noun: Noun, plural: bool, dets: str, extend: bool = False, depth: int = 1) -> NP:
    """dets: d(efinite), i(ndefinite), p(ossessive), k(ein); extend: may take a PP or (depth 0) a clause."""
    det, column = dice.pick(dets), 3 if plural else "mfnw".index(noun.gender) % 3
    possessive = dice.pick(POSSESSIVES)
    stem = {"d": "", "i": "" if plural else "ein", "p": possessive[0], "k": "kein"}[det]
    endings = WEAK if det == "d" else MIXED if stem else STRONG
    fitting = [adjective for adjective in ADJECTIVE_LIST if noun.cls in adjective[2]]
    adjectives = [dice.pick(fitting) for _ in range(0 if dice.terse else dice.pick([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2]))]
    if adjectives[1:] == adjectives[:1]:
        adjectives = adjectives[:1]

    post, en_post, is_relative = "", "", False
    if extend and not dice.terse and dice.chance(0.12):
        post, en_post = attached(dice, noun)
    elif extend and depth == 0 and dice.chance(0.25):
        post, en_post = relative(dice, noun, plural)
        is_relative = True

    forms = []
    for case in ("nom", "acc", "dat"):
        ending = EIN[case][column]
        article = ARTICLE[case][column] if det == "d" else stem and stem + ending
        words = [a[0].split("/")[-1] + endings[case][column] for a in adjectives]
        form = noun.pl if plural or (noun.gender == "w" and case != "nom") else noun.sg
        if plural and case == "dat" and form[-1] not in "ns":
            form += "n"
        forms.append(join(article.replace("euere", "eure"), *words, form, post))
    rest = join(*[a[1] for a in adjectives], noun.en_pl if plural else noun.en, en_post)
    a = "an" if rest[0] in "aeiou" else "a"
    en = {"d": "the", "i": "" if plural else a, "p": possessive[1], "k": "any" if plural else a}[det]
    return NP(
        *forms,
        join("no" if det == "k" else en, rest),
        join(en, rest),
        5 if plural else 2,
        noun.cls,
        negative=det == "k",
        relative=is_relative,
        marked=column == 0,
    )


def some_noun(dice: Dice, classes: str, dets: str, extend: bool = False, depth: int = 1) -> NP:
    return noun_phrase(dice, dice.pick(LEXICON[dice.pick(classes)]), dice.chance(0.3), dets, extend, depth)


def prepositional(prep: str, case: str, np: NP) -> str:
    phrase = f"{prep} {getattr(np, case)}"
    for long, short in CONTRACTIONS.items():
        if phrase.startswith(long) and not np.relative:
            return short + phrase[len(long) :]
    return phrase


def attached(dice: Dice, noun: Noun) -> tuple[str, str]:
    """A PP inside a noun phrase.  No adverbial or prepositional object has the same preposition and noun
    class, so that it is never in doubt what the PP belongs to."""
    if noun.cls == "p" and dice.chance(0.5):
        place = noun_phrase(dice, dice.pick([n for n in LEXICON["l"] if n.prep == "in"]), False, "d")
        return prepositional("aus", "dat", place), join("from", place.en)
    if noun.cls == "p":
        thing = some_noun(dice, "o", "ddip")
        return prepositional("mit", "dat", thing), join("with", thing.en)
    if noun.cls in "fro":
        person = some_noun(dice, "p", "ddip")
        return prepositional("für", "acc", person), join("for", person.en)
    return "", ""


def relative(dice: Dice, noun: Noun, plural: bool) -> tuple[str, str]:
    slots = [(f, role) for f in FRAMES for role in f.roles if f.kind != "c" and noun.cls in f.roles[role]]
    frame, role = dice.pick(slots)
    gap, column = NP(person=5 if plural else 2, cls=noun.cls), 3 if plural else "mfnw".index(noun.gender) % 3
    clear = False
    while not clear:
        c = clause(dice, frame, dice.pick(TENSES), gap_role=role, gap=gap)
        # "die frau , die die katze sieht" is kept for the woman that sees, never the woman that is seen
        clear = role != "acc" or noun.cls not in "pa" or column == 0
        clear = clear or c.subject.marked or c.subject.person != gap.person
    prep, case = frame.prep[:2] if role == "prep" else ("", {"subject": "nom"}.get(role, role))
    return join(",", prep, RELATIVE[case][column], german(c, "final"), ","), join("that", english(c))


def subject_phrase(dice: Dice, classes: str, extend: bool, depth: int) -> NP:
    if "p" not in classes or dice.chance(0.65):
        return some_noun(dice, classes, "dddddiiipppk", extend, depth)
    person = int(dice.random() * 6)
    de, en = dice.pick([s for s in SUBJECTS[person] if s[0] != "es" or "a" in classes])
    return NP(de, en=en, person=person, cls="a" if de == "es" else "p", pronoun=True, marked=de not in ("sie", "es"))


def object_phrase(dice: Dice, classes: str, subject: NP, dets: str, extend: bool, depth: int) -> NP:
    if "p" in classes and dice.chance(0.2):
        person = int(dice.random() * 5)
        if person == 2 or person % 3 != subject.person % 3:  # no "ich sehe mich"
            acc, dat, en = OBJECTS[person]
            return NP("", acc, dat, en, en, person, pronoun=True)
    return some_noun(dice, classes, dets, extend, depth)


# ---- clauses


def adverbial(dice: Dice, kind: str, tense: str) -> Adverb:
    if kind == "P" and dice.chance(0.75):
        place = dice.pick(LEXICON["l"])
        np = noun_phrase(dice, place, False, "dddp")
        return Adverb(kind, prepositional(place.prep, "dat", np), join(place.en_prep, np.en))
    if kind == "T" and dice.chance(0.2):
        np = noun_phrase(dice, dice.pick(LEXICON["e"]), False, "d")
        prep, en = dice.pick([("nach", "after"), ("vor", "before")])
        return Adverb(kind, join(prep, np.dat), join(en, np.en))
    return Adverb(*dice.pick([a for a in ADVERB_LIST if a[0] == kind and a[3:] in ([], [tense])])[:3])


def clause(
    dice: Dice, frame: Frame | None, tense: str, depth: int = 1, main: bool = False, gap_role: str = "", gap: NP = NO_NP
) -> Clause:
    """Relative clauses need depth 0; main allows a fronted adverb; a relative pronoun stands for the gap."""
    frame = frame or dice.pick(BY_KIND[dice.pick("ttttttiiiddggGpppk")])
    roles, in_subject = frame.roles, dice.chance(0.5)  # one extended noun phrase at most
    subject = gap if gap_role == "subject" else subject_phrase(dice, roles["subject"], in_subject, depth)
    modal = dice.pick(MODAL_LIST[:4] if frame.kind == "k" else MODAL_LIST)
    c = Clause(frame, subject, tense, modal, not subject.negative and dice.chance(0.18))

    banned = {"M": frame.kind != "i", "F": c.negated or subject.negative, "S": not main, "P": frame.kind in "kc"}
    c.adverbs = [
        adverbial(dice, kind, tense) for kind in ("" if dice.terse else dice.pick(ADVERBIALS)) if not banned.get(kind)
    ]
    if main and c.adverbs and c.adverbs[0].kind in "STP" and dice.chance(0.6):
        c.front = c.adverbs.pop(0)

    # English puts these after the object, where a relative clause would seem to own them
    extend = not in_subject and not any(a.kind in "MPT" for a in c.adverbs)
    for role in list(roles)[1:]:
        dets = "dddddiiiippp" if not c.negated else "ddpkkk" if role == "acc" else "ddp"
        last = role == list(roles)[-1]
        filler = object_phrase(dice, roles[role], subject, dets, extend and last, depth)
        c.objects[role] = gap if role == gap_role else filler
    if frame.kind == "k":
        adjective = dice.pick([a for a in ADJECTIVE_LIST if subject.cls in a[2]])
        c.predicate = adjective[0].split("/")[0], adjective[1]
    if frame.kind == "c":
        inner = dice.pick(BY_KIND["c"]) if depth == 0 and dice.chance(0.15) else None
        inner_tense = "perfect" if tense == "perfect" else dice.pick(TENSES)
        c.complement = dice.pick(frame.conjunctions), clause(dice, inner, inner_tense, 1 if inner else depth)
    return c


def present(verb: Verb, person: int) -> str:
    stem = verb.inf[:-2]
    du = verb.er[:-1] + ("t" if verb.er[-2] in "sßz" else "st")
    forms = [stem + "e", du, verb.er, verb.inf, add_t(stem), verb.inf]
    return PRESENT.get(verb.inf, forms)[person]


def german(c: Clause, order: str) -> str:
    """order: main (verb second), inverted (verb first, after something fronted) or final."""
    f, verb, person = c.frame, c.frame.verb, c.subject.person
    finite, end = {
        "present": (present(verb, person), verb.particle),
        "perfect": (PRESENT[verb.aux][person], verb.participle),
        "modal": (c.modal[0][person], verb.particle + verb.inf),
    }[c.tense]
    objects = [(np.pronoun, getattr(np, role)) for role, np in c.objects.items() if role != "prep"]
    light = join(*[form for pronoun, form in objects if pronoun])
    target = c.objects.get("prep", NO_NP)
    middle = join(
        *[a.de for kind in "STF" for a in c.adverbs if a.kind == kind],
        *[form for pronoun, form in objects if not pronoun],
        "nicht" if c.negated and not any(np.negative for np in c.objects.values()) else "",
        *[a.de for kind in "MP" for a in c.adverbs if a.kind == kind],
        prepositional(*f.prep[:2], target) if target.acc else "",
        c.predicate[0],
    )
    # a pronoun object precedes the subject, unless that is a pronoun too
    start = join(c.subject.nom, light) if c.subject.pronoun else join(light, c.subject.nom)
    if order == "final":
        text = join(start, middle, end + finite if c.tense == "present" else join(end, finite))
    elif order == "inverted" or c.front.de:
        text = join(c.front.de, finite, start, middle, end)
    else:
        text = join(c.subject.nom, finite, light, middle, end)
    return join(text, ",", c.complement[0], german(c.complement[1], "final")) if c.complement else text


def verb_group(c: Clause) -> str:
    person, verb, infinitive = c.subject.person, c.frame.verb.en, ""
    often = join(*[a.en for a in c.adverbs if a.kind == "F"])
    if c.tense == "modal" and c.modal[1] in ("have to", "want to"):
        verb, infinitive = c.modal[1], verb
    elif c.tense == "modal":
        first, _, rest = c.modal[1].partition(" ")
        return join(join(first, "not" if c.negated else "").replace("can not", "cannot"), often, rest, verb)
    elif verb == "be":
        return join(BE[c.tense][person], "not" if c.negated else "", often)
    if c.negated:
        do = "did" if c.tense == "perfect" else "does" if person == 2 else "do"
        return join(do, "not", verb, infinitive)
    finite = c.frame.verb.past if c.tense == "perfect" else add_s(verb) if person == 2 else verb
    return join(often, finite, infinitive)


def english(c: Clause) -> str:
    objects = [np.en_object for np in c.objects.values()]
    if c.frame.kind == "p":
        objects.insert(0, c.frame.prep[2])
    elif c.frame.kind == "G" or (c.frame.kind == "g" and "" in objects):  # the book that i give to him
        objects = [objects[1], "to", objects[0]]
    adverbs = {kind: join(*[a.en for a in c.adverbs if a.kind == kind]) for kind in "SMPT"}
    text = join(
        c.front.en,
        adverbs["S"],
        c.subject.en,
        verb_group(c),
        *objects,
        c.predicate[1],
        adverbs["M"],
        adverbs["P"],
        adverbs["T"],
    )
    return join(text, CONJUNCTIONS[c.complement[0]], english(c.complement[1])) if c.complement else text


# ---- sentences and files


def sentence(dice: Dice) -> tuple[str, str]:
    shape, tense = dice.pick("mmmmmmmccccaaffoo"), dice.pick(TENSES)
    dice.terse = shape != "m"
    if shape in "mc":  # a main clause, or one with a complement clause
        c = clause(dice, dice.pick(BY_KIND["c"]) if shape == "c" else None, tense, depth=0, main=True)
        return close(german(c, "main")), close(english(c))
    if shape == "o":  # two coordinated main clauses
        first, second = (clause(dice, None, tense, main=True) for _ in range(2))
        und, en = dice.pick([("und", "and"), (", aber", ", but")])
        return (
            close(join(german(first, "main"), und, german(second, "main"))),
            close(join(english(first), en, english(second))),
        )
    conjunction = dice.pick(["weil", "weil", "obwohl", "wenn", "während"])
    if conjunction == "wenn" and tense == "perfect":
        tense = "modal"
    sub_tense = "present" if tense == "modal" and conjunction in ("wenn", "während") else tense
    main = clause(dice, None, tense, depth=0, main=shape == "a")
    sub = clause(dice, None, sub_tense, depth=int(dice.chance(0.5)))
    de, en = join(conjunction, german(sub, "final")), join(CONJUNCTIONS[conjunction], english(sub))
    if shape == "f":  # fronted
        return close(join(de, ",", german(main, "inverted"))), close(join(en, ",", english(main)))
    return close(join(german(main, "main"), ",", de)), close(join(english(main), en))


def close(text: str) -> str:
    """Adjacent clause ends share a comma, and the full stop replaces the last one."""
    text = text.replace(", ,", ",")
    return (text[:-2] if text.endswith(" ,") else text) + " ."


def pairs(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of pairs, no source sentence twice."""
    dice, seen = Dice(seed), set()
    while True:
        de, en = sentence(dice)
        lengths = sorted(text.count(" ") + 1 for text in (de, en))
        if de not in seen and lengths[0] >= MIN_TOKENS and lengths[1] <= MAX_TOKENS:
            seen.add(de)
            yield de, en


def corpus(n: int, seed: int) -> list[tuple[str, str]]:
    """n pairs with distinct source sentences, the same for a seed on every Python version."""
    return list(islice(pairs(seed), n))


def splits(sizes: dict[str, int], seed: int) -> dict[str, list[tuple[str, str]]]:
    """Sources are distinct throughout; no held-out target (du, ihr: "you") is in train."""
    stream = pairs(seed)
    held_out = {name: list(islice(stream, sizes[name])) for name in ("test", "valid")}
    targets = {en for part in held_out.values() for _, en in part}
    return {"train": list(islice((p for p in stream if p[1] not in targets), sizes["train"])), **held_out}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Write a synthetic German-English parallel corpus.")
    parser.add_argument("out", metavar="OUT", help="folder for {train,valid,test}.{de,en}")
    sizes = {"train": 24000, "valid": 500, "test": 500}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, metavar="N", help=f"default {size}")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="selects the corpus (default 1)")
    args = parser.parse_args(argv)
    sizes = {name: getattr(args, name) for name in sizes}
    for name, size in sizes.items():
        if size < 0:
            parser.error(f"--{name} must not be negative: {size}")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        parser.error(f"not a folder: {args.out}")
    try:
        os.makedirs(args.out, exist_ok=True)
        for name, part in splits(sizes, args.seed).items():
            for column, language in enumerate(("de", "en")):
                path = os.path.join(args.out, f"{name}.{language}")
                with open(path, "w", encoding="utf-8", newline="\n") as file:
                    file.writelines(f"{pair[column]}\n" for pair in part)
    except OSError as error:
        parser.error(f"cannot write to {args.out}: {error.strerror}")
    print(f"wrote {', '.join(f'{size} {name}' for name, size in sizes.items())} pairs to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
