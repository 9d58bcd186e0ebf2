"""`uv run zoo/evaluate.py`: what the shipped model can do, on held-out prompts, and which heads do it. Exits non-zero when a target is missed."""

import sys
import json
import time
import random
from dataclasses import dataclass
from pathlib import Path
from collections.abc import Callable

import torch as t
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import corpus as c

purple, cyan, yellow = "\x1b[38;2;255;0;255m", "\x1b[38;2;0;255;255m", "\x1b[38;2;255;255;0m"
green, red, gray, bold, endc = "\x1b[38;2;0;255;0m", "\x1b[38;2;255;0;0m", "\x1b[38;2;127;127;127m", "\033[1m", "\033[0m"

HERE = Path(__file__).parent
LogitsFn = Callable[[Tensor], Tensor]
FAMOUS = "When Mary and John went to the store, John gave a drink to"
HUNT_TEMPLATE = "When {A} and {B} went to the {P}, {S} gave a {O} to"


@dataclass
class Case:
    prompt: str
    answer: str
    foils: list[str]
    corrupt: str = ""


# ---------------------------------------------------------------- prompts, all from held-out combinations


def held_pair(r: random.Random) -> tuple[str, str]:
    while True:
        a, b = r.sample(c.NAMES, 2)
        if c.pair_held(a, b):
            return a, b


def outsider(r: random.Random, a: str, b: str) -> str:
    return r.choice([name for name in c.NAMES if name not in (a, b)])


def ioi_cases(n: int, seed: int, bank: list[str], unknown: bool = False, held_templates: bool = True, hunt: bool = False) -> list[Case]:
    """Half of the cases repeat the second name of the opening, half the first."""
    r = random.Random(seed)
    cases = []
    while len(cases) < n:
        opening, act = r.choice(c.OPENINGS), r.choice(bank)
        if held_templates and not hunt and not c.template_held(opening, act):
            continue
        a, b = held_pair(r)
        giver, receiver = (b, a) if len(cases) % 2 == 0 else (a, b)
        third = outsider(r, a, b)
        x, y = (giver, third) if len(cases) % 4 < 2 else (third, giver)
        places = c.UNKNOWN_PLACES if r.random() < 0.5 else [c.unknown_word(r)]
        things = c.UNKNOWN_OBJECTS if r.random() < 0.5 else [c.unknown_word(r)]
        slots = {"A": a, "B": b, "D": third, "X": x, "Y": y, "O2": r.choice(c.OBJECTS)}
        slots |= {"P": r.choice(places if unknown else c.PLACES), "O": r.choice(things if unknown else c.OBJECTS)}
        template = HUNT_TEMPLATE if hunt else opening + " " + act
        cases.append(
            Case(
                prompt=template.format(**slots, S=giver),
                answer=" " + receiver,
                foils=[" " + giver],
                corrupt=template.format(**slots, S=third),
            )
        )
    return cases


def greater_than_cases(n: int, seed: int) -> list[Case]:
    """The answer is the starting year XX; the metric sorts the 100 years by it. The corrupted prompt starts in 01."""
    r = random.Random(seed)
    cases = []
    while len(cases) < n:
        event, xx, century, template = r.choice(c.EVENTS), r.randrange(2, 98), r.choice(c.CENTURIES), c.GT_TEMPLATES[0]
        if c.gt_held(event, xx):
            prompt, corrupt = (template.split("{Y}")[0].format(E=event, C=century, X=f"{x:02d}") for x in (xx, 1))
            cases.append(Case(prompt=prompt, answer=f"{xx:02d}", foils=[], corrupt=corrupt))
    return cases


def capital_cases() -> list[Case]:
    combinations = [(country, k) for country in c.COUNTRIES for k in c.ASKED if c.fact_held(country, "capital", k)]
    prompts = [(c.FACT_TEMPLATES["capital"][k].split(" {v}")[0].format(c=country), country) for country, k in combinations]
    return [Case(prompt=prompt, answer=" " + c.CAPITALS[country], foils=[]) for prompt, country in prompts]


def pronoun_cases(n: int, seed: int) -> list[Case]:
    r = random.Random(seed)
    cases = []
    while len(cases) < n:
        name, k = r.choice(c.NAMES), r.choice(c.HE_TEMPLATES)
        if c.pronoun_held(name, k):
            he = c.PRONOUN[name][0]
            prompt = c.PRONOUN_TEMPLATES[k].split(" {he}")[0].format(n=name, **c.pronoun_slots(r))
            cases.append(Case(prompt=prompt, answer=" " + he, foils=[" she" if he == "he" else " he"]))
    return cases


def agreement_cases(n: int, seed: int) -> list[Case]:
    """The attractor always has the other number."""
    r = random.Random(seed)
    cases = []
    while len(cases) < n:
        a, b = r.sample(c.SINGULAR, 2)
        if c.agreement_held(a, b):
            plural = len(cases) % 2
            verbs = r.choice(c.VERB_PAIRS)
            preposition = r.choice(c.PREPOSITIONS)
            subjects, attractor = (a, c.NOUNS[a]), b if plural else c.NOUNS[b]
            clean, corrupt = (f"The {subjects[i]} {preposition} the {attractor}" for i in (plural, 1 - plural))
            cases.append(Case(prompt=clean, answer=" " + verbs[plural], foils=[" " + verbs[1 - plural]], corrupt=corrupt))
    return cases


def successor_cases(n: int, seed: int) -> list[Case]:
    cases = []
    for kind, (items, _, _) in c.LISTS.items():
        for start in range(len(items)):
            for length in range(3, 7):
                chosen = c.list_slice(kind, start, length)
                if chosen and c.successor_held(kind, start):
                    cases.append(Case(prompt=" " + " ".join(chosen[:-1]), answer=" " + chosen[-1], foils=[" " + chosen[-2]]))
    random.Random(seed).shuffle(cases)
    return cases[:n]


def bracket_cases(n: int, seed: int) -> list[Case]:
    r = random.Random(seed)
    cases = []
    while len(cases) < n:
        text = f"{r.choice(c.IDENTIFIERS)} = {r.choice(c.FUNCTIONS)}{c.nested(r)}"
        i = r.choice([i for i, char in enumerate(text) if char in ")]}"])
        cases.append(Case(prompt=text[:i], answer=text[i], foils=[char for char in ")]}" if char != text[i]]))
    return cases


def docstring_cases(n: int, seed: int) -> list[Case]:
    r = random.Random(seed)
    cases = []
    for _ in range(n):
        arguments = r.sample(c.IDENTIFIERS, r.randrange(4, 6))
        k = r.randrange(1, len(arguments))
        text = c.docstring(r, arguments)
        prompt = text[: text.index(f" param {arguments[k]}:")] + " param"
        cases.append(Case(prompt=prompt, answer=" " + arguments[k], foils=[" " + a for i, a in enumerate(arguments) if i != k]))
    return cases


def acronym_cases(n: int, seed: int) -> list[Case]:
    r = random.Random(seed)
    cases = []
    while len(cases) < n:
        words = r.sample(c.TITLE_WORDS, 3)
        if c.acronym_held(words):
            k = len(cases) % 3
            letters = "".join(word[0] for word in words)
            cases.append(Case(prompt=f"The {' '.join(words)} ({letters[:k]}", answer=letters[k], foils=[]))
    return cases


# ---------------------------------------------------------------- behaviour


def single(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    ids = tokenizer.encode(text)
    assert len(ids) == 1, f"{text!r} is {len(ids)} tokens"
    return ids[0]


def to_ids(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> tuple[Tensor, Tensor]:
    rows = [[0] + tokenizer.encode(prompt) for prompt in prompts]
    ids = t.zeros(len(rows), max(map(len, rows)), dtype=t.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = t.tensor(row)
    return ids, t.tensor([len(row) - 1 for row in rows])


def end_logits(logits_fn: LogitsFn, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Tensor:
    ids, ends = to_ids(tokenizer, prompts)
    logits = t.cat([logits_fn(chunk) for chunk in ids.split(100)])
    return logits[t.arange(len(ends)), ends].float()


def logit_differences(logits_fn: LogitsFn, tokenizer: PreTrainedTokenizerFast, cases: list[Case]) -> Tensor:
    """Answer minus the best foil."""
    logits = end_logits(logits_fn, tokenizer, [case.prompt for case in cases])
    foils = t.tensor([max(row[single(tokenizer, foil)].item() for foil in case.foils) for row, case in zip(logits, cases)])
    return logits[t.arange(len(cases)), [single(tokenizer, case.answer) for case in cases]] - foils


def accuracy(logits_fn: LogitsFn, tokenizer: PreTrainedTokenizerFast, cases: list[Case]) -> float:
    return (logit_differences(logits_fn, tokenizer, cases) > 0).float().mean().item()


def top1(logits_fn: LogitsFn, tokenizer: PreTrainedTokenizerFast, cases: list[Case], may_end: bool = True) -> float:
    logits = end_logits(logits_fn, tokenizer, [case.prompt for case in cases])
    if not may_end:  # a list may end anywhere: leave the end-of-text token out
        logits[:, 0] = -t.inf
    return (logits.argmax(-1) == t.tensor([single(tokenizer, case.answer) for case in cases])).float().mean().item()


def probability_difference(logits: Tensor, tokenizer: PreTrainedTokenizerFast, cases: list[Case]) -> float:
    years = t.tensor([single(tokenizer, f"{i:02d}") for i in range(100)])
    above = t.arange(100)[None] > t.tensor([int(case.answer) for case in cases])[:, None]
    probs = logits.softmax(-1)[:, years]
    return ((probs * above).sum(1) - (probs * ~above).sum(1)).mean().item()


def repeated_ids(vocab_size: int, n_rows: int = 32, half: int = 60) -> Tensor:
    first = t.randint(1, vocab_size, (n_rows, half), generator=t.Generator().manual_seed(77))
    return t.cat([t.zeros(n_rows, 1, dtype=t.long), first, first], 1)


def induction_losses(logits_fn: LogitsFn, vocab_size: int) -> tuple[float, float]:
    ids = repeated_ids(vocab_size)
    half = ids.shape[1] // 2
    losses = -logits_fn(ids).float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return losses[:, :half].mean().item(), losses[:, half + 1 :].mean().item()


@t.no_grad()
def behaviour(logits_fn: LogitsFn, tokenizer: PreTrainedTokenizerFast, n: int = 300) -> dict[str, float]:
    ioi = ioi_cases(n, 1, c.ACTS)
    greater_than = greater_than_cases(n, 2)
    first, second = induction_losses(logits_fn, len(tokenizer))
    ioi_ld = logit_differences(logits_fn, tokenizer, ioi)
    famous = end_logits(logits_fn, tokenizer, [FAMOUS])[0]
    gt_logits = end_logits(logits_fn, tokenizer, [case.prompt for case in greater_than])
    return {
        "ioi": (ioi_ld > 0).float().mean().item(),
        "ioi_logit_difference": ioi_ld.mean().item(),
        "ioi_top1": top1(logits_fn, tokenizer, ioi),
        "ioi_third_name": accuracy(logits_fn, tokenizer, ioi_cases(n, 3, c.DISTRACTOR_ACTS + c.EITHER_ACTS, held_templates=False)),
        "ioi_third_name_either": accuracy(logits_fn, tokenizer, ioi_cases(n, 9, c.EITHER_ACTS, held_templates=False)),
        "ioi_unknown_words": accuracy(logits_fn, tokenizer, ioi_cases(n, 4, c.ACTS, unknown=True, held_templates=False)),
        "greater_than": probability_difference(gt_logits, tokenizer, greater_than),
        "capitals": top1(logits_fn, tokenizer, capital_cases()),
        "agreement": accuracy(logits_fn, tokenizer, agreement_cases(n, 5)),
        "successor": top1(logits_fn, tokenizer, successor_cases(n, 6), may_end=False),
        "pronouns": accuracy(logits_fn, tokenizer, pronoun_cases(n, 7)),
        "brackets": accuracy(logits_fn, tokenizer, bracket_cases(n, 8)),
        "docstring": top1(logits_fn, tokenizer, docstring_cases(n, 9)),
        "acronym": top1(logits_fn, tokenizer, acronym_cases(n, 10)),
        "induction_first": first,
        "induction_second": second,
        "famous_top1": float(famous.argmax().item() == single(tokenizer, " Mary")),
        "famous_logit_difference": (famous[single(tokenizer, " Mary")] - famous[single(tokenizer, " John")]).item(),
    }


# ---------------------------------------------------------------- heads, with plain torch hooks


@dataclass
class HeadCache:
    logits: Tensor  # (batch, seq, vocab)
    z: list[Tensor]  # per layer (batch, seq, n_head * d_head)
    patterns: list[Tensor]  # per layer (batch, n_head, query, key)
    final: Tensor  # (batch, seq, d_model), what ln_f reads


@t.no_grad()
def run_heads(model, ids: Tensor) -> HeadCache:
    z, final = {}, []
    handles = [
        block.attn.c_proj.register_forward_pre_hook(lambda _, args, layer=layer: z.update({layer: args[0]})) for layer, block in enumerate(model.transformer.h)
    ]
    handles.append(model.transformer.ln_f.register_forward_pre_hook(lambda _, args: final.append(args[0])))
    out = model(ids, attention_mask=t.ones_like(ids), output_attentions=True)
    for handle in handles:
        handle.remove()
    return HeadCache(out.logits, [z[layer] for layer in range(len(z))], list(out.attentions), final[0])


@t.no_grad()
def patched_logits(model, ids: Tensor, source: HeadCache, heads: list[tuple[int, int]]) -> Tensor:
    """Run ids with the outputs of some heads taken, at all positions, from another run."""
    d_head = model.config.n_embd // model.config.n_head

    def patch(layer: int, head: int):
        def hook(_, args):
            z = args[0].clone()
            z[..., head * d_head : (head + 1) * d_head] = source.z[layer][..., head * d_head : (head + 1) * d_head]
            return (z,)

        return hook

    handles = [model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(patch(layer, head)) for layer, head in heads]
    logits = model(ids, attention_mask=t.ones_like(ids)).logits
    for handle in handles:
        handle.remove()
    return logits


def all_heads(model) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(model.config.n_layer) for head in range(model.config.n_head)]


def head_shares(model, clean_ids: Tensor, corrupt_ids: Tensor, metric: LogitsFn) -> tuple[dict, dict, float, float]:
    """Per head: the share of the metric that its clean output restores (denoising) and that its corrupted output destroys (noising)."""
    clean, corrupt = run_heads(model, clean_ids), run_heads(model, corrupt_ids)
    top, bottom = metric(clean.logits), metric(corrupt.logits)
    denoise, noise = {}, {}
    for head in all_heads(model):
        denoise[head] = (metric(patched_logits(model, corrupt_ids, clean, [head])) - bottom) / (top - bottom)
        noise[head] = (top - metric(patched_logits(model, clean_ids, corrupt, [head]))) / (top - bottom)
    return denoise, noise, top, bottom


def pattern_scores(model) -> dict[str, dict]:
    ids = repeated_ids(model.config.vocab_size)
    half = ids.shape[1] // 2
    patterns = run_heads(model, ids).patterns
    scores = {"induction": {}, "duplicate": {}, "previous": {}}
    for layer, head in all_heads(model):
        pattern = patterns[layer][:, head]
        scores["induction"][layer, head] = pattern.diagonal(1 - half, -2, -1)[:, 1:].mean().item()
        scores["duplicate"][layer, head] = pattern.diagonal(-half, -2, -1)[:, 1:].mean().item()
        scores["previous"][layer, head] = pattern.diagonal(-1, -2, -1)[:, 1:].mean().item()
    return scores


def same_length(tokenizer: PreTrainedTokenizerFast, cases: list[Case]) -> tuple[Tensor, Tensor]:
    clean, corrupt = ([[0] + tokenizer.encode(text) for text in texts] for texts in zip(*[(x.prompt, x.corrupt) for x in cases]))
    assert len({len(row) for row in clean + corrupt}) == 1, "the cases have several token lengths"
    return t.tensor(clean), t.tensor(corrupt)


def difference_metric(tokenizer: PreTrainedTokenizerFast, cases: list[Case]) -> LogitsFn:
    answers = t.tensor([single(tokenizer, case.answer) for case in cases])
    foils = t.tensor([single(tokenizer, case.foils[0]) for case in cases])
    rows = t.arange(len(cases))
    return lambda logits: (logits[rows, -1, answers] - logits[rows, -1, foils]).mean().item()


@t.no_grad()
def ioi_heads(model, tokenizer: PreTrainedTokenizerFast, n: int = 48) -> dict:
    """One template, held-out pairs, corrupted = a third name at S2. Shares, attention from END and S2, direct logit attribution."""
    cases = ioi_cases(n, 11, c.ACTS, hunt=True)
    clean_ids, corrupt_ids = same_length(tokenizer, cases)
    metric = difference_metric(tokenizer, cases)
    denoise, noise, top, bottom = head_shares(model, clean_ids, corrupt_ids, metric)
    cache = run_heads(model, clean_ids)
    answers = t.tensor([single(tokenizer, case.answer) for case in cases])
    foils = t.tensor([single(tokenizer, case.foils[0]) for case in cases])
    io = (clean_ids == answers[:, None]).int().argmax(1)
    s1 = (clean_ids == foils[:, None]).int().argmax(1)
    s2 = clean_ids.shape[1] - 1 - (clean_ids == foils[:, None]).flip(1).int().argmax(1)
    rows = t.arange(n)
    w_u = model.lm_head.weight * model.transformer.ln_f.weight
    direction = (w_u[answers] - w_u[foils]) / (cache.final[:, -1].var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    d_head = model.config.n_embd // model.config.n_head
    table = {}
    for layer, head in all_heads(model):
        cols = slice(head * d_head, (head + 1) * d_head)
        output = cache.z[layer][:, -1, cols] @ model.transformer.h[layer].attn.c_proj.weight[cols]
        pattern = cache.patterns[layer][:, head]
        table[layer, head] = {
            "denoise": denoise[layer, head],
            "noise": noise[layer, head],
            "dla": ((output - output.mean(-1, keepdim=True)) * direction).sum(-1).mean().item(),
            "end_io": pattern[rows, -1, io].mean().item(),
            "end_s1": pattern[rows, -1, s1].mean().item(),
            "end_s2": pattern[rows, -1, s2].mean().item(),
            "s2_s1": pattern[rows, s2, s1].mean().item(),
        }
    corrupt = run_heads(model, corrupt_ids)
    ranking = sorted(noise, key=noise.get, reverse=True)
    ablated = {k: metric(patched_logits(model, clean_ids, corrupt, ranking[:k])) for k in (1, 2, 3, 5)}
    return {"table": table, "clean": top, "corrupt": bottom, "ranking": ranking, "ablated": ablated}


@t.no_grad()
def greater_than_heads(model, tokenizer: PreTrainedTokenizerFast, n: int = 48) -> tuple[dict, dict]:
    cases = greater_than_cases(n, 12)
    clean_ids, corrupt_ids = same_length(tokenizer, cases)
    denoise, noise, _, _ = head_shares(model, clean_ids, corrupt_ids, lambda logits: probability_difference(logits[:, -1], tokenizer, cases))
    return denoise, noise


@t.no_grad()
def agreement_heads(model, tokenizer: PreTrainedTokenizerFast, n: int = 48) -> tuple[dict, dict]:
    cases = agreement_cases(n, 13)
    clean_ids, corrupt_ids = same_length(tokenizer, cases)
    denoise, noise, _, _ = head_shares(model, clean_ids, corrupt_ids, difference_metric(tokenizer, cases))
    return denoise, noise


@t.no_grad()
def famous_attention(model, tokenizer: PreTrainedTokenizerFast) -> dict:
    ids = t.tensor([[0] + tokenizer.encode(FAMOUS)])
    mary = ids[0].tolist().index(single(tokenizer, " Mary"))
    patterns = run_heads(model, ids).patterns
    return {(layer, head): patterns[layer][0, head, -1, mary].item() for layer, head in all_heads(model)}


def name(head: tuple[int, int]) -> str:
    return f"{head[0]}.{head[1]}"


def ranked(scores: dict, k: int = 4) -> str:
    return "  ".join(f"{name(head)} {scores[head]:.2f}" for head in sorted(scores, key=scores.get, reverse=True)[:k])


# ---------------------------------------------------------------- the table

TARGETS = {  # figure: (sense, target, what it is)
    "ioi": (">=", 0.98, "IOI accuracy, held-out name pairs and held-out template x verb"),
    "ioi_third_name": (">=", 0.95, "IOI accuracy with a third name"),
    "ioi_unknown_words": (">=", 0.90, "IOI accuracy with unknown place and object words"),
    "greater_than": (">=", 0.85, "greater-than probability difference"),
    "capitals": (">=", 1.0, "capitals, top-1, held-out (country, template)"),
    "agreement": (">=", 0.99, "agreement over an attractor, logit difference > 0"),
    "successor": (">=", 0.99, "successor, top-1 without end-of-text"),
    "induction_second": ("<=", 0.1, "induction: loss on the second half of random repeats (nats)"),
    "induction_drop": (">=", 5.0, "induction: first half minus second half (nats)"),
    "induction_heads": (">=", 2, "heads with induction score > 0.8"),
    "ioi_largest_head": ("<=", 0.7, "IOI: largest share recovered by a single head"),
    "famous_top1": (">=", 1, f"top-1 is ' Mary' after '{FAMOUS}'"),
    "famous_logit_difference": (">=", 3.0, "its logit difference ' Mary' - ' John'"),
    "famous_attention": (">=", 0.5, "its strongest attention of a head from the last position to ' Mary'"),
    "previous_token_score": (">=", 0.8, "strongest previous-token head"),
}
REPORTED = {
    "ioi_logit_difference": "IOI logit difference",
    "ioi_top1": "IOI top-1",
    "ioi_third_name_either": "IOI with a third name in either order with S2",
    "pronouns": "pronouns, logit difference > 0",
    "brackets": "closing bracket, right one of three",
    "docstring": "docstring argument, top-1",
    "acronym": "acronym letter, held-out word triples, top-1",
    "induction_first": "induction: loss on the first half (nats)",
}


@dataclass
class EvaluateConfig:
    folder: Path = HERE
    n: int = 300


def main(cfg: EvaluateConfig) -> None:
    start = time.time()
    disable_progress_bar()
    t.set_num_threads(1)  # as fast as two on so small a model, and far faster next to other work
    tokenizer = AutoTokenizer.from_pretrained(cfg.folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(cfg.folder, dtype=t.float32, local_files_only=True, attn_implementation="eager").eval()
    figures = behaviour(lambda ids: model(ids, attention_mask=t.ones_like(ids)).logits, tokenizer, cfg.n)
    scores = pattern_scores(model)
    ioi = ioi_heads(model, tokenizer)
    gt_denoise, gt_noise = greater_than_heads(model, tokenizer)
    agr_denoise, agr_noise = agreement_heads(model, tokenizer)
    attention = famous_attention(model, tokenizer)
    denoise = {head: row["denoise"] for head, row in ioi["table"].items()}
    noise = {head: row["noise"] for head, row in ioi["table"].items()}
    figures["induction_drop"] = figures["induction_first"] - figures["induction_second"]
    figures["induction_heads"] = sum(score > 0.8 for score in scores["induction"].values())
    figures["ioi_largest_head"] = max(denoise.values())
    figures["famous_attention"] = max(attention.values())
    figures["previous_token_score"] = max(scores["previous"].values())

    missed = []
    print(f"{purple}=== what the model can do ==={endc}")
    for key, (sense, target, what) in TARGETS.items():
        passed = figures[key] >= target if sense == ">=" else figures[key] <= target
        missed += [] if passed else [key]
        verdict = f"{green}pass{endc}" if passed else f"{red}MISS{endc}"
        print(f"{verdict}  {cyan}{figures[key]:8.3f}{endc}  {sense} {target:<5g} {what}")
    for key, what in REPORTED.items():
        print(f"{gray}  --{endc}  {cyan}{figures[key]:8.3f}{endc}  {'':8} {what}")

    print(f"{purple}=== which heads do it ==={endc}")
    print(f"induction        {cyan}{ranked(scores['induction'])}{endc}")
    print(f"previous token   {cyan}{ranked(scores['previous'])}{endc}")
    print(f"duplicate token  {cyan}{ranked(scores['duplicate'])}{endc}")
    print(f"IOI logit difference: clean {cyan}{ioi['clean']:.2f}{endc}, a third name at S2 {cyan}{ioi['corrupt']:.2f}{endc}")
    print(f"IOI denoising    {cyan}{ranked(denoise, 6)}{endc}")
    print(f"IOI noising      {cyan}{ranked(noise, 6)}{endc}")
    print(f"IOI, top heads by noising ablated: {cyan}{'  '.join(f'{k}: {ld:.2f}' for k, ld in ioi['ablated'].items())}{endc}")
    print(f"{gray}head  denoise  noise    DLA  END>IO  END>S1  END>S2   S2>S1{endc}")
    for head, row in ioi["table"].items():
        color = yellow if max(row["denoise"], row["noise"]) > 0.05 or abs(row["dla"]) > 0.5 else gray
        print(f"{color}{name(head)}   {row['denoise']:7.2f}{row['noise']:7.2f}{row['dla']:7.2f}", end="")
        print("".join(f"{row[key]:8.2f}" for key in ("end_io", "end_s1", "end_s2", "s2_s1")) + endc)
    print(f"greater-than     denoising {cyan}{ranked(gt_denoise)}{endc}  noising {cyan}{ranked(gt_noise)}{endc}")
    print(f"agreement        denoising {cyan}{ranked(agr_denoise)}{endc}  noising {cyan}{ranked(agr_noise)}{endc}")
    print(f"famous prompt, attention of the last position to ' Mary'  {cyan}{ranked(attention)}{endc}")

    color = red if missed else green
    print(f"{color}{bold}{len(TARGETS) - len(missed)} of {len(TARGETS)} targets met{endc}{gray} in {time.time() - start:.0f} s{endc}")
    if missed:
        print(f"{red}missed: {', '.join(missed)}{endc}")
    print(json.dumps({key: round(value, 4) for key, value in figures.items()} | {"missed": missed}))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    t.manual_seed(0)
    main(tyro.cli(EvaluateConfig))
