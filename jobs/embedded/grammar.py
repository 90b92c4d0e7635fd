"""A seeded English grammar: the text that the embedded models learn from, and the pairs that measure what they learned.

A sentence is written as markup that carries its own mistakes: `[good|bad|worse]` reads "good" in an acceptable sentence,
and an unacceptable one takes exactly one wrong alternative from one bracket. So a pair differs in one mistake and nothing
else, and a mistake is written beside the rule that it breaks. Everything follows from `random.Random(seed)` and the lists
below: no set or dict order, no clock, no hash() decides anything, so every process writes the same text.

The language is plain and general. It knows no fact about anything: the embedded base model learns to speak from it, and
whatever else it says later it learned from the data it was fine-tuned on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple, TypeVar
from zlib import crc32

T = TypeVar("T")

PEOPLE = """farmer teacher doctor nurse baker driver student child woman man boy girl guest waiter cook singer writer
painter tailor pilot sailor soldier judge lawyer clerk guide tourist traveller neighbour friend brother sister mother father
uncle aunt king queen manager engineer builder gardener butcher musician player visitor owner worker officer hunter family
customer member parent""".split()
NAMES = "Anna Peter Maria John Emma Paul Laura David Sofia Martin Julia Simon Nora Oscar Clara Hugo Alice Felix".split()
ANIMALS = "dog cat horse cow goat bird duck lion bear wolf fox rabbit mouse donkey pig monkey elephant pet".split()
DISHES = "apple cake sandwich egg orange pear potato tomato lemon pie biscuit onion carrot banana sardine fig".split()
FOODS = "bread cheese soup rice fish meat salad milk water tea coffee wine juice sugar salt butter honey fruit".split()
THINGS = """book letter picture map bag box key lamp chair table bed cup plate knife bottle basket coat hat shoe shirt
dress watch phone ticket newspaper bicycle car boat ball toy candle clock mirror towel blanket bowl carpet camera ring stone
flower tree rose""".split()
BUILDINGS = """hotel museum station restaurant shop market bank school hospital library theatre church castle airport
bakery office cinema palace bar gym garage spa""".split()
FEATURES = """room window door garden balcony kitchen terrace pool tower floor bathroom roof gate courtyard lift entrance
cellar suite""".split()
CITIES = """London Paris Rome Vienna Berlin Madrid Lisbon Athens Dublin Prague Warsaw Oslo Naples Venice Milan Lyon
Hamburg Munich Geneva Seville Granada Porto Valencia Bilbao Cordoba Malaga Toledo Cadiz Barcelona Brussels""".split()
PLACES = """in:garden in:kitchen in:village in:forest in:park in:city in:street in:barn in:town in:house in:room in:valley
in:basement in:office in:courtyard in:library on:hill on:beach on:bridge on:island on:roof on:terrace on:balcony on:train
at:station at:market at:airport at:hotel at:school at:door at:gate near:river near:lake near:sea near:church near:castle
near:harbour near:road near:wall beside:fountain beside:museum behind:house behind:wall behind:theatre under:bridge
under:tree across:square""".replace("across:", "across_the_").split()
TIMES = """in_the_morning in_the_afternoon in_the_evening at_night at_noon every_day every_week on_Monday on_Tuesday on_Friday
on_Sunday in_summer in_winter in_spring in_May in_October in_March in_April all_day after_lunch before_dinner after_breakfast
after_work twice_a_week once_a_year""".replace("_", " ").replace("\n", " ").split(" ")
NUMBERS = """two three four five six seven eight nine ten eleven twelve fifteen sixteen eighteen twenty thirty forty fifty
sixty""".split()
COLOURS = "red blue green white black yellow brown grey".split()
SIZES = "big small old new young tall short strong fast slow cheap clean nice quiet bright rich dark warm cold long".split()
TRAITS = "beautiful famous modern expensive comfortable popular interesting important dangerous useful".split()
MOODS = "happy sad tired hungry angry busy ready sick late free kind polite careful welcome".split()
ADVERBS = "often always never usually sometimes".split()
MANNERS = "quickly slowly quietly well loudly together alone early late again here there".split()

REGULAR_DOUBLES = {"stop", "plan", "travel"}
IRREGULAR_VERBS = """sleep:slept:slept sit:sat:sat stand:stood:stood run:ran:run swim:swam:swum sing:sang:sung eat:ate:eaten
drink:drank:drunk buy:bought:bought sell:sold:sold bring:brought:brought find:found:found see:saw:seen take:took:taken
make:made:made read:read:read write:wrote:written draw:drew:drawn drive:drove:driven wear:wore:worn hold:held:held
keep:kept:kept lose:lost:lost build:built:built leave:left:left begin:began:begun speak:spoke:spoken fall:fell:fallen
break:broke:broken hide:hid:hidden meet:met:met know:knew:known give:gave:given forget:forgot:forgotten pay:paid:paid
feed:fed:fed choose:chose:chosen""".split()
IRREGULAR_NOUNS = dict(pair.split(":") for pair in """child:children woman:women man:men wolf:wolves mouse:mice knife:knives
family:families potato:potatoes tomato:tomatoes""".split())

REST = "sleep sit stand run swim sing wait rest walk dance work play live laugh stay travel cry speak".split()
ROAM = "sleep sit stand run swim wait rest walk play live stay hide fall".split()
EAT, DRINK = "eat cook buy sell bring like order serve prepare".split(), {"tea", "coffee", "wine", "juice", "milk", "water"}
USE = "buy sell bring find see take make draw hold keep lose carry clean want need choose forget break hide open close".split()
MEET = "see know help meet visit follow love call thank remember feed watch like".split()
CHASE = "see follow watch chase find like hear fear".split()
VISIT = "visit like find leave own clean build paint know love see remember reserve".split()


class Verb(NamedTuple):
    """The five forms that English verbs have."""

    base: str
    third: str
    past: str
    done: str
    doing: str


def _verb(base: str) -> Verb:
    past, done = next((tuple(v.split(":")[1:]) for v in IRREGULAR_VERBS if v.startswith(base + ":")), ("", ""))
    if base.endswith("y") and base[-2] not in "aeo":
        third, regular = base[:-1] + "ies", base[:-1] + "ied"
    else:
        third = base + ("es" if base.endswith(("s", "ch", "sh", "x")) else "s")
        regular = base + ("d" if base.endswith("e") else "ed")
    stem = base[:-1] if base.endswith("e") and not base.endswith("ee") else base
    if base in REGULAR_DOUBLES or base in {"sit", "run", "swim", "begin", "forget"}:
        stem = base + base[-1]
        regular = stem + "ed"
    return Verb(base, third, past or regular, done or regular, stem + "ing")


def _plural(noun: str) -> str:
    return IRREGULAR_NOUNS.get(noun) or noun + ("es" if noun.endswith(("s", "ch", "sh", "x")) else "s")


def _compare(adjective: str) -> tuple[str, str]:
    """The comparative and the superlative, of one word (bigger) or of two (more famous)."""
    if adjective in TRAITS:
        return f"more {adjective}", f"most {adjective}"
    if adjective in {"big", "sad"}:
        adjective += adjective[-1]
    return adjective.removesuffix("e") + "er", adjective.removesuffix("e") + "est"
