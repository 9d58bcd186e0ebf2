"""The command line of this room: run."""

from dataclasses import dataclass

from rich.console import Console

from techniques.output.requests import Run, RunResult
from techniques.shell import CYAN, GRAY, PURPLE, YELLOW, options, plain, table
from utils import show_token


@dataclass
class RunCommand(options(Run)):
    """The likeliest next tokens and the metric for clean, corrupted and now."""


COMMANDS = {"run": RunCommand}


# ------------------------------------------------------------------ tables


def show_run(out: Console, r: RunResult) -> None:
    sides = {r.names[0]: r.clean, r.names[1]: r.corrupt, "now": r.now}
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
    if r.floor == r.floor:
        small = ", which is below it" if r.noise else ""
        out.print(plain(f"changed by {r.change:+.4f} against a noise floor of {r.floor:.2g}{small}", YELLOW if r.noise else GRAY))
    if r.warning:
        out.print(plain(r.warning, YELLOW))
    out.print(plain(r.convention, GRAY))


SHOW = {RunResult: show_run}
