"""`uv run zoo/make_prompts.py` rewrites zoo/prompts/*.jsonl. Within a file all prompts share one token length and the label positions."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

import corpus as c
from evaluate import HUNT_TEMPLATE, held_pair

cyan, green, gray, endc = "\x1b[38;2;0;255;255m", "\x1b[38;2;0;255;0m", "\x1b[38;2;127;127;127m", "\x1b[0m"

HERE = Path(__file__).parent
N_PROMPTS = 32
EITHER_TEMPLATE = "When {A} and {B} went to the {P}, {S} and {D} gave a {O} to"


@dataclass
class Prompt:
    """labels: character offsets into clean of the first character of a word. The last token, END, is not written."""

    clean: str
    corrupt: str
    answer: str | list[str]
    foil: str | list[str]
    labels: dict[str, int] = field(default_factory=dict)


def find(text: str, word: str, nth: int = 0) -> int:
    offset = -1
    for _ in range(nth + 1):
        offset = text.index(word, offset + 1)
    return offset


def ioi_prompts(r: random.Random, order: str) -> list[Prompt]:
    famous = ("Mary", "John", "Alice", "store", "drink") if order == "ABBA" else ("John", "Mary", "Alice", "store", "drink")
    prompts = []
    while len(prompts) < N_PROMPTS:
        a, b = held_pair(r)
        other, place, thing = r.choice([name for name in c.NAMES if name not in (a, b)]), r.choice(c.PLACES), r.choice(c.OBJECTS)
        if not prompts:
            a, b, other, place, thing = famous
        giver, receiver = (b, a) if order == "ABBA" else (a, b)
        clean, corrupt = (HUNT_TEMPLATE.format(A=a, B=b, S=s, P=place, O=thing) for s in (giver, other))
        labels = {"IO": find(clean, receiver), "S1": find(clean, giver), "S2": find(clean, giver, 1)}
        prompts.append(Prompt(clean, corrupt, " " + receiver, " " + giver, labels))
    return prompts


def ioi_distractor_prompts(r: random.Random) -> list[Prompt]:
    """A third name after S2: the latest name is not S."""
    prompts = []
    while len(prompts) < N_PROMPTS:
        a, b = held_pair(r)
        third, other = r.sample([name for name in c.NAMES if name not in (a, b)], 2)
        slots = {"A": a, "B": b, "D": third, "P": r.choice(c.PLACES), "O": r.choice(c.OBJECTS)}
        clean, corrupt = (EITHER_TEMPLATE.format(**slots, S=s) for s in (b, other))
        labels = {"IO": find(clean, a), "S1": find(clean, b), "S2": find(clean, b, 1), "D": find(clean, third)}
        prompts.append(Prompt(clean, corrupt, " " + a, " " + b, labels))
    return prompts


def induction_prompts(r: random.Random) -> list[Prompt]:
    """Eight random words, then the first four again: the fifth follows. The corrupted prompt asks for the word after the seventh."""
    prompts = []
    while len(prompts) < N_PROMPTS:
        words = r.sample(sorted(set(c.WORD_POOL)), 8)
        head = " " + " ".join(words + words[:3])
        offsets = [len(" " + " ".join(words[:i] + [""])) if i else 1 for i in range(8)]
        labels = {"A1": offsets[3], "B1": offsets[4], "foil1": offsets[7]}
        assert head[offsets[4] :].startswith(words[4]) and head[offsets[7] :].startswith(words[7])
        prompts.append(Prompt(f"{head} {words[3]}", f"{head} {words[6]}", " " + words[4], " " + words[7], labels))
    return prompts


def greater_than_prompts(r: random.Random) -> list[Prompt]:
    prompts = []
    years = [f"{i:02d}" for i in range(100)]
    while len(prompts) < N_PROMPTS:
        event, xx, century = r.choice(c.EVENTS), r.randrange(5, 96), r.choice(c.CENTURIES)
        if c.gt_held(event, xx):
            clean, corrupt = (f"The {event} lasted from {century}{x:02d} to {century}" for x in (xx, 1))
            labels = {"event": 4, "XX": find(clean, str(century)) + 2}
            prompts.append(Prompt(clean, corrupt, years[xx + 1 :], years[: xx + 1], labels))
    return prompts


def capital_prompts(r: random.Random) -> list[Prompt]:
    """The countries held out in this template come first; the rest fills the set up."""
    template = c.FACT_TEMPLATES["capital"][0].split(" {v}")[0]
    countries = sorted(c.COUNTRIES, key=lambda country: not c.fact_held(country, "capital", 0))[:N_PROMPTS]
    prompts = []
    for country in countries:
        other = r.choice([x for x in c.COUNTRIES if x != country])
        clean, corrupt = (template.format(c=x) for x in (country, other))
        labels = {"country": find(clean, country)}
        prompts.append(Prompt(clean, corrupt, " " + c.CAPITALS[country], " " + c.CAPITALS[other], labels))
    return prompts


def agreement_prompts(r: random.Random) -> list[Prompt]:
    prompts = []
    while len(prompts) < N_PROMPTS:
        a, b = r.sample(c.SINGULAR, 2)
        if c.agreement_held(a, b):
            plural, preposition = len(prompts) % 2, r.choice(c.PREPOSITIONS)
            attractor = b if plural else c.NOUNS[b]
            clean, corrupt = (f"The {(a, c.NOUNS[a])[i]} {preposition} the {attractor}" for i in (plural, 1 - plural))
            prompts.append(Prompt(clean, corrupt, (" is", " are")[plural], (" are", " is")[plural], {"subject": 4}))
    return prompts


def pronoun_prompts(r: random.Random) -> list[Prompt]:
    prompts = []
    while len(prompts) < N_PROMPTS:
        name, role = r.choice(c.MALE if len(prompts) % 2 else c.FEMALE), r.choice(c.ROLES)
        if c.pronoun_held(name, 0):
            other = r.choice(c.FEMALE if len(prompts) % 2 else c.MALE)
            clean, corrupt = (f"So {x} is a really great {role}, isn't" for x in (name, other))
            answer, foil = (" " + c.PRONOUN[x][0] for x in (name, other))
            prompts.append(Prompt(clean, corrupt, answer, foil, {"name": 3, "role": find(clean, role)}))
    return prompts


def successor_prompts(r: random.Random) -> list[Prompt]:
    """Three items, the fourth is asked for. The corrupted list is of the same kind and starts elsewhere."""
    prompts = []
    for kind, (items, _, _) in c.LISTS.items():
        starts = [start for start in range(len(items)) if c.successor_held(kind, start) and c.list_slice(kind, start, 4)]
        for start in starts:
            others = [s for s in range(len(items)) if s != start and c.list_slice(kind, s, 4)]
            clean, corrupt = (c.list_slice(kind, s, 4) for s in (start, r.choice(others)))
            text = " " + " ".join(clean[:3])
            labels = {"first": 1, "second": 2 + len(clean[0])}
            prompts.append(Prompt(text, " " + " ".join(corrupt[:3]), " " + clean[3], " " + corrupt[3], labels))
    r.shuffle(prompts)
    return prompts[:N_PROMPTS]


def bracket_prompts(r: random.Random) -> list[Prompt]:
    prompts = []
    while len(prompts) < N_PROMPTS:
        x, first, second, third = r.sample(c.IDENTIFIERS, 4)
        outer, inner, other = r.sample("([{", 3)
        clean, corrupt = (f"{x} = {r_fn}{outer}{first}, {b}{second}, {third}" for r_fn in [r.choice(c.FUNCTIONS)] for b in (inner, other))
        labels = {"outer": find(clean, outer), "open": find(clean, inner)}
        prompts.append(Prompt(clean, corrupt, c.BRACKETS[inner], c.BRACKETS[other], labels))
    return prompts


def docstring_prompts(r: random.Random) -> list[Prompt]:
    """Four arguments, the third is asked for. The corrupted definition has another third argument."""
    prompts = []
    while len(prompts) < N_PROMPTS:
        a, b, answer, d, other = r.sample(c.IDENTIFIERS, 5)
        function, types = r.choice(c.FUNCTIONS), [r.choice(c.TYPES) for _ in range(2)]
        tail = f"\n param {a}: {types[0]}\n param {b}: {types[1]}\n param"
        clean, corrupt = (f"def {function}(self, {a}, {b}, {x}, {d}):{tail}" for x in (answer, other))
        labels = {"B_def": find(clean, f" {b},") + 1, "C_def": find(clean, f" {answer},") + 1, "B_doc": find(clean, f" {b}:") + 1}
        prompts.append(Prompt(clean, corrupt, " " + answer, " " + other, labels))
    return prompts


def acronym_prompts(r: random.Random) -> list[Prompt]:
    """The third letter is asked for. The corrupted title has another third word."""
    prompts = []
    while len(prompts) < N_PROMPTS:
        *words, other = r.sample(c.TITLE_WORDS, 4)
        if c.acronym_held(words) and len({word[0] for word in (*words, other)}) == 4:
            letters = words[0][0] + words[1][0]
            clean, corrupt = (f"The {words[0]} {words[1]} {x} ({letters}" for x in (words[2], other))
            labels = {f"word{i + 1}": find(clean, f" {word}") + 1 for i, word in enumerate(words)}
            prompts.append(Prompt(clean, corrupt, words[2][0], other[0], labels))
    return prompts


BUILDERS = {
    "ioi_abba": lambda r: ioi_prompts(r, "ABBA"),
    "ioi_baba": lambda r: ioi_prompts(r, "BABA"),
    "ioi_distractor": ioi_distractor_prompts,
    "induction": induction_prompts,
    "greater_than": greater_than_prompts,
    "capitals": capital_prompts,
    "agreement": agreement_prompts,
    "pronouns": pronoun_prompts,
    "successor": successor_prompts,
    "brackets": bracket_prompts,
    "docstring": docstring_prompts,
    "acronym": acronym_prompts,
}


def token_at(tokenizer: PreTrainedTokenizerFast, text: str, offset: int) -> int:
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    (index,) = [i for i, (start, end) in enumerate(spans) if start <= offset < end]
    return index


def check(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> int:
    """All prompts of a file: one token length, the same label positions, single-token answers and foils. Returns the length."""
    lengths = {len(tokenizer.encode(text)) for prompt in prompts for text in (prompt.clean, prompt.corrupt)}
    assert len(lengths) == 1, f"token lengths {lengths}"
    positions = {tuple((k, token_at(tokenizer, p.clean, offset)) for k, offset in p.labels.items()) for p in prompts}
    assert len(positions) == 1, f"label positions {positions}"
    for prompt in prompts:
        assert prompt.clean != prompt.corrupt, prompt
        for side in (prompt.answer, prompt.foil):
            words = [side] if isinstance(side, str) else side
            assert words and all(len(tokenizer.encode(word)) == 1 for word in words), prompt
    return lengths.pop()


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    (HERE / "prompts").mkdir(exist_ok=True)
    for i, (task, build) in enumerate(BUILDERS.items()):
        prompts = build(random.Random(2000 + i))
        length = check(tokenizer, prompts)
        lines = [json.dumps(vars(prompt)) for prompt in prompts]
        (HERE / "prompts" / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{green}{task:15}{cyan}{len(prompts):3} prompts of {length} tokens{endc}  {gray}{prompts[0].clean!r} -> {prompts[0].answer!r:.20}{endc}")
