"""What the keys do that open a list, a panel or a chart, fit a lens, manage the engine, or export. The app inherits it beside Deeds."""

import contextlib
import json
import re
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from textual import work

import pictures
from export import EXPORTS, python_script
from link import EngineError, Superseded
from techniques.attention.requests import AttentionSet, Detect, DETECTORS, HeadStatsResult
from techniques.identities.requests import Identities
from techniques.lens.requests import TuneLens
from techniques.output.requests import RunResult
from vocabulary.nodes import UserError
from vocabulary.requests import Load, Models
from pictures import HEAD_STATS, LENS_STATS, RUN_NAMES
from session import SESSIONS, VIEWS, read_session
from utils import ROOT, visible
from widgets import BAD, BOLD, DIM, GOOD, PLAIN, WARN, Editor, Item, Overlay, Panel, Picker, Spans

from actions import Action, show_key


class Quests:
    """Methods of the app: do_<id> for actions of the table in actions.py."""

    # -------------------------------------------------------------- lenses, rankings, detectors

    def do_lens_kind(self) -> None:
        folders = [f.parent for root in (ROOT / "zoo", ROOT / "exports") for f in root.glob("*/config.json")]
        files = list((ROOT / "exports").glob("*.pt"))
        items = [Item("logit", "the model's own norm and unembedding at every point", "", "")]
        items += [Item("tuned", str(f.relative_to(ROOT)), "tuned lens", str(f)) for f in folders] + [
            Item("jacobian", str(f.relative_to(ROOT)), "Jacobian lens", str(f)) for f in files
        ]

        def chosen(item: Item | None, typed: str) -> None:
            kind, _, artefact = typed.strip().partition(" ") if item is None else (item.key, "", item.value)
            self.guard(lambda: self.act("lens", kind=kind, artefact=artefact.strip()))

        self.open(Picker("lens (or type: tuned FOLDER, jacobian FILE; F fits a tuned lens)", items, chosen, free=True))

    def do_fit(self) -> None:
        self.ready()
        name = re.sub(r"\W+", "-", self.info.name).strip("-")

        def accept(values: list[str]) -> str:
            text, out, steps = values
            if not steps.isdigit() or int(steps) < 1:
                return "steps: a positive whole number"
            self.fit(TuneLens(text, out, int(steps), resume=(Path(out) / "checkpoint.safetensors").exists()))
            return ""

        fields = [("text file", ""), ("folder", str(ROOT / "exports" / f"tuned-lens-{name}")), ("steps", "250")]
        self.open(Editor("fit a tuned lens", fields, accept, 0, 1, "text file empty: the zoo's corpus · enter starts, J shows and cancels · esc"))

    @work(group="fit", exclusive=True)
    async def fit(self, request: TuneLens) -> None:
        try:
            done = await self.link.ask("fit", request, 2)
        except Superseded:
            self.say("the fit was cancelled; F again goes on from its checkpoint", WARN)
            return
        except EngineError as error:
            self.say(str(error), BAD)
            return
        self.act("lens", kind="tuned", artefact=done.folder)
        self.say(
            f"tuned lens in {done.folder}: mean KL on held-out text {done.before[:-1].mean():.3f} → {done.after[:-1].mean():.3f} nats in {done.seconds:.0f} s",
            GOOD,
        )

    @work(group="chart", exclusive=True)
    async def do_chart(self) -> None:
        if self.info is None:
            self.say(f"no model yet: {self.busy}", BAD)
            return
        stat, pos, lines, lens = self.state.views["lens.stat"], self.cursor.pos, {}, self.panes["lens"]
        wanted = lens.wants(self)["lens"]
        runs = [r for r in ("clean", "corrupt", "now") if (r != "corrupt" or self.state.prompt.corrupt) and (r != "now" or self.state.study.interventions)]
        try:
            for which in runs:
                result = await self.link.ask("chart", replace(wanted, which=which, positions=(pos,)), 0)
                lines[RUN_NAMES[which]] = pictures.lens_values(result, stat)[:, 0].tolist()
        except Superseded:
            return
        except EngineError as error:
            self.say(str(error), BAD)
            return
        rows = pictures.chart(f"{LENS_STATS[stat]} at {pos}", list(result.points), lines, self.size.width - 2, max(8, self.size.height * 3 // 5))
        self.open(Panel("over depth", rows, f"{result.convention} · esc"))

    def do_ranked(self) -> None:
        if self.pane == "patching":
            self.rank_cells()
            return
        if self.pane == "circuit" and self.state.views["circuit.view"] == "path":
            self.rank_paths()
            return
        if self.pane not in ("lens", "attention", "output"):
            raise UserError("H ranks the cells of pane 4, the paths of pane 5 and the heads of pane 2: here is nothing to rank")
        result, stat = self.result("heads", HeadStatsResult), self.state.views["attention.stat"]
        if result is None or stat not in result.stats:
            raise UserError("the heads map has no numbers yet")
        self.rank(f"heads by {HEAD_STATS[stat]}", result.stats[stat])

    def rank_paths(self) -> None:
        """Paths by the size of what is shown; choosing one puts the cursor on its sender."""
        pane = self.panes["circuit"]
        grid, result = pane.map.grid, pane.paths(self)
        if result is None or grid is None:
            raise UserError("no path has been patched yet: S runs them")
        cells = sorted(((int(r), int(c)) for r, c in np.argwhere(np.isfinite(grid.values))), key=lambda rc: -abs(float(grid.values[rc])))
        items = [Item(result.address(r, c) or f"{result.rows[r]} {result.cols[c]}", f"{float(grid.values[r, c]):+.4f}", "", (r, c)) for r, c in cells[:2000]]
        self.open(
            Picker("paths by effect", items, lambda item, typed: item and self.guard(lambda: self.find(item.key)) if item and item.key != "embed" else None)
        )

    def rank_cells(self) -> None:
        pane, grid = self.panes["patching"], self.panes["patching"].table.grid
        result = next((r for r in pane.shown(self) if r), None)
        if result is None or grid is None:
            raise UserError("nothing has been swept yet: S runs the sweep")
        cells = [(int(r), int(c)) for r, c in np.argwhere(np.isfinite(grid.values))]
        show = self.state.views["patching.show"]
        low = {"p": 0.0, "metric": result.base}.get(show)  # p: the smallest first; the metric: what moves it most
        cells.sort(key=lambda rc: float(grid.shown[rc]) if show == "p" else -abs(float(grid.values[rc]) - (low or 0.0)))
        items = [Item(result.address(r, c) or f"{result.rows[r]} × {result.cols[c]}", f"{float(grid.shown[r, c]):+.4f}", "", (r, c)) for r, c in cells[:2000]]
        self.open(Picker(f"cells by {self.state.views['patching.show']}", items, lambda item, typed: item and pane.go(self, result, *item.value)))

    def rank(self, title: str, scores: np.ndarray) -> None:
        """Heads by score, to filter and go to."""
        order = [divmod(int(i), scores.shape[1]) for i in np.argsort(-np.abs(np.nan_to_num(scores)), axis=None, kind="stable")]
        items = [Item(f"L{x}H{h}", f"{scores[x, h]:+.4f}", "", (x, h)) for x, h in order]

        def chosen(item: Item | None, typed: str) -> None:
            if item is not None:
                self.move(layer=item.value[0], head=item.value[1], comp="head")

        self.open(Picker(title, items, chosen))

    def do_reading(self) -> None:
        self.turn("attention.read")

    @work(group="labels", exclusive=True)
    async def do_labels(self) -> None:
        if self.info is None or not self.state.prompt_set:
            self.say("mean attention between labels needs a prompt set with labels: o opens one", BAD)
            return
        which = self.state.views["which"]
        try:
            found = await self.link.ask("labels", AttentionSet(replace(self.state.study, prompt_set=self.state.prompt_set), which), 1)
        except Superseded:
            return
        except EngineError as error:
            self.say(str(error), BAD)
            return
        cells = [(x, h, d, s) for x, h, d, s in np.ndindex(*found.mean.shape) if np.isfinite(found.mean[x, h, d, s])]
        cells.sort(key=lambda c: -abs(float(found.mean[c])))
        names = found.labels
        items = [Item(f"L{x}H{h}", f"{names[d]} → {names[s]}  {found.mean[x, h, d, s]:+.3f} ± {found.std[x, h, d, s]:.3f}", "", (x, h)) for x, h, d, s in cells]

        def chosen(item: Item | None, typed: str) -> None:
            if item is not None:
                self.move(layer=item.value[0], head=item.value[1], comp="head")

        self.open(Picker(f"mean attention over {len(found.prompts)} prompts, {RUN_NAMES[which]}", items, chosen))

    def do_detect(self) -> None:
        if self.pane == "features":
            self.check_edge()
            return
        self.ready()

        def accept(values: list[str]) -> str:
            pattern, measure = values[0].strip(), values[1].strip()
            cells = re.findall(r"(\d+)\s*>\s*(\d+)", pattern)
            if not cells and pattern not in DETECTORS:
                return f"give cells such as 14>2 10>4, or one of {', '.join(DETECTORS)}"
            which = self.state.views["which"]
            cells = tuple((int(a), int(b)) for a, b in cells)
            self.detect(Detect(self.state.study, which, pattern if not cells else "cells", cells, error_measure=measure))
            return ""

        fields = [("pattern", f"{self.cursor.pos}>{self.cursor.src}"), ("measure", "mul")]
        self.open(Editor("detector", fields, accept, 0, 1, f"cells destination>source, or {', '.join(DETECTORS)}; measure mul or abs · enter · esc"))

    @work(group="detect", exclusive=True)
    async def detect(self, request: Detect) -> None:
        try:
            found = await self.link.ask("detect", request, 0)
        except Superseded:
            return
        except EngineError as error:
            self.say(str(error), BAD)
            return
        self.rank(f"heads by {found.convention}", found.scores)

    # -------------------------------------------------------------- lists

    def do_help(self) -> None:
        items = [Item(" ".join(show_key(k) for k in a.keys.split(",")), a.help, a.group, a) for a in self.table]
        self.open(Picker("keys", items, lambda item, typed: item and self.action_do(item.value.id)))

    def do_palette(self) -> None:
        items = [Item(a.id, a.help, " ".join(show_key(k) for k in a.keys.split(",")), a) for a in self.table]
        views = [Item(f"{n}={v}", "view", "", (n, v)) for n, values in VIEWS.items() for v in values]

        def chosen(item: Item | None, typed: str) -> None:
            if item is None:
                return
            self.action_do(item.value.id) if isinstance(item.value, Action) else self.guard(lambda: self.act("view", name=item.value[0], value=item.value[1]))

        self.open(Picker("command", items + views, chosen))

    def do_models(self) -> None:
        def chosen(item: Item | None, typed: str) -> None:
            words = [item.key] if item else typed.split()
            options = dict(w.partition("=")[::2] for w in words[1:])
            old = self.state.model
            unknown = set(options) - {"base", "dtype", "device", "device_map"}
            if unknown:
                self.say(f"{min(unknown)}=: a model takes base=, dtype=, device=, device_map=", BAD)
                return
            load = Load(
                words[0],
                options.get("base"),
                options.get("dtype", old.dtype),
                options.get("device", old.device),
                options.get("device_map", old.device_map),
            )
            if load == old and self.info is not None:
                self.say(f"{load.model} is loaded already: ctrl+e restarts the engine, which reads its weights from disk again", WARN)
                return
            self.guard(lambda: self.act("model", load=load))

        start = [Item("zoo", "the embedded model", "")]
        picker = Picker("model (or type a folder or hub name, then dtype=bfloat16 base=gpt2 …)", start, chosen, free=True)
        self.open(picker)
        self.fill_models(picker)

    @work(group="models", exclusive=True)
    async def fill_models(self, picker: Picker) -> None:
        with contextlib.suppress(Superseded, EngineError):
            found = await self.link.ask("models", Models(), 0)
            picker.items = [Item(c.name, c.where, c.note, c.name) for c in found.choices]
            if picker.is_mounted and not picker.closing:
                picker.draw()

    @work(group="identities", exclusive=True)
    async def do_honesty(self) -> None:
        if self.info is None:
            self.say(f"no model yet: {self.busy}", BAD)
            return
        panel = Panel("honesty", [[(" checking the identities on this model and prompt…", DIM)]], "esc closes")
        self.open(panel)
        try:
            found = await self.link.ask("identities", Identities(self.state.with_saes(self.state.study)), 1)
        except Superseded:
            return
        except EngineError as error:
            panel.replace([[(f" {visible(str(error))}", BAD)]])
            return
        at_load = self.info.checks
        bad = [r for r in (*found.rows, *at_load) if r.ok is False]
        head: Spans = [(f" {len(bad)} broken" if bad else " all hold", BAD if bad else GOOD), (f"  {found.convention}", DIM)]
        rows = pictures.identity_rows(found.rows)
        rows.append([(f" at load, on random tokens: {sum(r.ok is True for r in at_load)} of {sum(r.ok is not None for r in at_load)} identities held", DIM)])
        rows += pictures.identity_rows(tuple(r for r in at_load if r.ok is False))
        panel.replace([head, *rows])

    def do_jobs(self) -> None:
        jobs: list = []

        def rows() -> list[Spans]:
            jobs[:] = self.link.jobs.values()
            lines = [
                (
                    j.slot,
                    type(j.request).__name__,
                    f" {j.progress.done}/{j.progress.total} {j.progress.text}{'' if 'left' in j.progress.text else f' {j.left}'}".rstrip(),
                )
                for j in jobs
            ]
            return [[(f" {slot:12}", BOLD), (f"{kind:12}", PLAIN), (text, DIM)] for slot, kind, text in lines] or [[(" no jobs are running", DIM)]]

        def cancel(at: int) -> None:
            if at < len(jobs):
                self.cancel(jobs[at])
                panel.replace(rows())

        panel = Panel("jobs", rows(), "x cancels · esc closes", bool(jobs), {"x": cancel})
        self.open(panel)
        panel.set_interval(1, lambda: panel.replace(rows()))

    def do_convention(self) -> None:
        """What the title line says, where it may be cut, and the lines below the picture."""
        pane, width = self.panes[self.pane], max(20, self.size.width - 6)
        title, note = getattr(pane, "said", ("", ""))
        lines = [(line, BOLD) for line in textwrap.wrap(title, width)] + [(line, PLAIN) for line in textwrap.wrap(note, width)]
        lines += [(line, DIM) for row in pane.info_line.text().splitlines() for line in textwrap.wrap(row, width)]
        self.open(Panel(f"{pane.number} {pane.label}", [[(f" {text}", style)] for text, style in lines] or [[(" nothing is shown", DIM)]], "esc"))

    def do_write(self) -> None:
        path = self.session.path
        self.say(
            f"this session is {path}: {len(self.session.lines)} actions, written as they happen; uv run tui.py --resume opens it again"
            if self.session.written
            else "nothing has been done yet: the first action starts the session file"
        )

    def do_restore(self) -> None:
        files = sorted(SESSIONS.glob("*.jsonl"), key=lambda p: -p.stat().st_mtime)[:200]
        items = [Item(f.stem, f"{max(f.read_bytes().count(b'\n') - 1, 0)} actions", "", f) for f in files]

        def chosen(item: Item | None, typed: str) -> None:
            self.guard(lambda: self.restore(item.value if item else Path(typed)))

        self.open(Picker("restore a session", items, chosen, free=True))

    def restore(self, path: Path) -> None:
        self.session, warning = read_session(path)
        self.at_end = True
        self.say(warning or f"restored {path.name}: {len(self.session.past)} steps back", WARN if warning else GOOD)
        self.refresh_wants()

    def do_restart(self) -> None:
        self.busy = "starting the engine…"
        self.say("restarting the engine; model, prompts and interventions are kept")
        self.have.clear()
        self.run_engine()

    def do_redraw(self) -> None:
        self.screen.forget()

    def do_suspend(self) -> None:
        self.action_suspend_process()

    def cancel(self, job) -> None:
        """A sweep that was cancelled does not start again by itself; what it found stays."""
        self.link.cancel(job.id)
        if job.request in self.started:
            self.started.discard(job.request)
            self.refresh_wants()

    def do_interrupt(self) -> None:
        jobs = [j for j in self.link.jobs.values() if j.slot != "load"]
        for job in jobs:
            self.cancel(job)
        self.say(f"cancelled {len(jobs)} jobs" if jobs else "nothing is running; q quits")

    def do_quit(self) -> None:
        self.exit()

    # -------------------------------------------------------------- out

    def do_copy(self) -> None:
        pane, name = self.panes[self.pane], self.pane
        if any(self.stale(s) for s in self.wanted):
            raise UserError("the screen is still computing: copy when it is done")
        node, s = self.node(), self.state
        choices = [
            Item("text", "this pane as text", ".txt", lambda: pane.as_text()),
            *(Item("tsv" if len(pane.grids()) == 1 else f"tsv {n}", f"{n}: every number, tab-separated", ".tsv", g.tsv) for n, g in pane.grids().items()),
            Item(
                "python",
                "a script that uses TransformerLens alone and prints the metric",
                ".py",
                lambda: python_script(s, self.info, self.result("run", RunResult)),
            ),
            Item("svg", "the screen as a picture", ".svg", lambda: self.export_screenshot(title="loupe")),
            Item("node", f"the address {node}", ".txt", lambda: f"{node}\n"),
            *pane.copies(self),
            Item("prompt", "the prompt as a line of a prompt set", ".jsonl", lambda: self.prompt_line()),
        ]
        self.open(Picker("copy", choices, lambda item, typed: item and self.guard(lambda: self.export(name, item))))

    def prompt_line(self) -> str:
        p = self.state.prompt
        return (
            json.dumps(
                {
                    "clean": p.clean,
                    "corrupt": p.corrupt,
                    "answer": list(p.answers),
                    "foil": list(p.foils),
                    "labels": dict(p.labels),
                    **({} if p.bos is None else {"bos": p.bos}),
                },
                ensure_ascii=False,
            )
            + "\n"
        )

    def export(self, name: str, item: Item) -> None:
        if item.key == "svg" and self.query(Overlay):
            self.call_after_refresh(self.export, name, item)  # the picture without the menu
            return
        text = item.value()
        path = EXPORTS / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{name}-{item.key.replace(' ', '-')}{item.note}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from error
        if item.key != "svg":
            self.copy_to_clipboard(text)
        self.say(f"{'written' if item.key == 'svg' else 'copied; also'} {path.relative_to(ROOT)} ({len(text.splitlines())} lines)", GOOD)
