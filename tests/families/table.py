"""docs/architectures.md, from running every analysis on every family: uv run tests/families/table.py > docs/architectures.md"""

import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from families.configs import FAMILIES

HEAD = """# Which analyses are right on which architecture

Made by `uv run tests/families/table.py > docs/architectures.md`; do not edit. A test says when it is stale.

Every decoder-only text architecture that TransformerLens's Bridge lists and transformers can build from a config, as a random model of two or three layers with effects of real
size. ✓ means equal to the architecture's own Hugging Face modules under plain torch hooks (`tests/families/reference.py`) to 1e-4 in float32; in bfloat16 finite and near it.
✓ − k means equal but for k, which is refused in words; − means refused. What is refused, and the words, stands below the table. ✗ is known to be wrong.

* **do**: zero and patch at z, q, k, v, pattern, attn, mlp, resid_pre, resid_mid, resid_post and neurons, at all positions and at one. **sweep**, **estimate**: every cell of each kind.
* **attribution**: every head, MLP and bias, their sum the logit. **direct**: direct effects. **path**: path patches from embeddings, heads and MLPs to q, k, v, MLPs and the logits.
  **edges**: one edge cut, every kind of edge. **EAP**: every edge's score. **weights**: OV and QK of a head.
"""


def cell(found: dict[str, str]) -> str:
    """✓, − or ✗ of an analysis, with the parts that differ."""
    wrong = [part for part, words in found.items() if words and not words.startswith("refused")]
    refused = [part for part, words in found.items() if words.startswith("refused")]
    if wrong:
        return "✗ " + ", ".join(wrong)
    if len(refused) == len(found):
        return "−"
    return "✓" + (f" − {', '.join(refused)}" if refused else "")


def short(words: str) -> str:
    """A refusal without the address that was asked for."""
    return re.sub(r"^(refused|wrong|error): (L\d\S*( \S+)?: )?", "", words)


def lines(family: str, found: dict[str, dict[str, str]]) -> list[str]:
    """A family's row of the table, and a line for every reason."""
    from families.known import KNOWN

    row = [family, *(cell(f).replace("|", "\\|") for f in found.values())]
    reasons = defaultdict(list)
    for analysis, parts in found.items():
        for part, words in parts.items():
            if words:
                said = short(words) if words.startswith("refused") else "wrong: " + KNOWN.get((family, analysis), short(words))
                reasons[said].append(f"{analysis} {part}".strip())
    every = sum(map(len, found.values()))
    return [f"| {' | '.join(row)} |", *(f"* {family}, {'everything' if len(some) == every else ', '.join(some)}: {said}" for said, some in reasons.items())]


def main() -> None:
    import torch

    from families.analyses import ANALYSES, Case, outcomes

    torch.set_num_threads(1)
    rows, reasons, root = [], [], Path(tempfile.mkdtemp())
    for family in FAMILIES:
        case = Case(family, root)
        row, *more = lines(family, {analysis: outcomes(case, analysis) for analysis in ANALYSES})
        rows.append(row)
        reasons += more
    print(HEAD)
    print(f"| architecture | {' | '.join(ANALYSES)} |\n|{'---|' * (1 + len(ANALYSES))}")
    print("\n".join(rows), "\n\n## What is refused, and why\n", "\n".join(reasons), sep="\n")


if __name__ == "__main__":
    main()
