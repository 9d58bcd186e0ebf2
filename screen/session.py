"""
What lasts: the state of a hunt, the actions that change it, and the session file (one JSON object a line) from which undo, redo and resume work.

1. `State` is immutable; `apply(state, name, args)` is the one function that changes it, and knows every kind of action.
2. `Session.do` applies an action and appends it to the file as it happens; undo and redo are lines of the file too.
3. Reading a file back folds its lines; what can't be read is said, what stands before it is kept, and the file itself is left as it is.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vocabulary.circuit import check_receivers, Circuit, COMBINE, combined, grouped, LOGITS, parse_edge, toggled
from vocabulary.nodes import ABLATIONS, FROM_SET, Intervention, parse_intervention, UserError
from vocabulary.prompts import ALIGNMENTS, Metric, METRICS, Prompt, RUNS, Study, WHICH
from vocabulary.requests import Load
from vocabulary.wire import from_json, to_json
from utils import ROOT

FORMAT = 1
SESSIONS = ROOT / "sessions"
VIEWS = {"mode": ("colour", "number", "cells", "blocks", "shade"), "which": WHICH, "ids": ("off", "on")}  # what the screen shows; each pane adds its own


def add_views(views: dict[str, tuple[str, ...]]) -> None:
    """A pane's views and their values, the first of which is shown first; before those of all prompts."""
    last = {name: VIEWS.pop(name) for name in ("which", "ids")}
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
    views: dict[str, str] = field(default_factory=lambda: {k: v[0] for k, v in VIEWS.items()})

    @property
    def study(self) -> Study:
        """What analyses run on. The set travels only when a mean or another of its prompts is needed."""
        active = self.interventions if self.enabled else ()
        means = any(i.op in FROM_SET for i in active)
        study = Study(self.prompt, active, self.base, self.metric, self.prompt_set if means else (), align=self.align)
        return self.with_saes(study) if any(i.node.site == "sae" for i in active) else study

    def with_saes(self, study: Study) -> Study:
        """With the loaded SAEs, for what speaks of their features; the rest does not depend on what is loaded."""
        return dataclasses.replace(study, saes=self.saes, sae_error=self.sae_error)

    @property
    def whole_study(self) -> Study:
        """The same with the prompt set."""
        return dataclasses.replace(self.study, prompt_set=self.prompt_set)

    @property
    def current(self) -> Circuit | None:
        return next((c for c in self.circuits if c.name == self.circuit), None)


def one_of(value: str, allowed: tuple[str, ...] | dict, what: str) -> str:
    if value not in allowed:
        raise UserError(f"{what} {value!r}: choose one of {', '.join(allowed)}")
    return value


def model(state: State, load: dict) -> State:
    return dataclasses.replace(state, model=from_json(load, Load), interventions=(), saes=(), sae="")


def prompt(state: State, prompt: dict) -> State:
    return dataclasses.replace(state, prompt=from_json(prompt, Prompt))


def open_set(state: State, path: str, prompts: list, index: int = 0) -> State:
    prompts = from_json(prompts, tuple[Prompt, ...])
    return go(dataclasses.replace(state, set_path=path, prompt_set=prompts, align=""), index)


def go(state: State, index: int) -> State:
    if not 0 <= index < len(state.prompt_set):
        raise UserError(f"no prompt {index + 1} in a set of {len(state.prompt_set)}")
    return dataclasses.replace(state, index=index, prompt=state.prompt_set[index])


def metric(state: State, kind: str, pos: int | str = "END") -> State:
    return dataclasses.replace(state, metric=Metric(one_of(kind, METRICS, "metric"), pos))


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


def named(state: State, name: str) -> Circuit:
    found = next((c for c in state.circuits if c.name == name), None)
    if found is None:
        raise UserError(f"there is no circuit {name!r}: there {'are' if state.circuits else 'is none'} {', '.join(c.name for c in state.circuits)}".rstrip())
    return found


def with_circuit(state: State, circuit: Circuit) -> State:
    """The circuit in the place of the one of its name, or at the end; it becomes the current one."""
    if not circuit.name.strip():
        raise UserError("a circuit needs a name")
    old = [c.name for c in state.circuits]
    some = tuple(circuit if c.name == circuit.name else c for c in state.circuits) if circuit.name in old else (*state.circuits, circuit)
    return dataclasses.replace(state, circuits=some, circuit=circuit.name)


def new_circuit(state: State, name: str) -> State:
    if any(c.name == name for c in state.circuits):
        raise UserError(f"there is a circuit {name!r} already: choose another name")
    return with_circuit(state, Circuit(name, state.model.model))


def put_circuit(state: State, circuit: dict) -> State:
    return with_circuit(state, from_json(circuit, Circuit))


def select_circuit(state: State, name: str) -> State:
    return dataclasses.replace(state, circuit=named(state, name).name)


def rename_circuit(state: State, name: str, to: str) -> State:
    if any(c.name == to for c in state.circuits):
        raise UserError(f"there is a circuit {to!r} already: choose another name")
    renamed = dataclasses.replace(named(state, name), name=to)
    if not to.strip():
        raise UserError("a circuit needs a name")
    some = tuple(renamed if c.name == name else c for c in state.circuits)
    return dataclasses.replace(state, circuits=some, circuit=to if state.circuit == name else state.circuit)


def delete_circuit(state: State, name: str) -> State:
    left = tuple(c for c in state.circuits if c is not named(state, name))
    return dataclasses.replace(state, circuits=left, circuit=state.circuit if state.circuit != name else left[-1].name if left else "")


def keep(state: State, part: str) -> State:
    """Keep a node or an edge (an address with ->) in the current circuit, or drop it; the first one makes a circuit."""
    return with_circuit(state, toggled(state.current or Circuit("circuit", state.model.model), part))


def receivers(state: State, addresses: list) -> State:
    """Where paths end: heads' q, k, v, MLPs, logits."""
    check_receivers(addresses)
    return dataclasses.replace(state, receivers=tuple(dict.fromkeys(addresses)) or (LOGITS,))


def senders(state: State, addresses: list) -> State:
    """Where paths to each receiver begin, together: heads, MLPs, embed; none: at the node under the cursor."""
    for text in addresses:
        parse_edge(f"{text}->{LOGITS}")
    return dataclasses.replace(state, senders=tuple(dict.fromkeys(addresses)))


def group(state: State, name: str, nodes: list) -> State:
    """Give nodes of the current circuit a name; no nodes take the group away."""
    return with_circuit(state, grouped(named(state, state.circuit), name, tuple(nodes)))


def combine(state: State, how: str, one: str, other: str, name: str) -> State:
    return with_circuit(state, combined(named(state, one), named(state, other), one_of(how, COMBINE, "combination"), name))


def saes(state: State, sources: list) -> State:
    """The SAEs in use, one a layer; what acted on features of others goes with them."""
    some = tuple(str(s) for s in sources)
    kept = tuple(i for i in state.interventions if i.node.site != "sae") if set(state.saes) - set(some) else state.interventions
    new = [s for s in some if s not in state.saes]
    return dataclasses.replace(state, saes=some, interventions=kept, sae=new[-1] if new else state.sae if state.sae in some else some[-1] if some else "")


def align(state: State, how: str) -> State:
    """How positions of clean and corrupted prompts of unequal length stand against each other."""
    return dataclasses.replace(state, align=one_of(how, ALIGNMENTS, "alignment") if how else "")


def show_sae(state: State, source: str) -> State:
    return dataclasses.replace(state, sae=one_of(source, state.saes, "SAE"))


def sae_error(state: State, value: bool) -> State:
    return dataclasses.replace(state, sae_error=bool(value))


ACTIONS: dict[str, Callable[..., State]] = {
    f.__name__: f
    for f in (
        model,
        prompt,
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
        new_circuit,
        put_circuit,
        select_circuit,
        rename_circuit,
        delete_circuit,
        keep,
        receivers,
        senders,
        group,
        combine,
        saes,
        show_sae,
        align,
        sae_error,
    )
}


def apply(state: State, name: str, args: dict) -> State:
    """The state after an action. UserError for an unknown action or arguments that do not fit it."""
    if name not in ACTIONS:
        raise UserError(f"unknown action {name!r}")
    try:
        return ACTIONS[name](state, **args)
    except (TypeError, AttributeError) as error:
        raise UserError(f"action {name}: {error}") from error


class Session:
    """A state with its history. The file is created by the first action; `path` says where."""

    def __init__(self, state: State, path: Path | None = None):
        self.state, self.path = state, path or SESSIONS / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S-%f}.jsonl"
        self.start, self.past, self.future = state, [], []
        self.lines: list[dict] = []
        self.written = False

    def write(self, line: dict) -> None:
        self.lines.append(line)
        if not self.written:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.written = True
            with open(self.path, "x", encoding="utf-8") as f:
                for old in ({"loupe": FORMAT, "start": to_json(self.start)}, *self.lines):
                    f.write(json.dumps(old, ensure_ascii=False) + "\n")
            return
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False) + "\n")

    def step(self, name: str, args: dict) -> None:
        if name in ("undo", "redo"):
            source, target = (self.past, self.future) if name == "undo" else (self.future, self.past)
            if not source:
                raise UserError(f"nothing to {name}")
            target.append((self.state, source[-1][1]))
            self.state = source.pop()[0]
        else:
            new = apply(self.state, name, args)
            self.past.append((self.state, name))
            self.state, self.future = new, []

    def do(self, name: str, /, **args: object) -> State:
        """Apply an action (or `undo`, `redo`) and append it to the file."""
        args = to_json(args)
        self.step(name, args)
        self.write({"t": datetime.datetime.now().isoformat(timespec="milliseconds"), "do": name, "args": args})
        return self.state


def read_session(path: str | Path) -> tuple[Session, str]:
    """The session of a file, and a warning ("" when the whole file was read). A damaged file is kept; its session goes on in a new one."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no session at {path}: give a .jsonl file of {SESSIONS.name}/")
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    whole = lines[-1] == ""
    lines = lines[:-1] if whole else lines
    try:
        head = json.loads(lines[0])
        assert isinstance(head, dict)
    except (json.JSONDecodeError, IndexError, AssertionError) as error:
        raise UserError(f"{path.name} is not a session of Loupe: its first line is not the header") from error
    if head.get("loupe") != FORMAT:
        raise UserError(f"{path.name} is not a session of Loupe format {FORMAT}: its header says {head.get('loupe')!r}")
    session, warning, known = Session(from_json(head.get("start"), State), path), "", set(State().views)
    session.state = session.start = dataclasses.replace(session.start, views=State().views | {k: v for k, v in session.start.views.items() if k in known})
    for number, line in enumerate(lines[1:], 2):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("do"), str) or not isinstance(entry.get("args"), dict):
                raise UserError("not an action")
            session.step(entry["do"], entry["args"])
        except (json.JSONDecodeError, UserError) as error:
            rest = len(lines) - number
            warning = f"{path.name} line {number}: {error}; the {number - 2} steps before it are restored" + (f", {rest} after it are not" if rest else "")
            break
        session.lines.append(entry)
    session.written = not warning and whole
    if not session.written:
        session.path = Session(session.state).path
    return session, warning


def newest_session(folder: Path = SESSIONS) -> Path:
    files = sorted(folder.glob("*.jsonl"), key=lambda p: p.stat().st_mtime)
    if not files:
        raise UserError(f"no session in {folder}: start with `uv run tui.py`")
    return files[-1]
