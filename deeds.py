"""What the keys do: an action `x` of the table in actions.py is the method `do_x` of Deeds, which the app inherits."""

import contextlib
from dataclasses import replace
from pathlib import Path

from textual import work

import pictures
from link import EngineError, Superseded
from techniques.attribution.requests import AttributionSetResult
from techniques.output.requests import RunResult
from vocabulary.alignment import check_pairs
from vocabulary.nodes import ABLATIONS, Intervention, OPS, parse_intervention, parse_node, UserError
from vocabulary.prompts import ALIGNMENTS, METRICS, Prompt, read_prompt_set, WHICH
from vocabulary.requests import Check, CheckResult
from session import VIEWS
from utils import ROOT, show_token, visible
from widgets import BAD, DIM, GOOD, PLAIN, WARN, Editor, Overlay, Item, Picker, Spans


class Deeds:
    """What the keys do. The app gives it the state, the cursor, the engine and the panes."""

    # -------------------------------------------------------------- actions

    def action_do(self, name: str) -> None:
        self.say("")
        try:
            getattr(self, f"do_{name}")()
        except UserError as error:
            self.say(str(error), BAD)

    def open(self, overlay: Overlay) -> None:
        """Show an overlay; it has the focus at once."""
        self.mount(overlay)
        self.screen.set_focus(overlay)

    def action_noop(self) -> None: ...

    def act(self, name: str, /, **args: object) -> None:
        """Change the state through the session, then show it."""
        before = self.state.prompt
        try:
            self.session.do(name, **args)
        except OSError as error:
            raise UserError(f"the session can't be written to {self.session.path}: {error.strerror}; free space or permissions, then repeat") from error
        if self.state.prompt != before:
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
        elif self.pane == "features" and self.panes["features"].back(self):
            return
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
        self.open(
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

    def do_align(self) -> None:
        """How positions stand against each other: seen, chosen, edited."""
        self.ready()
        check, s = self.answers.get(Check(self.state.prompt, self.state.align)), self.state
        if not isinstance(check, CheckResult) or check.corrupt is None:
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
            if item is None or item.value != "edit":
                how = item.value if item else typed.strip()
                if s.prompt.alignment:
                    self.act("prompt", prompt=replace(s.prompt, alignment=()))
                self.guard(lambda: self.act("align", how=how))
                self.say(f"alignment: {ALIGNMENTS[self.state.align]}")
                return
            text = " ".join(f"{a}-{b}" for a, b in check.alignment)

            def accept(values: list[str]) -> str:
                try:
                    pairs = tuple(tuple(int(x) for x in pair.split("-")) for pair in values[0].split())
                    check_pairs(pairs, len(here), len(there))
                    assert all(len(p) == 2 for p in pairs)
                except (ValueError, AssertionError):
                    return "write pairs of positions, clean-corrupted: 0-0 1-1 4-6"
                except UserError as error:
                    return str(error)
                self.act("prompt", prompt=replace(s.prompt, alignment=pairs))
                return ""

            self.open(Editor("alignment", [("pairs", text)], accept, 0, 1, "clean-corrupted · enter · esc", True))

        self.open(Picker(f"alignment: {now}, {len(check.alignment)} pairs", items, chosen))

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

        self.open(Picker("prompt set", items, chosen, free=True))

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

        self.open(Picker("metric (type kind@position for another position: prob@-2, logit_diff@S2)", items, chosen, free=True))

    def do_ids(self) -> None:
        self.turn("ids")

    # -------------------------------------------------------------- interventions

    def toggle(self, new: Intervention) -> None:
        if new in self.state.interventions:
            self.act("drop", intervention=new)
            self.say(f"restored {new.node}", GOOD)
        else:
            self.intervene(new)

    def ready(self) -> None:
        if self.info is None:
            raise UserError(f"no model yet: {self.busy}" + ("" if self.link.alive else ": ctrl+e restarts the engine"))

    def intervene(self, new: Intervention) -> None:
        """Add an intervention that this model and prompt can take; else a UserError, and nothing changes."""
        node, i = new.node, self.info
        if node.site == "sae" and node.layer not in {s.layer for name, s in self.known_saes.items() if name in self.state.saes}:
            raise UserError(f"{node}: no SAE of layer {node.layer} is loaded: z in pane 6 lists those that fit")
        if node.layer is not None and node.layer >= i.n_layers or (node.head or 0) >= i.n_heads or (node.site == "neuron" and node.index >= i.d_mlp):
            raise UserError(f"{node} is not in this model: it has {i.n_layers} layers, {i.n_heads} heads, {i.d_mlp} neurons")
        if node.site == "resid_mid" and i.parallel:
            raise UserError(f"{node}: attention and MLP are parallel in this model, so there is no resid_mid")
        run = self.result("run", RunResult)
        if run is not None:
            row, n = run.now.tokens, len(run.now.tokens.ids)
            if isinstance(node.pos, int) and not -n <= node.pos < n:
                raise UserError(f"{node}: the prompt has {n} tokens, 0 to {n - 1}")
            if isinstance(node.pos, str) and node.pos not in row.labels:
                raise UserError(f"{node}: the prompt's labels are {', '.join(row.labels)}")
            aligned = self.state.align or self.state.prompt.alignment
            if new.op == "patch" and run.corrupt is not None and not aligned and len(run.corrupt.tokens.ids) != len(run.clean.tokens.ids):
                a, b = len(run.clean.tokens.ids), len(run.corrupt.tokens.ids)
                raise UserError(f"patching is position by position, and clean has {a} tokens, corrupted {b}: make them equal with e or E, or align them with %")
        if new.op == "patch" and self.state.prompt.corrupt is None:
            raise UserError("patching takes the value from the other prompt, and there is no corrupted prompt: E types one, o opens a set")
        if new.op.startswith("mean") and not self.state.prompt_set:
            raise UserError("mean ablation averages over the corrupted prompts of a prompt set: o opens one, A chooses another kind")
        self.act("intervene", intervention=new)
        if new.op.startswith("mean") and self.state.prompt not in self.state.prompt_set:
            self.say(f"{new}: the mean is over {Path(self.state.set_path).stem}, a set that this prompt is not from", WARN)
        else:
            self.say(f"{new}: {OPS[new.op]}", GOOD)

    def do_ablate(self) -> None:
        self.ready()
        self.toggle(Intervention(self.node(), self.state.ablation))

    def do_patch(self) -> None:
        self.ready()
        self.toggle(Intervention(self.node(), "patch"))

    def do_ablation(self) -> None:
        items = [Item(k, OPS[k]) for k in ABLATIONS]
        self.open(
            Picker(
                f"kind of ablation (now {self.state.ablation})",
                items,
                lambda item, typed: item and self.guard(lambda: self.act("ablation", kind=item.key)),
            )
        )

    def do_scale(self) -> None:
        self.ready()
        if self.pane == "features":
            self.do_steer()
            return
        node = self.node()

        def accept(values: list[str]) -> str:
            try:
                self.intervene(parse_intervention(f"{node}=scale:{values[0]}"))
            except UserError as error:
                return str(error)
            return ""

        self.open(Editor(f"scale {node}", [("factor", "2.0")], accept, 0, 1, "enter · esc"))

    def do_type_node(self) -> None:
        self.ready()

        def accept(values: list[str]) -> str:
            try:
                for new in [parse_intervention(text) for text in values[0].split()]:
                    self.intervene(new)
            except UserError as error:
                return str(error)
            return ""

        node = self.node()
        self.open(
            Editor(
                "interventions",
                [("node=op", f"{node}={self.state.ablation}")],
                accept,
                0,
                1,
                "L2H3@S2=zero 1.2.q=patch L3.mlp=scale:0.5 · enter · esc",
                True,
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
        self.turn({"patching": "patching.over", "circuit": "circuit.over"}.get(self.pane, "attention.source"))

    def do_points(self) -> None:
        self.turn({"patching": "patching.show", "circuit": "circuit.each", "features": "features.order"}.get(self.pane, "lens.points"))

    def do_sweep(self) -> None:
        self.ready()
        if self.pane == "circuit":
            self.run_circuit()
            return
        if self.pane == "features":
            self.run_features()
            return
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
        self.turn("circuit.rest" if self.pane == "circuit" else "patching.op")

    def do_weighted(self) -> None:
        if self.pane == "features":
            self.do_sae_error()
            return
        self.turn({"patching": "patching.effect", "circuit": "circuit.path"}.get(self.pane, "attention.weighted"))

    def do_multiples(self) -> None:
        self.turn("attention.layer")

    # -------------------------------------------------------------- finding

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

        self.open(Editor("find", [("find", self.needle)], accept, 0, 1, "a token, or a node such as L2H3 or L1.resid_mid@S2 · enter · esc", True))

    def find(self, needle: str) -> str:
        self.ready()
        if not needle:
            return "type a token or a node"
        with contextlib.suppress(UserError):
            node = parse_node(needle)
            if node.layer is None or node.layer >= self.info.n_layers or (node.head or 0) >= self.info.n_heads:
                return f"{needle} is not in this model: {self.info.n_layers} layers, {self.info.n_heads} heads"
            row, n = (self.tokens.tokens, self.length()) if self.tokens else (None, 0)
            if isinstance(node.pos, str) and (row is None or node.pos not in row.labels):
                return f"the prompt's labels are {', '.join(row.labels) if row else 'not known yet'}"
            if isinstance(node.pos, int) and not -n <= node.pos < n:
                return f"the prompt has {n} tokens, 0 to {n - 1}"
            if node.site == "sae":
                if wrong := self.panes["features"].show_feature(self, node):
                    return wrong
                self.show_pane("features")
                if node.pos is not None:
                    self.scopes["features"] = "here"
                    self.move(pos=row.labels[node.pos] if isinstance(node.pos, str) else node.pos % n)
                self.say(f"a, p and s act on {self.node()}")
                return ""
            resid = node.site.startswith("resid")
            if resid != (self.pane == "lens"):
                self.show_pane("lens" if resid else self.pane if self.pane in ("attention", "attribution", "circuit", "weights") else "attention")
            if node.pos is not None:
                self.scopes[self.pane] = "here"
            pos = row.labels[node.pos] if isinstance(node.pos, str) else self.cursor.pos if node.pos is None else node.pos % n
            where = {"point": node.site} if resid else {"comp": node.site if node.site in ("attn", "mlp") else "head"}
            self.move(layer=node.layer, pos=pos, **where, **({"head": node.head} if node.head is not None else {}))
            self.say(f"a, p and s act on {self.node()}")
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
