"""A script that reproduces the metric on the screen with TransformerLens alone. Never imports torch."""

from dataclasses import dataclass

from vocabulary.chat import CHAT_IDS, messages
from vocabulary.names import sources
from vocabulary.nodes import Intervention, UserError
from vocabulary.prompts import Prompt, Study, TokenRow
from vocabulary.requests import Load, ModelInfo

HEAD = '''"""
The metric on the screen with TransformerLens alone. Made by Loupe; needs torch, transformers and transformer_lens only.
"""

import torch as t
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformer_lens.model_bridge import TransformerBridge

about = {about!r}

t.set_grad_enabled(False)
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
hf = AutoModelForCausalLM.from_pretrained({weights!r}, dtype=t.{dtype}, attn_implementation="eager", use_safetensors=True)
model = TransformerBridge.boot_transformers({base!r}, hf_model=hf, tokenizer=tokenizer, device="cpu").eval()
{chat}
clean = t.tensor([{clean}])
corrupt = {corrupt}
{same}base, other = {base_run}
answers, foils = {answers}, {foils}
means = {means}  # the corrupted prompts that means are taken over


def run(ids, hooks=()):
    """Logits [seq, vocab] under hooks; unlike run_with_hooks, an unknown name is an error."""
    points = [(model.hook_dict[name], fn) for name, fn in hooks]
    for point, fn in points:
        point.add_hook(fn)
    try:
        return model(ids)[0].float()
    finally:
        for point, _ in points:
            point.remove_hooks()


def value(name, ids):
    """The activation at a hook point in an unpatched run."""
    kept = []
    run(ids, [(name, lambda x, hook: kept.append(x.clone()))])
    return kept[0]


def mean(name, over_positions):
    """Over the corrupted prompts: position by position, or over all positions but the first."""
    kept = [value(name, t.tensor([ids])).float() for ids in means]
    return t.cat([x[:, 1:].flatten(0, 1) for x in kept]).mean(0)[None, None] if over_positions else t.cat(kept).mean(0, keepdim=True)


def write(name, spot, make):
    """A hook that replaces one spot of a hook point's tensor."""

    def hook(x, hook):
        x = x.clone()
        x[spot] = make(x)
        return x

    return [(name, hook)]


def write_mid(layer, spot, make):
    """resid_mid is written through the attention output: on a bridge a write at resid_mid itself reaches the MLP only."""
    kept = {{}}

    def read(x, hook):
        kept["pre"] = x

    def hook(x, hook):
        mid = kept["pre"] + x
        mid[spot] = make(mid)
        return mid - kept["pre"]

    return [(f"blocks.{{layer}}.hook_resid_pre", read), (f"blocks.{{layer}}.hook_attn_out", hook)]


ALL = slice(None)
hooks = []
'''

METRIC = {
    "logit_diff": "logits[pos, answers].mean() - logits[pos, foils].mean()",
    "prob": "logits[pos].softmax(-1)[answers].sum()",
    "prob_diff": "logits[pos].softmax(-1)[answers].sum() - logits[pos].softmax(-1)[foils].sum()",
    "logprob": "logits[pos].softmax(-1)[answers].sum().log()",
    "rank": "(logits[pos] > logits[pos, answers].max()).sum()",
    "loss": "t.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])",
    "kl": "(clean_logp.exp() * (clean_logp - logits[pos].log_softmax(-1))).sum()",
}


def position(pos: int | str | None, row: TokenRow) -> str:
    if pos is None:
        return "ALL"
    index = row.labels[pos] if isinstance(pos, str) else pos % len(row.ids)
    return f"slice({index}, {index + 1})"


def hook_lines(i: Intervention, row: TokenRow, info: ModelInfo) -> str:
    """The script's lines for one intervention."""
    node, pos = i.node, position(i.node.pos, row)
    spot, name = f"(ALL, {pos})", f"blocks.{node.layer}.hook_{node.site}"
    match node.site:
        case "embed":
            name = "hook_embed"
        case "attn" | "mlp":
            name += "_out"
        case "neuron":
            name, spot = f"blocks.{node.layer}.mlp.hook_post", f"(ALL, {pos}, {node.index})"
        case "head":
            name = f"blocks.{node.layer}.attn.hook_{node.part}"
            head = node.head // (info.n_heads // info.n_kv_heads) if node.part in ("k", "v") else node.head
            spot = f"(ALL, {head}, {pos})" if node.part == "pattern" else f"(ALL, {pos}, {head})"
    setup = ""
    match i.op:
        case "zero":
            make = "lambda x: 0"
        case "scale":
            make = f"lambda x: x[{spot}] * {i.value!r}"
        case "patch":
            setup, make = f"source = value({name!r}, other)\n", f"lambda x, s=source: s[{spot}]"
        case "mean":
            setup, make = f"source = mean({name!r}, False)\n", f"lambda x, s=source: s[{spot}].to(x)"
        case "mean_all":
            rest = spot.replace(pos, "ALL", 1) if pos != "ALL" else spot
            setup, make = f"source = mean({name!r}, True)\n", f"lambda x, s=source: s[{rest}].to(x)"
        case _:
            raise UserError(f"{i}: a script for {i.op} is not built yet")
    call = f"write_mid({node.layer}, {spot}, {make})" if node.site == "resid_mid" else f"write({name!r}, {spot}, {make})"
    return f"# {str(i)!r}\n{setup}hooks += {call}\n"


def ids_of(prompts: tuple[Prompt, ...], bos: bool, default: bool) -> str:
    """The corrupted prompts of a set as ids; `bos` is that of the prompt on the screen, `default` that of plain texts beside chats."""
    texts = [p.corrupt for p in prompts if p.corrupt is not None]
    encoded = lambda text, bos: f"{'[tokenizer.bos_token_id] + ' if bos else ''}tokenizer.encode({text}, add_special_tokens=False)"  # noqa: E731
    if any(isinstance(text, tuple) for text in texts):
        one = lambda p: f"chat_ids({messages(p.corrupt)!r})" if isinstance(p.corrupt, tuple) else encoded(repr(p.corrupt), default if p.bos is None else p.bos)  # noqa: E731
        return f"[{', '.join(one(p) for p in prompts if p.corrupt is not None)}]"
    return f"[{encoded('text', bos)} for text in {texts!r}]" if texts else "[]"


def same_ids(prompt: Prompt) -> str:
    """The lines that prove that the ids of chats are those of the model's own template."""
    sides = {name: text for name, text in (("clean", prompt.clean), ("corrupt", prompt.corrupt)) if isinstance(text, tuple)}
    return "".join(f"assert chat_ids({messages(text)!r}) == {name}[0].tolist(), 'another chat template'\n" for name, text in sides.items())


@dataclass(frozen=True)
class Shown:
    """What a script is about: a model and a study, by the names that a session's state gives them."""

    model: Load
    study: Study

    prompt = property(lambda self: self.study.prompt)
    metric = property(lambda self: self.study.metric)
    base = property(lambda self: self.study.base)
    prompt_set = property(lambda self: self.study.prompt_set)


def python_script(state, info: ModelInfo, run) -> str:
    """The script for the metric of a session's state, or of what is `Shown`, from its RunResult; running it prints that number."""
    kind, load, active = state.metric.kind, state.model, state.study.interventions
    if run.now.metric is None:
        raise UserError("there is no metric to reproduce: t names the answer and the foil")
    if kind not in METRIC:
        raise UserError(f"a script knows the metrics {', '.join(METRIC)}, not {kind}")
    weights, base = sources(load.model, load.base, info, any(i.node.part == "pattern" and i.node.site == "head" for i in active))
    row = run.now.tokens
    if any(i.op == "patch" for i in active) and run.corrupt is not None and len(run.corrupt.tokens.ids) != len(run.clean.tokens.ids):
        raise UserError("a script that patches across prompts of unequal length is not built: it would take other positions than the screen")
    mids = [i for i in active if i.node.site == "resid_mid"]
    ordered = [i for i in active if i not in mids] + mids
    needs_means = any(i.op.startswith("mean") for i in active)
    runs = ("clean", "corrupt") if state.base == "clean" else ("corrupt", "clean")
    means, same = ids_of(state.prompt_set, row.bos, info.default_bos) if needs_means else "[]", same_ids(state.prompt)
    text = HEAD.format(
        about=f"{kind} at {state.metric.pos} of {info.name} under {' '.join(map(str, active)) or 'no interventions'}: {run.now.metric:.6f} on the screen.",
        tokenizer=base, weights=weights, base=base, dtype=info.dtype, clean=list(run.clean.tokens.ids), base_run=f"{runs[0]}, {runs[1]}",
        corrupt=f"t.tensor([{list(run.corrupt.tokens.ids)}])" if run.corrupt else "None", answers=list(run.answers), foils=list(run.foils),
        means=means, same=same, chat=CHAT_IDS if "chat_ids(" in means + same else "",
    )  # fmt: skip
    text += "".join(hook_lines(i, row, info) for i in ordered)
    pos = position(state.metric.pos, row) if kind != "loss" else "ALL"
    text += "\nids = base\nlogits = run(ids, hooks)\n"
    if kind != "loss":
        text += f"pos = {pos.removeprefix('slice(').split(',')[0]}\n"
    if kind == "kl":
        text += "clean_logp = run(clean)[pos].log_softmax(-1)\n"
    return text + f'print(f"{{float({METRIC[kind]}):.6f}}")\n'
