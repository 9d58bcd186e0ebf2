"""The shell command: qk, a score by what wrote into query and key; over a set; one path checked for real."""

from dataclasses import dataclass

from rich.console import Console

from techniques.qk.requests import QK, QKCheck, QKCheckResult, QKFeaturesResult, QKResult, QKSet
from techniques.qk.table import check_words, pair_rows, table as numbers
from techniques.shell import CYAN, GRAY, options, plain, table
from utils import show_number, show_token


@dataclass
class QKCommand(options(QK, QKCheck, hide=("component",))):
    """
    Why a head looks at a source: its score before the softmax by what wrote into the query and the key, components or (--features --sae SOURCE) features; --check
    COMPONENT changes one path for real.
    """

    mean: bool = False
    """the mean over --set, with 95 % intervals"""
    check: str = ""
    """a component (embed, L0H1, L0.mlp; with --features L1.sae.f7) whose path into --side is changed for real, by --op"""

    def request(self) -> QK | QKSet | QKCheck:
        if self.check:
            return self.ask(QKCheck, component=self.check)
        return self.ask(QKSet if self.mean else QK)


COMMANDS = {"qk": QKCommand}


def show_qk(out: Console, r: QKResult) -> None:
    rows, cols, values = numbers(r, "largest", (16, 6) if isinstance(r, QKFeaturesResult) else (24, 12))
    name = lambda pos: f"{pos} {show_token(r.tokens.texts[pos])}"  # noqa: E731
    against, what = f", less {r.instead}" if r.instead else "", "features" if isinstance(r, QKFeaturesResult) else "components"
    where = f"over {len(r.prompts)} prompts" if r.prompts.size else f"from {name(r.dest)} to {name(r.source)}"
    shown = table(f"L{r.layer}H{r.head} {where}{against}: query {what} (rows) by key {what}", "", *cols)
    for row, line in zip(rows, values.tolist()):
        shown.add_row(row, *(plain(show_number(v, 7), CYAN if abs(v) > abs(r.total) / 4 else "") for v in line))
    out.print(shown)
    if r.prompts.size:
        out.print(plain(f"{len(r.prompts)} prompts; --json has each entry's interval (low, high)", GRAY))
    capped = f", after the soft cap {r.capped:.4f}" if r.cap else ""
    out.print(f"sum {r.total:.4f}, the model's own score {r.score:.4f}{capped}, error {r.error:.1e}; attention {r.attention:.4f}")
    out.print(plain(r.convention, GRAY))


def show_features(out: Console, r: QKFeaturesResult) -> None:
    pairs = table(
        f"pairs of features by size, {r.pairs} in all", "query", "", "key", "", "adds", "95 %" if r.prompts.size else "", "prompts" if r.prompts.size else ""
    )
    for a, b, adds, between, fires in pair_rows(r, 20):
        pairs.add_row(a, plain(r.labels.get(a, ""), GRAY), b, plain(r.labels.get(b, ""), GRAY), plain(adds, CYAN), between, fires)
    out.print(pairs)
    show_qk(out, r)


def show_check(out: Console, r: QKCheckResult) -> None:
    out.print(check_words(r))
    out.print(plain(r.convention, GRAY))


SHOW = {QKResult: show_qk, QKFeaturesResult: show_features, QKCheckResult: show_check}
