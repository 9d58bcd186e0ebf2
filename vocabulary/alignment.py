"""
Prompts of unequal length: which position of the clean prompt stands against which of the corrupted one. Never imports torch.

An alignment is a tuple of pairs (clean index, corrupted index), one to one. Positions without a partner are never patched across.
"""

from difflib import SequenceMatcher

from vocabulary.nodes import UserError
from vocabulary.prompts import ALIGNMENTS, Prompt, TokenRow

Pairs = tuple[tuple[int, int], ...]


def align(prompt: Prompt, clean: TokenRow, corrupt: TokenRow, how: str = "") -> Pairs:
    """The prompt's own alignment where it has one; else as ALIGNMENTS says. () where nothing says how to align prompts of unequal length."""
    if how not in ALIGNMENTS:
        raise UserError(f"{how!r} is not an alignment: use diff or labels, or give the prompt pairs of positions")
    n, m = len(clean.ids), len(corrupt.ids)
    if prompt.alignment:
        return check_pairs(prompt.alignment, n, m)
    match how:
        case "diff":
            return by_diff(clean, corrupt)
        case "labels":
            return by_labels(clean, corrupt)
    return tuple((i, i) for i in range(n)) if n == m else ()


def check_pairs(pairs: Pairs, n: int, m: int) -> Pairs:
    """Pairs in order; a position outside its prompt, or used twice, is an error."""
    for what, side, size in (("clean", 0, n), ("corrupted", 1, m)):
        places = [p[side] for p in pairs]
        if bad := [i for i in places if not 0 <= i < size]:
            raise UserError(f"alignment: the {what} prompt has no position {bad[0]}, it has {size} tokens (0 to {size - 1})")
        if twice := [i for i in places if places.count(i) > 1]:
            raise UserError(f"alignment: position {twice[0]} of the {what} prompt is paired twice")
    return tuple(sorted(tuple(p) for p in pairs))


def ends(clean: TokenRow, corrupt: TokenRow) -> dict[int, int]:
    """BOS and END, which are always aligned."""
    out = {0: 0} if clean.bos and corrupt.bos else {}
    return out | {len(clean.ids) - 1: len(corrupt.ids) - 1}


def by_diff(clean: TokenRow, corrupt: TokenRow) -> Pairs:
    """Equal tokens from both ends, then equal stretches by difflib between them, and replaced stretches of equal length; BOS and END."""
    a, b, out = clean.ids, corrupt.ids, ends(clean, corrupt)
    start = 0
    while start < min(len(a), len(b)) - 1 and a[start] == b[start]:
        start += 1
    stop = 1  # END
    while stop < min(len(a), len(b)) - start and a[-stop - 1] == b[-stop - 1]:
        stop += 1
    out |= {i: i for i in range(start)} | {len(a) - i: len(b) - i for i in range(1, stop + 1)}
    for tag, i, i2, j, j2 in SequenceMatcher(None, a[start : len(a) - stop], b[start : len(b) - stop], autojunk=False).get_opcodes():
        if tag == "equal" or tag == "replace" and i2 - i == j2 - j:
            out |= {start + i + k: start + j + k for k in range(i2 - i)}
    return tuple(sorted(out.items()))


def by_labels(clean: TokenRow, corrupt: TokenRow) -> Pairs:
    """Positions with the same label in both; BOS and END. Labels at one token in one prompt and two in the other are an error."""
    pairs = set(ends(clean, corrupt).items()) | {(i, corrupt.labels[name]) for name, i in clean.labels.items() if name in corrupt.labels}
    return check_pairs(tuple(pairs), len(clean.ids), len(corrupt.ids))


def find_labels(clean: TokenRow, corrupt: TokenRow, pairs: Pairs) -> dict[str, int]:
    """The corrupted prompt's labels: its own, else the partners of the clean prompt's (by the token diff where there is no alignment yet)."""
    partner = dict(pairs or by_diff(clean, corrupt))
    return {name: partner[i] for name, i in clean.labels.items() if i in partner} | corrupt.labels


def is_by_index(pairs: Pairs, n: int, m: int) -> bool:
    return n == m and pairs == tuple((i, i) for i in range(n))


def partners(pairs: Pairs, side: str, size: int) -> tuple[int, ...]:
    """For every position of a side (clean or corrupt) its partner in the other, -1 without one."""
    there = {p[side == "corrupt"]: p[side == "clean"] for p in pairs}
    return tuple(there.get(i, -1) for i in range(size))


def words(pairs: Pairs, n: int, m: int) -> str:
    """An alignment in a few words: what has no partner."""
    alone = [[i for i in range(size) if i not in {p[side] for p in pairs}] for side, size in ((0, n), (1, m))]
    spell = lambda places: " ".join(map(str, places[:8])) + (" …" if len(places) > 8 else "") if places else "none"  # noqa: E731
    order = [j for _, j in sorted(pairs)]
    crossed = ", some of them crossing" if order != sorted(order) else ""
    return f"{len(pairs)} aligned positions{crossed}; without partner: clean {spell(alone[0])}, corrupted {spell(alone[1])}"
