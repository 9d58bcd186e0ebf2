"""What the keys do with circuits: keep and drop, paths, scores, discovery, files. The app inherits it beside Deeds and Quests."""

import dataclasses
import re
from pathlib import Path

import numpy as np
from textual import work

import drawings
from link import EngineError, Superseded
from techniques.circuits.requests import Compare, Discover, DiscoverResult, METHODS, PathPatch
from vocabulary.circuit import check_receivers, Circuit, COMBINE, LOGITS
from vocabulary.nodes import Node, parse_node, UserError
from vocabulary.wire import to_json
from session import VIEWS
from utils import ROOT
from widgets import BAD, BOLD, DIM, GOOD, PLAIN, WARN, Editor, Item, Panel, Picker

FOLDER = ROOT / "exports" / "circuits"


class Circuits:
    """Methods of the app: do_<id> for actions of the table in actions.py."""

    def do_pane_circuit(self) -> None:
        self.show_pane("circuit")

    def do_keep(self) -> None:
        """Keep the node under the cursor, or drop it."""
        self.ready()
        node = self.node()
        if node.site == "head" and node.part == "pattern":
            node = dataclasses.replace(node, part="z")
        if isinstance(node.pos, int) and self.tokens and (label := next((k for k, v in self.tokens.tokens.labels.items() if v == node.pos), None)):
            node = dataclasses.replace(node, pos=label)
        self.act("keep", part=str(node))
        kept = self.state.current
        verb = "kept in" if str(node) in kept.nodes else "dropped from"
        self.say(f"{node} {verb} {kept.name}: {len(kept.nodes)} nodes, {len(kept.edges)} edges (u undoes)", GOOD)

    # -------------------------------------------------------------- running what the pane shows

    def run_circuit(self) -> None:
        self.ready()
        request = self.panes["circuit"].request(self)
        if request is None:
            raise UserError("there is no circuit yet: c keeps the node under the cursor, Y opens one, U finds one")
        if isinstance(request, PathPatch) and self.state.prompt.corrupt is None and not request.over_set:
            raise UserError("path patching takes values from the other prompt, and there is no corrupted prompt: E types one, o opens a set")
        self.started.add(request)
        self.refresh_wants()

    def do_receivers(self) -> None:
        """Choose where paths end."""
        self.ready()
        c, now = self.cursor, self.state.receivers
        here = [str(Node("head", c.layer, c.head, p)) for p in "qkv"] if c.comp == "head" else []
        items = [Item(r, "take it away" if r in now else "add it", "", r) for r in dict.fromkeys((*now, *here, str(Node("mlp", c.layer)), LOGITS))]
        group = [
            Item(name, f"the q, k or v of a group: {' '.join(some)}", "", some)
            for name, some in (self.state.current.groups if self.state.current else {}).items()
        ]

        def put(some: list[str]) -> None:
            check_receivers(some, self.info)
            for place in [p for r in some if r != LOGITS and (p := parse_node(r).pos) is not None]:
                row = self.tokens.tokens if self.tokens else None
                if row and place not in row.labels and place not in range(-len(row.ids), len(row.ids)):
                    raise UserError(f"@{place}: the prompt has {len(row.ids)} tokens and the labels {', '.join(row.labels)}")
            self.act("receivers", addresses=some)
            self.say(f"paths end at {', '.join(self.state.receivers)}: S runs them")

        def begin(some: list[str]) -> None:
            self.act("senders", addresses=some)
            if self.state.views["circuit.each"] != "receiver":
                self.act("view", name="circuit.each", value="receiver")
            self.say(f"paths begin at {', '.join(some) or 'the node under the cursor'} and go to each receiver: S runs them")

        items += [Item("from the node under the cursor", "to each receiver", "", ("from",))]
        items += [
            Item(f"from {name}", f"a group together, to each receiver: {' '.join(some)}", "", ("from", *some))
            for name, some in (self.state.current.groups if self.state.current else {}).items()
        ]

        def chosen(item: Item | None, typed: str) -> None:
            words = list(item.value) if item and isinstance(item.value, tuple) else typed.replace(",", " ").split() if item is None else []
            if words[:1] == ["from"]:
                self.guard(lambda: begin(words[1:]))
                return
            if item is None:
                some = typed.replace(",", " ").split()
            elif isinstance(item.value, tuple):
                some = [f"{n}.v" for n in item.value if parse_node(n).site == "head"]
            else:
                some = [r for r in now if r != item.value] if item.value in now else [*(r for r in now if r != LOGITS), item.value]
            self.guard(lambda: put(some))

        self.open(Picker(f"receivers: {', '.join(now)} (or type: L3H2.q L3H3.q, or: from L0H1 L0H3)", items + group, chosen, free=True))

    # -------------------------------------------------------------- the list of circuits

    def do_circuits(self) -> None:
        state, now = self.state, self.state.current
        items = [Item("new", "an empty circuit", "", self.new_circuit), Item("discover", "EAP, EAP-IG, ACDC, greedy: a job", "", self.do_discover)]
        items += [Item(f"go to {c.name}", f"{len(c.nodes)} nodes, {len(c.edges)} edges, {c.model}", "", lambda c=c: self.act("select_circuit", name=c.name)) for c in state.circuits if c is not now]  # fmt: skip
        here = {c.name for c in state.circuits}
        items += [Item(f"found {name}", f"by {done.method}, faithfulness {done.score:.3f}: put it among the circuits", "", lambda done=done: self.act("put_circuit", circuit=to_json(done.circuit)))
                  for name, done in self.found.items() if name not in here and done.circuit.nodes]  # fmt: skip
        if now:
            items += [
                Item("rename", now.name, "", lambda: self.name_it("rename", now.name, lambda to: self.act("rename_circuit", name=now.name, to=to))),
                Item("group", "name some of its nodes", "", self.group_nodes),
                Item("compare", "with a published circuit or another", "", self.compare_with),
                *(Item(how, f"{COMBINE[how]}: {now.name} and another", "", lambda how=how: self.combine_with(how)) for how in COMBINE if len(state.circuits) > 1),
                Item("save", "as JSON", "", lambda: self.save_circuit()),
                *(Item(f"export {kind}", what, "", lambda kind=kind: self.export_circuit(kind)) for kind, what in (
                    ("dot", "Graphviz"), ("mermaid", "a Mermaid flowchart"), ("table", "tab-separated"), ("text", "the drawing"),
                    ("python", "a script that uses TransformerLens alone and prints the faithfulness"))),
                Item("delete", f"{now.name} (u brings it back)", "", lambda: self.act("delete_circuit", name=now.name)),
            ]  # fmt: skip
        items += [
            Item(f"rest {r}", "what is outside the circuit is set to", "", lambda r=r: self.act("view", name="circuit.rest", value=r))
            for r in VIEWS["circuit.rest"]
        ]
        other = "count" if state.views["circuit.mlps"] == "stay" else "stay"
        items += [
            Item(f"score by {by}", what, "now" if by == state.views["circuit.by"] else "", lambda by=by: self.act("view", name="circuit.by", value=by))
            for by, what in (
                ("auto", "by edges when they lead from embed to logits, else by nodes"),
                ("nodes", "heads, MLPs, features"),
                ("edges", "only they carry the clean run"),
            )
        ]
        items += [Item(f"mlps {other}", "MLPs outside the circuit are replaced too" if other == "count" else "MLPs always stay", "", lambda: self.act("view", name="circuit.mlps", value=other))]  # fmt: skip
        items += [Item(f"open {name}", "published", "", lambda name=name: self.open_circuit(drawings.PUBLISHED / f"{name}.json")) for name in drawings.published_names()]  # fmt: skip
        items += [Item(f"open {p.stem}", str(p.parent.relative_to(ROOT)), "", lambda p=p: self.open_circuit(p)) for p in sorted(FOLDER.glob("*.json"))]

        def chosen(item: Item | None, typed: str) -> None:
            self.guard(item.value if item else lambda: self.open_circuit(Path(typed.strip())))

        self.open(Picker("circuits (or type the path of a .json file)", items, chosen, free=True))

    def free_name(self, start: str) -> str:
        names, n = {c.name for c in self.state.circuits}, 2
        name = start
        while name in names:
            name, n = f"{start}-{n}", n + 1
        return name

    def name_it(self, title: str, start: str, then) -> None:
        def accept(values: list[str]) -> str:
            try:
                then(values[0].strip())
            except UserError as error:
                return str(error)
            return ""

        self.open(Editor(title, [("name", start)], accept, 0, 1, "enter · esc"))

    def new_circuit(self) -> None:
        self.name_it("new circuit", self.free_name("circuit"), lambda name: self.act("new_circuit", name=name))

    def group_nodes(self) -> None:
        now = self.state.current
        inside = [n for n in now.nodes if not any(n in some for some in now.groups.values())]

        def accept(values: list[str]) -> str:
            try:
                self.act("group", name=values[0].strip(), nodes=values[1].split())
            except UserError as error:
                return str(error)
            self.say(f"group {values[0].strip()} of {self.state.circuit}")
            return ""

        hint = "no nodes: the group goes · enter · esc"
        self.open(Editor(f"a group of {now.name}", [("name", "S-inhibition"), ("nodes", " ".join(inside))], accept, 0, 1, hint, True))

    def combine_with(self, how: str) -> None:
        now = self.state.current
        items = [Item(c.name, f"{len(c.nodes)} nodes", "", c.name) for c in self.state.circuits if c is not now]
        put = lambda item, typed: item and self.guard(lambda: self.act("combine", how=how, one=now.name, other=item.key, name=self.free_name(how)))  # noqa: E731
        self.open(Picker(f"{how} of {now.name} and", items, put))

    def open_circuit(self, path: Path) -> None:
        circuit, wrong = drawings.read_circuit(path)
        circuit = dataclasses.replace(circuit, name=self.free_name(circuit.name), model=circuit.model or self.state.model.model)
        self.act("put_circuit", circuit=circuit)
        if self.info and any((n := parse_node(a)).layer >= self.info.n_layers or (n.head or 0) >= self.info.n_heads for a in circuit.nodes):
            wrong = (
                *wrong,
                f"{circuit.name} is of {circuit.model or 'another model'}: {self.info.name} does not have all its nodes, so it can be compared but not scored",
            )
        if len(wrong) > 1:
            self.open(Panel(f"{circuit.name}: {len(wrong)} entries left out", [[(f" {w}", WARN)] for w in wrong], "esc"))
        self.say(wrong[0] if wrong else f"{circuit.name}: {len(circuit.nodes)} nodes, {len(circuit.edges)} edges", WARN if wrong else GOOD)

    def save_circuit(self) -> None:
        now = self.state.current
        path = FOLDER / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', now.name)}.json"
        self.written(path, lambda: drawings.write_circuit(now, path))

    def export_circuit(self, kind: str) -> None:
        now, pane = self.state.current, self.panes["circuit"]
        now = now if kind != "python" or pane.by_edges(self) else dataclasses.replace(now, edges=())
        result, study, views = pane.scored(self), pane.study(self), self.state.views
        suffix, make = {
            "dot": (".dot", lambda: drawings.dot(now)), "mermaid": (".mmd", lambda: drawings.mermaid(now)), "table": (".tsv", lambda: drawings.table(now, result)),
            "text": (".txt", lambda: "\n".join(drawings.draw(now, dict(zip(result.parts, result.effects.tolist())) if result else None)) + "\n"),
            "python": (".py", lambda: drawings.circuit_script(now, study, self.info, self.state.model, views["circuit.rest"], views["circuit.mlps"] == "count", result)),
        }[kind]  # fmt: skip
        text = make()
        path = FOLDER / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', now.name)}{suffix}"

        def put() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

        self.written(path, put)
        self.copy_to_clipboard(text)

    def written(self, path: Path, write) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from error
        self.say(f"written {path.relative_to(ROOT)}", GOOD)

    def compare_with(self) -> None:
        now = self.state.current
        found = self.found.get(now.name)
        scored = (found.edges, tuple(found.scores.tolist())) if isinstance(found, DiscoverResult) and found.method != "greedy" else ((), ())
        items = [Item(name, "published", "", Compare(now, Circuit(), name, *scored)) for name in drawings.published_names()]
        items += [Item(c.name, f"{len(c.nodes)} nodes", "", Compare(now, c, "", *scored)) for c in self.state.circuits if c is not now]

        def chosen(item: Item | None, typed: str) -> None:
            request = item.value if item else Compare(now, Circuit(), typed.strip(), *scored)
            self.compare(request)

        self.open(Picker(f"compare {now.name} with (or type the path of a .json file)", items, chosen, free=True))

    @work(group="compare", exclusive=True)
    async def compare(self, request: Compare) -> None:
        try:
            self.have["compare"] = (request, await self.link.ask("compare", request, 1))
        except Superseded:
            return
        except EngineError as error:
            self.say(str(error), BAD)
            return
        self.act("view", name="circuit.view", value="compare")

    # -------------------------------------------------------------- discovery

    def do_discover(self) -> None:
        self.ready()
        items = [Item(m, what, "", m) for m, what in METHODS.items()]
        self.open(Picker("discover a circuit by", items, lambda item, typed: item and self.how_to_discover(item.key)))

    def how_to_discover(self, method: str) -> None:
        fields = {"acdc": [("threshold", "0.1")], "greedy": [("target", "0.85"), ("heads", "0")], "features": [("features", "30"), ("steps", "5")]}.get(
            method, [("edges", "40"), ("steps", "5")]
        )
        rest = self.state.views["circuit.rest"]

        def accept(values: list[str]) -> str:
            try:
                numbers = [float(v) if name in ("threshold", "target") else int(v) for v, (name, _) in zip(values, fields)]
            except ValueError:
                return "write numbers, whole ones for " + " and ".join(n for n, _ in fields if n not in ("threshold", "target"))
            if not all(np.isfinite(numbers)):
                return "write finite numbers"
            study = self.discovery_study()
            request = Discover(self.state.with_saes(study) if method == "features" else study, method, rest=rest, name=self.free_name(method))
            if method == "acdc":
                request = dataclasses.replace(request, threshold=numbers[0])
            elif method == "greedy":
                request = dataclasses.replace(request, target=numbers[0], nodes=int(numbers[1]))
            elif method == "features":
                request = dataclasses.replace(request, nodes=int(numbers[0]), steps=int(numbers[1]))
            else:
                request = dataclasses.replace(request, edges=int(numbers[0]), steps=int(numbers[1]))
            self.discover(request)
            return ""

        self.open(Editor(f"{method} · rest {rest}", fields, accept, 0, 1, "enter estimates the time first · esc"))

    def discovery_study(self):
        return self.panes["circuit"].study(self)

    @work(group="discover", exclusive=True)
    async def discover(self, request: Discover) -> None:
        """The estimate of the time first; then, when it is wanted, the job."""
        self.say(f"{request.method}: estimating the time…", DIM)
        try:
            dry = await self.link.ask("discover", dataclasses.replace(request, dry=True), 1)
        except Superseded:
            return
        except EngineError as error:
            self.say(str(error), BAD)
            return
        self.say("")
        n = len(request.study.prompt_set) or 1
        rows = [
            [
                (f" about {dry.expected:.0f} s" if dry.expected < 100 else f" about {dry.expected / 60:.0f} min", BOLD),
                (f" over {n} prompt{'s' * (n != 1)}", PLAIN),
            ],
            [(f" {METHODS[request.method]}", DIM)],
        ]
        go = lambda at: (panel.action_close(), self.run_discovery(request))  # noqa: E731
        panel = Panel(f"{request.method}", rows, "enter starts it (J lists it, x cancels it there) · esc", True, {"enter": go})
        self.open(panel)

    @work(group="discovery", exclusive=True)
    async def run_discovery(self, request: Discover) -> None:
        try:
            done = await self.link.ask("discover", request, 2)
        except Superseded:
            self.say(f"{request.method} was cancelled", WARN)
            return
        except EngineError as error:
            self.say(str(error), BAD)
            return
        self.found[done.circuit.name] = done
        if not done.circuit.nodes:
            self.say(done.warning or f"{request.method} found no circuit", WARN)
            return
        self.found_by[done.circuit.name] = request
        if self.session.future:  # what was undone stays redoable
            self.say(
                f"{done.circuit.name} is found, faithfulness {done.score:.3f}: Y, then 'found {done.circuit.name}', puts it among the circuits (and ends redo)",
                GOOD,
            )
            return
        self.act("put_circuit", circuit=to_json(done.circuit))
        self.say(done.warning or f"{done.circuit.name}: {len(done.circuit.nodes)} nodes, {len(done.circuit.edges)} edges, faithfulness {done.score:.3f}, {done.seconds:.1f} s",
                 WARN if done.warning else GOOD)  # fmt: skip
