"""The command line of engine.py: every analysis from a shell, as a table or as JSON."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine import Engine, serve
from messages import (
    Attention,
    AttentionResult,
    HeadStats,
    HeadStatsResult,
    Identities,
    IdentitiesResult,
    Lens,
    LensResult,
    Load,
    Metric,
    Progress,
    Prompt,
    Run,
    RunResult,
    Study,
    UserError,
    parse_intervention,
    read_prompt_set,
    to_json,
)
from utils import settings, show_number, show_token

GRAY, GREEN, CYAN, YELLOW, RED, PURPLE = (
    "rgb(127,127,127)",
    "rgb(0,255,0)",
    "rgb(0,255,255)",
    "rgb(255,255,0)",
    "rgb(255,0,0)",
    "rgb(255,0,255)",
)


@dataclass
class Options:
    """What every analysis takes. Defaults for model, dtype and device come from .env."""

    model: str | None = None
    """zoo, a Hugging Face folder, or a hub name"""
    base_model: str | None = None
    """the architecture (and tokenizer), when the model is a folder of fine-tuned weights"""
    clean: str = "When Mary and John went to the store, John gave a drink to"
    """the prompt"""
    corrupt: str | None = None
    """the corrupted prompt"""
    answer: tuple[str, ...] = ()
    """answer tokens, with their leading space"""
    foil: tuple[str, ...] = ()
    """foil tokens"""
    bos: bool | None = None
    """BOS in front; unset, what the model was trained with"""
    set: Path | None = None
    """a .jsonl prompt set, for means; its first prompt is used when neither --answer nor --corrupt is given and --clean is left alone"""
    do: tuple[str, ...] = ()
    """interventions such as L9H9=zero "L3.mlp@-1=scale:0.5" L5.resid_pre@S2=patch"""
    base: str = "clean"
    """which prompt the interventions act on: clean or corrupt"""
    metric: str = "logit_diff"
    pos: str = "END"
    """the metric's position: a number or a label"""
    dtype: str | None = None
    """auto, float32, bfloat16, float16"""
    device: str | None = None
    """auto, cpu, cuda, cuda:1, mps"""
    device_map: str | None = None
    json: bool = False
    """print the result as JSON, and nothing else"""

    def load(self) -> Load:
        env = settings()
        ask = {"dtype": self.dtype or env.get("LOUPE_DTYPE"), "device": self.device or env.get("LOUPE_DEVICE")}
        name = self.model or env.get("LOUPE_MODEL") or "zoo"
        return Load(name, self.base_model, **{k: v for k, v in ask.items() if v}, device_map=self.device_map or env.get("LOUPE_DEVICE_MAP") or None)

    def study(self) -> Study:
        prompts = read_prompt_set(self.set) if self.set else ()
        prompt = Prompt(self.clean, self.corrupt, self.answer, self.foil, bos=self.bos)
        if prompts and prompt == Prompt(Options.clean, bos=self.bos):
            prompt = prompts[0]
        pos = int(self.pos) if self.pos.lstrip("-").isdigit() else self.pos
        return Study(prompt, tuple(parse_intervention(d) for d in self.do), self.base, Metric(self.metric, pos), prompts)


@dataclass
class RunCommand(Options):
    """The likeliest next tokens and the metric for clean, corrupted and now."""

    k: int = 10

    def request(self) -> Run:
        return Run(self.study(), self.k)


@dataclass
class LensCommand(Options):
    """Logit lens at hook points x positions."""

    which: str = "now"
    points: tuple[str, ...] = ()
    k: int = 5

    def request(self) -> Lens:
        return Lens(self.study(), self.which, self.points, self.k)


@dataclass
class AttentionCommand(Options):
    """Attention patterns of one layer: where each head looks from the last position, or everything with --json."""

    layer: int = 0
    which: str = "now"

    def request(self) -> Attention:
        return Attention(self.study(), self.layer, self.which)


@dataclass
class HeadsCommand(Options):
    """Statistics of every head, on the prompt or on random repeated tokens (--source random)."""

    which: str = "now"
    source: str = "prompt"

    def request(self) -> HeadStats:
        return HeadStats(self.study(), self.which, self.source)


@dataclass
class CheckCommand(Options):
    """The identities on a model; exits with 1 when one is broken."""

    name: Annotated[str, tyro.conf.Positional] = ""
    corrupt: str | None = "When Mary and John went to the store, Alice gave a drink to"

    def load(self) -> Load:
        return replace(super().load(), model=self.name) if self.name else super().load()

    def request(self) -> Identities:
        return Identities(self.study())


@dataclass
class ServeCommand:
    """Answer requests on stdin and stdout, for tui.py."""


COMMANDS = {
    "run": RunCommand,
    "lens": LensCommand,
    "attention": AttentionCommand,
    "heads": HeadsCommand,
    "check": CheckCommand,
    "serve": ServeCommand,
}


# ------------------------------------------------------------------ tables


def plain(text: str, style: str = "") -> Text:
    """Text that is never read as markup."""
    return Text(text, style)


def table(title: str, *columns: str) -> Table:
    out = Table(title=plain(title, PURPLE) if title else None, title_justify="left", box=None, pad_edge=False)
    for c in columns:
        out.add_column(plain(c, GRAY), no_wrap=True, overflow="fold")
    return out


def show_run(out: Console, r: RunResult) -> None:
    sides = {"clean": r.clean, "corrupted": r.corrupt, "now": r.now}
    for name, s in sides.items():
        if s is None or name == "now" and s is r.clean:
            continue
        out.print(plain(f"{name}: {' '.join(show_token(x) for x in s.tokens.texts)}", PURPLE))
        rows = table("", "next token", "probability", "logit")
        for i, p, z in zip(s.top_ids[-1].tolist(), s.top_probs[-1].tolist(), s.top_logits[-1].tolist()):
            rows.add_row(plain(show_token(r.texts[i])), f"{p:.4f}", f"{z:.3f}")
        out.print(rows)
    values = [f"{n} {s.metric:.4f}" for n, s in sides.items() if s is not None and s.metric is not None]
    out.print(plain("  ".join(values) + ("" if r.normalised is None else f"  normalised {r.normalised:.4f}"), CYAN))
    if r.warning:
        out.print(plain(r.warning, YELLOW))
    out.print(plain(r.convention, GRAY))


def show_lens(out: Console, r: LensResult) -> None:
    answers = not np.isnan(r.prob).all()
    rows = table("the last position", "point", "top token", "probability", "answer", "rank", "entropy", "KL", "logit diff")
    for i, point in enumerate(r.points):
        values = [r.prob[i, -1], r.rank[i, -1]] if answers else [None, None]
        cells = [show_number(None if v is None else float(v)) for v in (*values, r.entropy[i, -1], r.kl[i, -1], r.logit_diff[i, -1])]
        rows.add_row(point, plain(show_token(r.texts[int(r.top_ids[i, -1, 0])])), f"{r.top_probs[i, -1, 0]:.4f}", *cells)
    out.print(rows)
    tops = table("top token at every position", "point", *(show_token(x, 8, fill=False) for x in r.tokens.texts))
    for i, point in enumerate(r.points):
        tops.add_row(point, *(plain(show_token(r.texts[int(j)], 8, fill=False)) for j in r.top_ids[i, :, 0]))
    out.print(tops)
    out.print(plain(r.convention, GRAY))


def show_attention(out: Console, r: AttentionResult) -> None:
    rows = table(f"layer {r.layer}: where each head looks from the last position ({r.which})", "head", *(show_token(x) for x in r.tokens.texts))
    for h, p in enumerate(r.pattern[:, -1]):
        best = int(np.abs(p).argmax())
        rows.add_row(f"L{r.layer}H{h}", *(plain(f"{v:.2f}", CYAN if j == best else "") for j, v in enumerate(p.tolist())))
    out.print(rows)
    out.print(plain(r.convention, GRAY))


def show_heads(out: Console, r: HeadStatsResult) -> None:
    layers, heads = next(iter(r.stats.values())).shape
    for name, values in r.stats.items():
        rows = table(name, "layer", *(f"H{h}" for h in range(heads)))
        for layer in range(layers):
            rows.add_row(f"L{layer}", *(show_number(float(v), 5) for v in values[layer]))
        out.print(rows)
    out.print(plain(r.convention, GRAY))


def show_identities(out: Console, r: IdentitiesResult) -> None:
    rows = table("identities", "", "identity", "error", "tolerance", "")
    for i in r.rows:
        mark, style = {True: ("ok", GREEN), False: ("BROKEN", RED), None: ("n/a", GRAY)}[i.ok]
        rows.add_row(plain(mark, style), plain(i.name), show_number(i.error, 7), show_number(i.tolerance, 7), plain(i.note, GRAY))
    out.print(rows)
    out.print(plain(r.convention, GRAY))


SHOW: dict[type, Callable] = {
    RunResult: show_run,
    LensResult: show_lens,
    AttentionResult: show_attention,
    HeadStatsResult: show_heads,
    IdentitiesResult: show_identities,
}


def main(args: list[str] | None = None) -> int:
    """0, or 1 when an identity is broken, or 2 for input that can't be used."""
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="engine.py", description="Loupe without a screen.", args=args)
    if isinstance(command, ServeCommand):
        serve()
    errors = Console(stderr=True, highlight=False)
    show = lambda p: errors.print(plain(p.text, GRAY)) if isinstance(p, Progress) and p.text and errors.is_terminal else None  # noqa: E731
    try:
        request = command.request()
        engine = Engine()
        info = engine.run(command.load(), show)
        result = engine.run(request)
    except UserError as error:
        errors.print(plain(str(error), RED), soft_wrap=True)
        return 2
    if command.json:
        sys.stdout.write(json.dumps(to_json(result), ensure_ascii=False, allow_nan=False) + "\n")
    else:
        out = Console(highlight=False)
        out.width = out.width if out.is_terminal else 10_000
        device = f"{info.dtype} on {info.device}"
        out.print(plain(f"{info.name}: {info.architecture}, {info.n_layers} layers x {info.n_heads} heads, d_model {info.d_model}, {device}", GRAY))
        SHOW[type(result)](out, result)
    broken = [i for i in (*info.checks, *(result.rows if isinstance(result, IdentitiesResult) else ())) if i.ok is False]
    for i in broken:
        errors.print(plain(f"identity broken: {i.name}, error {i.error:.2g} against {i.tolerance:.2g}. {i.note}", RED), soft_wrap=True)
    return 1 if broken and isinstance(result, IdentitiesResult) else 0
