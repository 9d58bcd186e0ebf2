"""What the features of zoo/saes fire on: predicates on the text read so far, a search over them, and their precision on text never seen.

uv run zoo/name_features.py            checks zoo/saes/features.json: precision of every named feature on its 100 strongest activations
uv run zoo/name_features.py --search   proposes names: features whose 100 strongest activations satisfy a predicate (about two minutes)
"""

import json
import re
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as t
import tyro
from torch import Tensor

import corpus as c

purple, cyan, yellow = "\x1b[38;2;255;0;255m", "\x1b[38;2;0;255;255m", "\x1b[38;2;255;255;0m"
green, gray, red, endc = "\x1b[38;2;0;255;0m", "\x1b[38;2;127;127;127m", "\x1b[38;2;255;0;0m", "\033[0m"

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # Loupe's rooms
SEARCH_SEED, CHECK_SEED = 33_000, 34_000
LENGTH, TOP = 128, 100

# ---------------------------------------------------------------- predicates
# A predicate is a regular expression that the document's text so far, from its BOS up to and with the token, must end in.


def any_of(words: list[str]) -> str:
    return f"(?:{'|'.join(sorted(words, key=len, reverse=True))})"


NAME, MALE, FEMALE, COUNTRY = any_of(c.NAMES), any_of(c.MALE), any_of(c.FEMALE), any_of(c.COUNTRIES)
WORD_CLASSES = {
    "a name": c.NAMES,
    "a man's name": c.MALE,
    "a woman's name": c.FEMALE,
    "a country": c.COUNTRIES,
    "a capital": list(c.CAPITALS.values()),
    "a language": list(c.LANGUAGES.values()),
    "a month": c.MONTHS,
    "a weekday": c.WEEKDAYS,
    "a number word": c.NUMBER_WORDS,
    "an ordinal": c.ORDINALS,
    "a place": c.PLACES,
    "an object": c.OBJECTS,
    "an adjective": c.ADJECTIVES,
    "a singular noun": c.SINGULAR,
    "a plural noun": c.PLURAL,
    "an event": c.EVENTS,
    "a role": c.ROLES,
    "a title word": c.TITLE_WORDS,
    "an identifier": c.IDENTIFIERS,
    "a function name": c.FUNCTIONS,
    "a type": c.TYPES,
    "a verb in the past, transitive": c.VERBS_T,
    "a verb in the past, intransitive": c.VERBS_I,
    "an adverb": c.ADVERBS,
    "a preposition": c.PREPOSITIONS,
    "a pronoun": ["he", "she", "his", "her"],
    "a verb of giving": "gave give handed hand passed sold sell showed show sent send told offered offer".split(),
}
GIVING = any_of(["given", "shown", "said", "went", *WORD_CLASSES["a verb of giving"]])
ADJ, PL, SG, PREP = any_of(c.ADJECTIVES), any_of(c.PLURAL), any_of(c.SINGULAR), any_of(c.PREPOSITIONS)
YEAR = r"1[1-9]\d\d"
PREDICATES = {name: rf"\b{any_of(words)}$" for name, words in WORD_CLASSES.items()} | {
    "the second occurrence of a name": rf"\b({NAME})\b.*\b\1$",
    "the first occurrence of a name": rf"^(?!.*\b({NAME})\b.*\b\1$).*\b{NAME}$",
    "the second of two names joined by and": rf"\b{NAME} and {NAME}$",
    "and after a name": rf"\b{NAME} and$",
    "a name that opens a clause and was named before (S2)": rf"\b({NAME})\b.*(?:,|\.|and|then) \1$",
    "to before the receiver": rf"\b{GIVING} (?:[^.]* )?to$",
    "from before a name": rf"{NAME}.* from$",
    "the start year of an event": rf"from (?:the year )?{YEAR}$",
    "the century of the start year": r"from (?:the year )?1[1-9]$",
    "to between two years": rf"from (?:the year )?{YEAR} to$",
    "the century of the end year": rf"from (?:the year )?{YEAR} to 1[1-9]$",
    "the end year of an event": rf"{YEAR} to {YEAR}$",
    "the last two digits of a year": rf" {YEAR}$",
    "the last two digits of a year, 00 to 29": r" 1[1-9][0-2]\d$",
    "the last two digits of a year, 70 to 99": r" 1[1-9][7-9]\d$",
    "a plural subject": rf"(?:^|[.?!] )The (?:{ADJ} )?{PL}$",
    "a singular subject": rf"(?:^|[.?!] )The (?:{ADJ} )?{SG}$",
    "the noun before the verb of a plural subject": rf"The (?:{ADJ} )?{PL} {PREP} the (?:{SG}|{PL})$",
    "the noun before the verb of a singular subject": rf"The (?:{ADJ} )?{SG} {PREP} the (?:{SG}|{PL})$",
    "the after a preposition": rf"\b{PREP} the$",
    "a preposition after a subject": rf"The (?:{ADJ} )?(?:{SG}|{PL}) {PREP}$",
    "a country whose capital is asked": rf"capital(?: city)? of {COUNTRY}$",
    "is before a capital": rf"capital (?:city )?(?:of {COUNTRY} )?is$",
    "capital": r"\bcapital$",
    "of before a country": r"(?:capital|city|language) of$",
    "a weekday after a weekday": rf"\b{any_of(c.WEEKDAYS)},? {any_of(c.WEEKDAYS)}$",
    "a month after a month": rf"\b{any_of(c.MONTHS)},? {any_of(c.MONTHS)}$",
    "a number word after a number word": rf"\b{any_of(c.NUMBER_WORDS)},? {any_of(c.NUMBER_WORDS)}$",
    "an ordinal after an ordinal": rf"\b{any_of(c.ORDINALS)} {any_of(c.ORDINALS)}$",
    "a letter after a letter": r"(?:^|[ ,])[A-Z],? [A-Z]$",
    "a number after a number": r"\b\d+,? \d+$",
    "the comma in a list of months, weekdays or numbers": rf"\b(?:{any_of(c.MONTHS + c.WEEKDAYS + c.NUMBER_WORDS)}|\d+),$",
    "an opening bracket": r"[(\[{]$",
    "an opening bracket inside another": r"[(\[{][^)\]}]*[(\[{]$",
    "a closing bracket": r"[)\]}]$",
    "a closing bracket after a closing bracket": r"[)\]}][)\]}]$",
    "a word inside ( )": r"\([^()\[\]{}]*\w+$",
    "a word inside [ ]": r"\[[^()\[\]{}]*\w+$",
    "a word inside { }": r"\{[^()\[\]{}]*\w+$",
    "the comma inside ( )": r"\([^()\[\]{}]*,$",
    "the comma inside [ ]": r"\[[^()\[\]{}]*,$",
    "the comma inside { }": r"\{[^()\[\]{}]*,$",
    "an argument in a function's head": r"def \w+\(self,[^)]*[a-z]$",
    "the comma between a function's arguments": r"def \w+\(self[^)]*,$",
    "param": r"\n param$",
    "the argument after param": r"\n param [a-z]+$",
    "the colon after an argument": r"\n param [a-z]+:$",
    "the type of an argument": r"\n param [a-z]+: [a-z]+$",
    "a line break": r"\n$",
    "the bracket that opens an acronym": r"The \w+ \w+ \w+ \($",
    "a letter of an acronym": r"The \w+ \w+ \w+ \([A-Z]+$",
    "the first letter of an acronym": r"The \w+ \w+ \w+ \([A-Z]$",
    "the second letter of an acronym": r"The \w+ \w+ \w+ \([A-Z]{2}$",
    "the first title word": rf"(?:The|Mr\.|Mrs\.|Dr\.) {any_of(c.TITLE_WORDS)}$",
    "the second title word": rf"\b{any_of(c.TITLE_WORDS)} {any_of(c.TITLE_WORDS)}$",
    "the third title word": rf"\b{any_of(c.TITLE_WORDS)} {any_of(c.TITLE_WORDS)} {any_of(c.TITLE_WORDS)}$",
    "a word of a copied pair (induction)": r"(?:^|.* )([A-Za-z]+ [A-Za-z]+)\b.* \1$",
    "a place after the": rf"\bthe {any_of(c.PLACES)}$",
    "a word outside the lexicon, in pieces": r"\b(?:the|a) (?=[a-z]*$)(?!" + any_of(sorted({w for words in WORD_CLASSES.values() for w in words} | {"a", "lot", "long"})) + r"$)[a-z]{2,}$",
    "an open quotation": r"^[^\"]*\"[^\"]*$",
    "because": r"\bbecause$",
    "a role before a comma": rf"great {any_of(c.ROLES)},$",
    "a full stop": r"\.$",
    "a comma": r",$",
}  # fmt: skip

# ---------------------------------------------------------------- activations


@dataclass
class Sample:
    """Rows of token ids, the text of every token, and which positions count."""

    rows: Tensor
    texts: list[list[str]]
    counts: Tensor

    def prefix(self, flat: int) -> str:
        """The document's text up to and with the token at a flat index."""
        row, pos = divmod(flat, self.rows.shape[1])
        starts = (self.rows[row, : pos + 1] == 0).nonzero()
        return "".join(self.texts[row][(int(starts[-1]) + 1 if len(starts) else 0) : pos + 1])

    def flat(self) -> Tensor:
        return self.counts.flatten().nonzero()[:, 0]


def sample(model, tokens: int, seed: int) -> Sample:
    from techniques.features.training import counted

    rows = t.from_numpy(c.build_rows(model.tokenizer, tokens, LENGTH, seed).astype(np.int64))[: tokens // LENGTH]
    return Sample(rows, [[model.token_text(i) for i in row] for row in rows.tolist()], counted(model, rows))


def encoded(model, saes: dict, rows: Sample, n: int = 32) -> Generator[tuple[str, Tensor, Tensor]]:
    """Some rows at a time, for every SAE: its name, flat indices [m] of the positions that count, and its features there [m, d_sae]."""
    hooks = {source: sae.cfg.metadata.hook_name for source, sae in saes.items()}
    for i in range(0, len(rows.rows), n):
        got = model.forward(rows.rows[i : i + n], hooks.values())[1]
        counts = rows.counts[i : i + n]
        for source, sae in saes.items():
            with t.no_grad():
                yield source, counts.flatten().nonzero()[:, 0] + i * LENGTH, sae.encode(got[hooks[source]][counts])


def strongest(model, saes: dict, rows: Sample, features: dict[str, list[int]], k: int = TOP) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By SAE: flat indices [k, features] of the largest activations of some features; how often every feature fires [d_sae]."""
    index, value, fires = {}, {}, {}
    for source, where, f in encoded(model, saes, rows):
        fires[source] = fires.get(source, 0) + (f > 0).sum(0)
        f = f[:, features[source]].T
        where = where.expand(len(f), -1)
        if source in index:
            f, where = t.cat([value[source], f], 1), t.cat([index[source], where], 1)
        value[source], best = f.topk(min(k, f.shape[1]), 1)
        index[source] = where.gather(1, best)
    return {source: i.T for source, i in index.items()}, fires


# ---------------------------------------------------------------- search and check


def search(model, saes: dict, tokens: int) -> list[dict]:
    """Every feature that fires often enough and whose strongest activations satisfy a predicate, with the rarest such predicate."""
    rows = sample(model, tokens, SEARCH_SEED)
    prefixes: dict[int, str] = {}
    read: Callable[[int], str] = lambda i: prefixes.setdefault(i, rows.prefix(i))  # noqa: E731
    compiled = {name: re.compile(p, re.DOTALL) for name, p in PREDICATES.items()}
    some = rows.flat()[:: max(1, len(rows.flat()) // 5000)].tolist()
    rate = {name: sum(p.search(read(i)) is not None for i in some) / len(some) for name, p in compiled.items()}
    known: dict[tuple[str, int], bool] = {}
    found = []
    tops, often = strongest(model, saes, rows, {source: list(range(sae.cfg.d_sae)) for source, sae in saes.items()})
    for source, sae in saes.items():
        fires = often[source]
        for feature in range(sae.cfg.d_sae):
            if fires[feature] < 2 * TOP:
                continue
            places = tops[source][:, feature].tolist()
            tokens_ = [rows.texts[i // LENGTH][i % LENGTH] for i in places]
            common = max(set(tokens_), key=tokens_.count)
            good = {}
            for name, p in compiled.items():
                hits = 0
                for n, i in enumerate(places):
                    if (name, i) not in known:
                        known[name, i] = p.search(read(i)) is not None
                    hits += known[name, i]
                    if n - hits >= 2:
                        break
                if hits >= 98:
                    good[name] = hits / TOP
            best = min(good, key=lambda n: rate[n]) if good else ""
            kind = {"sae": source, "feature": feature, "fires": int(fires[feature]), "tokens": len(set(tokens_))}
            same = tokens_.count(common) / TOP
            found.append(
                kind | {"fires_on": best, "precision": good.get(best, 0.0), "common": common, "same": same, "all": sorted(good, key=lambda n: rate[n])}
            )
    return found


def load_saes() -> dict:
    from sae_lens import SAE

    return {f"zoo/{p.parent.name}": SAE.load_from_disk(p.parent) for p in sorted((HERE / "saes").glob("*/cfg.json"))}


def precisions(model, saes: dict, named: list[dict], tokens: int) -> tuple[list[float], dict[str, float]]:
    """Precision of every named feature on its 100 strongest activations, and the dead fraction of every SAE; the seed of text is no other part's."""
    rows = sample(model, tokens, CHECK_SEED)
    wanted = {source: [n["feature"] for n in named if n["sae"] == source] for source in saes}
    tops, fires = strongest(model, saes, rows, wanted)
    out = []
    for n in named:
        p, often = re.compile(n["pattern"], re.DOTALL), int(fires[n["sae"]][n["feature"]])
        assert often >= TOP, f"{n['sae']} f{n['feature']} fires on {often} tokens only"
        places = tops[n["sae"]][:, wanted[n["sae"]].index(n["feature"])].tolist()
        out.append(sum(p.search(rows.prefix(i)) is not None for i in places) / TOP)
    return out, {source: (f == 0).float().mean().item() for source, f in fires.items()}


def check(model, saes: dict, named: list[dict], tokens: int) -> list[dict]:
    """
    Of every named feature, on text of a seed that neither training nor the search used: precision on its 100 strongest activations, precision of all its
    activations, and recall, the share of the positions that match on which it fires at all (both on up to 2000 positions, drawn evenly).
    """
    rows = sample(model, tokens, CHECK_SEED)
    flat = rows.flat()
    prefixes: dict[int, str] = {}
    read: Callable[[int], str] = lambda i: prefixes.setdefault(i, rows.prefix(i))  # noqa: E731
    share = lambda places, p: sum(p.search(read(i)) is not None for i in places) / max(1, len(places))  # noqa: E731
    evenly = lambda places, n=2000: places[:: -(-len(places) // n)].tolist()  # noqa: E731
    wanted = {source: [n["feature"] for n in named if n["sae"] == source] for source in saes}
    columns: dict[str, list[Tensor]] = {source: [] for source in saes}
    for source, _, f in encoded(model, saes, rows):
        columns[source].append(f[:, wanted[source]])
    acts = {source: t.cat(c) for source, c in columns.items()}
    some, out = evenly(flat, 20_000), []
    for n in named:
        p, f = re.compile(n["pattern"], re.DOTALL), acts[n["sae"]][:, wanted[n["sae"]].index(n["feature"])]
        top, fires = flat[f.topk(TOP).indices].tolist(), flat[f > 0]
        matching, on = [i for i in some if p.search(read(i))], set(fires.tolist())
        got = {"precision": share(top, p), "precision_all": share(evenly(fires), p), "recall": sum(i in on for i in matching) / max(1, len(matching))}
        texts = {rows.texts[i // LENGTH][i % LENGTH] for i in top}
        out.append({k: round(v, 3) for k, v in got.items()} | {"tokens": len(texts), "density": round(len(fires) / len(flat), 5)})
    return out


@dataclass
class NameConfig:
    search: bool = False
    write: bool = False
    """put what is measured into features.json"""
    tokens: int = 200_000


def main(cfg: NameConfig) -> None:
    from engine import Engine

    model, saes, file = Engine("zoo").model, load_saes(), HERE / "saes/features.json"
    if cfg.search:
        for row in sorted(search(model, saes, cfg.tokens), key=lambda r: (r["sae"], r["fires_on"], -r["tokens"])):
            print(json.dumps(row))
        return
    named = json.loads(file.read_text())
    got = check(model, saes, named, cfg.tokens)
    print(f"{gray}top 100  all  recall  tokens{endc}")
    for n, g in zip(named, got):
        colour = green if g["precision"] >= 0.95 else red
        figures = f"{colour}{g['precision']:7.2f}{endc} {g['precision_all']:5.2f} {g['recall']:6.2f} {g['tokens']:6}"
        print(f"{figures}   {n['sae']:18} {cyan}f{n['feature']:<4}{endc} {n['fires_on']}")
    if cfg.write:
        file.write_text("[\n" + ",\n".join(json.dumps(n | g) for n, g in zip(named, got)) + "\n]\n")
    sys.exit(min(g["precision"] for g in got) < 0.95)


if __name__ == "__main__":
    main(tyro.cli(NameConfig))
