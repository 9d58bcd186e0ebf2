"""The command line of this room: generate."""

from dataclasses import dataclass

from rich.console import Console

from techniques.generation.requests import (
    Continued, Curve, CurveResult, Direction, Directions, DirectionsResult, Generate, GenerateResult, MakeDirection, Sampling,
)  # fmt: skip
from techniques.shell import CYAN, DO, GRAY, METRIC, PURPLE, YELLOW, options, plain, table
from utils import show_token


@dataclass
class GenerateCommand(options(Generate, Sampling, hide=("how",), unused=METRIC)):
    """Continue the prompt without and with the interventions, token by token: greedy, or drawn at a temperature."""

    def request(self) -> Generate:
        return Generate(self.study(), self.ask(Sampling))


@dataclass
class DirectionCommand(options(MakeDirection, unused=METRIC + DO)):
    """Make a direction to steer along and keep it under directions/: from prompts, a set, a feature, a head, a file. Then --do L8.resid_post=steer:NAME:2."""


@dataclass
class DirectionsCommand(options(Directions)):
    """The kept directions that fit the model."""


@dataclass
class SteerCurveCommand(options(Curve)):
    """The metric at each coefficient of a steering intervention (--do L8.resid_post=steer:NAME:2)."""


COMMANDS = {"generate": GenerateCommand, "direction": DirectionCommand, "directions": DirectionsCommand, "steer-curve": SteerCurveCommand}


# ------------------------------------------------------------------ tables


def show_run(out: Console, run: Continued, r: GenerateResult) -> None:
    share = "" if run.share is None else f"  share with the text: {run.share:.3f} of {len(run.samples)}"
    out.print(plain(f"{run.run}{share}", PURPLE))
    for n, s in enumerate(run.samples):
        parted = f"  parts at token {s.parted}" if s.parted >= 0 else ""
        out.print(plain(f"{n}: {s.text!r}{parted}", CYAN))
        if len(run.samples) == 1:
            rows = table("", "token", "probability", "likeliest")
            for i, p, ids, probs in zip(s.ids, s.probs.tolist(), s.top_ids.tolist(), s.top_probs.tolist()):
                best = "  ".join(f"{show_token(r.texts[j], fill=False)} {q:.3f}" for j, q in zip(ids[:3], probs))
                rows.add_row(plain(show_token(r.texts[i])), f"{p:.4f}", plain(best))
            out.print(rows)


def show_generated(out: Console, r: GenerateResult) -> None:
    for run in r.runs:
        show_run(out, run, r)
    out.print(plain(r.convention, GRAY))


def show_direction(out: Console, d: Direction) -> None:
    out.print(plain(f"{d.name}  length {d.norm:.4g}, at {d.at or 'no hook point'}: {d.words}", CYAN))
    out.print(plain(f"{d.path}; steer with --do {d.at or 'L0.resid_post'}=steer:{d.name}:1", GRAY))


def show_directions(out: Console, r: DirectionsResult) -> None:
    rows = table("", "name", "at", "length", "what it is", "model")
    for d in r.some:
        rows.add_row(plain(d.name), d.at, f"{d.norm:.4g}", plain(d.words), plain(d.model))
    out.print(rows)
    for text in r.wrong:
        out.print(plain(text, YELLOW))


def show_curve(out: Console, r: CurveResult) -> None:
    rows = table("", "coefficient", "metric")
    for c, v in zip(r.coefficients.tolist(), r.values.tolist()):
        rows.add_row(f"{c:g}", f"{v:+.4f}")
    out.print(rows)
    out.print(plain(r.convention, GRAY))


SHOW = {GenerateResult: show_generated, Direction: show_direction, DirectionsResult: show_directions, CurveResult: show_curve}
