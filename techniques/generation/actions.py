"""What pane 8's own keys do: the grown prompt as the prompt, how it is continued, on what the interventions are held. Each takes the pane and the app."""

from dataclasses import replace

from screen.actions import accepted
from screen.overlays import Editor
from screen.pane import Host, Pane
from techniques.generation.requests import HELD, GenerateResult
from vocabulary.chat import grown
from vocabulary.nodes import UserError
from vocabulary.typed import whole_number
from widgets import GOOD

LABELS = {"temperature": "temp.", "top_p": "top-p"}
WHOLE, NUMBERS = ("tokens", "samples", "seed"), ("temperature", "top_p")


def send_back(pane: Pane, app: Host) -> None:
    """The prompt and the new tokens up to the cursor's become the prompt; the corrupted prompt grows by the same text."""
    result = app.requests.result("generate", GenerateResult)
    if result is None:
        raise UserError("nothing is continued yet")
    run, sample, token = pane.at(result)
    s = result.runs[run].samples[sample]
    if not token < len(s.ids):
        raise UserError("there is no new token under the cursor")
    more, p = s.text[: s.ends[token]], app.state.prompt
    pane.expected = (*result.runs[run].tokens.ids, *s.ids[: token + 1])
    app.act("prompt", prompt=replace(p, clean=grown(p.clean, more), corrupt=None if p.corrupt is None else grown(p.corrupt, more)))
    app.say(f"the prompt has grown by {token + 1} token{'s' * (token > 0)}: t names an answer, u takes it back", GOOD)


def turn_held(pane: Pane, app: Host) -> None:
    held = "prompt" if app.state.generation.held == "all" else "all"
    app.act("generation", held=held)
    app.say(HELD[held])


def draw_anew(pane: Pane, app: Host) -> None:
    how = app.state.generation
    if how.temperature == 0:
        raise UserError("greedy: every draw is the same; b sets a temperature")
    app.act("generation", seed=how.seed + 1)
    app.say(f"seed {how.seed + 1}")


def edit_sampling(pane: Pane, app: Host) -> None:
    """Tokens, temperature, top-p, seed, samples, the text to look for, the other prompt."""
    how = app.state.generation
    names = ("tokens", "temperature", "top_p", "seed", "samples", "contains", "other")
    shown = lambda v: ("on" if v else "off") if isinstance(v, bool) else v if isinstance(v, str) else f"{v:.9g}"  # noqa: E731
    fields = [(LABELS.get(name, name), shown(getattr(how, name))) for name in names]
    hint = "temp. 0: greedy · contains: its share is told · other: on, the other prompt too"
    app.open(Editor("how the prompt is continued", fields, accepted(lambda values: put(app, dict(zip(names, values)))), 0, 1, hint))


def put(app: Host, values: dict[str, str]) -> str:
    """Take what was typed; the line that says what is wrong, or ""."""
    found: dict[str, object] = {"contains": values["contains"]}
    for name in WHOLE:
        if (number := whole_number(values[name].strip())) is None:
            return f"{name}: {values[name]!r} is not a whole number"
        found[name] = number
    for name in NUMBERS:
        try:
            found[name] = float(values[name])
        except ValueError:
            return f"{name}: {values[name]!r} is not a number"
    if values["other"].strip() not in ("on", "off"):
        return "other: write on or off"
    found["other"] = values["other"].strip() == "on"
    if found["other"] and not app.state.compares:
        return "other: there is no other run to continue: E types a corrupted prompt"
    app.act("generation", **found)
    return ""
