"""What the keys do to prompts: edit them, choose the metric, open and step through a set, align two of unequal length."""

import ast
import time
from dataclasses import replace
from pathlib import Path

from vocabulary.alignment import check_pairs
from vocabulary.chat import as_typed, read_typed
from vocabulary.chosen import choose, pinned
from vocabulary.typed import read_text, user_path, whole_number
from vocabulary.nodes import UserError
from techniques.sets.requests import MAKES, MakeSet, SetResult
from vocabulary.files import folder, short, write_text
from vocabulary.prompts import ALIGNMENTS, Metric, METRICS, Prompt, line_of, read_place, read_prompt_set
from vocabulary.requests import Check, CheckResult
from screen.actions import turn
from screen.overlays import Editor, Item, Picker, wrapped
from screen.pane import Host
from screen.template import folded
from screen.top import token_line
from utils import ROOT, settings, show_token, visible
from widgets import BAD, DIM, GOOD, PLAIN, WARN, Spans

TURNS = "\\nsystem: \\nuser: \\nassistant: begin a turn; a last assistant: begins the answer · ctrl+t ids"


def edit(app: Host, focus: int = 0) -> None:
    app.open(PromptEditor(app, focus))


class PromptEditor(Editor):
    """Clean, corrupted, answer and foil; below them their tokens as one types. A prompt that the model can't take is refused."""

    def __init__(self, app: Host, focus: int):
        p = app.state.prompt
        self.chats = isinstance(p.clean, tuple), isinstance(p.clean if p.corrupt is None else p.corrupt, tuple)
        fields = [("clean", as_typed(p.clean)), ("corrupted", as_typed(p.corrupt or "")), ("answer", "|".join(p.answers)), ("foil", "|".join(p.foils))]
        hint = "| between several answers · \\n newline · ctrl+t ids"
        super().__init__("chat" if self.chats[0] else "prompt", fields, self.accept_prompt, focus, 7, TURNS if any(self.chats) else hint)
        self.host = app
        self.checked: tuple[Prompt, CheckResult] | None = None

    def prompt(self) -> Prompt:
        clean, corrupt, answers, foils = self.values()
        clean, corrupt = (read_typed(text) if chat and text else text for text, chat in zip((clean, corrupt), self.chats))
        p = self.host.state.prompt
        split = lambda text: tuple(part for part in text.split("|") if part)  # noqa: E731
        return Prompt(clean, corrupt or None, split(answers), split(foils), p.labels if clean == p.clean else (), p.bos)

    def accept_prompt(self, values: list[str]) -> str:
        try:
            prompt = self.prompt()
        except UserError as error:
            return str(error)
        if not prompt.clean:
            return "an empty prompt: type a text"
        if self.checked and self.checked[0] == prompt and self.checked[1].problems:
            return self.checked[1].problems[0]
        if prompt != self.host.state.prompt:
            self.host.act("prompt", prompt=prompt)
        return ""

    def edited(self) -> None:
        if not self.host.info:
            return
        failed = lambda error: self.preview.show([[(f" {visible(str(error))}", BAD)]])  # noqa: E731
        try:
            prompt = self.prompt()
        except UserError as error:
            failed(error)
            return
        self.host.requests.ask("edit", Check(prompt), lambda check: self.show_tokens(prompt, check), 0, failed=failed)

    def show_tokens(self, prompt: Prompt, check: CheckResult) -> None:
        self.checked = (prompt, check)
        ids, w = self.ids, self.host.size.width
        fold = lambda r: frozenset() if ids else frozenset(r.template) - {len(r.ids) - 1}  # noqa: E731
        row = lambda name, r: token_line(name, r, -1, w, frozenset(), ids, True, faded=frozenset(r.template), folded=fold(r))  # noqa: E731
        lines = [row(f"{len(check.clean.ids)} tokens", check.clean)]
        lines.append(row(f"{len(check.corrupt.ids)} tokens", check.corrupt) if check.corrupt else [])
        for name, rows in (("answer", check.answers), ("foil", check.foils)):
            spans: Spans = [(f" {name:9}  ", DIM)]
            for r in rows:
                spans += [
                    (
                        " ".join(show_token(t) + (f":{i}" if ids else "") for t, i in zip(r.texts, r.ids)),
                        GOOD if len(r.ids) == 1 else BAD if check.problems else WARN,
                    ),
                    ("  ", PLAIN),
                ]
            lines.append(spans)
        said = [[(f" {visible(p)}", BAD)] for p in check.problems] + [[(f" {visible(h)}", WARN)] for h in check.hints]
        lines += [line for row in said for line in wrapped(row, w)]
        self.preview.show(lines[:7])


def toggle_bos(app: Host) -> None:
    """BOS in front of the prompt and its set, or not; back to what the tokenizer does by itself where that is the same."""
    app.ready()
    check, info = app.requests.check(), app.info
    if not info.bos:
        raise UserError(f"{info.bos_habit}, and none can be put in front")
    if check is None:
        raise UserError("the prompt is being read: press < again")
    if isinstance(app.state.prompt.clean, tuple):
        raise UserError(f"a chat is asked {'with' if check.clean.bos else 'without'} BOS, as its template has it: > makes plain text of it")
    if app.state.prompt.clean.startswith(info.bos):
        raise UserError(f"the text starts with {info.bos} itself: e takes it out")
    on = not check.clean.bos
    app.act("bos", value=None if on == info.default_bos else on)
    asked = "put in front" if on else "left out"
    app.say(info.bos_habit if on == info.default_bos else f"BOS is {asked}; by itself the model has {info.bos_habit}")


def turn_chat(app: Host) -> None:
    """The prompt and its set as what a user says to the model, or as plain text again."""
    app.ready()
    before = app.state.prompt.clean
    on = isinstance(before, str)
    if on and not app.info.chat_template:
        raise UserError("this model's tokenizer has no chat template, so it can't be asked in turns: put a chat_template.jinja into its folder")
    app.act("chat", value=on)
    if on:
        app.say(
            "the prompt is what a user says, as this model's chat template writes it: e adds turns, t the answer (often without a leading space), \\ dims the template"
        )
    elif len(before) > 1:
        app.say("plain text: what the user says last; the other turns are gone, u brings them back", WARN)
    else:
        app.say("plain text again")


def turn_template(app: Host) -> None:
    """The chat template's tokens as all others, dim, or folded away."""
    app.ready()
    row = app.tokens.tokens if app.tokens else None
    if row is None or not row.template:
        raise UserError("no token of this prompt is a chat template's: > asks it as a chat")
    turn(app, "template")
    app.move(pos=app.cursor.pos, src=app.cursor.src)
    of = f"{len(row.template)} of {len(row.ids)} tokens are the chat template's"
    how = {"shown": "shown as all others", "dim": "dim"}.get(app.state.views["template"], "")
    app.say(f"{of}: {how or f'{len(folded(app.state, row))} are folded away; labels, END and where the metric is read stay'}")


# ------------------------------------------------------------------ alignment


def align(app: Host) -> None:
    """How positions stand against each other: seen, chosen, edited."""
    app.ready()
    check, s = app.requests.check(), app.state
    if app.state.model.against:
        raise UserError("both models read the same tokens: nothing is to be aligned (M goes back to the corrupted prompt)")
    if check is None or check.corrupt is None:
        raise UserError("an alignment is between two prompts, and there is no corrupted prompt: E types one, o opens a set")
    now = "by hand" if s.prompt.alignment else s.align or "position by position"
    items = [Item(how or "none", what, "now" if how == s.align and not s.prompt.alignment else "", how) for how, what in ALIGNMENTS.items()]
    items.append(Item("edit", f"the pairs by hand (now {now})", "", "edit"))
    here, there = check.clean.texts, check.corrupt.texts
    items += [Item(f"{a} ↔ {b}", f"{show_token(here[a], 14)} ↔ {show_token(there[b], 14)}", "", "edit") for a, b in check.alignment]
    alone = [f"{i} {show_token(here[i], 12, fill=False)}" for i in sorted(set(range(len(here))) - {a for a, _ in check.alignment})]
    if alone and check.alignment:
        items.append(Item("alone", f"without a partner: {' '.join(alone)}", "", "edit"))

    def chosen(item: Item | None, typed: str) -> None:
        if item is not None and item.value == "edit":
            edit_alignment(app, check)
            return
        how = item.value if item else typed.strip()
        if s.prompt.alignment:
            app.act("prompt", prompt=replace(s.prompt, alignment=()))
        app.act("align", how=how)
        app.say(f"alignment: {ALIGNMENTS[app.state.align]}")

    app.open(Picker(f"alignment: {now}, {len(check.alignment)} pairs", items, chosen))


def edit_alignment(app: Host, check: CheckResult) -> None:
    def accept(values: list[str]) -> str:
        pairs = tuple(tuple(map(whole_number, pair.split("-"))) for pair in values[0].split())
        if not all(len(p) == 2 and None not in p for p in pairs):
            return "write pairs of positions, clean-corrupted: 0-0 1-1 4-6"
        check_pairs(pairs, len(check.clean.texts), len(check.corrupt.texts))
        app.act("prompt", prompt=replace(app.state.prompt, alignment=pairs))
        return ""

    text = " ".join(f"{a}-{b}" for a, b in check.alignment)
    app.open(Editor("alignment", [("pairs", text)], accept, 0, 1, "clean-corrupted", True))


# ------------------------------------------------------------------ sets and metrics


def open_set(app: Host) -> None:
    files = sorted((ROOT / "zoo" / "prompts").glob("*.jsonl")) + sorted(Path.cwd().glob("*.jsonl"))
    items = [Item(f.stem, str(f.relative_to(ROOT) if f.is_relative_to(ROOT) else f), "", f) for f in files]
    items += [Item(f"make {name}", what, "", MakeSet(name)) for name, what in MAKES.items()]

    def chosen(item: Item | None, typed: str) -> None:
        if item is not None and isinstance(item.value, MakeSet):
            make(app, item.value)
        else:
            open_file(app, item.value if item else Path(typed))

    app.open(Picker("prompt set: open a file, or make one in this model's words", items, chosen, free=True))


def make(app: Host, request: MakeSet) -> None:
    """A set made for this model, written beside the exports and opened."""
    app.ready()

    def made(result: SetResult) -> None:
        path = folder("exports") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-set-{result.make}.jsonl"
        write_text(path, "".join(map(line_of, result.prompts)))
        app.act("open_set", path=str(path), prompts=result.prompts, index=0)
        app.say(f"{result.summary}; written to {short(path)}", GOOD)

    app.requests.ask("set", request, made)


def look_through(app: Host, name: str, prompts: tuple[Prompt, ...]) -> None:
    """What of an opened set does not fit this model is listed, each line with its reason."""

    def seen(result: SetResult) -> None:
        if not result.left:
            return
        items = [Item(f"line {i + 1}", reason, "", i) for i, reason in result.left]
        title = f"{len(result.left)} of {len(prompts)} prompts of {name} do not fit {app.info.name} and are left out of what runs over the set"
        app.open(Picker(title, items, lambda item, typed: item and app.act("go", index=item.value)))

    if app.info is not None:
        app.requests.ask("set", MakeSet(name, measured=False, prompts=prompts), seen)


def open_file(app: Host, path: Path) -> None:
    prompts = read_prompt_set(path)
    app.act("open_set", path=str(path), prompts=prompts, index=0)
    app.say(f"{len(prompts)} prompts of {path.name}: ( and ) step through them; mean ablation averages over their corrupted prompts", GOOD)
    look_through(app, path.name, prompts)


def next_prompt(app: Host, by: int = 1) -> None:
    if not app.state.prompt_set:
        raise UserError("no prompt set is open: o opens one")
    app.act("go", index=(app.state.index + by) % len(app.state.prompt_set))


def choose_metric(app: Host) -> None:
    items = [Item(k, v) for k, v in METRICS.items() if k != "own"] + own_metrics(settings().get("LOUPE_METRICS", "").strip())

    def chosen(item: Item | None, typed: str) -> None:
        own = item.value if item else typed.strip() if ".py:" in typed else None
        if own:
            take_own(app, own)
            return
        kind, _, pos = (typed if "@" in typed else item.key if item else typed).partition("@")
        app.act("metric", kind=item.key if item and not pos else kind, pos=read_place(pos.strip() or "END"))

    app.open(Picker("metric (type kind@position for another position: prob@-2; or FILE.py:NAME, a function of your own)", items, chosen, free=True))


def own_metrics(file: str) -> list[Item]:
    """The functions of LOUPE_METRICS, read and not run; what is wrong with the file."""
    if not file:
        return []
    try:
        body = ast.parse(read_text(user_path(file))).body
    except (UserError, SyntaxError) as error:
        return [Item("LOUPE_METRICS", f"{file}: {error}")]
    some = [f for f in body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_") and len(f.args.args) == 2]
    return [Item(f.name, (ast.get_docstring(f) or "of your own").split("\n")[0], file, f"{file}:{f.name}") for f in some]


def take_own(app: Host, own: str) -> None:
    """A metric of one's own, pinned to its file as it is now: where the file lies with the engine on another machine, that one reads it."""
    path = user_path(own.rpartition(":")[0]).resolve()
    if not path.is_file() and not getattr(app.client, "via", ""):
        raise UserError(f"there is no file {path}: a metric of your own is named as FILE.py:NAME")
    metric = pinned(Metric("own", own=own))
    choose(metric)
    app.act("metric", kind="own", own=metric.own, digest=metric.digest)
