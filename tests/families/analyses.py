"""Every analysis against the reference, by kind: what `outcomes` returns is, for each part, "" (equal), "refused: why", or what is wrong."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import torch as t
from conftest import PROMPT
from torch import Tensor

from engine import Engine
from families.configs import build
from families.reference import Reference
from techniques.attention.requests import Attention
from techniques.attribution.requests import Attribution
from techniques.circuits.edges import all_edges, edge_values, own_edge
from techniques.circuits.requests import Discover, PathPatch
from techniques.lens.requests import Lens
from techniques.output.requests import Run
from techniques.patching.requests import Estimate, Sweep
from techniques.qk.requests import QK
from techniques.weights.requests import HeadWeights, Singular
from vocabulary.nodes import parse_intervention, parse_node, UserError
from vocabulary.prompts import Study
from vocabulary.requests import Load

TOLERANCE = 1e-4
PROMPT = replace(PROMPT, bos=True)
STUDY = Study(PROMPT)
HEADS, LAYERS = ("z", "q", "k", "v", "pattern"), ("attn", "mlp", "resid_pre", "resid_mid", "resid_post")
KINDS = (*HEADS, *LAYERS, "neurons")
DIFFERS = 10  # the position at which the two prompts differ
SOME, EVERY = (
    (0, DIFFERS, 12, 14),
    5,
)  # positions, and one neuron in so many, at which tables are compared: a place before the change, itself, one between, the last
PAIRS = (
    "embed->L0H0.q", "embed->L1H2.v", "L0H1->L1H2.q", "L0H3->L1H2.k", "L0H1->L1H0.v", "L0.mlp->L1H2.q", "embed->L0.mlp", "L0H1->L0.mlp", "L0H1->L1.mlp", "L0.mlp->L1.mlp",
    "embed->logits", "L0H1->logits", "L1H3->logits", "L1.mlp->logits",
)  # fmt: skip


class Wrong(Exception):
    """An analysis gave something else than the reference."""


def same(got, want, tolerance: float = TOLERANCE) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise Wrong(f"shape {got.shape}, not {want.shape}")
    error = np.abs(got - want)
    if not (error <= tolerance * np.maximum(1, np.abs(want))).all():
        raise Wrong(f"off by {np.nanmax(error):.2g} of {np.nanmax(np.abs(want)):.2g}" if np.isfinite(got).all() else "not finite")


class Case:
    """One family: its folder, Loupe's engine on it, the reference, and both prompts' token ids."""

    def __init__(self, family: str, root: Path):
        self.family, self.folder = family, root / family
        if not self.folder.exists():
            build(family, self.folder)

    @property
    def engine(self) -> Engine:
        return self.loaded("float32")

    @property
    def half(self) -> Engine:
        return self.loaded("bfloat16")

    def loaded(self, dtype: str) -> Engine:
        """Tried once; what loading says is what every analysis says."""
        known = self.__dict__.setdefault("engines", {})
        if dtype not in known:
            known[dtype] = Engine()
            try:
                known[dtype].run(Load(str(self.folder), dtype=dtype))
            except Exception as error:
                known[dtype] = error
        if isinstance(known[dtype], Exception):
            raise known[dtype]
        return known[dtype]

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.family, self.folder)

    @cached_property
    def ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        from transformers import AutoTokenizer

        tok = AutoTokenizer.from_pretrained(self.folder)
        return tuple((0, *tok(text, add_special_tokens=False).input_ids) for text in (PROMPT.clean, PROMPT.corrupt))

    @cached_property
    def answers(self) -> tuple[int, int]:
        from transformers import AutoTokenizer

        tok = AutoTokenizer.from_pretrained(self.folder)
        return tuple(tok(text, add_special_tokens=False).input_ids[0] for text in (PROMPT.answers[0], PROMPT.foils[0]))

    def metric(self, logits: Tensor) -> Tensor:
        """The logit difference at the last position [batch]."""
        return logits[:, -1, self.answers[0]] - logits[:, -1, self.answers[1]]

    def value(self, *args) -> np.ndarray:
        return self.metric(self.reference.run(*args)[0]).numpy()

    def once(self, key: object, make: Callable[[], object]) -> object:
        """What several analyses need of the reference, made once."""
        held = self.__dict__.setdefault("held", {})
        if key not in held:
            held[key] = make()
        return held[key]

    def ask(self, request: object) -> object:
        """What Loupe answers in float32."""
        return self.once(request, lambda: self.engine.run(request))

    @cached_property
    def bases(self) -> tuple[float, float]:
        return tuple(float(self.metric(self.reference.trace(ids)["logits", None])) for ids in self.ids)


# ------------------------------------------------------------------ cells


@dataclass(frozen=True)
class Cell:
    """A node of the reference: a site and a layer, a head or a neuron, a position (None: all)."""

    site: str
    layer: int
    unit: int | None = None
    pos: int | None = None

    def index(self, ref: Reference) -> tuple:
        """Into [position, ...] behind the batch; of a pattern [head, destination, source]."""
        pos = slice(None) if self.pos is None else slice(self.pos, self.pos + 1)
        if self.site == "pattern":
            return self.unit, pos
        if self.site == "neuron":
            return pos, slice(self.unit, self.unit + 1)
        return (pos,) if self.unit is None else (pos, ref.columns(self.site, self.unit))


def address(cell: Cell) -> str:
    """As a user writes it."""
    name = f".mlp.n{cell.unit}" if cell.site == "neuron" else f".{cell.site}" if cell.unit is None else f"H{cell.unit}.{cell.site}"
    return f"L{cell.layer}{name}" + ("" if cell.pos is None else f"@{cell.pos}")


def cells_of(case: Case, kind: str) -> np.ndarray:
    """The cells of a sweep's kind that are looked at, as its table has them: all heads, some positions and neurons."""
    ref = case.reference
    match kind:
        case "z" | "q" | "pattern":
            rows = [[Cell(kind, i, h) for h in range(ref.heads)] for i in range(ref.n)]
        case "k" | "v":
            rows = [[Cell(kind, i, h) for h in range(0, ref.heads, ref.heads // ref.kv_heads)] for i in range(ref.n)]
        case "neurons":
            layer = with_neurons(case)
            rows = [[Cell("neuron", layer, n) for n in range(0, ref.trace(case.ids[0])["neuron", layer].shape[-1], EVERY)]]
        case _:
            rows = [[Cell(kind, i, None, p) for p in SOME] for i in range(ref.n)]
    return np.array(rows, dtype=object)


def looked_at(case: Case, kind: str, table: np.ndarray) -> np.ndarray:
    """Those cells of a whole table [layer, head or position or neuron], whose shape must be right."""
    ref = case.reference
    if kind in LAYERS:
        columns, step = len(case.ids[0]), list(SOME)
    elif kind == "neurons":
        columns, step = ref.trace(case.ids[0])["neuron", with_neurons(case)].shape[-1], slice(None, None, EVERY)
    else:
        columns, step = len(cells_of(case, kind)[0]), slice(None)
    shape = (1 if kind == "neurons" else ref.n, columns)
    if table.shape != shape:
        raise Wrong(f"shape {table.shape}, not {shape}")
    return table[:, step]


def with_neurons(case: Case) -> int:
    """The last layer with neurons; the last at all where there is none."""
    return max((i for i in range(case.reference.n) if case.reference.has("neuron", i)), default=case.reference.n - 1)


def readable(case: Case, kind: str) -> bool:
    """Whether every layer has the site (of neurons: any): what has none must be refused."""
    ref = case.reference
    return any(ref.has("neuron", i) for i in range(ref.n)) if kind == "neurons" else all(ref.has(kind, i) for i in range(ref.n))


def patched(case: Case, cells: list[Cell], base: int, value: Callable[[Cell, tuple], Tensor | float]) -> np.ndarray:
    """The metric with each cell changed alone, one row of a batch each."""
    ref, edits = case.reference, []
    for site, layer in dict.fromkeys((c.site, c.layer) for c in cells):

        def change(x: Tensor, site: str = site, layer: int = layer) -> Tensor:
            x = x.clone()
            for row, c in enumerate(cells):
                if (c.site, c.layer) == (site, layer):
                    x[(row, *c.index(ref))] = value(c, c.index(ref))
            return x

        edits += ref.edit(site, layer, change)
    return case.value([case.ids[base]] * len(cells), edits)


def from_other(case: Case, other: int) -> Callable:
    source = case.reference.trace(case.ids[other])
    return lambda c, index: source[c.site, c.layer][(0, *index)]


# ------------------------------------------------------------------ analyses: each yields (part, what tries it)

Tries = Iterator[tuple[str, Callable[[], None]]]


def logits(case: Case) -> Tries:
    def every_position() -> None:
        found, ref = case.engine.run(Run(STUDY)), case.reference
        for side, ids in zip((found.clean, found.corrupt), case.ids):
            if side.tokens.ids != ids:
                raise Wrong(f"tokens {side.tokens.ids[:3]}, not {ids[:3]}")
            want = ref.trace(ids)["logits", None][0]
            same(side.top_logits, want.gather(1, t.tensor(side.top_ids).long()))
            same(side.top_logits, want.topk(side.top_ids.shape[1]).values)
        same([found.clean.metric, found.corrupt.metric], case.bases)

    yield "", every_position


def lens(case: Case) -> Tries:
    def points() -> None:
        found, ref = case.engine.run(Lens(STUDY, which="clean")), case.reference
        if ref.norm is None:
            raise Wrong("a lens without a final norm")
        a = ref.trace(case.ids[0])
        for point, entropy, diff in zip(found.points, found.entropy, found.logit_diff):
            node = parse_node(point)
            want = ref.logits(a[node.site, node.layer])[0].detach().double()
            same(diff, want[:, case.answers[0]] - want[:, case.answers[1]])
            logp = want.log_softmax(-1)
            same(entropy, -(logp.exp() * logp).sum(-1))

    yield "", points


def attention(case: Case) -> Tries:
    def layers() -> None:
        for layer in range(case.engine.model.info.n_layers):
            found = case.engine.run(Attention(STUDY, layer, which="clean"))
            if not readable(case, "pattern"):
                raise Wrong("a pattern where there is no attention")
            want, seq = case.reference.trace(case.ids[0])["pattern", layer][0], len(case.ids[0])
            got = np.nan_to_num(found.pattern)
            same(got[..., -seq:] if got.shape[-1] == seq else got[..., :seq], want)

    yield "", layers


def interventions(case: Case) -> dict[str, list[tuple[Cell, str, float]]]:
    """By kind: a zero at all positions and another run's value at one, and what the metric must be; all in one run of the reference."""
    asked = []
    for kind in (*HEADS, *LAYERS, "neuron"):
        unit = None if kind in LAYERS else 3 if kind == "neuron" else 2
        asked += [(kind, Cell(kind, 0, unit), "zero"), (kind, Cell(kind, 1, unit, len(case.ids[0]) - 1), "patch")]
    there, other = [a for a in asked if case.reference.has(a[0], a[1].layer)], from_other(case, 1)
    zeros = {cell for _, cell, op in asked if op == "zero"}
    want = patched(case, [cell for _, cell, _ in there], 0, lambda c, i: 0.0 if c in zeros else other(c, i))
    known = {cell: float(x) for (_, cell, _), x in zip(there, want)}
    return {kind: [(cell, op, known.get(cell)) for k, cell, op in asked if k == kind] for kind, _, _ in asked}


def do(case: Case) -> Tries:
    """Interventions on the clean prompt: zero everywhere, and patch at one position."""
    for kind in (*HEADS, *LAYERS, "neuron"):

        def every(kind: str = kind) -> None:
            refused, some = [], case.once("do", lambda: interventions(case))[kind]
            for cell, op, want in some:
                text = f"{address(cell)}={op}"
                try:
                    got = case.engine.run(Run(Study(PROMPT, (parse_intervention(text),)))).now.metric
                except UserError as error:
                    refused.append((error, want is not None))
                    continue
                if want is None:
                    raise Wrong(f"{text}: an answer where the architecture has no such site")
                try:
                    same(got, want)
                except Wrong as wrong:
                    raise Wrong(f"{text} {wrong} (unchanged {case.bases[0]:.3g}, it says {got:.4g}, must be {want:.4g})") from wrong
            if any(there for _, there in refused) or len(refused) == len(some):  # where some layer has no such site, its refusal is what is right
                raise refused[0][0]

        yield kind, every


def swept(case: Case) -> dict[str, np.ndarray]:
    """By kind the metric with each cell's clean value in the corrupted run, all in one run of the reference."""
    tables = {kind: cells_of(case, kind) for kind in KINDS if readable(case, kind)}
    values, start, out = patched(case, [c for some in tables.values() for c in some.flat], 1, from_other(case, 0)), 0, {}
    for kind, some in tables.items():
        out[kind] = values[start : start + some.size].reshape(some.shape)
        start += some.size
    return out


def sweep(case: Case) -> Tries:
    """Denoising: clean values into the corrupted run, one cell at a time."""
    for kind in KINDS:

        def table(kind: str = kind) -> None:
            found = case.ask(Sweep(STUDY, kind, node=f"L{with_neurons(case)}.mlp" if kind == "neurons" else ""))
            if not readable(case, kind):
                raise Wrong("a table where the architecture has no such site")
            same(looked_at(case, kind, found.values), case.once("sweep", lambda: swept(case))[kind])

        yield kind, table


def estimate(case: Case) -> Tries:
    """Attribution patching: (clean - corrupted) . gradient in the corrupted run."""
    for kind in KINDS:

        def table(kind: str = kind) -> None:
            found = case.engine.run(Estimate(STUDY, kind, node=f"L{with_neurons(case)}.mlp" if kind == "neurons" else ""))
            if not readable(case, kind):
                raise Wrong("a table where the architecture has no such site")
            ref, cells = case.reference, cells_of(case, kind)
            own, other = ref.trace(case.ids[1]), ref.trace(case.ids[0])
            slopes = case.once("slopes", lambda: gradients(case, 1, spots_of(case)))
            value = lambda c: ((other[c.site, c.layer] - own[c.site, c.layer]) * slopes[c.site, c.layer])[(0, *c.index(ref))].sum()  # noqa: E731
            same(looked_at(case, kind, found.values), case.bases[1] + np.vectorize(lambda c: float(value(c)))(cells))

        yield kind, table


def spots_of(case: Case) -> list[tuple[str, int]]:
    """Where the cells of all kinds lie."""
    return list(dict.fromkeys((c.site, c.layer) for kind in KINDS if readable(case, kind) for c in cells_of(case, kind).flat))


def gradients(case: Case, base: int, spots: list[tuple[str, int]]) -> dict:
    """The metric's gradient at places of a run [1, ...]; at resid_mid that of what attention adds."""
    ref, leaves, edits = case.reference, {}, []
    for site, layer in spots:
        place = ("attn", layer) if site == "resid_mid" else (site, layer)

        def add(x: Tensor, key=(site, layer)) -> Tensor:
            leaves[key] = t.zeros_like(x).requires_grad_(True)
            return x + leaves[key]

        edits.append((place, add))
    logits, _ = ref.run([case.ids[base]], edits, grad=True)
    found = t.autograd.grad(case.metric(logits).sum(), list(leaves.values()), allow_unused=True)
    return {key: t.zeros_like(x) if g is None else g / (ref.times if key[0] == "resid_mid" else 1) for (key, x), g in zip(leaves.items(), found)}


# ------------------------------------------------------------------ what is linear in what parts add


def direct_part(case: Case, change: Tensor, side: int) -> float:
    """The metric when what a part adds at the last position changes and only the final norm, its scale frozen, sees it [d_model]."""
    ref = case.reference
    x = ref.trace(case.ids[side])["resid_post", ref.n - 1][:, -1:]
    with t.no_grad():
        normed = ref.norm(x) + ref.frozen(ref.norm, x, change.view(1, 1, -1))
        return float(case.metric(ref.unembed(normed)))


def attribution(case: Case) -> Tries:
    def cells() -> None:
        found, ref = case.engine.run(Attribution(STUDY, which="clean")), case.reference
        if not ref.paths.out or ref.paths.beside:
            raise Wrong("an answer where the stream is not the sum of heads and MLPs")
        a, last = ref.trace(case.ids[0]), slice(-1, None)
        x = a["resid_post", ref.n - 1][:, last]
        with t.no_grad():
            zero = ref.head(t.zeros_like(x))

        def of(part: Tensor) -> float:
            """A part [d_model] of the stream in logits, before a soft cap, without the unembedding's bias."""
            with t.no_grad():
                row = ref.scale * (ref.head(ref.frozen(ref.norm, x, part.view(1, 1, -1))) - zero)
            return float(case.metric(row))

        writes = [ref.head_writes(i, a["z", i][:, last], a["before_norm", i][:, last]) for i in range(ref.n)]
        same(found.cells.heads, [[of(w) for w in layer] for layer in writes])
        same(found.cells.mlps, [of(ref.times * a["mlp", i][:, last]) for i in range(ref.n)])
        same(found.cells.attn_bias, [of(ref.bias_of_attention(i, a["before_norm", i][:, last])) for i in range(ref.n)])
        same(found.cells.embed + (found.cells.position or 0.0), of(a["resid_pre", 0][:, last]))
        with t.no_grad():
            raw = ref.scale * ref.head(ref.norm(x))
        same(found.total, float(case.metric(raw)))

    yield "", cells


def direct(case: Case) -> Tries:
    """Direct effects by noising: what a node adds changes to the corrupted run's, all norms' scales stay the clean run's."""
    for kind in ("nodes", "q", "attn", "resid_pre"):

        def table(kind: str = kind) -> None:
            found = case.engine.run(Sweep(STUDY, kind, direction="noise", effect="direct"))
            ref = case.reference
            if not readable(case, {"nodes": "z"}.get(kind, kind)):
                raise Wrong("a table where the architecture has no such site")
            own, other = (ref.trace(ids) for ids in case.ids)
            last = slice(-1, None)
            rows = []
            for i in range(ref.n):
                if kind in ("nodes", "q"):
                    z = other["z", i] if kind == "nodes" else z_by_queries(case, i)
                    x = own["before_norm", i][:, last]
                    row = list(ref.head_writes(i, z[:, last], x) - ref.head_writes(i, own["z", i][:, last], x))
                    row += [ref.times * (other["mlp", i] - own["mlp", i])[:, last]] * (kind == "nodes")
                else:
                    change = (other[kind, i] - own[kind, i])[:, last] * (ref.times if kind == "attn" else 1)
                    row = [change * 0] * (len(case.ids[0]) - 1) + [change]
                rows.append([direct_part(case, x, 0) for x in row])
            same(found.values, rows)

        yield kind, table


def z_by_queries(case: Case, layer: int) -> Tensor:
    """A layer's z in the clean run [1, seq, heads d_head], each head's with its own corrupted queries alone."""
    ref, other = case.reference, case.reference.trace(case.ids[1])["q", layer]
    z = ref.trace(case.ids[0])["z", layer].clone()

    def each(x: Tensor) -> Tensor:
        x = x.clone()
        for h in range(ref.heads):
            x[h, :, ref.columns("q", h)] = other[0][:, ref.columns("q", h)]
        return x

    got = ref.run([case.ids[0]] * ref.heads, [(("q", layer), each)], [("z", layer)])[1]["z", layer]
    for h in range(ref.heads):
        z[..., ref.columns("z", h)] = got[h : h + 1, :, ref.columns("z", h)]
    return z


# ------------------------------------------------------------------ paths and edges


def added(case: Case, sender: str, edges: bool) -> tuple[tuple[str, int], Tensor]:
    """Where a sender adds to the stream, and what the corrupted run changes there [1, seq, d_model]; with `edges` each run has its own scale in a norm after attention."""
    ref, (own, other) = case.reference, (case.reference.trace(ids) for ids in case.ids)
    if sender == "embed":
        return ("resid_pre", 0), other["resid_pre", 0] - own["resid_pre", 0]
    node = parse_node(sender)
    i = node.layer
    if node.site == "mlp":
        return ("mlp", i), other["mlp", i] - own["mlp", i]
    if edges or ref.post("attn", i) is None:
        writes = [ref.head_writes(i, a["z", i], a["before_norm", i])[node.head] for a in (other, own)]
        return ("attn", i), (writes[0] - writes[1]) / ref.times
    cols = ref.columns("z", node.head)
    z = own["z", i].clone()
    z[..., cols] = other["z", i][..., cols]
    return ("attn", i), ref.run([case.ids[0]], [(("z", i), lambda x: z)], [("attn", i)])[1]["attn", i] - own["attn", i]


def along(case: Case, edge: str, edges: bool) -> float:
    """The metric of the clean run where one receiver reads the sender's corrupted value, everything else in between as in the clean run."""
    if all(case.reference.post("attn", i) is None for i in range(case.reference.n)):
        edges = False  # no norm whose scale could make a difference
    return case.once(("along", edges), lambda: all_along(case, edges))[edge]


def all_along(case: Case, edges: bool) -> dict[str, float]:
    """That of every pair, one row of a batch each."""
    ref, clean = case.reference, case.reference.trace(case.ids[0])
    some = [e for e in PAIRS if exists(case, e) and known_to_reference(case, e)]
    adds, ends = [added(case, e.split("->")[0], edges) for e in some], [receiver_of(e) for e in some]
    keeps = [(site, i) for i in range(ref.n) for site in ("z", "mlp")]
    spots = list(dict.fromkeys(end[:2] for end in ends if end))

    def frozen(x: Tensor, key: tuple[str, int]) -> Tensor:
        keep = t.tensor([end is None or end[:2] != key for end in ends]).view(-1, 1, 1)
        return t.where(keep, clean[key], x)

    def more(x: Tensor, spot: tuple[str, int]) -> Tensor:
        return x + t.cat([change if at == spot else t.zeros_like(change) for at, change in adds])

    def put(x: Tensor, spot: tuple[str, int]) -> Tensor:
        x = x.clone()
        for row, end in enumerate(ends):
            if end and end[:2] == spot:
                cols = slice(None) if end[2] is None else ref.columns(end[0], end[2])
                x[row][:, cols] = got[spot][row][:, cols]
        return x

    edits = [(key, lambda x, key=key: frozen(x, key)) for key in keeps] + [(at, lambda x, at=at: more(x, at)) for at in dict.fromkeys(at for at, _ in adds)]
    logits, got = ref.run([case.ids[0]] * len(some), edits, spots)
    values = case.value([case.ids[0]] * len(some), [(at, lambda x, at=at: put(x, at)) for at in spots])
    return {e: float(case.metric(logits)[row] if end is None else values[row]) for row, (e, end) in enumerate(zip(some, ends))}


def receiver_of(edge: str) -> tuple[str, int, int | None] | None:
    """Site, layer and head of an edge's receiver; None: the logits."""
    receiver = edge.split("->")[1]
    if receiver == "logits":
        return None
    node = parse_node(receiver)
    return ("mlp", node.layer, None) if node.site == "mlp" else (node.part, node.layer, node.head)


def exists(case: Case, edge: str) -> bool:
    return not (case.reference.paths.parallel and edge == "L0H1->L0.mlp")


def known_to_reference(case: Case, edge: str) -> bool:
    receiver = edge.split("->")[1]
    if not case.reference.paths.out or not case.reference.paths.mlp or case.reference.paths.beside:
        return False
    return receiver == "logits" or ".mlp" in receiver or case.reference.has(receiver[-1], 0)


def path(case: Case) -> Tries:
    for edge in filter(partial(exists, case), PAIRS[1::2]):

        def one(edge: str = edge) -> None:
            sender, receiver = edge.split("->")
            found = case.engine.run(PathPatch(STUDY, (sender,), (receiver,)))
            if not known_to_reference(case, edge):
                raise Wrong("an answer where the architecture has no such end")
            same(found.values[np.isfinite(found.values)], [along(case, edge, False)])

        yield edge, one


def edges(case: Case) -> Tries:
    """One edge cut, all others kept; all of them asked for together."""

    @cache
    def found() -> dict[str, float]:
        model, some = case.engine.model, [e for e in PAIRS if exists(case, e)]
        if not all(known_to_reference(case, e) for e in some):
            case.ask(Discover(STUDY, "eap", edges=4))  # what it refuses is what a user sees
        every = frozenset(all_edges(model.info))
        steps = edge_values(model, STUDY, [every - {own_edge(model.info, e)} for e in some])
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                return dict(zip(some, stop.value[:, 0]))

    for edge in filter(partial(exists, case), PAIRS):

        def one(edge: str = edge) -> None:
            got = found()[edge]
            if not known_to_reference(case, edge):
                raise Wrong("an answer where the architecture has no such end")
            same(got, along(case, edge, True))

        yield edge, one


def eap(case: Case) -> Tries:
    """(corrupted - clean sender) . gradient at the receiver's own input in the clean run, summed over positions."""

    def scores() -> None:
        found, ref = case.ask(Discover(STUDY, "eap", edges=4)), case.reference
        if not all(known_to_reference(case, f"embed->L0H0.{p}") for p in "qkv"):
            raise Wrong("scores where the architecture has no queries, keys and values that can be read apart")
        slopes, changes = receiver_slopes(case), {}
        got, want = [], []
        for edge, score in zip(found.edges, found.scores):
            sender, receiver = edge.split("->")
            if sender not in changes:
                spot, change = added(case, sender, True)
                changes[sender] = change * (1 if spot[0] == "resid_pre" else ref.times)
            got.append(score)
            want.append(float((changes[sender] * slopes[receiver]).sum()))
        same(got, want)

    yield "", scores


def receiver_slopes(case: Case) -> dict[str, Tensor]:
    """By receiver the metric's gradient at what it alone reads of the stream [1, seq, d_model]: through its own columns, and the norm before it."""
    ref, clean = case.reference, case.reference.trace(case.ids[0])
    layers = range(ref.n)
    g = gradients(case, 0, [*((p, i) for p in "qkv" for i in layers), *(("mlp_in", i) for i in layers), ("resid_post", ref.n - 1)])
    out = {"logits": g["resid_post", ref.n - 1]}

    def back(norm: str, layer: int, x: Tensor, through: Callable[[Tensor], Tensor], slope: Tensor) -> Tensor:
        with t.enable_grad():
            x = x.detach().requires_grad_(True)
            y = through(ref.at(layer, norm)(x) if norm else x)
            return t.autograd.grad(y, x, slope.view(y.shape))[0]

    for i in layers:
        for part in "qkv":
            for h in range(0, ref.heads, 1 if part == "q" else ref.heads // ref.kv_heads):
                slope, cols = t.zeros_like(g[part, i]), ref.columns(part, h)
                slope[..., cols] = g[part, i][..., cols]
                out[f"L{i}H{h}.{part}"] = back(ref.paths.ln1, i, clean["resid_pre", i], ref.place(part, i)[0], slope)
        x = clean["resid_pre" if ref.paths.parallel else "resid_mid", i]
        out[f"L{i}.mlp"] = back(ref.paths.ln2, i, x, lambda y: y, g["mlp_in", i])
    return out


def qk(case: Case) -> Tries:
    """A score as a sum over pairs, against the mean of those in sight, from what the model's own softmax puts out: differences of its logarithm."""

    def scores() -> None:
        last, source = len(case.ids[0]) - 1, len(case.ids[0]) - 3
        asks = [QK(STUDY, layer, head, last, source, which="clean") for layer in range(case.engine.model.info.n_layers) for head in (0, 3)]
        found = [case.engine.run(ask) for ask in asks]
        if not readable(case, "pattern"):
            raise Wrong("a score where there is no attention")
        for ask, r in zip(asks, found):
            row = case.reference.trace(case.ids[0])["pattern", ask.layer][0, ask.head, last].double()
            want = row[source].log() - row[row > 0].log().mean()
            same(r.values.sum(dtype=np.float64), r.score)
            same(r.total if not r.cap else r.capped, want)

    yield "", scores


# ------------------------------------------------------------------ weights, and half precision


def centres(norm: t.nn.Module, width: int) -> bool:
    x = t.randn(1, width, generator=t.Generator().manual_seed(0))
    with t.no_grad():
        return t.allclose(norm(x + 1), norm(x), atol=1e-4)


def gain(norm: t.nn.Module | None, rows: Tensor) -> Tensor:
    """Rows [n, d_model] through the linear map that a norm is at inputs of size one."""
    if norm is None:
        return rows
    x = t.randn(1, rows.shape[-1], generator=t.Generator().manual_seed(0))
    x = x / (x.std(correction=0) if centres(norm, rows.shape[-1]) else x.pow(2).mean().sqrt())
    return Reference.frozen(norm, x, rows)


def weights(case: Case) -> Tries:
    """The singular values of a head's OV and the error that the head's weights report against the model's own scores and values."""

    def ov() -> None:
        found = case.engine.run(HeadWeights(1, 1, 5))
        if not (readable(case, "v") and readable(case, "z")):
            raise Wrong("an answer where a head's values are no matrix")
        same(found.error, 0.0, 1e-3)

    def singular() -> None:
        found, ref = case.engine.run(Singular(1, 1, "OV", 4)), case.reference
        if not readable(case, "v"):
            raise Wrong("an answer where a head's values are no matrix")
        width = ref.trace(case.ids[0])["resid_pre", 0].shape[-1]
        eye, z = t.eye(width), t.zeros(1, width, ref.heads * ref.d_head)
        with t.no_grad():
            project, out = ref.place("v", 1)[0], ref.at(1, ref.paths.out)
            z[..., ref.columns("z", 1)] = (project(eye[None]) - project(t.zeros_like(eye)[None]))[..., ref.columns("v", 1)]
            matrix = ref.times * gain(ref.post("attn", 1), (out(z) - out(t.zeros_like(z)))[0])
        norm = ref.at(1, ref.paths.ln1) if ref.paths.ln1 else None
        matrix = gain(norm, eye) @ matrix
        if norm is not None and centres(norm, width):
            matrix = matrix - matrix.mean(-1, keepdim=True)
        same(found.values, t.linalg.svdvals(matrix)[:4], 1e-3)

    yield "error", ov
    yield "OV", singular


def half(case: Case) -> Tries:
    """bfloat16: finite, and near the numbers of float32."""

    def near(got, want) -> None:
        got, want = np.asarray(got, float), np.asarray(want, float)
        if not np.isfinite(got).all():
            raise Wrong("not finite")
        experts = any(name.endswith("experts") for name, _ in case.reference.hf.named_modules())  # a router's choice jumps at the least rounding
        if not experts and np.abs(got - want).max() > 0.3 * max(1.0, np.abs(want).max()):
            raise Wrong(f"off by {np.abs(got - want).max():.2g} of {np.abs(want).max():.2g}")

    asks = {
        "sweep": (Sweep(STUDY, "z"), lambda r: r.values),
        "EAP": (Discover(STUDY, "eap", edges=4), lambda r: r.scores),
    }
    for name, (ask, read) in asks.items():
        yield name, lambda ask=ask, read=read: near(read(case.half.run(ask)), read(case.ask(ask)))


ANALYSES: dict[str, Callable[[Case], Tries]] = {
    "logits": logits, "lens": lens, "attention": attention, "do": do, "sweep": sweep, "estimate": estimate, "attribution": attribution,
    "direct": direct, "path": path, "edges": edges, "EAP": eap, "QK": qk, "weights": weights, "bfloat16": half,
}  # fmt: skip


def outcomes(case: Case, analysis: str) -> dict[str, str]:
    """By part, "" where the answer equals the reference, "refused: why", "wrong: how much", or "error: what" of a traceback."""
    found = {}
    for part, attempt in ANALYSES[analysis](case):
        try:
            attempt()
            found[part] = ""
        except UserError as error:
            found[part] = f"refused: {error}"
        except Wrong as wrong:
            found[part] = f"wrong: {wrong}"
        except Exception as error:
            found[part] = f"error: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
            for engine in case.__dict__.get("engines", {}).values():
                if isinstance(engine, Engine):
                    engine.model.remove_hooks()
    return found
