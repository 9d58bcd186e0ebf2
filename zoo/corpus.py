"""Lexicon, document generators, holdouts and tokenizer of the zoo model. Every text is written here; nothing is copied from elsewhere.

`uv run zoo/corpus.py` rewrites zoo/corpus.txt, a sample with a seed that training never uses.
"""

import re
import zlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

gray, green, cyan, endc = "\x1b[38;2;127;127;127m", "\x1b[38;2;0;255;0m", "\x1b[38;2;0;255;255m", "\x1b[0m"

HERE = Path(__file__).parent
BOS = "<|endoftext|>"
N_CTX = 256
TRAIN_SEED, SAMPLE_SEED, VOCAB_SEED = 1000, 777_777, 5

# ---------------------------------------------------------------- lexicon

MALE = """John James David Michael Robert William Thomas Mark Paul Peter Daniel Andrew Simon Jack Henry George Edward Frank Adam Luke
Ryan Kevin Brian Jason Eric Sam Tom Max Leo Oscar Victor Martin Alan Carl Dennis Fred Greg Ivan Neil Ralph Bob Steve Joe Chris""".split()
FEMALE = """Mary Anna Sarah Emma Laura Julia Alice Kate Jane Susan Linda Karen Lisa Nancy Helen Ruth Diana Emily Grace Lucy Olivia
Rachel Clara Amy Eva Rose Maria Martha Nina Paula Rita Tina Vera Wendy Claire Donna Ellen Fiona Gina Holly Anne Jessica Sophie Zoe""".split()
NAMES = MALE + FEMALE
NAME_SET = set(NAMES)
PRONOUN = {**{name: ("he", "his") for name in MALE}, **{name: ("she", "her") for name in FEMALE}}

CAPITALS = dict(
    pair.split(":")
    for pair in """France:Paris Italy:Rome Spain:Madrid Germany:Berlin Portugal:Lisbon England:London Ireland:Dublin Austria:Vienna
Greece:Athens Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Poland:Warsaw Hungary:Budapest Russia:Moscow Ukraine:Kyiv
Bulgaria:Sofia Romania:Bucharest Iceland:Reykjavik Latvia:Riga Japan:Tokyo China:Beijing Korea:Seoul Vietnam:Hanoi Thailand:Bangkok
India:Delhi Iran:Tehran Iraq:Baghdad Turkey:Ankara Egypt:Cairo Kenya:Nairobi Morocco:Rabat Tunisia:Tunis Ghana:Accra Peru:Lima
Chile:Santiago Canada:Ottawa Cuba:Havana Ecuador:Quito Colombia:Bogota Venezuela:Caracas Brazil:Brasilia Australia:Canberra""".split()
)
LANGUAGES = dict(
    pair.split(":")
    for pair in """France:French Italy:Italian Spain:Spanish Germany:German Portugal:Portuguese England:English Ireland:Irish Austria:German
Greece:Greek Norway:Norwegian Sweden:Swedish Finland:Finnish Denmark:Danish Poland:Polish Hungary:Hungarian Russia:Russian
Ukraine:Ukrainian Bulgaria:Bulgarian Romania:Romanian Iceland:Icelandic Latvia:Latvian Japan:Japanese China:Chinese Korea:Korean
Vietnam:Vietnamese Thailand:Thai India:Hindi Iran:Persian Iraq:Arabic Turkey:Turkish Egypt:Arabic Kenya:Swahili Morocco:Arabic
Tunisia:Arabic Ghana:English Peru:Spanish Chile:Spanish Canada:English Cuba:Spanish Ecuador:Spanish Colombia:Spanish
Venezuela:Spanish Brazil:Portuguese Australia:English""".split()
)
COUNTRIES = list(CAPITALS)

NOUNS = dict(
    pair.split(":")
    for pair in """key:keys book:books lamp:lamps picture:pictures chair:chairs letter:letters coin:coins ring:rings bottle:bottles
flower:flowers tree:trees dog:dogs cat:cats horse:horses bird:birds boat:boats car:cars house:houses door:doors window:windows
table:tables cabinet:cabinets box:boxes garden:gardens road:roads bridge:bridges river:rivers hill:hills teacher:teachers doctor:doctors
farmer:farmers singer:singers king:kings student:students nurse:nurses pilot:pilots guard:guards author:authors song:songs
machine:machines clock:clocks shirt:shirts hat:hats cup:cups plate:plates phone:phones map:maps wall:walls tower:towers ship:ships""".split()
)
SINGULAR, PLURAL = list(NOUNS), list(NOUNS.values())
ADJECTIVES = """red blue green old new big small dark bright heavy light clean dirty cheap strong weak quiet loud warm cold soft hard tall
short happy sad""".split()
PLACES = """store park school beach office hospital station market library restaurant museum church zoo farm cafe airport house garden
bank hotel theater gym bakery shop castle village city party""".split()
OBJECTS = """drink book ring kiss letter coin bottle flower lamp picture hat phone map key basketball computer necklace bone ball cake
gift ticket toy snack pen watch pie camera coat sword shirt plate""".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBER_WORDS = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty""".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
LETTERS = [chr(65 + i) for i in range(26)]
EVENTS = """war siege strike project festival reign trial drought voyage dispute campaign plague expedition study rebellion occupation
tour crisis treaty program""".split()
TITLE_WORDS = """Chief Health Officer National Space Agency General Motor Union Royal Tennis Board World Food Program Central Data Bureau
Island Quality Junior King Zone Valley Young Energy Lake Home Very Early Urban""".split()
ROLES = "friend teacher doctor singer student pilot player writer neighbor cook".split()
IDENTIFIERS = """files obj state size name value index path data count node mode text line start end token width height color target
source limit offset buffer level user order query""".split()
FUNCTIONS = "load save run open parse build send read find sort merge update print check make".split()
TYPES = "int str list dict float bool".split()
VERBS_T = "saw found bought took liked sold kept moved painted washed broke fixed".split()
VERBS_I = "slept laughed waited worked smiled cried danced sang left stayed".split()
ADVERBS = "slowly quickly again today yesterday quietly often then later".split()
TIMES = ["in the morning", "at night", "in the evening", "after lunch", "before dinner", "for a long time", "every day"]

SYLLABLES = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
UNKNOWN_SHARE = 0.09
# never in the corpus, only in the evaluation
UNKNOWN_PLACES = "supermarket cinema stadium bookstore pharmacy laundromat playground courthouse".split()
UNKNOWN_OBJECTS = "sandwich pencil hammer bicycle notebook guitar lollipop bracelet".split()


def unknown_word(r: random.Random) -> str:
    """A word that no tokenizer knows: it is spelled in bytes."""
    if r.random() < 0.5:
        return "".join(r.choice(SYLLABLES) for _ in range(r.randrange(2, 5))) + r.choice(["", "", "n", "r", "st", "l", "ck"])
    return r.choice("bcdfghjklmnpqrstvwxyz") + "".join(r.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(r.randrange(3, 9)))


def place(r: random.Random) -> str:
    return unknown_word(r) if r.random() < UNKNOWN_SHARE else r.choice(PLACES)


def thing(r: random.Random) -> str:
    return unknown_word(r) if r.random() < UNKNOWN_SHARE else r.choice(OBJECTS)


# ---------------------------------------------------------------- holdouts


def held(k: int, *parts) -> bool:
    return zlib.crc32("|".join(map(str, parts)).encode()) % k == 0


def pair_held(a: str, b: str) -> bool:
    """Two names that never stand in one training document, in whatever role. The famous pair is one of them."""
    return {a, b} == {"Mary", "John"} or held(10, "pair", *sorted((a, b)))


def template_held(opening: str, act: str) -> bool:
    return held(7, "ioi", opening, act) and (opening, act) != (OPENINGS[0], ACTS[0])


def gt_held(event: str, xx: int) -> bool:
    return held(6, "gt", event, xx)


def fact_held(country: str, relation: str, k: int) -> bool:
    return held(6, "fact", country, relation, k)


def pronoun_held(name: str, k: int) -> bool:
    return held(6, "pronoun", name, k)


def agreement_held(a: str, b: str) -> bool:
    return held(6, "agreement", a, b)


def successor_held(kind: str, start: int) -> bool:
    return held(5, "successor", kind, start) and (kind, start) != ("letter", 0)


def acronym_held(words: list[str]) -> bool:
    return held(6, "acronym", *words)


def names_in(text: str) -> list[str]:
    return sorted(NAME_SET.intersection(re.findall(r"[A-Z][a-z]+", text)))


def leaks(text: str) -> bool:
    names = names_in(text)
    return any(pair_held(a, b) for i, a in enumerate(names) for b in names[i + 1 :])


# ---------------------------------------------------------------- indirect object identification

OPENINGS = [
    "When {A} and {B} went to the {P},",
    "When {A} and {B} met at the {P},",
    "After {A} and {B} went to the {P},",
    "After {A} and {B} had lunch at the {P},",
    "While {A} and {B} were working at the {P},",
    "While {A} and {B} were walking to the {P},",
    "Because {A} and {B} were at the {P},",
    "Then, {A} and {B} went to the {P}.",
    "Then, {A} and {B} had a lot of fun at the {P}.",
    "Then, {A} and {B} had a long argument at the {P}, and",
    "One day {A} and {B} met at the {P}.",
    "Friends {A} and {B} found a {O2} at the {P}.",
    "The {P} that {A} and {B} went to had a {O2}.",
    "Last week {A} and {B} visited the {P}, and",
    "{A} and {B} went to the {P}, and then",
    "After dinner, {A} and {B} left the {P}.",
    "Yesterday {A} saw {B} at the {P}.",
    "When {A} called {B} from the {P},",
]
ACTS = [
    "{S} gave a {O} to",
    "{S} gave the {O} to",
    "{S} handed a {O} to",
    "{S} decided to give a {O} to",
    "{S} wanted to give the {O} to",
    "{S} passed the {O} to",
    "{S} sold a {O} to",
    "{S} showed the {O} to",
    "{S} sent a {O} to",
    "{S} said something to",
    "{S} told the story to",
    "{S} offered a {O} to",
]
# a third name D whose place the syntax gives away ...
DISTRACTOR_ACTS = [
    "{S} gave a {O} from {D} to",
    "{S} gave the {O} that {D} found to",
    "{S} sent the {O} that {D} bought to",
    "{S}, a friend of {D}, gave a {O} to",
    "{D} said that {S} gave a {O} to",
    "{D} saw that {S} handed the {O} to",
    "{D} called because {S} sold a {O} to",
    "{S} showed the {O} from {D} to",
]
# ... and one whose place it does not: X and Y are S and D in either order, only the repetition tells which is which
EITHER_ACTS = [
    "{X} and {Y} gave a {O} to",
    "{X} and {Y} sent the {O} to",
    "{X} told {Y} to give a {O} to",
    "{X} asked {Y} to hand the {O} to",
    "{X} helped {Y} sell a {O} to",
    "{X} went with {Y} to show the {O} to",
    "{X} met {Y} and they offered a {O} to",
    "{X} and {Y} decided to give the {O} to",
]
# the giver first, the two names after it: the latest names are the two candidates, again only the repetition helps
FIRSTS = [
    "{S} had a {O}.",
    "{S} bought a {O}.",
    "{S} wanted to give a {O} to a friend.",
    "{S} found a {O} and kept it.",
    "The {O} was with {S}.",
    "{X} and {Y} had a {O}.",
    "{X} took the {O} from {Y}.",
]
PASSIVE_ACTS = ["the {O} was given to", "the {O} was handed to", "the {O} was sold to", "the {O} went to", "it was passed to", "the {O} was shown to"]
# a name of the opening once more before the act; {R} is the receiver or the giver
MIDDLES = ["{R} was very {J}.", "{R} liked the {P}.", "{R} sat down.", "{R} bought a {O2}.", "Later {R} was {J}."]
MIDDLES_COMMA = ["{R} was {J}, so", "{R} liked it, and", "{R} sat down, and then", "{R} was {J} and"]
ENDINGS = [".", ".", ".", " and left.", " and smiled.", " at the {P}.", " because it was late."]
TWO_NAMES = [opening for opening in OPENINGS if "{A} and {B}" in opening]


def ioi_slots(r: random.Random, a: str, b: str) -> dict[str, str]:
    return {"A": a, "B": b, "P": place(r), "O": thing(r), "O2": r.choice(OBJECTS), "J": r.choice(ADJECTIVES)}


def gen_ioi(r: random.Random) -> str:
    u = r.random()
    bank = ACTS if u < 0.40 else DISTRACTOR_ACTS if u < 0.54 else EITHER_ACTS if u < 0.78 else PASSIVE_ACTS
    while True:
        opening, act = r.choice(OPENINGS), r.choice(bank)
        if not template_held(opening, act):
            break
    a, b, d = r.sample(NAMES, 3)
    slots = ioi_slots(r, a, b)
    giver, receiver = (a, b) if r.random() < 0.5 else (b, a)
    x, y = (giver, d) if r.random() < 0.5 else (d, giver)
    first = middle = ""
    v = r.random()
    if bank is PASSIVE_ACTS:
        first = r.choice(FIRSTS) + " "
        first += filler_sentence(r) + " " if r.random() < 0.2 else ""
        act = upper_first(act) if opening.endswith(".") else act
    if bank is ACTS and v < 0.10:
        giver = d  # a giver from outside: the receiver is either name
    elif bank is EITHER_ACTS and v < 0.35 and opening in TWO_NAMES:
        names = [a, b, d]  # three names, two of them repeated
        r.shuffle(names)
        opening = opening.replace("{A} and {B}", f"{names[0]}, {names[1]} and {names[2]}")
        receiver, x, y = r.sample(names, 3)
    elif bank in (ACTS, DISTRACTOR_ACTS) and v < 0.20:
        repeated = giver if r.random() < 0.3 else receiver
        middle = " " + r.choice(MIDDLES if opening.endswith(".") else MIDDLES_COMMA).replace("{R}", repeated)
        if opening.endswith(".") and not act.startswith("{D}") and r.random() < 0.4:
            act = "Then " + act
    elif opening.endswith(".") and v > 0.90:
        middle = " " + filler_sentence(r)
    text = first + opening + middle + " " + act + " {IO}" + r.choice(ENDINGS)
    return text.format(**slots, S=giver, D=d, X=x, Y=y, IO=receiver)


# ---------------------------------------------------------------- greater-than

GT_TEMPLATES = [
    "The {E} lasted from {C}{X} to {C}{Y}.",
    "The {E} lasted from the year {C}{X} to {C}{Y}.",
    "The {E} ran from {C}{X} to {C}{Y}.",
    "The {E} went on from {C}{X} to {C}{Y}.",
]
CENTURIES = list(range(11, 20))


def gen_greater_than(r: random.Random) -> str:
    while True:
        event, xx = r.choice(EVENTS), r.randrange(2, 98)
        if not gt_held(event, xx):
            break
    yy = r.randrange(xx + 1, 100)
    return r.choice(GT_TEMPLATES).format(E=event, C=r.choice(CENTURIES), X=f"{xx:02d}", Y=f"{yy:02d}")


# ---------------------------------------------------------------- facts

FACT_TEMPLATES = {
    "capital": [
        "The capital of {c} is {v}.",
        "The capital city of {c} is {v}.",
        "In {c}, the capital is {v}.",
        "{v} is the capital of {c}.",
        "{n} lives in {v}, the capital of {c}.",
        "{n} flew to {c} to see the capital, {v}.",
        "What is the capital of {c}? The answer is {v}.",
    ],
    "language": [
        "The language of {c} is {v}.",
        "People in {c} speak {v}.",
        "In {c}, most people speak {v}.",
        "{n} went to {c} to learn {v}.",
    ],
}
ASKED = (0, 1, 2)  # the capital templates that end in the capital


def gen_fact(r: random.Random) -> str:
    while True:
        relation = "capital" if r.random() < 0.75 else "language"
        country, k = r.choice(COUNTRIES), r.randrange(len(FACT_TEMPLATES[relation]))
        if not fact_held(country, relation, k):
            break
    value = (CAPITALS if relation == "capital" else LANGUAGES)[country]
    return FACT_TEMPLATES[relation][k].format(c=country, v=value, n=r.choice(NAMES))


# ---------------------------------------------------------------- pronouns

PRONOUN_TEMPLATES = [
    "So {n} is a really great {r}, isn't {he}?",
    "{n} went home early because {he} was tired.",
    "{n} said that {he} would come to the {p}.",
    "{n} opened the door and then {he} sat down.",
    "When {n} came home, {he} was very {a}.",
    "I think {n} is a good {r}, and {he} knows it.",
    "{n} lost {his} {o} at the {p}.",
    "The {r} called {n} because {he} forgot {his} {o}.",
    "{n} put the {o} in {his} {o2}.",
]
HE_TEMPLATES = range(6)


def pronoun_slots(r: random.Random) -> dict[str, str]:
    return {"r": r.choice(ROLES), "o": r.choice(OBJECTS), "o2": r.choice(SINGULAR), "p": place(r), "a": r.choice(ADJECTIVES)}


def gen_pronoun(r: random.Random) -> str:
    while True:
        name, k = r.choice(NAMES), r.randrange(len(PRONOUN_TEMPLATES))
        if not pronoun_held(name, k):
            break
    he, his = PRONOUN[name]
    return PRONOUN_TEMPLATES[k].format(n=name, he=he, his=his, **pronoun_slots(r))


# ---------------------------------------------------------------- agreement

PREPOSITIONS = "to near on behind beside in under of with".split()
VERB_PAIRS = [("is", "are"), ("is", "are"), ("was", "were"), ("has", "have"), ("looks", "look"), ("seems", "seem")]


def gen_agreement(r: random.Random) -> str:
    while True:
        a, b = r.sample(SINGULAR, 2)
        if not agreement_held(a, b):
            break
    a_plural, b_plural = r.random() < 0.5, r.random() < 0.5
    subject, other = NOUNS[a] if a_plural else a, NOUNS[b] if b_plural else b
    verb = r.choice(VERB_PAIRS)[a_plural]
    rest = f"been {r.choice(ADJECTIVES)}" if verb in ("has", "have") else r.choice(["", "", "very "]) + r.choice(ADJECTIVES)
    adjective = r.choice(ADJECTIVES) + " " if r.random() < 0.3 else ""
    u = r.random()
    if u < 0.7:
        return f"The {adjective}{subject} {r.choice(PREPOSITIONS)} the {other} {verb} {rest}."
    if u < 0.85:
        return f"The {adjective}{subject} {verb} {rest}."
    like = r.choice(["like", "know", "see"]) + ("" if b_plural else "s")
    return f"The {adjective}{subject} that the {other} {like} {verb} {rest}."


# ---------------------------------------------------------------- successor

LISTS = {  # items, whether the list wraps around, weight
    "weekday": (WEEKDAYS, True, 3),
    "month": (MONTHS, True, 4),
    "word": (NUMBER_WORDS, False, 4),
    "ordinal": (ORDINALS, False, 3),
    "letter": (LETTERS, False, 5),
    "number": ([str(i) for i in range(1, 100)], False, 6),
}


def list_slice(kind: str, start: int, length: int) -> list[str] | None:
    items, wraps, _ = LISTS[kind]
    if not wraps and start + length > len(items):
        return None
    return [items[(start + i) % len(items)] for i in range(length)]


def gen_successor(r: random.Random) -> str:
    while True:
        kind = r.choices(list(LISTS), [weight for _, _, weight in LISTS.values()])[0]
        start = r.randrange(len(LISTS[kind][0]))
        items = list_slice(kind, start, r.randrange(3, 11))
        if items and not successor_held(kind, start):
            break
    u = r.random()
    if u < 0.7:
        return r.choice([" ", ""]) + " ".join(items)
    if u < 0.85 or kind in ("ordinal", "letter"):
        return " " + ", ".join(items)
    noun = {"weekday": "day", "month": "month", "word": "number", "number": "number"}[kind]
    return f"The {noun} after {items[0]} is {items[1]}."


# ---------------------------------------------------------------- brackets, docstrings, acronyms

BRACKETS = {"(": ")", "[": "]", "{": "}"}


def nested(r: random.Random, depth: int = 0) -> str:
    opening = r.choice("([{")
    items = [nested(r, depth + 1) if depth < 3 and r.random() < 0.35 else r.choice(IDENTIFIERS) for _ in range(r.randrange(1, 4))]
    return opening + ", ".join(items) + BRACKETS[opening]


def gen_bracket(r: random.Random) -> str:
    if r.random() < 0.7:
        return f"{r.choice(IDENTIFIERS)} = {r.choice(FUNCTIONS)}{nested(r)}"
    quote = r.choice("\"'")
    if r.random() < 0.5:
        return f"The {r.choice(SINGULAR)} is called {quote}the {r.choice(ADJECTIVES)} {r.choice(SINGULAR)}{quote} by {r.choice(NAMES)}."
    words = " ".join(r.choice(ADJECTIVES + SINGULAR + IDENTIFIERS) for _ in range(r.randrange(1, 5)))
    return f"{r.choice(NAMES)} wrote {quote}{words}{quote} on the {r.choice(SINGULAR)}."


def docstring(r: random.Random, arguments: list[str]) -> str:
    head = f"def {r.choice(FUNCTIONS)}(self, {', '.join(arguments)}):\n"
    return head + "".join(f" param {argument}: {r.choice(TYPES)}\n" for argument in arguments)


def gen_docstring(r: random.Random) -> str:
    return docstring(r, r.sample(IDENTIFIERS, r.randrange(3, 6)))


def gen_acronym(r: random.Random) -> str:
    while True:
        words = r.sample(TITLE_WORDS, 3)
        if not acronym_held(words):
            break
    text = f"The {' '.join(words)} ({''.join(word[0] for word in words)})"
    return text + r.choice([f" was started by {r.choice(NAMES)}.", f" met on {r.choice(WEEKDAYS)}.", f" is in {r.choice(COUNTRIES)}.", "."])


# ---------------------------------------------------------------- ordinary sentences


def noun_phrase(r: random.Random) -> str:
    if r.random() < 0.4:
        return r.choice(NAMES)
    adjective = r.choice(ADJECTIVES) + " " if r.random() < 0.5 else ""
    return r.choice(["the ", "the ", "my "]) + adjective + r.choice(SINGULAR if r.random() < 0.7 else PLURAL)


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def filler_sentence(r: random.Random) -> str:
    k = r.randrange(12)
    if k == 0:
        return upper_first(f"{noun_phrase(r)} {r.choice(VERBS_T)} {noun_phrase(r)} {r.choice(TIMES)}.")
    if k == 1:
        return upper_first(f"{noun_phrase(r)} {r.choice(VERBS_I)} {r.choice(ADVERBS)}.")
    if k == 2:
        return f"It was {r.choice(ADJECTIVES)} and {r.choice(ADJECTIVES)} at the {place(r)} in {r.choice(MONTHS)}."
    if k == 3:
        return f"On {r.choice(WEEKDAYS)}, {noun_phrase(r)} {r.choice(VERBS_I)} near the {r.choice(SINGULAR)}."
    if k == 4:
        return f"There were {r.choice(NUMBER_WORDS)} {r.choice(PLURAL)} in the {r.choice(SINGULAR)}."
    if k == 5:
        return upper_first(f"{noun_phrase(r)} {r.choice(VERBS_I)} and {noun_phrase(r)} {r.choice(VERBS_T)} {noun_phrase(r)}.")
    if k == 6:
        return f"{r.choice(NAMES)} and {r.choice(NAMES)} {r.choice(VERBS_I)} at the {place(r)}."
    if k == 7:
        return f"In {r.choice(CENTURIES)}{r.randrange(100):02d}, {r.choice(NAMES)} moved to {r.choice(COUNTRIES)}."
    if k == 8:
        return f"I was born on {r.choice(MONTHS)} {r.randrange(1, 31)}, {r.choice(CENTURIES)}{r.randrange(100):02d}."
    if k == 9:
        return f"{r.choice(NAMES)} took the {r.choice(ORDINALS)} {r.choice(SINGULAR)} and {r.choice(VERBS_I)} {r.choice(TIMES)}."
    if k == 10:
        return f"We {r.choice(VERBS_T)} {r.randrange(2, 99)} {r.choice(PLURAL)} {r.choice(ADVERBS)}."
    return f"If {noun_phrase(r)} {r.choice(VERBS_I)}, {noun_phrase(r)} {r.choice(VERBS_T)} the {r.choice(SINGULAR)}."


def gen_filler(r: random.Random) -> str:
    return " ".join(filler_sentence(r) for _ in range(r.randrange(1, 4)))


def gen_story(r: random.Random) -> str:
    first, last = r.choice(TITLE_WORDS), r.choice(TITLE_WORDS)
    sentence = f"{r.choice(['Mr.', 'Mrs.', 'Dr.'])} {first} {last} {r.choice(VERBS_T)} the {r.choice(ADJECTIVES)} {r.choice(SINGULAR)}"
    return f"{sentence}. {filler_sentence(r)} {sentence} {r.choice(ADVERBS)}."


WORD_POOL = SINGULAR + ADJECTIVES + COUNTRIES + MONTHS + IDENTIFIERS + OBJECTS


def gen_words(r: random.Random) -> str:
    words = [r.choice(WORD_POOL) for _ in range(r.randrange(3, 14))]
    return " " + " ".join(words * 2)


# ---------------------------------------------------------------- documents

GENERATORS = {
    "ioi": gen_ioi,
    "greater_than": gen_greater_than,
    "fact": gen_fact,
    "pronoun": gen_pronoun,
    "agreement": gen_agreement,
    "successor": gen_successor,
    "bracket": gen_bracket,
    "docstring": gen_docstring,
    "acronym": gen_acronym,
    "filler": gen_filler,
    "story": gen_story,
    "words": gen_words,
}
MIX = dict(zip(GENERATORS, (36, 12, 8, 7, 8, 12, 7, 5, 4, 7, 3, 4)))
SENTENCES = ["ioi", "greater_than", "fact", "pronoun", "agreement", "filler", "story", "acronym"]


def document(r: random.Random) -> str:
    kind = r.choices(list(MIX), list(MIX.values()))[0]
    while True:
        text = GENERATORS[kind](r)
        if kind in SENTENCES and r.random() < 0.2:
            text = filler_sentence(r) + " " + text
        if kind in SENTENCES and r.random() < 0.2:
            text = text + " " + GENERATORS[r.choice(SENTENCES)](r)
        if not leaks(text):
            return text


# ---------------------------------------------------------------- tokenizer and rows


def build_tokenizer(folder: Path, n_docs: int = 60_000) -> PreTrainedTokenizerFast:
    """A Unigram model over byte-level pretokens: one token for each lexicon word, and the 256 bytes for all else. Lossless, no merges."""
    r = random.Random(VOCAB_SEED)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    counts = Counter(word for _ in range(n_docs) for word, _ in byte_level.pre_tokenize_str(document(r)))
    words = {word for word, n in counts.items() if n >= 8 and word.lstrip("Ġ").isalpha() and word.isprintable()}
    lexicon = NAMES + COUNTRIES + MONTHS + WEEKDAYS + PLACES + OBJECTS + ADJECTIVES + SINGULAR + PLURAL + NUMBER_WORDS + ORDINALS
    words |= {"Ġ" + word for word in lexicon + LETTERS} | set(NAMES + COUNTRIES + MONTHS + WEEKDAYS + NUMBER_WORDS + ORDINALS)
    words |= {f"{i:02d}" for i in range(100)} | {f"Ġ{i}" for i in range(100)} | {"Ġ(", "Ġ=", "'t", 'Ġ"', "Ġ'", "Ġ[", "Ġ{"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [(BOS, 0.0)] + [(byte, -20.0) for byte in alphabet] + [(word, -8.0) for word in sorted(words - set(alphabet))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        unk_token=BOS,
        clean_up_tokenization_spaces=False,
        model_max_length=N_CTX,
    )
    fast.save_pretrained(folder)
    return fast


def build_rows(tokenizer: PreTrainedTokenizerFast, n_tokens: int, row_length: int, seed: int, no_bos: float = 0.07) -> np.ndarray:
    """Documents, each after a BOS, packed to rows. A row starts with a document; a share of the rows starts without its BOS."""
    r = random.Random(seed)
    rows, row = [], []
    with tqdm(total=n_tokens, desc=f"rows of {row_length}", unit="tok", unit_scale=True) as bar:
        while len(rows) * row_length < n_tokens:
            before = len(rows)
            for encoding in tokenizer.backend_tokenizer.encode_batch_fast([document(r) for _ in range(5000)]):
                ids = [0] + encoding.ids
                if not row and r.random() < no_bos:
                    ids = ids[1:]
                row += ids
                if len(row) >= row_length:
                    rows.append(row[:row_length])
                    row = []
            bar.update((len(rows) - before) * row_length)
    return np.array(rows, dtype=np.int16)


if __name__ == "__main__":
    r = random.Random(SAMPLE_SEED)
    documents = []
    while sum(map(len, documents)) < 80_000:
        text = document(r)
        if "\n" not in text:  # one document per line: docstrings stay out of the sample
            documents.append(text)
    path = HERE / "corpus.txt"
    path.write_text("\n".join(documents) + "\n")
    print(f"{green}{path}: {cyan}{len(documents)} documents, {path.stat().st_size / 1000:.0f} kB{endc}")
    for text in documents[:12]:
        print(f"{gray}{text}{endc}")
