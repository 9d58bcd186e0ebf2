"""The command line of this room: generate."""

from dataclasses import dataclass

from rich.console import Console

from techniques.generation.requests import Continued, Generate, GenerateResult, Sampling
from techniques.shell import CYAN, GRAY, PURPLE, options, plain, table
from utils import show_token


@dataclass
class GenerateCommand(options(Generate, Sampling, hide=("how",), unused=("metric", "pos"))):
    """Continue the prompt without and with the interventions, token by token: greedy, or drawn at a temperature."""

    def request(self) -> Generate:
        return Generate(self.study(), self.ask(Sampling))


COMMANDS = {"generate": GenerateCommand}


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


SHOW = {GenerateResult: show_generated}
