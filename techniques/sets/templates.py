"""
Tasks from published work as templates. A maker gives one prompt after the other, from words that `one` takes: those that are one token in the middle of a text.
The words are those of zoo/corpus.py.
"""

import random
from collections.abc import Callable, Generator
from functools import partial

from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt
from zoo import corpus as c

One = Callable[[list[str]], list[str]]  # words -> those of them that are one token behind a space
IOI = (  # Wang et al. 2022, appendix E; a, b: the first and the second name, s: the one that comes again
    "When {a} and {b} went to the {place}, {s} gave a {object} to",
    "Then, {a} and {b} went to the {place}. {s} gave a {object} to",
    "Then, {a} and {b} had a lot of fun at the {place}. {s} gave a {object} to",
    "Then, {a} and {b} were working at the {place}. {s} decided to give a {object} to",
    "Then, {a} and {b} were thinking about going to the {place}. {s} wanted to give a {object} to",
    "Then, {a} and {b} had a long argument, and afterwards {s} said to",
    "After {a} and {b} went to the {place}, {s} gave a {object} to",
    "When {a} and {b} got a {object} at the {place}, {s} decided to give it to",
    "When {a} and {b} got a {object} at the {place}, {s} decided to give the {object} to",
    "While {a} and {b} were working at the {place}, {s} gave a {object} to",
    "While {a} and {b} were commuting to the {place}, {s} gave a {object} to",
    "After the lunch, {a} and {b} went to the {place}. {s} gave a {object} to",
    "Afterwards, {a} and {b} went to the {place}. {s} gave a {object} to",
    "The {place} {a} and {b} went to had a {object}. {s} gave it to",
    "Friends {a} and {b} found a {object} at the {place}. {s} gave it to",
)


def enough(words: list[str], n: int, what: str) -> list[str]:
    if len(words) < n:
        raise UserError(f"this tokenizer has {len(words)} {what} of one token, and the task needs {n}")
    return words


def offsets(text: str, **words: tuple[str, int]) -> tuple[tuple[str, int], ...]:
    """Labels: for each name a word and which of its occurrences, as the offset of its first character."""
    found = {}
    for name, (word, nth) in words.items():
        at = -1
        for _ in range(nth + 1):
            at = text.index(word, at + 1)
        found[name] = at
    return tuple(found.items())


def swapped(text: str) -> str:
    """A template with its first two names in the other order."""
    return text.replace("{a}", "{x}").replace("{b}", "{a}").replace("{x}", "{b}")


def ioi(r: random.Random, one: One, corruption: str, templates: int) -> Generator[Prompt]:
    names, places, objects = enough(one(c.NAMES), 5, "names"), enough(one(c.PLACES), 1, "places"), enough(one(c.OBJECTS), 1, "objects")
    forms, i = IOI[:templates], 0
    while True:
        io, s, *others = r.sample(names, 5)
        text, thing = forms[i // 2 % len(forms)], {"place": r.choice(places), "object": r.choice(objects)}
        write = partial(text.format if i % 2 == 0 else swapped(text).format, **thing)
        clean = write(a=io, b=s, s=s)
        match corruption:
            case "abc":
                corrupt = write(a=others[0], b=others[1], s=others[2])
            case "swap":
                corrupt = write(a=io, b=s, s=io)
            case _:
                corrupt = write(a=io, b=s, s=others[0])
        yield Prompt(clean, corrupt, (f" {io}",), (f" {s}",), offsets(clean, IO=(f" {io}", 0), S1=(f" {s}", 0), S2=(f" {s}", 1)))
        i += 1


def greater_than(r: random.Random, one: One, two_digits: bool) -> Generator[Prompt]:
    """A year XXYY and what lies above it: all YY above where two digits are one token, else the tens digits above that of YY."""
    events = enough(one(c.EVENTS), 1, "events")
    while True:
        event, century, year = r.choice(events), r.randrange(11, 20), r.randrange(2, 99) if two_digits else r.randrange(10, 90)
        clean, corrupt = (f"The {event} lasted from the year {century}{y:02d} to the year {century}" for y in (year, 1))
        some = [f"{i:02d}" for i in range(100)] if two_digits else [str(i) for i in range(10)]
        at = year if two_digits else year // 10
        yield Prompt(clean, corrupt, tuple(some[at + 1 :]), tuple(some[: at + two_digits]), offsets(clean, YY=(f"{year:02d} to", 0)))


def capitals(r: random.Random, one: One) -> Generator[Prompt]:
    known = enough([x for x in c.COUNTRIES if one([c.CAPITALS[x]])], 2, "capitals")
    while True:
        country, other = r.sample(known, 2)
        clean, corrupt = (f"The capital of {x} is" for x in (country, other))
        yield Prompt(clean, corrupt, (f" {c.CAPITALS[country]}",), (f" {c.CAPITALS[other]}",), (("country", len("The capital of") + len(country)),))


def agreement(r: random.Random, one: One) -> Generator[Prompt]:
    nouns = enough([x for x in c.SINGULAR if len(one([x, c.NOUNS[x]])) == 2], 2, "nouns in both numbers")
    between, i = enough(one(["near", "behind", "beside", "under", "above"]), 1, "prepositions"), 0
    while True:
        a, b = r.sample(nouns, 2)
        plural, way = i % 2, r.choice(between)
        clean, corrupt = (f"The {(a, c.NOUNS[a])[k]} {way} the {b if plural else c.NOUNS[b]}" for k in (plural, 1 - plural))
        yield Prompt(clean, corrupt, ((" is", " are")[plural],), ((" are", " is")[plural],), (("subject", 4), ("attractor", clean.rindex(" ") + 1)))
        i += 1


def induction(r: random.Random, one: One) -> Generator[Prompt]:
    """Ten random words, then the first of them again: the next one follows. The corrupted prompt ends in another of them."""
    words = enough(one(sorted(set(c.WORD_POOL))), 20, "words")
    while True:
        some, k = r.sample(words, 10), r.randrange(2, 5)
        head = " " + " ".join(some + some[:k])
        where = [1 + sum(len(w) + 1 for w in some[:i]) for i in range(10)]
        far = r.randrange(k + 2, 9)
        labels = (("A1", where[k]), ("B1", where[k + 1]), ("foil1", where[far + 1]))
        yield Prompt(f"{head} {some[k]}", f"{head} {some[far]}", (f" {some[k + 1]}",), (f" {some[far + 1]}",), labels)


def pronouns(r: random.Random, one: One) -> Generator[Prompt]:
    names, roles, i = (enough(one(c.FEMALE), 2, "names"), enough(one(c.MALE), 2, "names")), enough(one(c.ROLES), 1, "roles"), 0
    while True:
        name, other, role = r.choice(names[i % 2]), r.choice(names[1 - i % 2]), r.choice(roles)
        clean, corrupt = (f"So {x} is a really great {role}, isn't" for x in (name, other))
        answer, foil = ((" she",), (" he",))[:: -1 if i % 2 else 1]
        yield Prompt(clean, corrupt, answer, foil, offsets(clean, name=(name, 0), role=(role, 0)))
        i += 1


def docstring(r: random.Random, one: One) -> Generator[Prompt]:
    """Four arguments, the third is asked for. The corrupted definition has another third argument."""
    words = enough(one(c.IDENTIFIERS), 5, "identifiers")
    while True:
        a, b, answer, d, other = r.sample(words, 5)
        function, kinds = r.choice(c.FUNCTIONS), r.sample(c.TYPES, 2)
        tail = f"\n param {a}: {kinds[0]}\n param {b}: {kinds[1]}\n param"
        clean, corrupt = (f"def {function}(self, {a}, {b}, {x}, {d}):{tail}" for x in (answer, other))
        yield Prompt(clean, corrupt, (f" {answer}",), (f" {other}",), offsets(clean, B_def=(f" {b},", 0), C_def=(f" {answer},", 0), B_doc=(f" {b}:", 0)))
