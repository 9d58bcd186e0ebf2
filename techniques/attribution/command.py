"""The command line of this room: attribution."""

import re
from dataclasses import dataclass

from rich.console import Console

from techniques.attribution.requests import (
    Attribution,
    AttributionCells,
    AttributionNeurons,
    AttributionNeuronsResult,
    AttributionResult,
    AttributionSet,
    AttributionSetResult,
    AttributionSources,
    AttributionSourcesResult,
)
from techniques.shell import CYAN, GRAY, PURPLE, YELLOW, options, plain, table
from utils import show_number, show_token
from vocabulary.nodes import UserError, parse_node


@dataclass
class AttributionCommand(options(Attribution, AttributionNeurons, hide=("layer",), unused=("metric",))):
    """Direct logit attribution at the metric's position: every component, or one of them taken apart (--by)."""

    by: str | None = None
    """a head (L9H9: by source position) or an MLP (L3.mlp: by neuron)"""
    mean: bool = False
    """mean and standard deviation over --set"""

    def request(self) -> Attribution | AttributionSources | AttributionNeurons | AttributionSet:
        if self.by is None:
            return self.ask(AttributionSet if self.mean else Attribution)
        node = parse_node(self.by)
        if self.mean or node.site not in ("head", "mlp") or node.part != "z":
            raise UserError("--by takes a head (L9H9) or an MLP (L3.mlp) apart, of one prompt")
        there = {"layer": node.layer} | ({} if node.pos is None else {"pos": node.pos})
        return self.ask(AttributionSources, head=node.head, **there) if node.site == "head" else self.ask(AttributionNeurons, **there)


COMMANDS = {"attribution": AttributionCommand}


# ------------------------------------------------------------------ tables


def show_cells(out: Console, cells: AttributionCells, spread: AttributionCells | None = None) -> None:
    """Heads as layers x heads, then the other cells as rows; with the spread behind a +-."""
    word = lambda a, b: show_number(float(a), 6) + ("" if spread is None else f" +-{float(b):.3f}")  # noqa: E731
    other = spread or cells
    heads = table("heads", "layer", *(f"H{h}" for h in range(cells.heads.shape[1])), "b_O", "MLP")
    for layer, row in enumerate(cells.heads):
        ends = (word(cells.attn_bias[layer], other.attn_bias[layer]), word(cells.mlps[layer], other.mlps[layer]))
        heads.add_row(f"L{layer}", *(word(a, b) for a, b in zip(row, other.heads[layer])), *ends)
    out.print(heads)
    rest = table("the rest", "part", "logit")
    for (name, value), (_, s) in zip(cells.rows(), other.rows()):
        if not re.match(r"L\d", name):
            rest.add_row(plain(name), word(value, s))
    out.print(rest)


def show_attribution(out: Console, r: AttributionResult) -> None:
    out.print(plain(f"{' '.join(show_token(x) for x in r.tokens.texts)}  at {r.pos}", PURPLE))
    show_cells(out, r.cells)
    capped = "" if r.capped is None else f"  after the cap {r.capped:.4f}"
    out.print(plain(f"sum {r.total:.4f}  logit {r.logit:.4f}  error {r.error:.1e}{capped}", CYAN))
    out.print(plain(r.convention, GRAY))


def show_sources(out: Console, r: AttributionSourcesResult) -> None:
    rows = table(f"L{r.layer}H{r.head} at {r.pos}, by source", "", "token", "attention", "logit")
    for j, (x, p, v) in enumerate(zip(r.tokens.texts, r.pattern.tolist(), r.sources.tolist())):
        rows.add_row(str(j), plain(show_token(x)), f"{p:.3f}", show_number(v))
    out.print(rows)
    out.print(plain(f"sum {r.total:.4f}  error {r.error:.1e}  interventions {r.interventions:.4f}", CYAN))
    out.print(plain(r.convention, GRAY))


def show_neurons(out: Console, r: AttributionNeuronsResult) -> None:
    rows = table(f"L{r.layer}.mlp at {r.pos}, by neuron", "neuron", "activation", "logit")
    for i, a, v in zip(r.index.tolist(), r.activation.tolist(), r.contribution.tolist()):
        rows.add_row(f"L{r.layer}.mlp.n{i}", show_number(a), show_number(v))
    out.print(rows)
    out.print(plain(f"the other neurons {r.rest:.4f}  b_out {r.bias:.4f}  interventions {r.interventions:.4f}  sum {r.total:.4f}  error {r.error:.1e}", CYAN))
    out.print(plain(r.convention, GRAY))


def show_attribution_set(out: Console, r: AttributionSetResult) -> None:
    show_cells(out, r.mean, r.std)
    rows = table("prompts", "prompt", "sum", "logit")
    for i, a, b in zip(r.prompts.tolist(), r.totals.tolist(), r.logits.tolist()):
        rows.add_row(plain(str(i + 1), YELLOW if i == r.worst else ""), f"{a:.4f}", f"{b:.4f}")
    out.print(rows)
    out.print(plain(f"mean {r.logits.mean():.4f}  worst prompt {r.worst + 1}  error {r.error:.1e}", CYAN))
    out.print(plain(r.convention, GRAY))


SHOW = {
    AttributionResult: show_attribution,
    AttributionSourcesResult: show_sources,
    AttributionNeuronsResult: show_neurons,
    AttributionSetResult: show_attribution_set,
}
