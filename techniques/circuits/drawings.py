"""Circuits as files, text, graphs and scripts. Never imports torch."""

import json
import re
from pathlib import Path

from techniques.circuits.requests import ScoreResult
from vocabulary.typed import parse_json, read_text
from vocabulary.chat import CHAT_IDS, text_json
from vocabulary.circuit import Circuit, LOGITS, own_node, owner, parse_edge, rank
from vocabulary.files import typed_path, write_text
from vocabulary.names import sources
from vocabulary.nodes import parse_node, UserError
from vocabulary.prompts import Study
from vocabulary.requests import ModelInfo
from vocabulary.wire import from_json, to_json
from utils import ROOT, printable

FORMAT = 1
PUBLISHED = ROOT / "techniques" / "circuits" / "published"
FIELDS = {"loupe_circuit", "name", "model", "nodes", "edges", "groups", "found"}

# ------------------------------------------------------------------ files


def write_circuit(circuit: Circuit, path: str | Path) -> Path:
    """A circuit as JSON, one node or edge a line."""
    path = typed_path(path)
    write_text(path, json.dumps({"loupe_circuit": FORMAT, **to_json(circuit)}, indent=1, ensure_ascii=False) + "\n")
    return path


def read_circuit(path: str | Path) -> tuple[Circuit, tuple[str, ...]]:
    """A circuit from a file, and a line for every entry that can't be used; the rest is kept. UserError when it is no circuit at all."""
    path = typed_path(path)
    if not path.is_file():
        raise UserError(f"no circuit at {path}: give a .json file that Loupe wrote, or one like those in {PUBLISHED.name}/")
    try:
        obj = parse_json(read_text(path))
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from error
    if not isinstance(obj, dict) or not isinstance(obj.get("nodes", []), list) or not isinstance(obj.get("edges", []), list):
        raise UserError(f'{path.name} is not a circuit: it needs an object with "nodes" or "edges", lists of addresses')
    wrong = [f"{path.name}: unknown field {k!r} left out" for k in sorted(set(obj) - FIELDS)]

    def usable(kind: str, read) -> list[str]:
        out = []
        for n, text in enumerate(obj.get(kind, []), 1):
            try:
                out.append(read(text if isinstance(text, str) else json.dumps(text)[:60]))
            except UserError as error:
                wrong.append(f"{path.name}, {kind} {n}: {error}; left out")
        return list(dict.fromkeys(out))

    nodes, edges = usable("nodes", own_node), usable("edges", lambda e: str(parse_edge(e)))
    nodes += [x for e in map(parse_edge, edges) for x in (owner(e.sender), owner(e.receiver)) if x not in ("embed", LOGITS)]
    nodes = tuple(sorted(set(nodes), key=rank))
    groups: dict[str, tuple[str, ...]] = {}
    for name, some in (obj.get("groups") or {}).items() if isinstance(obj.get("groups", {}), dict) else ():
        try:
            mine = tuple(own_node(x) for x in some)
        except (UserError, TypeError, AttributeError) as error:
            wrong.append(f"{path.name}, group {name}: {error}; left out")
            continue
        wrong += [f"{path.name}, group {name}: {x} is not among the nodes; left out" for x in mine if x not in nodes]
        if left := tuple(x for x in mine if x in nodes):
            groups[str(name)] = left
    text = {k: obj[k] if isinstance(obj.get(k), str) else "" for k in ("name", "model", "found")}
    if not nodes and not edges:
        raise UserError(f"{path.name} is not a circuit: it holds no nodes or edges that can be read" + (f" ({wrong[0]})" if wrong else ""))
    return from_json({**text, "name": text["name"] or path.stem, "nodes": list(nodes), "edges": edges, "groups": groups}, Circuit), tuple(wrong)


def published(name: str) -> tuple[Circuit, tuple[str, ...]]:
    """A published circuit by name (ioi, greater-than), or any file."""
    known = published_names()
    if name in known:
        return read_circuit(PUBLISHED / f"{name}.json")
    if not name.endswith(".json"):
        raise UserError(f"no published circuit {name!r}: there are {', '.join(known)}; or give a .json file")
    return read_circuit(name)


def published_names() -> tuple[str, ...]:
    return tuple(sorted(p.stem for p in PUBLISHED.glob("*.json")))


# ------------------------------------------------------------------ text


def draw(circuit: Circuit, effects: dict[str, float] | None = None, width: int = 80) -> list[str]:
    """By layer, the last at the top: its nodes with their groups and single effects, and beneath each what it reads from."""
    effects = effects or {}
    group_of = {n: printable(name) for name, some in circuit.groups.items() for n in some}
    into: dict[str, dict[str, list[str]]] = {}
    for e in map(parse_edge, circuit.edges):
        part = "" if e.receiver == LOGITS else f".{parse_node(e.receiver).part}" if parse_node(e.receiver).site == "head" else ""
        into.setdefault(owner(e.receiver), {}).setdefault(part, []).append(e.sender)
    lines: list[str] = []

    def reads(node: str) -> None:
        for part, some in sorted(into.get(node, {}).items()):
            head = f"     {part or 'in':3}◂ "
            line = head
            for s in sorted(some, key=rank):
                if len(line) + len(s) + 1 > width and line != head:
                    lines.append(line.rstrip())
                    line = " " * len(head)
                line += f"{s} "
            lines.append(line.rstrip())

    if into.get(LOGITS):
        lines.append("logits")
        reads(LOGITS)
    layers: dict[int, list[str]] = {}
    for n in sorted(circuit.nodes, key=rank):
        layers.setdefault(parse_node(n).layer, []).append(n)
    for layer in sorted(layers, reverse=True):
        if not circuit.edges:
            line = f"L{layer:<3}"
            for n in layers[layer]:
                text = f"{n}{f'({group_of[n]})' if n in group_of else ''}{f' {effects[n]:+.3f}' if n in effects else ''}"
                if len(line) + len(text) + 2 > width and len(line) > 4:
                    lines.append(line.rstrip())
                    line = "    "
                line += f"{text}  "
            lines.append(line.rstrip())
            continue
        lines.append(f"L{layer}")
        for n in layers[layer]:
            lines.append(f"  {n}{f'  {group_of[n]}' if n in group_of else ''}{f'  {effects[n]:+.3f}' if n in effects else ''}")
            reads(n)
    return lines or [f"{circuit.name} is empty"]


def table(circuit: Circuit, result: ScoreResult | None = None) -> str:
    """Tab-separated: every part, its group, single effect and minimality where known."""
    group_of = {n: printable(name) for name, some in circuit.groups.items() for n in some}
    effects = dict(zip(result.parts, result.effects.tolist())) if result is not None else {}
    minimal = dict(zip(result.parts, result.minimal.tolist())) if result is not None else {}
    number = lambda d, p: f"{d[p]:.6f}" if p in d else ""  # noqa: E731
    floor = f" (noise floor {result.floor:.2g})" if result is not None and result.floor == result.floor else ""
    rows = [f"part\tgroup\teffect{floor}\tminimality"]
    rows += [f"{p}\t{group_of.get(p, '')}\t{number(effects, p)}\t{number(minimal, p)}" for p in (*circuit.nodes, *circuit.edges)]
    return "\n".join(rows) + "\n"


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def dot(circuit: Circuit) -> str:
    """Graphviz, layers as ranks from the bottom up."""
    lines = [f"digraph {quoted(circuit.name)} {{", "  rankdir=BT; node [shape=box, fontname=monospace];"]
    layers: dict[int, list[str]] = {}
    for n in circuit.nodes:
        layers.setdefault(parse_node(n).layer, []).append(n)
    for some in layers.values():
        lines.append("  { rank=same; " + " ".join(f"{quoted(n)};" for n in some) + " }")
    for i, (name, some) in enumerate(circuit.groups.items()):
        for n in some:
            lines.append(
                f"  {quoted(n)} [label={quoted(n + chr(10) + name).replace(chr(10), chr(92) + 'n')}, colorscheme=set312, style=filled, fillcolor={i % 12 + 1}];"
            )
    for e in map(parse_edge, circuit.edges):
        part = "" if e.receiver == LOGITS else parse_node(e.receiver).part if parse_node(e.receiver).site == "head" else ""
        lines.append(f"  {quoted(e.sender)} -> {quoted(owner(e.receiver))}" + (f" [label={quoted(part)}]" if part else "") + ";")
    return "\n".join([*lines, "}"]) + "\n"


def mermaid(circuit: Circuit) -> str:
    """A Mermaid flowchart."""
    ident = lambda text: "".join(c if c.isalnum() else "_" for c in text)  # noqa: E731
    lines = ["flowchart BT"]
    grouped = {n for some in circuit.groups.values() for n in some}
    for i, (name, some) in enumerate(circuit.groups.items()):
        title = printable(name).replace('"', "#quot;")
        lines += [f'  subgraph g{i}["{title}"]', *(f'    {ident(n)}["{n}"]' for n in some), "  end"]
    lines += [f'  {ident(n)}["{n}"]' for n in circuit.nodes if n not in grouped]
    for e in map(parse_edge, circuit.edges):
        part = "" if e.receiver == LOGITS else parse_node(e.receiver).part if parse_node(e.receiver).site == "head" else ""
        lines.append(f"  {ident(e.sender)} -->{f'|{part}|' if part else ''} {ident(owner(e.receiver))}")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------ a script

SCRIPT = '''"""
The faithfulness of a circuit with TransformerLens alone. Made by Loupe; needs torch, transformers and transformer_lens{needs} only.
"""

import torch as t
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformer_lens.model_bridge import TransformerBridge

about = {about!r}

t.set_grad_enabled(False)
tokenizer = AutoTokenizer.from_pretrained({base!r})
hf = AutoModelForCausalLM.from_pretrained({weights!r}, dtype=t.{dtype}, attn_implementation="eager", use_safetensors=True)
model = TransformerBridge.boot_transformers({base!r}, hf_model=hf, tokenizer=tokenizer, device="cpu").eval()
n_layers, n_heads, n_kv_heads = {n_layers}, {n_heads}, {n_kv_heads}

prompts = {prompts}  # clean, corrupted, answers, foils, labels
nodes = {nodes}
edges = {edges}
rest = {rest!r}  # what is not in the circuit is set to: patch (the corrupted run), mean, mean_all, zero
mlps = {mlps}  # whether MLPs outside the circuit are replaced too

{chat}
def to_ids(text):
    return t.tensor([{encode}])


def run(ids, hooks=()):
    """Logits of the last position under hooks; an unknown name is an error."""
    points = [(model.hook_dict[name], fn) for name, fn in hooks]
    for point, fn in points:
        point.add_hook(fn)
    try:
        return model(ids)[0, -1].float()
    finally:
        for point, _ in points:
            point.remove_hooks()


NAMES = ["blocks.0.hook_resid_pre"]
for layer in range(n_layers):
    NAMES += [f"blocks.{{layer}}.attn.hook_{{p}}" for p in "zqkv"] + [f"blocks.{{layer}}.hook_mlp_out"]
NAMES = [name for name in NAMES if name in model.hook_dict]


def values(ids):
    kept = {{}}
    run(ids, [(name, lambda x, hook, name=name: kept.__setitem__(name, x.clone())) for name in NAMES])
    return kept


corrupted = [values(to_ids(p[1])) for p in prompts if p[1] is not None] if rest.startswith("mean") else []


def other(p):
    """What nodes outside the circuit are set to."""
    if rest == "patch":
        return values(to_ids(p[1]))
    own = values(to_ids(p[0]))
    if rest == "zero":
        return {{name: t.zeros_like(x) for name, x in own.items()}}
    if rest == "mean":
        return {{name: t.cat([c[name] for c in corrupted]).mean(0, keepdim=True) for name in NAMES}}
    return {{name: t.cat([c[name][:, 1:].flatten(0, 1) for c in corrupted]).mean(0).expand_as(own[name]) for name in NAMES}}


def metric(logits, p):
    answers, foils = ([tokenizer.encode(a, add_special_tokens=False)[0] for a in some] for some in p[2:4])
    return float({metric})

'''

PLACES = """
def positions(pos, p, seq):
    if not pos:
        return slice(None)
    if pos.lstrip("-").isdigit():
        return int(pos) % seq
    if pos == "END" and "END" not in p[4]:
        return seq - 1
    offsets = tokenizer(p[0], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return seq - len(offsets) + next(i for i, (a, b) in enumerate(offsets) if a <= p[4][pos] < b)

"""

NODES = '''
def keeps(node, p, seq):
    """(layer, part or mlp, head, positions) of a node."""
    address, _, pos = node.partition("@")
    places = positions(pos, p, seq)
    if address.endswith(".mlp"):
        return int(address[1:-4]), "mlp", 0, places
    head, _, part = address.partition(".")
    layer, head = head[1:].split("H")
    return int(layer), part or "z", int(head), places


def alone(circuit, p):
    """The metric with only these nodes as they are."""
    ids, source = to_ids(p[0]), other(p)
    seq = ids.shape[1]
    keep = {{x: t.zeros(n_layers, n_heads, seq, dtype=t.bool) for x in "zqkv"}} | {{"mlp": t.zeros(n_layers, 1, seq, dtype=t.bool)}}
    for node in circuit:
        layer, part, head, places = keeps(node, p, seq)
        keep[part][layer, head, places] = True
    alive = keep["z"] | keep["q"] | keep["k"] | keep["v"]
    hooks = []
    for layer in range(n_layers):
        cut = {{"z": ~alive[layer]}}
        for part in "qkv":
            gone = alive[layer] & ~keep["z"][layer] & ~keep[part][layer]
            if part != "q" and n_kv_heads < n_heads:  # a group's keys or values go when no living head of it keeps them
                wanted = alive[layer] & (keep["z"][layer] | keep[part][layer])
                gone = gone.view(n_kv_heads, -1, seq).any(1) & ~wanted.view(n_kv_heads, -1, seq).any(1)
            cut[part] = gone
        for part, mask in cut.items():
            name = f"blocks.{{layer}}.attn.hook_{{part}}"
            hooks.append((name, lambda x, hook, name=name, mask=mask: t.where(mask.T[None, :, :, None], source[name].to(x), x)))
        name = f"blocks.{{layer}}.hook_mlp_out"
        if mlps and name in NAMES:
            mask = ~keep["mlp"][layer, 0]
            hooks.append((name, lambda x, hook, name=name, mask=mask: t.where(mask[None, :, None], source[name].to(x), x)))
    return metric(run(ids, hooks), p)


parts = nodes
'''

FEATURES = '''
from sae_lens import SAE

error = {error}  # whether what an SAE does not explain stays in the circuit


def load(source):
    release, _, ident = source.partition(":")
    sae = SAE.from_pretrained(release, ident) if ident else SAE.load_from_disk(source)
    sae = (sae[0] if isinstance(sae, tuple) else sae).float().eval()
    sae.turn_off_forward_pass_hook_z_reshaping()
    hook = sae.cfg.metadata.hook_name
    assert "transcoder" not in sae.cfg.architecture() and not hook.endswith(("resid_mid", "mlp_in")), f"this script does not know {{source}}"
    return int(hook.split(".")[1]), (sae, hook)


by_layer = dict(load(source) for source in {saes!r})
by_layer = {{layer: x for layer, x in by_layer.items() if any(n.startswith(f"L{{layer}}.sae") for n in nodes)}}  # of other SAEs nothing is replaced
NAMES = [hook for _, hook in by_layer.values()]
corrupted = [values(to_ids(p[1])) for p in prompts if p[1] is not None] if rest.startswith("mean") else []


def split(sae, x):
    """The activation as the SAE reads it, and what was taken off."""
    x = x.float().flatten(-2) if x.ndim == 4 else x.float()
    mean = x.mean(-1, keepdim=True) if (sae.cfg.metadata.model_from_pretrained_kwargs or {{}}).get("center_writing_weights") else t.zeros(1)
    return x - mean, mean


def others(sae, hook, p):
    """What features outside the circuit are set to."""
    encode = lambda acts: sae.encode(split(sae, acts[hook])[0])
    if rest == "patch":
        return encode(values(to_ids(p[1])))
    if rest == "zero":
        return t.zeros(1, 1, sae.cfg.d_sae)
    if rest == "mean":
        return t.cat([encode(c) for c in corrupted]).mean(0, keepdim=True)
    return t.cat([encode(c)[:, 1:].flatten(0, 1) for c in corrupted]).mean(0)[None, None]


def alone(circuit, p):
    """The metric with only these features as they are; position 0 stays."""
    ids, hooks = to_ids(p[0]), []
    for layer, (sae, name) in by_layer.items():
        rest_of = others(sae, name, p)

        def put(x, hook, layer=layer, sae=sae, rest_of=rest_of):
            flat, mean = split(sae, x)
            f = sae.encode(flat)
            new = rest_of.expand_as(f).clone()
            for node in circuit:
                address, _, pos = node.partition("@")
                site, _, index = address.rpartition(".f")
                if site == f"L{{layer}}.sae":
                    places = positions(pos, p, f.shape[1])
                    new[:, places, int(index)] = f[:, places, int(index)]
            out = flat + sae.decode(new) - sae.decode(f) if error else sae.decode(new)
            out[:, 0] = flat[:, 0]
            return (out + mean).to(x).view(x.shape)

        hooks.append((name, put))
    return metric(run(ids, hooks), p)


parts = nodes
'''

# whose heads write z W_O into the stream with nothing in between, and read through TransformerLens's split inputs (a test runs the script on each)
EDGE_SCRIPTS = tuple(f"{name}ForCausalLM" for name in ("Falcon", "GPTNeoX", "Llama", "Mistral", "Mixtral", "Nemotron", "Olmo", "Phi", "Qwen2", "Qwen3"))
EDGE_SCRIPTS = ("GPT2LMHeadModel", *EDGE_SCRIPTS)
EDGES = '''
parallel = {parallel}
model.set_use_split_qkv_input(True)
model.set_use_hook_mlp_in(True)


def heads(layer, z):
    """What every head writes, {{address: [1, seq, d_model]}}."""
    return {{f"L{{layer}}H{{h}}": z[:, :, h] @ model.blocks[layer].attn.W_O[h] for h in range(n_heads)}}


def alone(circuit, p):
    """The metric when only these edges carry the clean run."""
    ids, source, circuit = to_ids(p[0]), other(p), set(circuit)
    theirs = {{"embed": source["blocks.0.hook_resid_pre"]}}
    for layer in range(n_layers):
        theirs |= heads(layer, source[f"blocks.{{layer}}.attn.hook_z"])
        theirs[f"L{{layer}}.mlp"] = source.get(f"blocks.{{layer}}.hook_mlp_out", 0)
    gap, hooks = {{}}, []  # of every sender so far: what it writes here less what cut edges carry

    def add(some):
        gap.update({{name: x - theirs[name] for name, x in some.items()}})

    def into(receiver, x):
        return x - sum((d for name, d in gap.items() if f"{{name}}->{{receiver}}" not in circuit), t.zeros_like(x))

    def on(name, fn):
        hooks.append((name, lambda x, hook: fn(x)))

    on("blocks.0.hook_resid_pre", lambda x: add({{"embed": x.clone()}}))
    for layer in range(n_layers):
        block, per = f"blocks.{{layer}}.", n_heads // n_kv_heads
        for part, step in (("q", 1), ("k", per), ("v", per)):
            on(f"{{block}}hook_{{part}}_input", lambda x, part=part, step=step, layer=layer: t.stack([into(f"L{{layer}}H{{h * step}}.{{part}}", x[:, :, h]) for h in range(x.shape[2])], 2))
        late = {{}}  # where attention and MLP are parallel the MLP reads before the heads of its layer write
        on(f"{{block}}attn.hook_z", lambda x, layer=layer, late=late: late.update(heads(layer, x)) if parallel else add(heads(layer, x)))
        if f"{{block}}hook_mlp_out" in NAMES:
            on(f"{{block}}hook_mlp_in", lambda x, layer=layer: into(f"L{{layer}}.mlp", x))
            on(f"{{block}}hook_mlp_out", lambda x, layer=layer: add({{f"L{{layer}}.mlp": x.clone()}}))
        on(f"{{block}}hook_resid_post", lambda x, late=late: add(late) if late else None)
    on(f"blocks.{{n_layers - 1}}.hook_resid_post", lambda x: into("logits", x))
    return metric(run(ids, hooks), p)


parts = edges
'''

TAIL = """
circuit = [alone(parts, p) for p in prompts]
nothing = [alone([], p) for p in prompts]
whole = [metric(run(to_ids(p[0])), p) for p in prompts]
mean = lambda x: sum(x) / len(x)
print(f"model {{mean(whole):.6f}}  circuit alone {{mean(circuit):.6f}}  nothing {{mean(nothing):.6f}}")
print(f"faithfulness {{(mean(circuit) - mean(nothing)) / (mean(whole) - mean(nothing)):.6f}}")
"""

METRICS = {
    "logit_diff": "logits[answers].mean() - logits[foils].mean()",
    "prob": "logits.softmax(-1)[answers].sum()",
    "prob_diff": "logits.softmax(-1)[answers].sum() - logits.softmax(-1)[foils].sum()",
    "logprob": "logits.softmax(-1)[answers].sum().log()",
}


def circuit_script(circuit: Circuit, study: Study, info: ModelInfo, load, rest: str = "mean", mlps: bool = False, result: ScoreResult | None = None) -> str:
    """A script that rebuilds the circuit with TransformerLens alone and prints the same faithfulness."""
    kind = study.metric.kind
    if kind not in METRICS or study.metric.pos not in ("END", -1):
        raise UserError(f"a circuit's script knows the metrics {', '.join(METRICS)} at END, not {kind}@{study.metric.pos}")
    if rest == "resample":
        raise UserError("a circuit's script can't draw the same prompts again: score it with mean or patch")
    if circuit.edges and info.architecture not in EDGE_SCRIPTS:
        raise UserError(f"a script for edges is right on {', '.join(EDGE_SCRIPTS)} only, not on {info.architecture}: export the nodes, or the JSON")
    features = [n for n in circuit.nodes if parse_node(n).site == "sae"]
    if features and (circuit.edges or len(features) < len(circuit.nodes)):
        raise UserError(f"{features[0]}: a circuit's script holds heads and MLPs, or features, not both")
    saes = [s for s in study.saes if features]
    if features and not saes:
        raise UserError(f"{features[0]}: the script needs its SAE, and none is loaded")
    weights, base = sources(load.model, load.base, info, any(parse_node(n).part == "pattern" for n in circuit.nodes))
    prompts = study.prompt_set or (study.prompt,)
    bos = prompts[0].bos if prompts[0].bos is not None else info.default_bos
    chats = any(isinstance(text, tuple) for p in prompts for text in (p.clean, p.corrupt))
    if chats and (named := [n for n in (*circuit.nodes, *circuit.edges) if re.search(r"@(?!END)[A-Za-z]", n)]):
        raise UserError(f"{named[0]}: a circuit's script knows labels in plain text only, not in chats: write the position as a number")
    encode = (
        "chat_ids(text) if isinstance(text, list) else " if chats else ""
    ) + f"{'[tokenizer.bos_token_id] + ' if bos else ''}tokenizer.encode(text, add_special_tokens=False)"
    rows = [(text_json(p.clean), text_json(p.corrupt), list(p.answers), list(p.foils), dict(p.labels)) for p in prompts]
    shown = f": its faithfulness is {result.faithfulness.mean:.6f} on the screen" if result is not None else ""
    fields = dict(
        about=f"the circuit {circuit.name} of {info.name}{shown}", weights=weights,
        base=base, dtype=info.dtype, n_layers=info.n_layers, n_heads=info.n_heads,
        n_kv_heads=info.n_kv_heads, prompts="[\n" + "".join(f"    {r!r},\n" for r in rows) + "]", nodes=repr(list(circuit.nodes)),
        edges=repr(list(circuit.edges)), rest=rest, mlps=mlps, saes=[sae_path(x) for x in saes],
        error=study.sae_error, needs=", sae_lens" if features else "", encode=encode, chat=CHAT_IDS if chats else "", metric=METRICS[kind], parallel=info.parallel,
    )  # fmt: skip
    return (SCRIPT + (EDGES if circuit.edges else PLACES + (FEATURES if features else NODES)) + TAIL).format(**fields)


def sae_path(source: str) -> str:
    """Where sae_lens finds it: a folder, or release:id."""
    folder = ROOT / "zoo" / "saes" / source.removeprefix("zoo/") if source.startswith("zoo/") else Path(source)
    return str(folder.resolve()) if folder.is_dir() else source
