"""What the keys do: an action `x` of the table in actions.py is the method `do_x` of Deeds, which the app inherits."""

import contextlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from textual import work

import pictures
from export import EXPORTS, python_script
from link import EngineError, Superseded
from messages import (
    AttentionSet,
    AttributionSetResult,
    ABLATIONS,
    DETECTORS,
    METRICS,
    OPS,
    WHICH,
    Check,
    CheckResult,
    Detect,
    HeadStatsResult,
    Identities,
    Intervention,
    Load,
    Models,
    Prompt,
    RunResult,
    TuneLens,
    UserError,
    parse_intervention,
    parse_node,
    read_prompt_set,
)
from pictures import HEAD_STATS, LENS_STATS, RUN_NAMES
from session import SESSIONS, VIEWS, read_session
from utils import ROOT, show_token, visible
from widgets import BAD, BOLD, DIM, GOOD, PLAIN, WARN, Editor, Item, Overlay, Panel, Picker, Spans

from actions import Action, show_key


class Deeds:
    """What the keys do. The app gives it the state, the cursor, the engine and the panes."""

    # -------------------------------------------------------------- actions

    def action_do(self, name: str) -> None:
        try:
            getattr(self, f"do_{name}")()
        except UserError as error:
            self.say(str(error), BAD)

    def action_noop(self) -> None: ...

    def act(self, name: str, /, **args: object) -> None:
        """Change the state through the session, then show it."""
        try:
            self.session.do(name, **args)
        except OSError as error:
            raise UserError(f"the session can't be written to {self.session.path}: {error.strerror}; free space or permissions, then repeat") from error
        if name in ("prompt", "go", "open_set"):
            self.at_end, self.matches = True, []
        self.refresh_wants()

    def do_pane_lens(self) -> None:
        self.show_pane("lens")

    def do_pane_attention(self) -> None:
        self.show_pane("attention")

    def do_pane_attribution(self) -> None:
        self.show_pane("attribution")

    def do_pane_patching(self) -> None:
        self.show_pane("patching")

    def do_pane_weights(self) -> None:
        self.show_pane("weights")

    def do_pane_output(self) -> None:
        self.show_pane("output")

    def do_next_pane(self, by: int = 1) -> None:
        keys = list(self.panes)
        self.show_pane(keys[(keys.index(self.pane) + by) % len(keys)])

    def do_previous_pane(self) -> None:
        self.do_next_pane(-1)

    def do_zoom(self) -> None:
        self.zoomed = True
        self.arrange()

    def do_unzoom(self) -> None:
        self.zoomed = False
        self.arrange()

    def do_back(self) -> None:
        if self.drilled:
            self.drilled = False
            self.draw()
        elif self.zoomed:
            self.do_unzoom()

    def do_left(self) -> None:
        self.step(0, -1)

    def do_right(self) -> None:
        self.step(0, 1)

    def do_up(self) -> None:
        self.step(-1, 0)

    def do_down(self) -> None:
        self.step(1, 0)

    def do_first(self) -> None:
        self.step(-(10**6), 0)

    def do_last(self) -> None:
        self.step(10**6, 0)

    def do_layer_up(self, by: int = 1) -> None:
        if self.info:
            self.move(layer=max(0, min(self.cursor.layer + by, self.info.n_layers - 1)))

    def do_layer_down(self) -> None:
        self.do_layer_up(-1)

    def do_pos_right(self, by: int = 1) -> None:
        self.panes[self.pane].across(self, by)

    def do_pos_left(self) -> None:
        self.do_pos_right(-1)

    def do_enter(self) -> None:
        self.ready()
        self.panes[self.pane].enter(self)

    # -------------------------------------------------------------- prompts

    def edit(self, focus: int) -> None:
        p = self.state.prompt
        fields = [("clean", p.clean), ("corrupted", p.corrupt or ""), ("answer", "|".join(p.answers)), ("foil", "|".join(p.foils))]
        self.edited = None
        self.mount(
            Editor(
                "prompt",
                fields,
                self.accept_prompt,
                focus,
                7,
                "enter accepts · tab next field · | between several answers · \\n newline · ctrl+t ids · esc",
            )
        )

    def typed_prompt(self, values: list[str]) -> Prompt:
        clean, corrupt, answers, foils = values
        p = self.state.prompt
        split = lambda text: tuple(part for part in text.split("|") if part)  # noqa: E731
        return Prompt(clean, corrupt or None, split(answers), split(foils), p.labels if clean == p.clean else (), p.bos)

    def accept_prompt(self, values: list[str]) -> str:
        prompt = self.typed_prompt(values)
        if not prompt.clean:
            return "an empty prompt: type a text"
        if self.edited and self.edited[0] == prompt and self.edited[1].problems:
            return self.edited[1].problems[0]
        if prompt != self.state.prompt:
            try:
                self.act("prompt", prompt=prompt)
            except UserError as error:
                return str(error)
        return ""

    async def on_editor_changed(self, event: Editor.Changed) -> None:
        editors = self.query(Editor)
        if editors and editors.first().rows > 1 and self.info:
            self.preview(editors.first(), self.typed_prompt(event.values))

    @work(group="edit", exclusive=True)
    async def preview(self, editor: Editor, prompt: Prompt) -> None:
        try:
            check: CheckResult = await self.link.ask("edit", Check(prompt), 0)
        except Superseded:
            return
        except EngineError as error:
            editor.preview.show([[(f" {visible(str(error))}", BAD)]])
            return
        self.edited = (prompt, check)
        ids, w = editor.ids, self.size.width
        row = lambda name, r: pictures.token_line(name, r, -1, w, None, ids, True)  # noqa: E731
        lines = [row(f"{len(check.clean.ids)} tokens", check.clean)]
        lines.append(row(f"{len(check.corrupt.ids)} tokens", check.corrupt) if check.corrupt else [])
        for name, rows in (("answer", check.answers), ("foil", check.foils)):
            spans: Spans = [(f" {name:9}  ", DIM)]
            for r in rows:
                spans += [
                    (" ".join(show_token(t) + (f":{i}" if ids else "") for t, i in zip(r.texts, r.ids)), GOOD if len(r.ids) == 1 else BAD),
                    ("  ", PLAIN),
                ]
            lines.append(spans)
        lines += [[(f" {visible(p)}", BAD)] for p in check.problems] + [[(f" {visible(h)}", WARN)] for h in check.hints]
        editor.preview.show(lines[:7])

    def do_edit(self) -> None:
        self.edit(0)

    def do_edit_corrupt(self) -> None:
        self.edit(1)

    def do_edit_answer(self) -> None:
        self.edit(2)

    def do_open(self) -> None:
        files = sorted((ROOT / "zoo" / "prompts").glob("*.jsonl")) + sorted(Path.cwd().glob("*.jsonl"))
        items = [Item(f.stem, str(f.relative_to(ROOT) if f.is_relative_to(ROOT) else f), "", f) for f in files]

        def chosen(item: Item | None, typed: str) -> None:
            self.guard(lambda: self.open_file(item.value if item else Path(typed)))

        self.mount(Picker("prompt set", items, chosen, free=True))

    def guard(self, what) -> None:
        try:
            what()
        except UserError as error:
            self.say(str(error), BAD)

    def open_file(self, path: Path) -> None:
        prompts = read_prompt_set(path)
        self.act("open_set", path=str(path), prompts=prompts, index=0)
        self.say(f"{len(prompts)} prompts of {path.name}: ( and ) step through them; mean ablation averages over their corrupted prompts", GOOD)

    def do_next_prompt(self, by: int = 1) -> None:
        if not self.state.prompt_set:
            raise UserError("no prompt set is open: o opens one")
        self.act("go", index=(self.state.index + by) % len(self.state.prompt_set))

    def do_previous_prompt(self) -> None:
        self.do_next_prompt(-1)

    def do_metric(self) -> None:
        items = [Item(k, v) for k, v in METRICS.items()]

        def chosen(item: Item | None, typed: str) -> None:
            kind, _, pos = (typed if "@" in typed else item.key if item else typed).partition("@")
            pos = int(pos) if pos.lstrip("-").isdigit() else pos
            self.guard(lambda: self.act("metric", kind=item.key if item and not pos else kind, pos=pos or "END"))

        self.mount(Picker("metric (type kind@position for another position: prob@-2, logit_diff@S2)", items, chosen, free=True))

    def do_ids(self) -> None:
        self.turn("ids")

    # -------------------------------------------------------------- interventions

    def toggle(self, new: Intervention) -> None:
        if new in self.state.interventions:
            self.act("drop", intervention=new)
            self.say(f"restored {new.node}", GOOD)
        else:
            self.act("intervene", intervention=new)
            self.say(f"{new}: {OPS[new.op]}", GOOD)

    def ready(self) -> None:
        if self.info is None:
            raise UserError(f"no model yet: {self.busy}")

    def do_ablate(self) -> None:
        self.ready()
        kind = self.state.ablation
        if kind.startswith("mean") and not self.state.prompt_set:
            raise UserError("mean ablation averages over the corrupted prompts of a prompt set: o opens one, A chooses another kind")
        self.toggle(Intervention(self.node(), kind))

    def do_patch(self) -> None:
        self.ready()
        if self.state.prompt.corrupt is None:
            raise UserError("patching takes the value from the other prompt, and there is no corrupted prompt: E types one, o opens a set")
        self.toggle(Intervention(self.node(), "patch"))

    def do_ablation(self) -> None:
        items = [Item(k, OPS[k]) for k in ABLATIONS]
        self.mount(
            Picker(
                f"kind of ablation (now {self.state.ablation})",
                items,
                lambda item, typed: item and self.guard(lambda: self.act("ablation", kind=item.key)),
            )
        )

    def do_scale(self) -> None:
        self.ready()
        node = self.node()

        def accept(values: list[str]) -> str:
            try:
                self.act("intervene", intervention=parse_intervention(f"{node}=scale:{values[0]}"))
            except UserError as error:
                return str(error)
            return ""

        self.mount(Editor(f"scale {node}", [("factor", "2.0")], accept, 0, 1, "enter · esc"))

    def do_type_node(self) -> None:
        self.ready()

        def accept(values: list[str]) -> str:
            try:
                for text in values[0].split():
                    self.act("intervene", intervention=parse_intervention(text))
            except UserError as error:
                return str(error)
            return ""

        node = self.node()
        self.mount(
            Editor(
                "interventions",
                [("node=op", f"{node}={self.state.ablation}")],
                accept,
                0,
                1,
                "L2H3@S2=zero 1.2.q=patch L3.mlp=scale:0.5 · enter · esc",
            )
        )

    def do_scope(self) -> None:
        here = self.scopes[self.pane] != "here"
        self.scopes[self.pane] = "here" if here else "all"
        self.say(f"a, p and s act on {self.node()}: " + ("this position only" if here else "all positions"))

    def do_base(self) -> None:
        new = "corrupt" if self.state.base == "clean" else "clean"
        self.act("base", value=new)
        self.say(
            "denoising: interventions act on the corrupted prompt, p patches from the clean one"
            if new == "corrupt"
            else "noising: interventions act on the clean prompt, p patches from the corrupted one"
        )

    def do_enable(self) -> None:
        if not self.state.interventions:
            raise UserError("no interventions: a ablates the node under the cursor, p patches it")
        self.act("enable", value=not self.state.enabled)
        self.say("interventions are on" if self.state.enabled else "interventions are off: x turns them on again")

    def do_clear(self) -> None:
        if self.state.interventions:
            self.act("clear")
            self.say("interventions cleared; u brings them back")

    def do_undo(self) -> None:
        self.walk("undo")

    def do_redo(self) -> None:
        self.walk("redo")

    def walk(self, way: str) -> None:
        stack = self.session.past if way == "undo" else self.session.future
        name = stack[-1][1] if stack else ""
        self.act(way)
        self.say(f"{'undid' if way == 'undo' else 'did again'}: {name} ({len(self.session.past)} back, {len(self.session.future)} forward)")

    # -------------------------------------------------------------- views

    def turn(self, name: str, allowed: tuple[str, ...] | None = None) -> None:
        values, now = allowed or VIEWS[name], self.state.views[name]
        self.act("view", name=name, value=values[(values.index(now) + 1) % len(values) if now in values else 0])

    def do_view(self) -> None:
        pane = self.panes[self.pane]
        self.turn(pane.view, pane.stats(self))

    def do_mode(self) -> None:
        self.turn("mode")

    def do_which(self) -> None:
        has_corrupt = self.state.prompt.corrupt is not None
        kinds = WHICH if has_corrupt else ("now", "clean", "now-clean")
        self.turn("which", tuple(k for k in kinds if "-" not in k) if self.pane == "lens" else kinds)

    def do_source(self) -> None:
        self.turn("patching.over" if self.pane == "patching" else "attention.source")

    def do_points(self) -> None:
        self.turn("patching.show" if self.pane == "patching" else "lens.points")

    def do_sweep(self) -> None:
        self.ready()
        if self.pane != "patching":
            raise UserError("sweeps live in pane 4: 4 goes there, v chooses what is swept, S runs it")
        request = self.panes["patching"].request(self)
        if request.op == "patch" and self.state.prompt.corrupt is None:
            raise UserError("patching takes values from the other prompt, and there is no corrupted prompt: E types one, o opens a set")
        if request.over_set and not self.state.prompt_set:
            raise UserError("no prompt set is open: o opens one, R goes back to the prompt")
        self.started.add(request)
        self.refresh_wants()

    def do_operation(self) -> None:
        self.turn("patching.op")

    def do_weighted(self) -> None:
        self.turn("patching.effect" if self.pane == "patching" else "attention.weighted")

    def do_multiples(self) -> None:
        self.turn("attention.layer")

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

        self.mount(Picker("lens (or type: tuned FOLDER, jacobian FILE; F fits a tuned lens)", items, chosen, free=True))

    def do_fit(self) -> None:
        self.ready()
        name = re.sub(r"\W+", "-", self.info.name).strip("-")

        def accept(values: list[str]) -> str:
            text, out, steps = values
            if not steps.isdigit() or int(steps) < 1:
                return "steps is a number"
            self.fit(TuneLens(text, out, int(steps), resume=(Path(out) / "checkpoint.safetensors").exists()))
            return ""

        fields = [("text file", ""), ("folder", str(ROOT / "exports" / f"tuned-lens-{name}")), ("steps", "250")]
        self.mount(Editor("fit a tuned lens", fields, accept, 0, 1, "text file empty: the zoo's corpus · enter starts, J shows and cancels · esc"))

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
        self.mount(Panel("over depth", rows, f"{result.convention} · esc"))

    # -------------------------------------------------------------- finding

    def do_ranked(self) -> None:
        if self.pane == "patching":
            self.rank_cells()
            return
        result, stat = self.result("heads", HeadStatsResult), self.state.views["attention.stat"]
        if result is None or stat not in result.stats:
            raise UserError("the heads map has no numbers yet")
        self.rank(f"heads by {HEAD_STATS[stat]}", result.stats[stat])

    def rank_cells(self) -> None:
        pane, grid = self.panes["patching"], self.panes["patching"].table.grid
        result = next((r for r in pane.shown(self) if r), None)
        if result is None or grid is None:
            raise UserError("nothing has been swept yet: S runs the sweep")
        cells = [(int(r), int(c)) for r, c in np.argwhere(np.isfinite(grid.values))]
        cells.sort(key=lambda rc: -abs(float(grid.values[rc])))
        items = [Item(result.address(r, c) or f"{result.rows[r]} × {result.cols[c]}", f"{float(grid.values[r, c]):+.4f}", "", (r, c)) for r, c in cells[:2000]]
        self.mount(Picker(f"cells by {self.state.views['patching.show']}", items, lambda item, typed: item and pane.go(self, result, *item.value)))

    def rank(self, title: str, scores: np.ndarray) -> None:
        """Heads by score, to filter and go to."""
        order = [divmod(int(i), scores.shape[1]) for i in np.argsort(-np.abs(np.nan_to_num(scores)), axis=None, kind="stable")]
        items = [Item(f"L{x}H{h}", f"{scores[x, h]:+.4f}", "", (x, h)) for x, h in order]

        def chosen(item: Item | None, typed: str) -> None:
            if item is not None:
                self.move(layer=item.value[0], head=item.value[1], comp="head")

        self.mount(Picker(title, items, chosen))

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

        self.mount(Picker(f"mean attention over {len(found.prompts)} prompts, {RUN_NAMES[which]}", items, chosen))

    def do_detect(self) -> None:
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
        self.mount(Editor("detector", fields, accept, 0, 1, f"cells destination>source, or {', '.join(DETECTORS)}; measure mul or abs · enter · esc"))

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

    def do_worst(self) -> None:
        result = self.result("attribution", AttributionSetResult)
        if result is None:
            raise UserError("the worst prompt is known after v has turned the attribution pane to the prompt set")
        self.act("go", index=result.worst)

    def do_search(self) -> None:
        def accept(values: list[str]) -> str:
            try:
                return self.find(values[0])
            except UserError as error:
                return str(error)

        self.mount(Editor("find", [("find", self.needle)], accept, 0, 1, "a token, or a node such as L2H3 or L1.resid_mid@S2 · enter · esc"))

    def find(self, needle: str) -> str:
        self.ready()
        if not needle:
            return "type a token or a node"
        with contextlib.suppress(UserError):
            node = parse_node(needle)
            if node.layer is None or node.layer >= self.info.n_layers or (node.head or 0) >= self.info.n_heads:
                return f"{needle} is not in this model: {self.info.n_layers} layers, {self.info.n_heads} heads"
            labels = self.tokens.tokens.labels if self.tokens else {}
            pos = (
                labels.get(node.pos, self.cursor.pos)
                if isinstance(node.pos, str)
                else self.cursor.pos
                if node.pos is None
                else node.pos % max(self.length(), 1)
            )
            where = {"point": node.site} if node.site.startswith("resid") else {"comp": node.site if node.site in ("attn", "mlp") else "head"}
            self.move(layer=node.layer, pos=pos, **where, **({"head": node.head} if node.head is not None else {}))
            return ""
        self.needle, self.matches = needle, self.panes[self.pane].find(self, needle)
        if not self.matches:
            return f"{needle!r} is not on this pane"
        self.do_find_next(0)
        return ""

    def do_find_next(self, by: int = 1) -> None:
        if not self.matches:
            raise UserError("nothing to find: / searches")
        here = next((n for n, m in enumerate(self.matches) if all(getattr(self.cursor, k) == v for k, v in m.items())), -by if by > 0 else 0)
        at = (here + by) % len(self.matches)
        self.move(**self.matches[at])
        self.say(f"{self.needle!r}: match {at + 1} of {len(self.matches)}")

    def do_find_previous(self) -> None:
        self.do_find_next(-1)

    # -------------------------------------------------------------- lists

    def do_help(self) -> None:
        items = [Item(" ".join(show_key(k) for k in a.keys.split(",")), a.help, a.group, a) for a in self.table]
        self.mount(Picker("keys", items, lambda item, typed: item and self.action_do(item.value.id)))

    def do_palette(self) -> None:
        items = [Item(a.id, a.help, " ".join(show_key(k) for k in a.keys.split(",")), a) for a in self.table]
        views = [Item(f"{n}={v}", "view", "", (n, v)) for n, values in VIEWS.items() for v in values]

        def chosen(item: Item | None, typed: str) -> None:
            if item is None:
                return
            self.action_do(item.value.id) if isinstance(item.value, Action) else self.guard(lambda: self.act("view", name=item.value[0], value=item.value[1]))

        self.mount(Picker("command", items + views, chosen))

    @work(group="models", exclusive=True)
    async def do_models(self) -> None:
        items = [Item("zoo", "the embedded model", "")]
        with contextlib.suppress(Superseded, EngineError):
            found = await self.link.ask("models", Models(), 0)
            items = [Item(c.name, c.where, c.note, c.name) for c in found.choices]

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
            self.guard(lambda: self.act("model", load=load))

        self.mount(Picker("model (or type a folder or hub name, then dtype=bfloat16 base=gpt2 …)", items, chosen, free=True))

    @work(group="identities", exclusive=True)
    async def do_honesty(self) -> None:
        if self.info is None:
            self.say(f"no model yet: {self.busy}", BAD)
            return
        panel = Panel("honesty", [[(" checking the identities on this model and prompt…", DIM)]], "esc closes")
        await self.mount(panel)
        try:
            found = await self.link.ask("identities", Identities(self.state.study), 1)
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
        jobs = list(self.link.jobs.values())
        rows = [
            [
                (f" {j.slot:12}", BOLD),
                (f"{type(j.request).__name__:12}", PLAIN),
                (f" {j.progress.done}/{j.progress.total} {j.progress.text}", DIM),
            ]
            for j in jobs
        ]

        def cancel(at: int) -> None:
            if jobs:
                self.link.cancel(jobs[at].id)
                panel.rows.pop(at)
                jobs.pop(at)
                panel.replace(panel.rows or [[(" no jobs", DIM)]])

        panel = Panel("jobs", rows or [[(" no jobs are running", DIM)]], "x cancels · esc closes", bool(rows), {"x": cancel})
        self.mount(panel)

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

        self.mount(Picker("restore a session", items, chosen, free=True))

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

    def do_interrupt(self) -> None:
        jobs = [j for j in self.link.jobs.values() if j.slot != "load"]
        for job in jobs:
            self.link.cancel(job.id)
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
            Item("prompt", "the prompt as a line of a prompt set", ".jsonl", lambda: self.prompt_line()),
        ]
        self.mount(Picker("copy", choices, lambda item, typed: item and self.guard(lambda: self.export(name, item))))

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
