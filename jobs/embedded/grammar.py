"""A seeded English grammar: the text that the embedded models learn from, and the pairs that measure what they learned.

A sentence is written as markup that carries its own mistakes: `[good|bad|worse]` reads "good" in an acceptable sentence,
and an unacceptable one takes exactly one wrong alternative from one bracket. So the two sentences of a pair differ in one
mistake and nothing else, and a mistake stands beside the rule that it breaks. Everything follows from `Random(seed)` and
the lists below: no set order, no clock, no hash() decides anything, so every process writes the same text.

The language is plain and general, and it states no fact: what a model says later about hotels, prices or people, it
learned from the data it was fine-tuned on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple
from zlib import crc32


def _phrases(text: str) -> list[str]:
    return " ".join(text.split()).split(", ")


PEOPLE = """farmer teacher doctor nurse baker driver student child woman man boy girl guest waiter cook singer writer
painter tailor pilot sailor soldier judge clerk guide tourist traveller neighbour friend brother sister mother father king
queen manager engineer gardener musician player visitor owner worker family""".split()
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
FEATURES = """room window door garden balcony kitchen terrace pool tower floor bathroom roof gate courtyard lift entrance
cellar suite street""".split()
SERVICES = "parking breakfast lunch dinner wifi cancellation delivery entry".split()
UNITS = "euro minute hour day night week month year point dollar percent".split()
CITIES = """London Paris Rome Vienna Berlin Madrid Lisbon Athens Dublin Prague Warsaw Oslo Naples Venice Milan Lyon Hamburg
Munich Geneva Seville Granada Porto Valencia Bilbao Cordoba Malaga Toledo Cadiz Barcelona Brussels""".split()
PLACES = _phrases("""in the garden, in the kitchen, in the village, in the forest, in the park, in the city, in the street,
in the barn, in the town, in the house, in the room, in the valley, in the basement, in the office, in the courtyard,
on the hill, on the beach, on the bridge, on the island, on the roof, on the terrace, on the balcony, on the train,
on the first floor, at the station, at the market, at the airport, at the hotel, at the school, at the front desk,
near the river, near the lake, near the sea, near the church, near the castle, near the harbour, by the road, by the wall,
beside the fountain, beside the museum, behind the house, behind the theatre, under the bridge, under the tree,
across the square, next to the bank, inside the gate, between the shops, among the trees, above the river""")
TIMES = _phrases("""in the morning, in the afternoon, in the evening, at night, at noon, every day, every week, on Monday,
on Tuesday, on Friday, on Sunday, in summer, in winter, in spring, in May, in October, in March, in April, all day, after lunch,
before dinner, after breakfast, after work, twice a week, once a year, all year, every hour, without help, until midnight,
until Sunday, from June to August, for two days, on weekends, from eight to ten""")
MONTHS = "January February March April May June July August October November".split()
NUMBERS = """two three four five six seven eight nine ten eleven twelve fourteen fifteen sixteen eighteen twenty thirty forty
fifty sixty hundred thousand million""".split()
COLOURS = "red blue green white black yellow brown grey".split()
SIZES = "big small old new young tall short strong fast slow cheap clean nice quiet bright rich dark warm cold long".split()
TRAITS = "beautiful famous modern expensive comfortable popular interesting important dangerous careful".split()
MOODS = "happy sad tired hungry angry busy ready sick late free kind polite welcome".split()
STATES = "open closed free full empty clean ready expensive cheap quiet".split()
ADVERBS = "often always never usually sometimes".split()
MANNERS = "quickly slowly quietly well loudly together alone early late again here there".split()

FORMS = """sleep:slept:slept sit:sat:sat stand:stood:stood run:ran:run swim:swam:swum sing:sang:sung eat:ate:eaten
drink:drank:drunk buy:bought:bought sell:sold:sold bring:brought:brought find:found:found see:saw:seen take:took:taken
make:made:made write:wrote:written draw:drew:drawn drive:drove:driven wear:wore:worn hold:held:held keep:kept:kept
lose:lost:lost build:built:built leave:left:left speak:spoke:spoken fall:fell:fallen break:broke:broken hide:hid:hidden
meet:met:met know:knew:known give:gave:given forget:forgot:forgotten feed:fed:fed hear:heard:heard read:read:read
child:children woman:women man:men wolf:wolves mouse:mice knife:knives potato:potatoes tomato:tomatoes"""
IRREGULAR = {forms[0]: forms[1:] for forms in (entry.split(":") for entry in FORMS.split())}
REST = "sleep sit stand run swim sing wait rest walk dance work play live laugh stay travel cry speak".split()
ROAM = "sleep sit stand run swim wait rest walk play live stay hide fall".split()
COOK = "eat cook buy sell bring like order serve prepare include".split()
OBJECTS = """buy:ticket lamp shirt basket bicycle candle; sell:flower carpet picture ring mirror chair; read:book letter
newspaper map; write:letter book; wear:coat hat shoe shirt dress watch ring; carry:bag box basket bottle chair; clean:room table
plate window floor bathroom; lose:key phone ticket ring bag watch; find:key coin stone map ball camera; make:bed table toy chair
candle; hold:cup lamp rose ball bowl; keep:letter picture clock ring; want:watch bicycle camera toy car boat; need:key towel
blanket map knife; open:door window box bottle gate; close:door window gate book bag; drive:car bus taxi; paint:wall door boat
picture gate; break:plate cup mirror window bowl; bring:towel blanket newspaper bottle plate; watch:film clock boat bird; draw:map
picture tree flower; hide:key letter box ring; fix:car lamp bicycle clock camera lift; use:phone lift knife towel pool"""
USE = {verb: nouns.split() for verb, nouns in (" ".join(entry.split()).split(":") for entry in OBJECTS.split(";"))}
MEET = "see know help meet visit follow love call thank remember feed watch like ask".split()
CHASE = "see follow watch chase find like hear fear".split()
VISIT = "visit like find leave own clean build paint know love see remember reserve".split()

ONE, ONLY_ONE = ["the"] * 20 + "a a a this that every each my our your his her".split(), "a this that every each".split()
MANY, ONLY_MANY = ["the"] * 18 + "these those some many two several my our their".split(), "these those many two several".split()
PRONOUNS = [("he", "him", False), ("she", "her", False), ("they", "them", True), ("we", "us", True)]
MODALS = "can will must should may".split()
SYLLABLES = """al an ar be ber bra ca can cor da dor el en er fa fer ga gra il in ja la lan le li lo ma mar mi mon na no or
pa per qui ra ri ro sa sol ta ter ti to tu va ver vi za""".split()


import os
WPM=float(os.environ.get('WPM','7'))
class Verb(NamedTuple):
    """The five forms that English verbs have."""

    base: str
    third: str
    past: str
    done: str
    doing: str


def _with_s(word: str) -> str:
    if re.search("[^aeou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search("(s|x|ch|sh)$", word) else "s")


def _verb(base: str) -> Verb:
    stem = base[:-1] if re.search("[^e]e$", base) else base  # mak-ing, but see-ing
    if base in {"sit", "run", "swim", "forget"}:
        stem += base[-1]
    regular = base[:-1] + "ied" if re.search("[^aeou]y$", base) else base + ("d" if base.endswith("e") else "ed")
    past, done = IRREGULAR.get(base, (regular, regular))
    return Verb(base, _with_s(base), past, done, stem + "ing")


def _plural(noun: str) -> str:
    return IRREGULAR[noun][0] if noun in IRREGULAR else _with_s(noun)


def _compare(adjective: str) -> tuple[str, str]:
    """The comparative and the superlative, of one word (bigger) or of two (more famous)."""
    if adjective in TRAITS:
        return f"more {adjective}", f"most {adjective}"
    if adjective == "big":
        adjective = "bigg"
    stem = adjective.removesuffix("e")
    return stem + "er", stem + "est"


def _render(markup: str, mistake: Random | None = None) -> str:
    """The acceptable sentence of a markup, or, given a source of chance, the same with a mistake for every seven words."""
    brackets = len(re.findall(r"\[.*?\]", markup))
    words = len(re.sub(r"\|.*?\]", "", markup).split())
    wanted = max(1, round(words / WPM))
    chosen = mistake.sample(range(brackets), min(wanted, brackets)) if mistake else []
    position = -1

    def choose(match: re.Match[str]) -> str:
        nonlocal position
        position += 1
        good, *bad = match[1].split("|")
        wrong = [text for text in bad if text != good]
        return mistake.choice(wrong) if mistake and position in chosen and wrong else good

    text = " ".join(re.sub(r"\[(.*?)\]", choose, markup).split())
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + re.sub(r" ([.,?])", r"\1", text[1:])


class _Speaker:
    """Says things at random. Methods of one group return markup (`sentence` …), of the other a chat (`chat` …)."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.one_of = self.random.choice

    def often(self, share: float) -> bool:
        return self.random.random() < share

    # --- parts of a sentence, as markup

    def noun_phrase(self, nouns: Sequence[str], many: bool = False, adjectives: Sequence[str] = SIZES) -> str:
        noun = self.one_of(nouns)
        determiner, wrong = self.one_of(MANY if many else ONE), self.one_of(ONLY_ONE if many else ONLY_MANY)
        described = (self.one_of(adjectives) + " " if self.often(0.12) else "") + (_plural(noun) if many else noun)
        return f"[{determiner} {described}|{wrong} {described}|{described} {determiner}]"

    def food(self) -> str:
        if self.often(0.4):
            return self.noun_phrase(DISHES, self.often(0.5), COLOURS)
        food = self.one_of(FOODS)
        return self.one_of([food, f"[the {food}|these {food}|{food} the]", f"[some {food}|many {food}|{food} some]"])

    def subject(self, nouns: Sequence[str]) -> tuple[str, bool]:
        """A subject and whether it is plural. Some carry a phrase or a clause whose nouns and verbs may mislead."""
        chance, many = self.random.random(), self.often(0.4)
        if nouns is PEOPLE and chance < 0.1:
            return self.one_of(NAMES), False
        if nouns is PEOPLE and chance < 0.22:
            pronoun, wrong, many = self.one_of(PRONOUNS)
            return f"[{pronoun}|{wrong}]", many
        phrase = self.noun_phrase(nouns, many)
        if chance < 0.32:
            return f"{phrase} {self.one_of(PLACES)}", many
        if chance < 0.38 and nouns is PEOPLE:
            verb, thing = self.handling()
            return f"{phrase} who {self.present(verb, many)} {thing}", many
        return phrase, many

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
        person = f"[{(pronoun := self.one_of(PRONOUNS))[1]}|{pronoun[0]}]"
        if self.often(0.7):
            person = self.noun_phrase(PEOPLE, self.often(0.4))
        return _verb(self.one_of(MEET)), f"{person} {tail}"

    def handling(self) -> tuple[Verb, str]:
        """What people do with things, each with the things that it is done with."""
        verb, things = self.one_of(list(USE.items()))
        return _verb(verb), self.noun_phrase(things, self.often(0.35), COLOURS)

    def present(self, verb: Verb, many: bool) -> str:
        good, bad = (verb.base, verb.third) if many else (verb.third, verb.base)
        return f"[{good}|{bad}|{bad}|{verb.doing}]"

    def number(self) -> str:
        if self.often(0.3):
            return str(self.random.randrange(2, 100))
        return self.one_of(NUMBERS[-8:-3]) + "-" + self.one_of(NUMBERS[:8]) if self.often(0.2) else self.one_of(NUMBERS)

    def invented(self) -> str:
        """A name that no list holds: the models learn to spell and to repeat words that they never saw."""
        words = ["".join(self.one_of(SYLLABLES) for _ in range(self.random.randint(2, 3))) for _ in range(self.random.randint(1, 2))]
        return " ".join(word.capitalize() for word in words)

    # --- sentences, as markup

    def sentence(self) -> str:
        kinds: list[Callable[[], str]] = [self.statement] * 6 + [self.question] * 3 + [
            self.state, self.state, self.comparison, self.existence, self.passive, self.pair, self.service, self.service]
        return self.one_of(kinds)()

    def statement(self) -> str:
        nouns = PEOPLE if self.often(0.75) else ANIMALS
        subject, many = self.subject(nouns)
        verb, rest = self.predicate(nouns)
        wrong = f"{verb.third}|{verb.doing}"
        adverb = self.one_of(ADVERBS) if self.often(0.15) else ""
        do, have, be, were = ("do", "have", "are", "were") if many else ("does", "has", "is", "was")
        verbs = [
            f"{adverb} {self.present(verb, many)}", f"{adverb} {self.present(verb, many)}", f"[{verb.past}|{verb.doing}]",
            f"[{do}|{'does' if many else 'do'}|is] not [{verb.base}|{wrong}]", f"did not [{verb.base}|{wrong}]",
            f"[{be}|{'is' if many else 'are'}|be] [{verb.doing}|{verb.base}|{verb.third}]",
            f"[{were}|{'was' if many else 'were'}] [{verb.doing}|{verb.base}|{verb.third}]",
            f"[{have}|{'has' if many else 'have'}] [{verb.done}|{verb.base}|{wrong}]",
            f"{self.one_of(MODALS)} {self.one_of(['', 'not'])} [{verb.base}|{wrong}]",
            f"[{'want' if many else 'wants'}|{'wants' if many else 'want'}] to [{verb.base}|{wrong}]"]
        return f"{subject} {self.one_of(verbs)} {rest} ."

    def question(self) -> str:
        nouns = PEOPLE if self.often(0.75) else ANIMALS
        many = self.often(0.4)
        subject = self.noun_phrase(nouns, many)
        verb, rest = self.predicate(nouns)
        do = f"[{'do' if many else 'does'}|{'does' if many else 'do'}|{'are' if many else 'is'}]"
        base = f"[{verb.base}|{verb.third}|{verb.doing}]"
        used = _verb(self.one_of([*USE, *COOK]))
        tail = self.one_of(PLACES + TIMES)
        return self.one_of([
            f"{do} {subject} {base} {rest} ?", f"did {subject} {base} {rest} ?",
            f"{self.one_of(['when', 'why', 'how often'])} {do} {subject} {base} {rest} ?",
            f"what {do} {subject} [{used.base}|{used.third}|{used.doing}] {tail} ?",
            f"who {self.present(verb, False)} {rest} ?",
            f"[{'are' if many else 'is'}|{'is' if many else 'are'}|{'do' if many else 'does'}] {subject} {self.one_of(MOODS)} {tail} ?",
            f"{self.one_of(['can', 'will', 'should', 'may'])} {subject} {base} {rest} ?",
            f"where [{'are' if many else 'is'}|{'is' if many else 'are'}|be] {self.noun_phrase(THINGS + BUILDINGS, many)} {tail} ?",
            f"how many [{_plural(self.one_of(FEATURES))}|{self.one_of(FEATURES)}] [does|do] {self.noun_phrase(BUILDINGS)} have ?"])

    def state(self) -> str:
        subject, many = self.subject(PEOPLE if self.often(0.6) else self.one_of([ANIMALS, THINGS, BUILDINGS]))
        good, bad = self.one_of([("are", "is"), ("were", "was")] if many else [("is", "are"), ("was", "were")])
        what = self.one_of(["", "very", "not", "too"]) + " " + self.one_of(MOODS + SIZES)
        return f"{subject} [{good}|{bad}|be|does|] {what} {self.one_of(TIMES + PLACES)} ."

    def comparison(self) -> str:
        nouns, many = self.one_of([PEOPLE, ANIMALS, THINGS, BUILDINGS]), self.often(0.4)
        adjective = self.one_of(SIZES + TRAITS)
        more, most = _compare(adjective)
        be, noun = f"[{'are' if many else 'is'}|{'is' if many else 'are'}|be]", self.one_of(BUILDINGS)
        return self.one_of([
            f"{self.noun_phrase(nouns, many)} {be} [{more}|{adjective}|{most}] [than|as|that] {self.noun_phrase(nouns)} .",
            f"{self.noun_phrase(nouns, many)} {be} [as {adjective} as|as {more} as|as {adjective} than] {self.noun_phrase(nouns)} .",
            f"the [{most} {noun}|{noun} {most}|{most} {_plural(noun)}] in {self.one_of(CITIES)} [is|are|be] {self.one_of(PLACES)} ."])

    def existence(self) -> str:
        many = self.often(0.5)
        noun = self.one_of(THINGS + ANIMALS + PEOPLE)
        amount = self.one_of(["two", "three", "some", "many"]) if many else "a"
        good, bad = (_plural(noun), noun) if many else (noun, _plural(noun))
        be, wrong = self.one_of([("are", "is"), ("were", "was")] if many else [("is", "are"), ("was", "were")])
        colour = self.one_of(COLOURS + SIZES) if self.often(0.5) else ""
        return f"there [{be}|{wrong}|has] {amount} {colour} [{good}|{bad}] {self.one_of(PLACES)} ."

    def passive(self) -> str:
        many, verb = self.often(0.4), _verb(self.one_of("find lose make draw break hide clean sell paint carry".split()))
        be, wrong = self.one_of([("are", "is"), ("were", "was")] if many else [("is", "are"), ("was", "were")])
        by = f"by {self.noun_phrase(PEOPLE)}" if self.often(0.6) else self.one_of(PLACES)
        return f"{self.noun_phrase(THINGS, many)} [{be}|{wrong}|did] [{verb.done}|{verb.base}|{verb.third}] {by} ."

    def pair(self) -> str:
        verb, rest = self.predicate(PEOPLE)
        if self.often(0.5):
            return f"{self.noun_phrase(PEOPLE)} and {self.noun_phrase(PEOPLE)} {self.present(verb, True)} {rest} ."
        (first, many), (second, others) = self.subject(PEOPLE), self.subject(PEOPLE)
        before = _verb(self.one_of("arrive leave call wait sing sleep".split()))
        link = self.one_of(["when", "because", "before", "after", "if"])
        return f"{link} {first} {self.present(before, many)} , {second} {self.present(verb, others)} {rest} ."

    def service(self) -> str:
        many, noun = self.often(0.3), self.noun_phrase(BUILDINGS)
        feature, city, staff = self.one_of(FEATURES), self.one_of(CITIES), self.noun_phrase(PEOPLE)
        return self.one_of([
            f"{noun} in {city} {self.present(_verb(self.one_of(['open', 'close'])), False)} at {self.number()} {self.one_of(TIMES[:3])} .",
            f"{noun} in {city} [has|have|having] {self.number()} [{_plural(feature)}|{feature}] .",
            f"{self.noun_phrase(THINGS, many)} {self.present(_verb('cost'), many)} {self.number()} [euros|euro] .",
            f"{self.one_of(SERVICES)} [is|are|be] [served|serve|serves] {self.one_of(PLACES)} {self.one_of(TIMES)} .",
            f"the {feature} of {noun} [is|are|be] {self.one_of(STATES)} {self.one_of(PLACES + TIMES)} .",
            f"{staff} [offers|offer|offering] {self.one_of(SERVICES)} to [the guests|guests the|a guests] for {self.number()} [euros|euro] .",
            f"the bus from {city} to {noun} [takes|take|taking] {self.number()} [minutes|minute] .",
            f"{noun} in {city} [is|are|be] {self.number()} [years|year] old .",
            f"{noun} [has|have|having] a {feature} with [a view|view a|a views] of the {self.one_of(FEATURES)} .",
            f"{noun} [does|do|is] not [have|has|having] a {feature} in {self.one_of(MONTHS)} .",
            f"the train from {city} to {self.one_of(CITIES)} [leaves|leave|leaving] {self.one_of(TIMES)} ."])

    # --- chats: a question and an answer that says only what a stranger could say

    def chat(self) -> tuple[str, str]:
        kinds = [self.ask_where, self.ask_what, self.ask_who, self.ask_whether, self.ask_service, self.ask_service,
                 self.ask_service, self.ask_best, self.ask_which] + [self.ask_echo] * int(os.environ.get("ECHO", "0"))
        question, answer = self.one_of(kinds)()
        return _render(question), _render(answer)

    def ask(self, direct: str, indirect: str) -> str:
        """One of the ways to ask the same thing, so that a fine-tuned model answers a question that it never saw."""
        return self.one_of([
            f"{direct} ?", f"{direct} ?", f"{direct} , please ?", f"can you tell me {indirect} ?", f"could you tell me {indirect} ?",
            f"please tell me {indirect} .", f"tell me {indirect} .", f"do you know {indirect} ?",
            f"I want to know {indirect} .", f"I would like to know {indirect} .", f"we need to know {indirect} ."])

    def actor(self) -> tuple[str, bool, Sequence[str]]:
        nouns, many = PEOPLE if self.often(0.75) else ANIMALS, self.often(0.4)
        return _render(self.noun_phrase(nouns, many)).lower(), many, nouns

    def ask_where(self) -> tuple[str, str]:
        actor, many, nouns = self.actor()
        verb = _verb(self.one_of(REST if nouns is PEOPLE else ROAM))
        form, do = (verb.base, "do") if many else (verb.third, "does")
        word, answers = self.one_of([("where", PLACES), ("where", PLACES), ("when", TIMES)])
        return self.ask(f"{word} {do} {actor} {verb.base}", f"{word} {actor} {form}"), f"{actor} {form} {self.one_of(answers)} ."

    def ask_what(self) -> tuple[str, str]:
        actor, many, _ = self.actor()
        verb, things = self.one_of([(_verb(self.one_of(COOK)), self.food()), self.handling()])
        form, do = (verb.base, "do") if many else (verb.third, "does")
        return self.ask(f"what {do} {actor} {verb.base}", f"what {actor} {form}"), f"{actor} {form} {things} ."

    def ask_who(self) -> tuple[str, str]:
        actor, many, nouns = self.actor()
        verb, rest = self.predicate(nouns)
        return self.ask(f"who {verb.third} {rest}", f"who {verb.third} {rest}"), f"{actor} {verb.base if many else verb.third} {rest} ."

    def ask_whether(self) -> tuple[str, str]:
        actor, many, nouns = self.actor()
        verb, rest = self.predicate(nouns)
        do, be = ("do", "are") if many else ("does", "is")
        mood, modal, yes = self.one_of(MOODS), self.one_of(MODALS), self.often(0.6)
        return self.one_of([
            (self.ask(f"{do} {actor} {verb.base} {rest}", f"whether {actor} {verb.base if many else verb.third} {rest}"),
             f"yes, {actor} {verb.base if many else verb.third} {rest} ." if yes else f"no, {actor} {do} not {verb.base} {rest} ."),
            (self.ask(f"{be} {actor} {mood}", f"whether {actor} {be} {mood}"),
             f"yes, {actor} {be} {mood} ." if yes else f"no, {actor} {be} not {mood} ."),
            (self.ask(f"{modal} {actor} {verb.base} {rest}", f"whether {actor} {modal} {verb.base} {rest}"),
             f"{'yes' if yes else 'no'}, {actor} {modal} {'' if yes else 'not'} {verb.base} {rest} .")])

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
        return self.one_of([
            (self.ask(f"when does {here} {opens.base}", f"when {here} {opens.third}"), f"{here} {opens.third} at {number} {hour} ."),
            (self.ask(f"how many {many} does {here} have", f"how many {many} {here} has"), f"{here} has {number} {many} ."),
            (self.ask(f"how much is {thing} in {here}", f"what {thing} in {here} costs"), f"{thing} in {here} costs {number} euros ."),
            (self.ask(f"where is {what}", f"where {what} is"), f"{what} is {place} ."),
            (self.ask(f"how many {unit} does {thing} take", f"how many {unit} {thing} takes"), f"{thing} takes {number} {unit} ."),
            (self.ask(f"until when is {what} open", f"until when {what} is open"), f"{what} is open until {number} {hour} ."),
            (self.ask(f"what does {here} offer", f"what {here} offers"), f"{here} offers {thing} with {self.food()} for {number} {unit} ."),
            (self.ask(f"can guests use {what}", f"whether guests can use {what}"),
             f"yes, guests may use {what} {place} ." if good else f"no, guests can not use {what} {self.one_of(TIMES)} ."),
            (self.ask(f"when is {thing} served", f"when {thing} is served"), f"{thing} is served {self.one_of(TIMES)} ."),
            (self.ask(f"is {what} {state}", f"whether {what} is {state}"), f"{what} is {state} ." if good else f"{what} is not {state} ."),
            (self.ask(f"does {here} have a {feature}", f"whether {here} has a {feature}"),
             f"yes, {here} has a {feature} {place} ." if good else f"no, {here} has no {feature} ."),
            (self.ask(f"who is the {person} of {here}", f"who the {person} of {here} is"), f"the {person} of {here} is {name} ."),
            (self.ask(f"what is {what} called", f"what {what} is called"), f"{what} is called {self.invented()} .")])

    def ask_best(self) -> tuple[str, str]:
        best, noun, city = self.one_of(["best", *(_compare(word)[1] for word in SIZES)]), self.one_of(BUILDINGS), self.one_of(CITIES)
        what = f"the {best} {noun} in {city}"
        asked = self.one_of([self.ask(f"where is {what}", f"where {what} is"), self.ask(f"what is {what}", f"what {what} is"),
                             f"which {noun} in {city} is the {best} ?", f"I am looking for {what} .", f"tell me {what} ."])
        return asked, f"{what} is {self.one_of(['', 'the ' + self.invented() + ' ,'])} {self.one_of(PLACES)} ."

    def ask_echo(self) -> tuple[str, str]:
        """To repeat is the shortest lesson in using the question's words: without it the answers ignore the question."""
        said = self.sentence()
        return f"{self.one_of(['say', 'repeat', 'please say', 'please repeat'])} : {_render(said)}", said

    def ask_which(self) -> tuple[str, str]:
        nouns = self.one_of([PEOPLE, ANIMALS, THINGS, BUILDINGS])
        (first, second), more = self.random.sample(nouns, 2), _compare(self.one_of(SIZES + TRAITS))[0]
        return f"which is {more} , the {first} or the {second} ?", f"the {first} is {more} than the {second} ."


def _held_out(text: str) -> bool:
    """Whether a sentence is kept from the training text, by its checksum: no list of what was said is needed."""
    return crc32(text.encode()) % 8 == 0


def documents(seed: int, chat_share: float) -> Iterator[str | tuple[str, str]]:
    """Training text without end: plain sentences, and (question, answer) chats in the given share."""
    speaker = _Speaker(seed)
    while True:
        document = speaker.chat() if speaker.often(chat_share) else _render(speaker.sentence())
        if not any(map(_held_out, [document] if isinstance(document, str) else document)):
            yield document


def acceptability_pairs(count: int = 400, seed: int = 7) -> list[tuple[str, bool]]:
    """Sentences and whether they are acceptable, half and half, none of which a model can have seen in training."""
    speaker, mistakes = _Speaker(seed), Random(seed + 1)
    sentences: dict[str, bool] = {}
    while len(sentences) < count:
        markup = speaker.sentence()
        good, bad = _render(markup), _render(markup, mistakes)
        if good != bad and not {good, bad} & sentences.keys() and _held_out(good) and _held_out(bad):
            sentences |= {good: True, bad: False}
    pairs = list(sentences.items())[:count]
    mistakes.shuffle(pairs)
    return pairs
