"""docs/architectures.md, from running every analysis on every family: uv run tests/families/table.py > docs/architectures.md"""

import contextlib
import re
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from families.configs import FAMILIES
from families.known import KNOWN

HEAD = """# Which analyses are right on which architecture

✓ means: equal to the architecture's own Hugging Face modules under plain torch hooks, to 1e-4 in float32; in bfloat16 finite and near the numbers of float32. **refused** means: Loupe
says in one line why it can't, and draws nothing; the number leads to the reason below the table. "✓ but q 3": equal, q is refused; "✓ only q 3": the others are. ✗ is known to be wrong.

Rows are Hugging Face's `model_type`, with variants: every decoder-only text architecture that TransformerLens lists and transformers builds from a config, as a random model of two
or three layers. Columns:

* **do**: interventions, zero and patch, at z, q, k, v, pattern, attn, mlp, resid_pre, resid_mid, resid_post and neurons. **sweep**, **estimate**: their tables of cells, patched and by gradient.
* **attribution**: what heads, MLPs and biases add to a logit. **direct**: direct effects. **path**: path patches, **edges**: one edge cut, both from embeddings, heads and MLPs to q, k, v,
  MLPs and logits. **EAP**: every edge's score. **QK**: attention scores by what wrote into query and key. **weights**: a head's OV and QK. **bfloat16**: loading, a sweep of z, and EAP.
"""
FOOT = """
Made by `uv run tests/families/table.py > docs/architectures.md` (three minutes); don't edit. `tests/test_architectures.py` holds every row to the page. Left out: DeepSeek-V4 (several
residual streams), and encoders."""


def reason(family: str, analysis: str, words: str) -> str:
    """What an outcome says, without the address, the architecture's name and sizes, so that families share it."""
    if not words.startswith("refused"):
        return "wrong: " + KNOWN.get((family, analysis), words)
    words = re.sub(r"^refused: ((L\d|embed)\S*( \S+)?: )?", "", words)
    words = re.sub(r"\b\w+(ForCausalLM|LMHeadModel)\b", "the model", words).removeprefix("the model: ")
    for sizes, instead in ((r" \(off by [^)]*\)", ""), (r"\b(is|are) [\d.e-]+ off", r"\1 off"), (r"blocks\.\d", "blocks.N"), (r"\blayer \d", "a layer")):
        words = re.sub(sizes, instead, words)
    words = re.sub(r"^(.{80,}?)\. [A-Z].*", r"\1", words)
    return words if words.count("(") == words.count(")") else words[: words.index(" (")]


def row(family: str, found: dict[str, dict[str, str]], number: dict[str, int]) -> str:
    """A family's line of the table; `number` says which reason has which, and gets those it lacks if it can."""

    def numbers(parts: list[str], analysis: str) -> str:
        return ", ".join(map(str, sorted({number[reason(family, analysis, found[analysis][part])] for part in parts})))

    def names(parts: list[str]) -> str:
        return ", ".join(dict.fromkeys(re.split(r"->(?:L\dH\d)?|(?:L\d)?\.", part)[-1] for part in parts))

    def cell(analysis: str) -> str:
        parts = {part: words for part, words in found[analysis].items() if words}
        wrong = [part for part, words in parts.items() if not words.startswith("refused")]
        if wrong:
            return f"✗ {numbers(wrong, analysis)}"
        if len(parts) == len(found[analysis]):
            return f"refused {numbers(list(parts), analysis)}"
        if not parts:
            return "✓"
        equal = [part for part in found[analysis] if part not in parts]
        said = f"✓ only {names(equal)}" if len(equal) < len(parts) else f"✓ but {names(list(parts))}"
        return f"{said} {numbers(list(parts), analysis)}"

    return f"| {family} | {' | '.join(map(cell, found))} |"


class Numbers(dict):
    """Each new reason gets the next number."""

    def __missing__(self, words: str) -> int:
        return self.setdefault(words, len(self) + 1)


def numbers_of(page: str) -> dict[str, int]:
    """Those that a page has given."""
    return {words: int(n) for n, words in re.findall(r"^(\d+)\. (.*)$", page, re.M)}


def main() -> None:
    import torch

    from families.analyses import ANALYSES, Case, outcomes

    torch.set_num_threads(1)
    number, root = Numbers(), Path(tempfile.mkdtemp())
    rows = []
    with contextlib.redirect_stdout(sys.stderr):  # libraries print
        for family in FAMILIES:
            case = Case(family, root)
            rows.append(row(family, {analysis: outcomes(case, analysis) for analysis in ANALYSES}, number))
    print(HEAD)
    print(f"| architecture | {' | '.join(ANALYSES)} |\n|{'---|' * (1 + len(ANALYSES))}", *rows, "\n## Why\n", sep="\n")
    print(*(f"{n}. {words}" for words, n in number.items()), sep="\n")
    print(FOOT)


if __name__ == "__main__":
    main()
