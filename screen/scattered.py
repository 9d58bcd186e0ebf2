"""
Scattered jobs on the screen: rows of the list of jobs, what starts, shows, cancels and goes on with one, and the tables that are joined of their parts.

1. The engine does all of it (techniques/cluster); the session keeps the folders, so that the next screen shows them again.
2. A table is drawn where a pane asks for exactly its request, of this model: nowhere else. `show` turns the session to it.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath

from techniques.cluster.requests import CancelShards, GoOnShards, Joined, Shards, StartShards, TakeShards, WatchShards, cut_along, named
from vocabulary.chosen import is_chosen, refusal, sbatch_key
from vocabulary.nodes import UserError
from vocabulary.parts import pack, unpack
from vocabulary.requests import Load, ModelInfo
from vocabulary.typed import whole_number
from vocabulary.wire import to_json
from screen.overlays import Editor, Item, Picker
from utils import model_name, visible
from widgets import BAD, BOLD, DIM, GOOD, PLAIN, WARN, Spans

OFTEN = 2.0  # seconds between two looks at the folders
LARGEST = 40_000_000  # bytes of a request that go over the wire in one message
HERE, SLURM = "here", "slurm"


@dataclass(frozen=True)
class Table:
    """A joined result: the model as it was asked for and as it answered, the request, and how much of the whole it is."""

    load: Load
    request: object
    info: ModelInfo
    result: object
    said: str
    whole: bool
    stamp: int  # of the request


class Scattered:
    """The folders of this session: how far they are and what is joined of them."""

    def __init__(self, app):
        self.app, self.timer, self.looking, self.typed = app, None, False, None  # typed: the session in which somebody here said how
        self.states: dict[str, Shards] = {}
        self.unfinished: set[str] = set()  # seen so in this screen
        self.tables: dict[str, Table] = {}
        self.started: dict[str, tuple[Load, object]] = {}  # what was asked in this screen, of which model
        self.had: dict[str, tuple[int, bool]] = {}
        self.wait: dict[str, float] = {}  # until when no table is taken: a slow line has keys to carry too

    # ---------------------------------------------------------------- following them

    def follow(self) -> None:
        """Look every few seconds, once there is a folder to look at."""
        if self.timer is None and self.app.session.folders and self.app.client.alive:
            self.timer = self.app.set_interval(OFTEN, self.look)
            self.look()

    def look(self) -> None:
        if self.app.client.alive and self.app.session.folders and not self.looking:
            self.looking = True
            self.app.run_worker(self.poll, group="scattered", exclusive=False, exit_on_error=True)

    async def poll(self) -> None:
        try:
            await self.see()
        finally:
            self.looking = False

    async def see(self) -> None:
        """How far the folders are; what is joined anew is taken and drawn."""
        app, silent = self.app, lambda error: None
        got = await app.requests.asked("scattered", WatchShards(tuple(app.session.folders)), 0, silent, any_model=True)
        for state in got.jobs if got is not None else ():
            self.heard(state)
            began = time.monotonic()
            if state.joined and self.had.get(state.folder) != (state.joined, state.whole) and began > self.wait.get(state.folder, 0.0):
                take = TakeShards(state.folder, self.tables[state.folder].stamp if state.folder in self.tables else 0)
                joined = await app.requests.asked("scattered table", take, 0, silent, any_model=True)
                if joined is not None:
                    self.had[state.folder] = (state.joined, state.whole)
                    self.put(joined)
                self.wait[state.folder] = time.monotonic() + 5 * (time.monotonic() - began)
        for panel in app.query("Jobs"):
            panel.follow()

    def heard(self, state: Shards) -> None:
        before = self.states.get(state.folder)
        self.states[state.folder] = state
        if not state.whole:
            self.unfinished.add(state.folder)
        if state.error and before is not None and before.error != state.error:
            self.app.say(f"{short(state.folder)}: {state.error}", BAD)
        if before is not None and before.live and not state.live:
            self.app.refresh_wants()  # what its tasks did not do is asked here again

    def put(self, joined: Joined) -> None:
        info, result, *asked = (frame.body for frame in unpack(joined.frames.tobytes()))
        mine, app, before = self.app.state.prompt_set, self.app, self.tables.get(joined.folder)
        load, request = asked or (before.load, before.request)
        if mine and prompts_of(request) == mine:  # the same object, so that comparing takes no time
            request = replace(request, study=replace(request.study, prompt_set=mine))
        self.tables[joined.folder] = table = Table(load, request, info, result, joined.said, joined.whole, joined.stamp)
        if joined.whole and self.ours(table):
            app.requests.record(request, result, True)
            if joined.folder in self.unfinished:
                app.say(f"{short(joined.folder)} is whole: J, then ⏎, shows it", GOOD)
        app.refresh_wants()

    # ---------------------------------------------------------------- what panes draw

    def ours(self, table: Table) -> bool:
        """Whether the loaded model is the one that a table is of, in this dtype."""
        return self.app.info is not None and table.info.identity == self.app.info.identity

    def table(self, request: object) -> Table | None:
        """What is joined for exactly this request, of this model, in a folder that was not forgotten."""
        there = [self.tables[folder] for folder in self.app.session.folders if folder in self.tables]
        some = [t for t in there if type(t.request) is type(request) and self.ours(t)]
        return next((t for t in some if essence(t.request) == essence(request)), None)

    def covers(self, request: object) -> tuple[object | None, bool] | None:
        """What scattered tasks have of exactly this request, and whether that is all; None where none of them does it."""
        if (table := self.table(request)) is not None:
            return table.result, table.whole
        model = self.app.requests.model
        live = [self.started[f] for f in self.app.session.folders if f in self.started and self.states[f].live]
        alike = any(m == model and type(r) is type(request) and essence(r) == essence(request) for m, r in live)
        return (None, False) if alike else None

    def partial(self, result: object) -> str:
        """Where a drawn result is part of a scattered one, how much of it, as the beginning of a title; "" else."""
        table = next((t for t in self.tables.values() if t.result is result), None)
        return "" if table is None or table.whole else f"{table.said} · "

    # ---------------------------------------------------------------- rows of the list

    def rows(self) -> list[tuple[Spans, str]]:
        """A line a folder, each with the folder."""
        self.follow()
        return [
            (self.row(self.states.get(f) or Shards(f, tasks="not looked at yet" if self.app.client.alive else "no engine")), f)
            for f in self.app.session.folders
        ]

    def row(self, s: Shards) -> Spans:
        table = self.tables.get(s.folder)
        shards = f"{s.done} of {s.total} shards" if s.total else ""
        state = "whole" if s.whole and not s.live else " · ".join(filter(None, (s.tasks, s.left))) if s.live or not s.error else ""
        text = " · ".join(filter(None, (s.asks, self.whose(s, table), shards, state)))
        name = short(s.folder) if self.app.size.width >= 100 else PurePath(s.folder).name
        error = [(f" · {visible(s.error)}", BAD)] if s.error else []
        return [
            (f" {name}", BOLD),
            (f" · {visible(text)}" if text else "", PLAIN if s.live else DIM),
            *error,
            *([(f" · {visible(table.info.warning)}", WARN)] if table is not None and table.info.warning else []),
            (" · as it was when the engine went" if s.total and not self.app.client.alive else " · ⏎ goes on" if s.more and s.total else "", DIM),
        ]

    def whose(self, s: Shards, table: Table | None) -> str:
        """The model and the set of a folder, where they are not the session's."""
        state = self.app.state
        same = not table.info.name or self.ours(table) if table is not None and self.app.info is not None else s.model in ("", state.model.model)
        model = "" if same else f"OF {model_name(s.model)}{f' in {table.info.dtype}' if table is not None else ''}"
        other = table is not None and prompts_of(table.request) not in ((), state.prompt_set) or table is None and s.prompts not in (0, len(state.prompt_set))
        return " · ".join(filter(None, (model, f"of another set ({s.prompts} prompts)" if other else "")))

    # ---------------------------------------------------------------- what can be done

    def tell(self, request: object, said: str) -> None:
        """Ask the engine to do something with a folder, and look again."""

        def then(state: Shards) -> None:
            self.states[state.folder] = state
            self.app.say(f"{short(state.folder)}: {said}")
            self.look()

        self.app.requests.ask("scattered does", request, then, 0, any_model=True)

    def check_live(self, folder: str) -> None:
        if not self.states.get(folder, Shards(folder)).live:
            raise UserError(f"{short(folder)}: no task of it runs")

    def cancel(self, folder: str) -> None:
        self.check_live(folder)
        self.tell(CancelShards(folder), "its tasks are cancelled; the parts that are done stay")

    def choose(self, folder: str) -> None:
        """What can be done with a folder."""
        s, app = self.states.get(folder) or Shards(folder), self.app
        items = [Item("show", "turn to what it asks and draw what is joined", "", lambda: self.show(folder))] if folder in self.tables else []
        items += (
            [
                Item(
                    "go on",
                    f"start what is missing: {s.total - s.done} shards" if s.done < s.total else "the second pass: the faithfulness of what was found",
                    "",
                    lambda: self.tell(GoOnShards(folder), "it goes on"),
                )
            ]
            if s.more and s.total
            else []
        )
        items += [Item("cancel", "end its tasks; the parts that are done stay", "", lambda: self.cancel(folder))] if s.live else []
        items += [Item("forget", "leave it out of this list; the folder stays as it is", "", lambda: app.act("scattered", folder=folder, how=None))]
        app.open(Picker(folder, items, lambda item, typed: item and app.guard(item.value)))

    def watch(self) -> None:
        """A folder that scatter made, also elsewhere or on another day."""

        async def look(folder: str) -> None:
            got = await self.app.requests.asked("scattered watch", WatchShards((folder,)), 0, any_model=True)
            if got is not None:
                self.app.act("scattered", folder=got.jobs[0].folder, how={})
                await self.poll()

        def accept(values: list[str]) -> str:
            if not values[0].strip():
                return "type the folder that scatter's --out named"
            self.app.run_worker(partial(look, values[0].strip()), group="scattered watch", exclusive=True, exit_on_error=True)
            return ""

        self.app.open(Editor("watch a scattered job", [("folder", "")], accept, 0, 1, "scatter's --out, where the engine runs; runs nothing"))

    def scatter(self, request: object) -> None:
        """Ask how, then start it: in `here` as processes of the engine's machine, in `slurm` as a job array."""
        app, last = self.app, next((how for how in reversed([*self.app.session.folders.values()]) if how), {})
        sbatch = str(last.get("sbatch", ""))
        sbatch = sbatch if self.typed is app.session or is_chosen(sbatch_key(sbatch)) else ""  # a session from somebody else chooses nothing
        name = f"{named(request).split()[0]}-{time.strftime('%m%d-%H%M%S')}"
        fields = [
            ("tasks", "1" if hasattr(request, "resume") else str(last.get("tasks", 2))),  # a fit in steps is one task
            ("where", str(last.get("where", HERE))),
            ("sbatch", sbatch),
            ("folder", f"exports/runs/{name}"),
        ]

        def accept(values: list[str]) -> str:
            tasks, where, sbatch, folder = whole_number(values[0].strip()), *(v.strip() for v in values[1:])
            if (tasks or 0) < 1 or where not in (HERE, SLURM) or not folder:
                return f"tasks: 1 or more; where: {HERE} (processes on the engine's machine) or {SLURM}; folder: a name"
            self.typed = app.session
            how = {"tasks": tasks, "where": where, "sbatch": sbatch}
            frames = pack([(0, app.state.model), (0, request)])
            if len(frames) > LARGEST:
                return f"the prompts are {len(frames) / 1e6:.0f} MB: scatter them from the shell (engine.py scatter … --set FILE.jsonl), then watch the folder here"
            ask = StartShards(frames, folder, tasks, tasks if where == HERE else 0, sbatch if where == SLURM else "")

            def started(state: Shards) -> None:
                self.states[state.folder], self.started[state.folder] = state, (app.requests.model, request)
                app.act("scattered", folder=state.folder, how=how)
                app.say(f"{short(state.folder)} is laid out, its tasks start; J shows how far it is", GOOD)
                self.look()

            app.requests.ask("scatter", ask, started, 0, any_model=True)
            return ""

        app.open(
            Editor(
                f"scatter {named(request)} {cut_along(request)}",
                fields,
                accept,
                0,
                1,
                f"where: {HERE} or {SLURM}",
                True,
            )
        )

    def show(self, folder: str) -> None:
        """Turn the session to what a folder asks, so that a pane draws it. UserError where it is of another model, or can't be asked here."""
        app, table = self.app, self.tables[folder]
        if table.info.name and not self.ours(table):
            raise UserError(f"{short(folder)} is of {table.info.key}, not of the model that is loaded: M loads that; engine.py gather {folder} prints it")
        if prompts_of(table.request):
            if not is_chosen(table.request.study.metric):
                raise UserError(refusal(table.request.study.metric))
            turn_study(app, table.request.study, folder)
        pane = next((p for p in app.panes.values() if p.turn_to(app, table.request, table.result)), None)
        if pane is None:
            raise UserError(f"no pane draws {named(table.request)}: engine.py gather {folder} prints it")
        app.show_pane(pane.key)
        asked = pane.scatters(app)
        if type(asked) is type(table.request) and essence(asked) != essence(table.request):
            raise UserError(
                f"{short(folder)} asks for more than this pane can ({', '.join(unlike(asked, table.request))}): engine.py gather {folder} prints it"
            )
        self.put_again(folder)
        app.refresh_wants()

    def put_again(self, folder: str) -> None:
        """The open set may be the table's now."""
        table, mine = self.tables[folder], self.app.state.prompt_set
        if mine and prompts_of(table.request) == mine:
            self.tables[folder] = replace(table, request=replace(table.request, study=replace(table.request.study, prompt_set=mine)))


def turn_study(app, study: object, folder: str) -> None:
    """The session's set, metric, base and interventions as a study has them, each an action of its own where it differs."""
    state = app.state
    if study.prompt_set != state.prompt_set:
        app.act("open_set", path=folder, prompts=study.prompt_set)
    elif state.index or not state.members:
        app.act("go", index=0)
    if study.metric != state.metric:
        app.act("metric", **to_json(study.metric))
    if study.interventions != (state.interventions if state.enabled else ()):
        app.act("clear")
        for new in study.interventions:
            app.act("intervene", intervention=new)
    if study.align != state.align:
        app.act("align", how=study.align)
    if study.text.path and study.text != state.text:
        app.act("text", **to_json(study.text))


def prompts_of(request: object) -> tuple:
    """The set that a request is over; none where it is over a text."""
    return request.study.prompt_set if hasattr(request, "study") else ()


def short(folder: str) -> str:
    """The last two names of a folder's path."""
    return "/".join(PurePath(folder).parts[-2:])


def essence(request: object) -> object:
    """A request without what makes no difference to its result: order and size of what runs at once, the names of a circuit, the direction of what is no patching."""
    plain = {name: value for name, value in (("first", ""), ("chunk_mb", 0), ("plain", False)) if hasattr(request, name)}
    if hasattr(request, "direction"):
        op = getattr(request, "op", "patch")
        side = request.study.base if op != "patch" else {"noise": "clean", "denoise": "corrupt"}[request.direction]
        plain |= {"direction": "noise" if side == "clean" else "denoise", "study": replace(request.study, base=side)}
    if hasattr(request, "circuit"):
        plain["circuit"] = replace(request.circuit, name="", found="", model="", groups={})
    return replace(request, **plain)


def unlike(one: object, other: object) -> list[str]:
    """The names of what two requests of one kind, or their studies, differ in."""
    a, b = essence(one), essence(other)
    names = [n for n in vars(a) if n != "study" and getattr(a, n) != getattr(b, n)]
    return names + [n for n in (vars(a.study) if hasattr(a, "study") else ()) if getattr(a.study, n) != getattr(b.study, n)]
