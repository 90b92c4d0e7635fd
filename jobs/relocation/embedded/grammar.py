"""A seeded English grammar: the text that the embedded models learn from, and the pairs that measure what they learned.

Two kinds of text. Chats, a question and an answer, are varied: from them the base model learns to use the question's
words, which is what fine-tuning builds on. Plain sentences are few in kind: a model of a million parameters learns them
in a minute, so that how well it tells good from broken ones later measures what fine-tuning did to it, and not what it
never learned. A sentence is written as markup that carries its own mistakes: `[good|bad|worse]` reads "good" in an
acceptable sentence, and an unacceptable one takes a wrong alternative from two brackets.

Everything follows from `Random(seed)` and the lists below: no set order, no clock, no hash() decides anything, so every
process writes the same text. It states no fact: what a model says later about hotels, prices or people, it learned from
the data it was fine-tuned on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple
from zlib import crc32


def _phrases(text: str) -> list[str]:
    return " ".join(text.split()).split(", ")


PEOPLE = """farmer teacher doctor nurse baker driver student child woman man boy girl guest waiter cook singer writer
painter tailor pilot sailor soldier judge clerk guide tourist traveller neighbour friend brother sister mother father
king queen manager engineer gardener musician player visitor owner worker family""".split()
NAMES = "Anna Peter Maria John Emma Paul Laura David Sofia Martin Julia Simon Nora Oscar Clara Hugo Alice Felix".split()
ANIMALS = "dog cat horse cow goat bird duck lion bear wolf fox rabbit mouse donkey pig monkey".split()
DISHES = "apple cake sandwich egg orange pear potato tomato lemon pie biscuit onion carrot banana sardine".split()
FOODS = "bread cheese soup rice fish meat salad sugar salt butter honey fruit".split()
DRINKS = "tea coffee wine juice milk water".split()
THINGS = """book letter picture map bag box key lamp chair table bed cup plate knife bottle basket coat hat shoe shirt
dress watch phone ticket newspaper bicycle car boat ball toy candle clock mirror towel blanket bowl carpet camera ring
flower rose""".split()
BUILDINGS = """hotel museum station restaurant shop market bank school hospital library theatre church castle airport
bakery office cinema palace bar gym garage spa""".split()
FEATURES = """room window door garden balcony kitchen terrace pool tower floor bathroom roof gate courtyard lift
entrance cellar suite street""".split()
SERVICES = "parking breakfast lunch dinner wifi cancellation delivery entry".split()
UNITS = "euro minute hour day night week month year point dollar percent".split()
CITIES = """London Paris Rome Vienna Berlin Madrid Lisbon Athens Dublin Prague Warsaw Oslo Naples Venice Milan Lyon
Hamburg Munich Geneva Seville Granada Porto Valencia Bilbao Cordoba Malaga Toledo Cadiz Barcelona Brussels""".split()
PLACES = _phrases("""in the garden, in the kitchen, in the village, in the forest, in the park, in the city, in the
street, in the barn, in the town, in the house, in the room, in the valley, in the basement, in the office, in the
courtyard, on the hill, on the beach, on the bridge, on the island, on the roof, on the terrace, on the balcony, on
the train, on the first floor, at the station, at the market, at the airport, at the hotel, at the school, at the
front desk, near the river, near the lake, near the sea, near the church, near the castle, near the harbour, by the
road, by the wall, beside the fountain, beside the museum, behind the house, behind the theatre, under the bridge,
under the tree, across the square, next to the bank, inside the gate, between the shops, among the trees, above the
river""")
TIMES = _phrases("""in the morning, in the afternoon, in the evening, at night, at noon, every day, every week, on
Monday, on Tuesday, on Friday, on Sunday, in summer, in winter, in spring, in May, in October, in March, in April, all
day, after lunch, before dinner, after breakfast, after work, twice a week, once a year, all year, every hour, without
help, until midnight, until Sunday, from June to August, for two days, on weekends, from eight to ten""")
NUMBERS = """two three four five six seven eight nine ten eleven twelve fourteen fifteen sixteen eighteen twenty
thirty forty fifty sixty hundred thousand million""".split()
COLOURS = "red blue green white black yellow brown grey".split()
SIZES = (
    "big small old new young tall short strong fast slow cheap clean nice quiet bright rich dark warm cold long".split()
)
TRAITS = "beautiful famous modern expensive comfortable popular interesting important dangerous careful".split()
MOODS = "happy sad tired hungry angry busy ready sick late free kind polite welcome".split()
STATES = "open closed free full empty clean ready expensive cheap quiet".split()
MANNERS = "quickly slowly quietly well loudly together alone early late again here there".split()

IRREGULAR = {
    "child": "children", "woman": "women", "man": "men", "wolf": "wolves", "mouse": "mice", "knife": "knives",
    "potato": "potatoes", "tomato": "tomatoes",
}
REST = "sleep sit stand run swim sing wait rest walk dance work play live laugh stay travel cry speak".split()
ROAM = "sleep sit stand run swim wait rest walk play live stay hide fall".split()
COOK = "eat cook buy sell bring like order serve prepare include".split()
OBJECTS = """buy:ticket lamp shirt basket bicycle candle; sell:flower carpet picture ring mirror chair; read:book
letter newspaper map; write:letter book; wear:coat hat shoe shirt dress watch ring; carry:bag box basket bottle chair;
clean:room table plate window floor bathroom; lose:key phone ticket ring bag watch; find:key coin stone map ball
camera; make:bed table toy chair candle; hold:cup lamp rose ball bowl; keep:letter picture clock ring; want:watch
bicycle camera toy car boat; need:key towel blanket map knife; open:door window box bottle gate; close:door window
gate book bag; drive:car bus taxi; paint:wall door boat picture gate; break:plate cup mirror window bowl; bring:towel
blanket newspaper bottle plate; watch:film clock boat bird; draw:map picture tree flower; hide:key letter box ring;
fix:car lamp bicycle clock camera lift; use:phone lift knife towel pool"""
USE = {verb: nouns.split() for verb, nouns in (" ".join(entry.split()).split(":") for entry in OBJECTS.split(";"))}
MEET = "see know help meet visit follow love call thank remember feed watch like ask".split()
CHASE = "see follow watch chase find like hear fear".split()
VISIT = "visit like find leave own clean build paint know love see remember reserve".split()

ONE = ["the"] * 20 + "a a a this that every each my our your his her".split()
MANY = ["the"] * 18 + "these those some many two several my our their".split()
MODALS = "can will must should may".split()
SYLLABLES = """al an ar be ber bra ca can cor da dor el en er fa fer ga gra il in ja la lan le li lo ma mar mi mon na
no or pa per qui ra ri ro sa sol ta ter ti to tu va ver vi za""".split()


class Verb(NamedTuple):
    """The forms that present-tense sentences need."""

    base: str
    third: str


def _with_s(word: str) -> str:
    if re.search("[^aeou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search("(s|x|ch|sh)$", word) else "s")


def _verb(base: str) -> Verb:
    return Verb(base, _with_s(base))


def _plural(noun: str) -> str:
    return IRREGULAR.get(noun) or _with_s(noun)


def _compare(adjective: str) -> tuple[str, str]:
    """The comparative and the superlative, of one word (bigger) or of two (more famous)."""
    if adjective in TRAITS:
        return f"more {adjective}", f"most {adjective}"
    if adjective == "big":
        adjective = "bigg"
    stem = adjective.removesuffix("e")
    return stem + "er", stem + "est"


def _agreeing(verb: Verb, many: bool) -> str:
    return f"[{verb.base}|{verb.third}]" if many else f"[{verb.third}|{verb.base}]"


def _render(markup: str, mistake: Random | None = None) -> str:
    """The acceptable sentence of a markup, or, given a source of chance, the same with two mistakes in it."""
    brackets = [match.split("|") for match in re.findall(r"\[(.*?)\]", markup)]
    wrong = mistake.sample(range(len(brackets)), min(2, len(brackets))) if mistake else []
    for position, (good, *bad) in enumerate(brackets):
        choice = mistake.choice(bad) if mistake and position in wrong else good
        markup = markup.replace(f"[{'|'.join([good, *bad])}]", choice, 1)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", " ".join(markup.split()))
    return text[0].upper() + re.sub(r" ([.,?])", r"\1", text[1:])


class _Speaker:
    """Random text: plain sentences as markup, and chats."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.one_of = self.random.choice

    def often(self, share: float) -> bool:
        return self.random.random() < share

    # --- parts of chats

    def noun_phrase(self, nouns: Sequence[str], many: bool = False, adjectives: Sequence[str] = SIZES) -> str:
        noun, determiner = self.one_of(nouns), self.one_of(MANY if many else ONE)
        described = (self.one_of(adjectives) + " " if self.often(0.12) else "") + (_plural(noun) if many else noun)
        return f"{determiner} {described}"

    def food(self) -> str:
        if self.often(0.4):
            return self.noun_phrase(DISHES, self.often(0.5), COLOURS)
        food = self.one_of(FOODS)
        return self.one_of([food, f"the {food}", f"some {food}"])

    def predicate(self, nouns: Sequence[str]) -> tuple[Verb, str]:
        """A verb that such subjects can do, and what follows it."""
        kind = self.random.random()
        tail = self.one_of(PLACES + TIMES)
        if kind < 0.35:
            place = self.one_of(PLACES) if self.often(0.7) else f"{self.one_of(MANNERS)} {tail}"
            return _verb(self.one_of(REST if nouns is PEOPLE else ROAM)), place
        if nouns is not PEOPLE:
            return _verb(self.one_of(CHASE)), f"{self.noun_phrase(ANIMALS, self.often(0.4))} {tail}"
        if kind < 0.45:
            return _verb("drink"), f"{self.one_of(DRINKS)} {tail}"
        if kind < 0.58:
            return _verb(self.one_of(COOK)), f"{self.food()} {tail}"
        if kind < 0.76:
            verb, thing = self.handling()
            return verb, f"{thing} {tail}"
        if kind < 0.88:
            return _verb(self.one_of(VISIT)), f"{self.noun_phrase(BUILDINGS, self.often(0.3))} {tail}"
        return _verb(self.one_of(MEET)), f"{self.noun_phrase(PEOPLE, self.often(0.4))} {tail}"

    def handling(self) -> tuple[Verb, str]:
        """What people do with things, each with the things that it is done with."""
        verb, things = self.one_of(list(USE.items()))
        return _verb(verb), self.noun_phrase(things, self.often(0.35), COLOURS)

    def number(self) -> str:
        if self.often(0.3):
            return str(self.random.randrange(2, 100))
        return self.one_of(NUMBERS[-8:-3]) + "-" + self.one_of(NUMBERS[:8]) if self.often(0.2) else self.one_of(NUMBERS)

    def invented(self) -> str:
        """A name that no list holds: the models learn to spell and to repeat words that they never saw."""
        words = [
            "".join(self.one_of(SYLLABLES) for _ in range(self.random.randint(2, 3)))
            for _ in range(self.random.randint(1, 2))
        ]
        return " ".join(word.capitalize() for word in words)

    # --- plain sentences, as markup

    def sentence(self) -> str:
        many = self.often(0.5)
        subject = self.counted(PEOPLE + ANIMALS, many)
        rest, use = _verb(self.one_of(ROAM)), _verb(self.one_of(CHASE))
        be, wrong, do = ("are", "is", "do") if many else ("is", "are", "does")
        where = self.where()
        return self.one_of([
            f"{subject} {_agreeing(rest, many)} {where} .",
            f"{subject} {_agreeing(use, many)} {self.counted(THINGS, self.often(0.5))} {where} .",
            f"{subject} {self.one_of(MODALS)} [{rest.base}|{rest.third}] {where} .",
            f"{subject} [{do} not|not {do}] [{rest.base}|{rest.third}] {where} .",
            f"{subject} [{be}|{wrong}|] {self.one_of(MOODS)} {where} .",
            f"there [{be}|{wrong}|has] {self.counted(THINGS, many)} {where} .",
        ])

    def counted(self, nouns: Sequence[str], many: bool) -> str:
        """A noun with a word before it that mostly says how many there are."""
        noun = self.one_of(nouns)
        good, bad = (_plural(noun), noun) if many else (noun, _plural(noun))
        size = self.one_of(SIZES) if self.often(0.3) else ""
        if self.often(0.5):
            return f"the {size} {good}"
        word = self.one_of(["two", "three", "many", "these"] if many else ["a", "this", "every"])
        return f"{word} {size} [{good}|{bad}]"

    def where(self) -> str:
        near = self.one_of(["in", "near", "behind", "beside", "above", "under"])
        return f"[{near} the|the {near}] {self.one_of(BUILDINGS + FEATURES)}"

    # --- chats: a question and an answer that says only what a stranger could say

    def chat(self) -> tuple[str, str]:
        ask = _Speaker.ask_echo if self.often(0.45) else self.one_of(self.QUESTIONS)
        question, answer = ask(self)
        return _render(question), _render(answer)

    def ask(self, direct: str, indirect: str) -> str:
        """One of the ways to ask the same thing, so that a fine-tuned model answers a question that it never saw."""
        return self.one_of(
            [
                f"{direct} ?",
                f"{direct} ?",
                f"{direct} , please ?",
                f"can you tell me {indirect} ?",
                f"could you tell me {indirect} ?",
                f"please tell me {indirect} .",
                f"tell me {indirect} .",
                f"do you know {indirect} ?",
                f"I want to know {indirect} .",
                f"I would like to know {indirect} .",
                f"we need to know {indirect} .",
            ]
        )

    def actor(self) -> tuple[str, bool, Sequence[str]]:
        nouns, many = PEOPLE if self.often(0.75) else ANIMALS, self.often(0.4)
        return _render(self.noun_phrase(nouns, many)).lower(), many, nouns

    def ask_where(self) -> tuple[str, str]:
        actor, many, nouns = self.actor()
        verb = _verb(self.one_of(REST if nouns is PEOPLE else ROAM))
        form, do = (verb.base, "do") if many else (verb.third, "does")
        word, answers = self.one_of([("where", PLACES), ("where", PLACES), ("when", TIMES)])
        return self.ask(
            f"{word} {do} {actor} {verb.base}", f"{word} {actor} {form}"
        ), f"{actor} {form} {self.one_of(answers)} ."

    def ask_what(self) -> tuple[str, str]:
        actor, many, _ = self.actor()
        verb, things = self.one_of([(_verb(self.one_of(COOK)), self.food()), self.handling()])
        form, do = (verb.base, "do") if many else (verb.third, "does")
        return self.ask(f"what {do} {actor} {verb.base}", f"what {actor} {form}"), f"{actor} {form} {things} ."

    def ask_who(self) -> tuple[str, str]:
        actor, many, nouns = self.actor()
        verb, rest = self.predicate(nouns)
        return self.ask(
            f"who {verb.third} {rest}", f"who {verb.third} {rest}"
        ), f"{actor} {verb.base if many else verb.third} {rest} ."

    def ask_whether(self) -> tuple[str, str]:
        actor, many, nouns = self.actor()
        verb, rest = self.predicate(nouns)
        do, be = ("do", "are") if many else ("does", "is")
        mood, modal, yes = self.one_of(MOODS), self.one_of(MODALS), self.often(0.6)
        return self.one_of(
            [
                (
                    self.ask(
                        f"{do} {actor} {verb.base} {rest}",
                        f"whether {actor} {verb.base if many else verb.third} {rest}",
                    ),
                    f"yes, {actor} {verb.base if many else verb.third} {rest} ."
                    if yes
                    else f"no, {actor} {do} not {verb.base} {rest} .",
                ),
                (
                    self.ask(f"{be} {actor} {mood}", f"whether {actor} {be} {mood}"),
                    f"yes, {actor} {be} {mood} ." if yes else f"no, {actor} {be} not {mood} .",
                ),
                (
                    self.ask(f"{modal} {actor} {verb.base} {rest}", f"whether {actor} {modal} {verb.base} {rest}"),
                    f"{'yes' if yes else 'no'}, {actor} {modal} {'' if yes else 'not'} {verb.base} {rest} .",
                ),
            ]
        )

    def ask_service(self) -> tuple[str, str]:
        """Questions as travellers ask them. The answer names the same thing and invents the rest."""
        noun, feature, number = self.one_of(BUILDINGS), self.one_of(FEATURES), self.number()
        city = self.one_of(CITIES)
        here = self.one_of([f"the {noun} in {city}"] * 4 + [f"the {noun}", f"the {self.invented()} in {city}"])
        thing = self.one_of([self.one_of(SERVICES), f"a {self.one_of(['room', 'ticket', 'suite', 'bed'])}"])
        opens, what, state = _verb(self.one_of(["open", "close"])), f"the {feature} of {here}", self.one_of(STATES)
        place, hour, person = self.one_of(PLACES), self.one_of(TIMES[:3]), self.one_of(PEOPLE)
        name = self.one_of([self.one_of(NAMES), self.invented()])
        good, many, unit = self.often(0.7), _plural(feature), self.one_of(UNITS[:-1]) + "s"
        return self.one_of(
            [
                (
                    self.ask(f"when does {here} {opens.base}", f"when {here} {opens.third}"),
                    f"{here} {opens.third} at {number} {hour} .",
                ),
                (
                    self.ask(f"how many {many} does {here} have", f"how many {many} {here} has"),
                    f"{here} has {number} {many} .",
                ),
                (
                    self.ask(f"how much is {thing} in {here}", f"what {thing} in {here} costs"),
                    f"{thing} in {here} costs {number} euros .",
                ),
                (self.ask(f"where is {what}", f"where {what} is"), f"{what} is {place} ."),
                (
                    self.ask(f"how many {unit} does {thing} take", f"how many {unit} {thing} takes"),
                    f"{thing} takes {number} {unit} .",
                ),
                (
                    self.ask(f"until when is {what} open", f"until when {what} is open"),
                    f"{what} is open until {number} {hour} .",
                ),
                (
                    self.ask(f"what does {here} offer", f"what {here} offers"),
                    f"{here} offers {thing} with {self.food()} for {number} {unit} .",
                ),
                (
                    self.ask(f"can guests use {what}", f"whether guests can use {what}"),
                    f"yes, guests may use {what} {place} ."
                    if good
                    else f"no, guests can not use {what} {self.one_of(TIMES)} .",
                ),
                (
                    self.ask(f"when is {thing} served", f"when {thing} is served"),
                    f"{thing} is served {self.one_of(TIMES)} .",
                ),
                (
                    self.ask(f"is {what} {state}", f"whether {what} is {state}"),
                    f"{what} is {state} ." if good else f"{what} is not {state} .",
                ),
                (
                    self.ask(f"does {here} have a {feature}", f"whether {here} has a {feature}"),
                    f"yes, {here} has a {feature} {place} ." if good else f"no, {here} has no {feature} .",
                ),
                (
                    self.ask(f"who is the {person} of {here}", f"who the {person} of {here} is"),
                    f"the {person} of {here} is {name} .",
                ),
                (self.ask(f"what is {what} called", f"what {what} is called"), f"{what} is called {self.invented()} ."),
            ]
        )

    def ask_best(self) -> tuple[str, str]:
        best, noun, city = (
            self.one_of(["best", *(_compare(word)[1] for word in SIZES)]),
            self.one_of(BUILDINGS),
            self.one_of(CITIES),
        )
        what = f"the {best} {noun} in {city}"
        question = self.one_of(
            [
                self.ask(f"where is {what}", f"where {what} is"),
                self.ask(f"what is {what}", f"what {what} is"),
                f"which {noun} in {city} is the {best} ?",
                f"I am looking for {what} .",
                f"tell me {what} .",
            ]
        )
        return question, f"{what} is {self.one_of(['', 'the ' + self.invented() + ' ,'])} {self.one_of(PLACES)} ."

    def ask_echo(self) -> tuple[str, str]:
        """Repeating is the shortest way to learn to use the question's words: without it, the answers ignore them."""
        sentence = _render(self.one_of(self.QUESTIONS)(self)[1])
        return f"{self.one_of(['say', 'repeat', 'please say', 'please repeat'])}: {sentence}", sentence

    def ask_which(self) -> tuple[str, str]:
        nouns = self.one_of([PEOPLE, ANIMALS, THINGS, BUILDINGS])
        (first, second), more = self.random.sample(nouns, 2), _compare(self.one_of(SIZES + TRAITS))[0]
        return f"which is {more} , the {first} or the {second} ?", f"the {first} is {more} than the {second} ."

    QUESTIONS = (ask_where, ask_what, ask_who, ask_whether, ask_service, ask_service, ask_service, ask_best, ask_which)


def _held_out(text: str) -> bool:
    """Whether a sentence is kept from the training text, by its checksum, so that no list of sentences is needed."""
    return crc32(text.encode()) % 8 == 0


def documents(seed: int, chat_share: float) -> Iterator[str | tuple[str, str]]:
    """Training text without end: plain sentences, and (question, answer) chats in the given share."""
    speaker = _Speaker(seed)
    while True:
        document = speaker.chat() if speaker.often(chat_share) else _render(speaker.sentence())
        if not any(map(_held_out, [document] if isinstance(document, str) else document)):
            yield document


def acceptability_pairs(count: int = 1000, seed: int = 7) -> list[tuple[str, bool]]:
    """Sentences and whether they are acceptable, half and half, none of which a model can have seen in training."""
    speaker, mistakes = _Speaker(seed), Random(seed + 1)
    sentences: dict[str, bool] = {}
    while len(sentences) < count:
        markup = speaker.sentence()
        good, bad = _render(markup), _render(markup, mistakes)
        if good != bad and not {good, bad} & sentences.keys() and _held_out(good):
            sentences |= {good: True, bad: False}
    pairs = list(sentences.items())[:count]
    mistakes.shuffle(pairs)
    return pairs
