"""
What lasts: the state of a hunt, the actions that change it, and the session file (one JSON object a line) from which undo, redo and resume work.

1. `State` is immutable; `apply(state, name, args)` is the one function that changes it, and knows every kind of action.
2. `Session.do` checks an action, appends it to the file (vocabulary/log.py), and applies it; undo and redo are lines of the file too.
3. Reading a file back folds its lines; one that can't be used is left out and said, and the file itself is left as it is.
"""

import dataclasses
import datetime
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from techniques.generation.requests import Sampling
from techniques.graphs.requests import GraphMarks
from vocabulary.chosen import is_chosen
from vocabulary.circuit import Circuit, LOGITS
from vocabulary.files import reason, typed_path
from vocabulary.nodes import ABLATIONS, FROM_SET, Intervention, parse_intervention, UserError
from vocabulary.prompts import ALIGNMENTS, as_chat, Metric, METRICS, Prompt, read_place, ReferenceText, RUNS, Study, WHICH
from vocabulary.requests import Load
from vocabulary.typed import one_of
from vocabulary.wire import changed_fits, fits, from_json, to_json
from screen import circuit_steps as circuits, compared, graph_steps, history
from screen.record import Record, Step
from vocabulary.log import encoded, FORMAT, Line, Log, new_path, read_lines, said
from vocabulary.results import digest, Kept

VIEWS = {"mode": ("colour", "number", "cells", "blocks", "shade"), "which": WHICH, "ids": ("off", "on"), "template": ("shown", "dim", "fold")}


def add_views(views: dict[str, tuple[str, ...]]) -> None:
    """A pane's views and their values, the first of which is shown first; before those of all prompts."""
    last = {name: VIEWS.pop(name) for name in ("which", "ids", "template")}
    VIEWS.update(views | last)


@dataclass(frozen=True)
class State:
    """Everything that a session restores. `views` hold what the panes show; keys and values are those of VIEWS."""

    model: Load = Load()
    prompt: Prompt = Prompt("When Mary and John went to the store, John gave a drink to", None, (" Mary",), (" John",))
    set_path: str = ""
    prompt_set: tuple[Prompt, ...] = ()
    index: int = 0
    metric: Metric = Metric()
    base: str = "clean"
    interventions: tuple[Intervention, ...] = ()
    enabled: bool = True
    ablation: str = "zero"
    lens: str = "logit"
    artefact: str = ""
    circuits: tuple[Circuit, ...] = ()
    circuit: str = ""  # the name of the current one
    receivers: tuple[str, ...] = (LOGITS,)  # of path patching
    senders: tuple[str, ...] = ()  # together, to each receiver; none: the node under the cursor
    saes: tuple[str, ...] = ()
    sae: str = ""  # the one that pane 6 shows
    sae_error: bool = True
    align: str = ""
    generation: Sampling = Sampling()
    text: ReferenceText = ReferenceText()  # that means are taken over
    graph: str = ""  # the file whose graph pane ` shows; none: the prompt's own
    transcoders: tuple[str, ...] = ()  # of the prompt's own; none: those that are loaded, else the zoo's
    marks: tuple[GraphMarks, ...] = ()
    views: dict[str, str] = field(default_factory=lambda: {k: v[0] for k, v in VIEWS.items()})

    @property
    def study(self) -> Study:
        """What analyses run on. The set travels only when a mean or another of its prompts is needed."""
        active = self.interventions if self.enabled else ()
        some = self.prompt_set if any(i.op in FROM_SET for i in active) else ()
        metric = self.metric if is_chosen(self.metric) else Metric()
        study = Study(self.prompt, active, self.base, metric, some, align=self.align, against=self.model.against, text=self.text)
        return self.with_saes(study) if any(i.node.site == "sae" for i in active) else study

    def with_saes(self, study: Study) -> Study:
        """With the loaded SAEs, for what speaks of their features; the rest does not depend on what is loaded."""
        return dataclasses.replace(study, saes=self.saes, sae_error=self.sae_error)

    @property
    def members(self) -> tuple[Prompt, ...]:
        """What "over the set" means: the prompts of the open set, while the prompt is one of them; one that was typed has left it."""
        text = lambda p: (p.clean, p.corrupt, p.answers, p.foils)  # noqa: E731
        return self.prompt_set if text(self.prompt) in map(text, self.prompt_set) else ()

    @property
    def compares(self) -> bool:
        """Whether there is another run to compare with and to patch from."""
        return self.prompt.corrupt is not None or bool(self.model.against)

    @property
    def current(self) -> Circuit | None:
        return next((c for c in self.circuits if c.name == self.circuit), None)


def model(state: State, load: dict) -> State:
    return dataclasses.replace(state, model=from_json(load, Load), interventions=(), saes=(), sae="", transcoders=())


def prompt(state: State, prompt: dict) -> State:
    return dataclasses.replace(state, prompt=from_json(prompt, Prompt))


def bos(state: State, value: bool | None) -> State:
    """Whether BOS comes before the prompt and all of the set; None: what the model's tokenizer does by itself."""
    of = lambda p: dataclasses.replace(p, bos=value) if isinstance(p.clean, str) else p  # noqa: E731  a chat's BOS is its template's
    return dataclasses.replace(state, prompt=of(state.prompt), prompt_set=tuple(map(of, state.prompt_set)))


def chat(state: State, value: bool) -> State:
    """The prompt and all of the set as chats, or as plain text."""
    prompts = tuple(as_chat(p, bool(value)) for p in state.prompt_set)
    return dataclasses.replace(state, prompt=as_chat(state.prompt, bool(value)), prompt_set=prompts)


def open_set(state: State, path: str, prompts: list | tuple[Prompt, ...], index: int = 0) -> State:
    prompts = prompts if isinstance(prompts, tuple) else from_json(prompts, tuple[Prompt, ...])
    return go(dataclasses.replace(state, set_path=path, prompt_set=prompts, align=""), index)


def go(state: State, index: int) -> State:
    if not 0 <= index < len(state.prompt_set):
        raise UserError(f"no prompt {index + 1} in a set of {len(state.prompt_set)}")
    return dataclasses.replace(state, index=index, prompt=state.prompt_set[index])


def metric(state: State, kind: str, pos: int | str = "END", own: str = "", digest: str = "") -> State:
    return dataclasses.replace(state, metric=Metric(one_of(kind, METRICS, "metric"), read_place(str(pos)), own, digest))


def base(state: State, value: str) -> State:
    return dataclasses.replace(state, base=one_of(value, RUNS[1:], "base"))


def intervene(state: State, intervention: str) -> State:
    """Add an intervention; one on the same node is replaced."""
    new = parse_intervention(intervention)
    kept = tuple(i for i in state.interventions if i.node != new.node)
    return dataclasses.replace(state, interventions=(*kept, new), enabled=True)


def drop(state: State, intervention: str) -> State:
    gone = parse_intervention(intervention)
    return dataclasses.replace(state, interventions=tuple(i for i in state.interventions if i != gone))


def clear(state: State) -> State:
    return dataclasses.replace(state, interventions=())


def enable(state: State, value: bool) -> State:
    return dataclasses.replace(state, enabled=bool(value))


def ablation(state: State, kind: str) -> State:
    return dataclasses.replace(state, ablation=one_of(kind, ABLATIONS, "ablation"))


def lens(state: State, kind: str, artefact: str = "") -> State:
    return dataclasses.replace(state, lens=one_of(kind, ("logit", "tuned", "jacobian"), "lens"), artefact=artefact)


def view(state: State, name: str, value: str) -> State:
    one_of(name, VIEWS, "view")
    return dataclasses.replace(state, views={**state.views, name: one_of(value, VIEWS[name], name)})


def saes(state: State, sources: list) -> State:
    """The SAEs in use, one a layer; what acted on features of others goes with them."""
    some = tuple(str(s) for s in sources)
    kept = tuple(i for i in state.interventions if i.node.site != "sae") if set(state.saes) - set(some) else state.interventions
    new = [s for s in some if s not in state.saes]
    return dataclasses.replace(state, saes=some, interventions=kept, sae=new[-1] if new else state.sae if state.sae in some else some[-1] if some else "")


def align(state: State, how: str) -> State:
    """How positions of clean and corrupted prompts of unequal length stand against each other."""
    return dataclasses.replace(state, align=one_of(how, ALIGNMENTS, "alignment") if how else "")


def generation(state: State, **how: object) -> State:
    return dataclasses.replace(state, generation=state.generation.changed(**how))


def text(state: State, path: str, tokens: int = ReferenceText.tokens, digest: str = "") -> State:
    return dataclasses.replace(state, text=ReferenceText(path, tokens, digest))


def show_sae(state: State, source: str) -> State:
    return dataclasses.replace(state, sae=one_of(source, state.saes, "SAE"))


def sae_error(state: State, value: bool) -> State:
    return dataclasses.replace(state, sae_error=bool(value))


ACTIONS: dict[str, Callable[..., State]] = {
    f.__name__: f
    for f in (
        model,
        prompt,
        bos,
        chat,
        open_set,
        go,
        metric,
        base,
        intervene,
        drop,
        clear,
        enable,
        ablation,
        lens,
        view,
        circuits.new_circuit,
        circuits.put_circuit,
        circuits.select_circuit,
        circuits.rename_circuit,
        circuits.delete_circuit,
        circuits.keep,
        circuits.receivers,
        circuits.senders,
        circuits.group,
        circuits.combine,
        saes,
        show_sae,
        align,
        generation,
        text,
        sae_error,
        *compared.ACTIONS,
        *graph_steps.ACTIONS,
        history.jump,
    )
}


def apply(state: State, name: str, args: dict) -> State:
    """The state after an action. UserError for an unknown action or arguments that do not fit it."""
    if name not in ACTIONS:
        raise UserError(f"unknown action {name!r}")
    try:
        return ACTIONS[name](state, **args)
    except (TypeError, AttributeError, ValueError, LookupError, OverflowError, RecursionError) as error:
        raise UserError(f"action {name}: {reason(error)}") from error


def read_set(prompts: object) -> tuple[Prompt, ...]:
    """A prompt set from its JSON."""
    some = from_json(prompts, tuple[Prompt, ...])
    fits(some, tuple[Prompt, ...], "prompt set")
    return some


class Session:
    """A state with its history and its file, which the first action creates. `trouble` is what there is to say of the file: not saved, or a copy; `name` what the user calls it."""

    def __init__(self, state: State, path: Path | None = None):
        self.state = self.start = state
        self.past: list[tuple[State, str]] = []
        self.future: list[tuple[State, str]] = []
        self.sets: dict[str, tuple[Prompt, ...]] = {}  # by the digest that lines name them with
        self.apart = True  # whether views are undone apart from work: not in files of before
        self.kept: set[str] = set()  # digests of those that the file holds
        self.log, self.actions, self.trouble, self.name = Log(path or new_path()), 0, "", ""
        self.folders: dict[str, dict] = {}  # of scattered jobs, each with how it was started
        self.record = Record(self)

    @property
    def path(self) -> Path:
        return self.log.path

    @property
    def written(self) -> bool:
        return self.log.saved > 0

    # -------------------------------------------------------------- lines

    def refer(self, args: dict, name: str = "prompts") -> dict:
        """Arguments with their prompt set as its digest, by which the session knows it from then on. UserError for what is no set."""
        prompts = args.get(name)
        if not isinstance(prompts, list) or not prompts:
            return args
        key = digest(prompts)
        if key not in self.sets:
            self.sets[key] = read_set(prompts)
        return args | {name: key}

    def keep(self, actions: list[dict]) -> None:
        """Put actions and results into the log, which is not yet the disk: before them the header where there is none, and the sets they name that it does not hold."""
        entries = []
        if not self.log.lines:
            start = to_json(self.start)
            entries.append({"loupe": FORMAT, "start": self.refer(start, "prompt_set")})
        needed = [e["start"]["prompt_set"] for e in entries] + [(a.get("args") or a.get("is") or {}).get(k) for a in actions for k in ("prompts", "prompt_set")]
        new = list(dict.fromkeys(d for d in needed if isinstance(d, str) and d in self.sets and d not in self.kept))
        entries += [{"set": name, "prompts": to_json(self.sets[name])} for name in new]
        self.log.lines += [encoded({"n": len(self.log.lines) + i, **entry}) for i, entry in enumerate(entries + actions)]
        self.actions += sum("do" in a for a in actions)
        self.kept.update(new)

    # -------------------------------------------------------------- steps

    def next_state(self, name: str, args: dict) -> State:
        """The state after an action, or after `undo` and `redo`; UserError when there is none."""
        if name in ("undo", "redo"):
            return history.taken_back(self.state, self.past if name == "undo" else self.future, args.get("of", ""), name)[0]
        if isinstance(args.get("prompts"), str):
            if args["prompts"] not in self.sets:
                raise UserError("its prompt set is missing")
            args = args | {"prompts": self.sets[args["prompts"]]}
        if name in ("name", "note", "scattered"):
            return self.state
        new = apply(self.state, name, args)
        changed_fits(new, self.state, ("prompt_set",))  # sets: `refer`
        return new

    def advance(self, name: str, args: dict, new: State) -> None:
        if name in ("undo", "redo"):
            source, target = (self.past, self.future) if name == "undo" else (self.future, self.past)
            _, done, source[:] = history.taken_back(self.state, source, args.get("of", ""), name)
            target.append((self.state, done))
            self.apart = bool(args.get("of"))
        elif name == "name":  # of the session, not of what it does
            self.name = str(args.get("text", ""))
        elif name == "scattered":
            how, folder = args.get("how"), str(args.get("folder", ""))
            self.folders = {f: h for f, h in self.folders.items() if f != folder} | ({folder: how} if isinstance(how, dict) else {})
        elif name != "note":
            self.past.append((self.state, name))
            self.future = [step for step in self.future if step[1] != name] if name == history.VIEW and self.apart else []
        self.state = new

    def step(self, name: str, args: dict, time: str = "") -> None:
        new = self.next_state(name, args)
        self.record.steps.append(Step(time, name, args, self.state, new))
        self.advance(name, args, new)

    def do(self, name: str, /, **args: object) -> State:
        """
        Take an action (or `undo`, `redo`): checked and encoded first, then written, then applied. UserError when it does not fit, and nothing changes.
        Where it can't be written it holds all the same: `trouble` says so, and the next action writes it too.
        """
        args = self.refer(to_json(args))
        new = self.next_state(name, args)
        time = datetime.datetime.now().isoformat(timespec="milliseconds")
        self.keep([*self.record.waiting, {"t": time, "do": name, "args": args}])
        self.record.waiting.clear()
        self.trouble = self.log.save()
        self.record.steps.append(Step(time, name, args, self.state, new))
        self.advance(name, args, new)
        return self.state

    def close(self) -> str:
        """Let the file go. What was not saved is tried once more, then kept whole among temporary files; what there is to say of that, or ""."""
        self.record.flush()
        said = self.log.save() if self.log.waiting and self.trouble else ""
        if said and self.log.waiting:
            self.log.close()
            self.log.go_on_in(Path(tempfile.gettempdir()) / self.path.name)
            failed = self.log.save()
            said = failed if self.log.waiting else f"the session could not be written where it belongs: all of it is in {self.path}, which --resume opens"
        self.log.close()
        return said


# ------------------------------------------------------------------ reading one back


def read_session(path: str | Path) -> tuple[Session, str]:
    """
    The session of a file, and a warning ("" when all of it was read). A line that can't be used is left out and named; then the file stays as it is, and
    the session goes on in a new one.
    """
    path = typed_path(path)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"no session at {path} ({reason(error)}): give a .jsonl file of sessions/") from error
    lines, ended = read_lines(data)
    head = lines.pop(0) if lines and (lines[0].entry is None or "loupe" in lines[0].entry) else Line(1, None, "it is not the header")
    session, wrong = Session(State()), [] if head.entry else [(1, f"{head.wrong}, so that model, prompt and set of the start are lost")]
    for line in lines:
        if line.entry and "set" in line.entry:
            try:
                session.sets[str(line.entry["set"])] = read_set(line.entry.get("prompts"))
            except UserError as error:
                wrong.append((line.place, str(error)))
    session.state = session.start = read_start(path, head, session.sets, wrong)
    actions, results = [], Kept(session.sets)
    for line in lines:
        entry = line.entry
        if entry is not None and "set" in entry:
            continue
        try:
            if entry is not None and session.record.read(entry, results):
                actions.append({k: v for k, v in entry.items() if k not in ("n", "sum")})
                continue
            if entry is None or not isinstance(entry.get("do"), str) or not isinstance(entry.get("args"), dict):
                raise UserError(line.wrong or "it is not an action")
            args = session.refer(entry["args"])
            session.step(entry["do"], args, str(entry.get("t", "")))
            actions.append({"t": entry.get("t"), "do": entry["do"], "args": args})
        except UserError as error:
            wrong.append((line.place, str(error)))
    steps = sum("do" in a for a in actions)
    if not head.entry and not actions:
        raise UserError(f"{path.name} is not a session of Loupe: its first line is not the header")
    if wrong or not ended:
        session.keep(actions)  # all of it, in a new file
    else:
        session.log = Log(path, [row + b"\n" for row in data.split(b"\n")[:-1]], len(data))
        session.actions, session.kept = steps, {str(line.entry["set"]) for line in lines if "set" in line.entry}
    session.record.acted = session.actions
    return session, said(path, wrong, steps)


def read_start(path: Path, head: Line, sets: dict, wrong: list) -> State:
    """The state that a session began with; the program's own where the header is lost. UserError for another format."""
    if head.entry is None:
        return State()
    if head.entry.get("loupe") not in (1, FORMAT):
        raise UserError(f"{path.name} is not a session of Loupe format {FORMAT}: its header says {head.entry.get('loupe')!r}")
    start = head.entry.get("start")
    digest = start.get("prompt_set") if isinstance(start, dict) else None
    if isinstance(digest, str):
        start = start | {"prompt_set": []}
        if digest not in sets:
            wrong.append((1, "the prompt set of the start is missing"))
    state = from_json(start, State)
    known = State().views
    state = dataclasses.replace(state, views=known | {k: v for k, v in state.views.items() if k in known})
    state = dataclasses.replace(state, prompt_set=sets.get(digest, ())) if isinstance(digest, str) else state
    changed_fits(state, State(), ("prompt_set",))
    return state
