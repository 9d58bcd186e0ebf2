"""Published figures of GPT-2 small, and the same figures measured on the loaded model: what `engine.py check gpt2` adds to the identities."""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

from techniques.attention.requests import HeadStats
from techniques.attribution.requests import Attribution
from techniques.output.requests import Run, RunResult
from techniques.patching.requests import Sweep
from vocabulary.nodes import UserError, parse_node
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import Identity, ModelInfo, Progress

SHAPE = {"architecture": "GPT2LMHeadModel", "n_layers": 12, "n_heads": 12, "d_model": 768, "d_vocab": 50257}
TOKENS, S2, END = 15, 10, 14
WITH_BOS = "with BOS in front, which this model's tokenizer does not add: < on the screen and --bos put it before your prompts"
TEMPLATES = (
    ("When John and Mary went to the shops, {} gave the bag to", " Mary", " John"),
    ("When Tom and James went to the park, {} gave the ball to", " Tom", " James"),
    ("When Dan and Sid went to the shops, {} gave an apple to", " Dan", " Sid"),
    ("After Martin and Amy went to the park, {} gave a drink to", " Martin", " Amy"),
)
IDS = ((5335, 1757), (1757, 5335), (4186, 3700), (3700, 4186), (6035, 15686), (15686, 6035), (5780, 14235), (14235, 5780))


def ioi_prompts() -> tuple[Prompt, ...]:
    """Four templates x both subjects; the partner prompt, in which only S2 differs, is the corrupted one. The published figures have BOS in front."""
    out = []
    for text, a, b in TEMPLATES:
        for answer, subject in ((a, b), (b, a)):
            clean, corrupt = text.format(subject.strip()), text.format(answer.strip())
            out.append(Prompt(clean, corrupt, (answer,), (subject,), (("S2", text.index("{}")),), bos=True))
    return tuple(out)


PROMPTS = ioi_prompts()


@dataclass(frozen=True)
class Figures:
    """Figures of one source: by name, what was published, how far off the loaded model may be, and how they are measured here."""

    title: str
    values: dict[str, float]
    tolerance: float
    source: str
    note: str


LAYOUT = Figures("IOI prompts", {"answers with the published ids": 8}, 0.0, "TransformerLens, Activation_Patching_in_TL_Demo", "of 8 prompts")
PAIR = Figures(
    "IOI logit difference",
    {"clean": 3.5519, "corrupted": -3.5519},
    0.002,
    LAYOUT.source,
    "mean over the 8 prompts",
)
PATCHED = Figures(
    "IOI denoising",
    {
        "L0.resid_pre@S2": 1.0,
        "L1.resid_pre@S2": 1.0007,
        "L2.resid_pre@S2": 1.0010,
        "L3.resid_pre@S2": 1.0003,
        "L7.resid_pre@S2": 0.9228,
        "L8.resid_pre@S2": 0.6565,
        "L8.resid_pre@END": 0.3187,
        "L9.resid_pre@END": 0.9384,
        "L10.resid_pre@END": 1.0048,
        "L3.attn@S2": 0.1546,
        "L5.attn@S2": 0.3521,
        "L7.attn@END": 0.2976,
        "L8.attn@END": 0.5697,
        "L9.attn@END": 0.2715,
        "L11.attn@END": -0.4062,
        "L0.mlp@S2": 0.8508,
        "L5.mlp@S2": 0.0965,
        "L5H5": 0.3435,
        "L6H9": 0.1303,
        "L7H9": 0.1922,
        "L8H6": 0.3186,
        "L8H10": 0.2779,
        "L9H9": 0.2636,
        "L10H7": -0.4799,
        "L11H10": -0.2782,
        "L10H7.q": -0.5129,
        "L9H9.q": 0.2794,
        "L10H7.k": -0.1310,
        "L8H6.v": 0.3172,
        "L10H7.pattern": -0.5051,
    },
    0.002,
    LAYOUT.source,
    "ratio of means over the 8 prompts; raw and processed weights agree on a patch",
)
DIRECT = Figures(
    "direct attribution to Mary - John",
    {
        "L8H10": 0.4264,
        "L9H6": 1.6281,
        "L9H9": 1.9583,
        "L10H0": 0.6370,
        "L10H7": -1.4267,
        "L10H10": 0.4524,
        "L11H1": -0.9117,
        "L11H10": -0.9042,
    },
    0.002,
    "TransformerLens, Direct_Logit_Attribution_Demo",
    "as there, what a head writes whatever it looks at is left out: (b_V + norm's bias W_V) W_O",
)
INDUCTION = Figures(
    "induction score",
    {"L5H1": 0.908, "L5H5": 0.932, "L6H9": 0.913, "L7H2": 0.833, "L7H10": 0.910},
    0.05,
    "coderajay, induction-head-detector",
    "other random tokens than there",
)
PREVIOUS = Figures("previous-token head", {"rank of L4H11": 0}, 0.0, "TransformerLens, Main_Demo", "0 is the strongest of all heads, on random repeated tokens")
GROUPS = (LAYOUT, PAIR, PATCHED, DIRECT, INDUCTION, PREVIOUS)


def compare(measured: dict[str, float]) -> tuple[Identity, ...]:
    """One row a figure; a figure that was not measured is a KeyError."""
    rows = []
    for g in GROUPS:
        for name, value in g.values.items():
            key = f"{g.title}: {name}"
            error = abs(measured[key] - value)
            note = f"{value:g} in {g.source}, {measured[key]:.4f} here; {g.note}; {WITH_BOS}"
            rows.append(Identity(f"published {key}", error, g.tolerance, error <= g.tolerance, note))
    return tuple(rows)


# ------------------------------------------------------------------ measuring


def check_places(run: RunResult) -> None:
    for row in (run.clean.tokens, run.corrupt.tokens):
        if (len(row.ids), row.labels["S2"], row.labels["END"]) != (TOKENS, S2, END):
            raise UserError(f"the published prompts have {TOKENS} tokens with S2 at {S2}, and here {len(row.ids)} with S2 at {row.labels['S2']}")


def value_biases(engine, study: Study, layer: int) -> list[float]:
    """
    What each head adds to the logit difference at END whatever it looks at, since its attention sums to one: (b_V + b W_V) W_O, with b the bias of
    the norm before it. The published weights had the norm folded into W_V and b_V, and b_V then into b_O.
    """
    from techniques.attribution.logits import frozen
    from model.runs import read_study

    runs = read_study(engine.model, study)
    _, d, _ = frozen(runs, "clean", runs.position("clean", "END"), layer, "attn", [])
    block = engine.model.bridge.blocks[layer]
    w_v, norm = block.attn.W_V.detach().float(), block.ln1.original_component.bias.detach().float()
    b_v = block.attn.b_V.detach().float().reshape(d.shape)
    return [((b_v[h] + norm @ w_v[h]) @ d[h].to(w_v.device)).item() for h in range(len(d))]


def patches(engine) -> Generator[Progress, None, dict[str, float]]:
    """Every patch of PATCHED over the 8 prompts, one sweep for all the cells of a kind: the metric's mean, normalised."""
    nodes, out = {n: parse_node(n) for n in PATCHED.values}, {}
    kind = {n: node.part if node.site == "head" else node.site for n, node in nodes.items()}
    col = {n: node.head if node.site == "head" else {"S2": S2, "END": END}[node.pos] for n, node in nodes.items()}
    for done, k in enumerate(dict.fromkeys(kind.values())):
        yield Progress(done, len(set(kind.values())), f"published figures: patching, {k}")
        some = [n for n in nodes if kind[n] == k]
        request = Sweep(Study(PROMPTS[0], prompt_set=PROMPTS), k, over_set=True, only=tuple((nodes[n].layer, col[n]) for n in some))
        swept = engine.run(request)
        for n in some:
            gap = swept.clean - swept.corrupt
            out[n] = (float(swept.values[nodes[n].layer, col[n]]) - swept.corrupt) / (gap or math.nan)
    return out


def measure(engine) -> Generator[Progress, None, dict[str, float]]:
    """Every figure of the table on the loaded model, by the engine's own requests."""
    plain = []
    for i, prompt in enumerate(PROMPTS):
        yield Progress(i, len(PROMPTS), "published figures: prompts" if i == 0 else "")
        plain.append(engine.run(Run(Study(prompt), 1)))
        check_places(plain[-1])
    out = {f"{LAYOUT.title}: answers with the published ids": sum((*r.answers, *r.foils) == ids for r, ids in zip(plain, IDS, strict=True))}
    for name, values in (("clean", [r.clean.metric for r in plain]), ("corrupted", [r.corrupt.metric for r in plain])):
        out[f"{PAIR.title}: {name}"] = math.fsum(values) / len(values)
    out |= {f"{PATCHED.title}: {name}": value for name, value in (yield from patches(engine)).items()}
    yield Progress(0, 2, "published figures: attribution and heads")
    study = Study(PROMPTS[0])
    cells, biases = engine.run(Attribution(study, "clean")).cells, {}
    for name in DIRECT.values:
        node = parse_node(name)
        if node.layer not in biases:
            biases[node.layer] = value_biases(engine, study, node.layer)
        out[f"{DIRECT.title}: {name}"] = float(cells.heads[node.layer, node.head]) - biases[node.layer][node.head]
    yield Progress(1, 2)
    stats = engine.run(HeadStats(study, "clean", "random")).stats
    for name in INDUCTION.values:
        node = parse_node(name)
        out[f"{INDUCTION.title}: {name}"] = float(stats["induction"][node.layer, node.head])
    previous = stats["previous"]
    out[f"{PREVIOUS.title}: rank of L4H11"] = int((previous > previous[4, 11]).sum())
    return out


def applies(info: ModelInfo) -> bool:
    return all(getattr(info, k) == v for k, v in SHAPE.items())


def rows(engine, info: ModelInfo, show: Callable[[object], None] = lambda part: None) -> tuple[Identity, ...]:
    """The figures beside the loaded model's own; nothing unless it has GPT-2 small's shape, and one row that says why where they can't be compared."""
    absent = lambda why: (Identity("published figures of gpt2", math.nan, 0.0, None, why),)  # noqa: E731
    if not applies(info):
        return ()
    if info.dtype != "float32":
        return absent(f"they are of float32, and the model is loaded in {info.dtype}")
    steps = measure(engine)
    try:
        while True:
            show(next(steps))
    except StopIteration as stop:
        return compare(stop.value)
    except UserError as error:
        return absent(str(error))
