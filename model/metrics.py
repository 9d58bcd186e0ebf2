"""The metric of a run: from its logits, from many runs' last rows at once, and differentiably."""

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import Model
from model.runs import Runs

VOCAB_BYTES = 64 << 20  # no vocabulary-sized tensor is larger; some ten of them are held at a time
WIDER = 1.375  # times that on an accelerator, where a chunk costs the host as much as the device


def vocab_bytes(model: Model) -> int:
    """How large a vocabulary-sized tensor may be on the model's device."""
    return VOCAB_BYTES if model.final_device.type == "cpu" else int(WIDER * VOCAB_BYTES)


def rows_at_once(model: Model) -> int:
    """How many rows of logits are made at once."""
    return max(1, vocab_bytes(model) // (4 * model.info.d_vocab))


def measure(kind: str, row: Tensor, clean: Tensor, nll: np.ndarray, answers: list[int], foils: list[int]) -> float | None:
    """The metric from a run's logits at the metric's position; None when it needs answers (or foils) that the prompt does not have."""
    if kind == "loss":
        return float(nll.mean()) if len(nll) else None
    logits = row.double()
    logp = logits.log_softmax(-1)
    if kind == "kl":
        final = clean.double().log_softmax(-1)
        return max(0.0, (final.exp() * (final - logp)).sum().item())
    if not answers or (kind in ("logit_diff", "prob_diff") and not foils):
        return None
    match kind:
        case "logit_diff":
            return (logits[answers].mean() - logits[foils].mean()).item()
        case "prob":
            return logp[answers].exp().sum().item()
        case "prob_diff":
            return (logp[answers].exp().sum() - logp[foils].exp().sum()).item()
        case "logprob":
            return logp[answers].logsumexp(0).item()
        case "rank":
            return float((logits > logits[answers].max()).sum().item())
    raise AssertionError(kind)


class MetricReader:
    """The metric of runs that differ in what reaches the final norm; of a logit difference only the answers' and foils' logits are made."""

    def __init__(self, group: list[Runs], clean: Tensor | None = None, which: str = "now"):
        runs = self.runs = group[0]
        self.model, self.group, self.kind = runs.of(which), group, runs.study.metric.kind
        self.whole, self.own = runs.study.metric.whole, runs.own
        self.stream: Tensor | None = None  # of the base run, after the last block [prompt, seq, d_model]
        self.ids = [r.row(which).ids for r in group]
        self.places = [len(ids) - 1 if self.whole else r.metric_position(which) for r, ids in zip(group, self.ids)]
        rows = [r.row(which) for r in group]
        assert self.kind != "logprob_sum" or all(row.tail for row in rows), "the answer's tokens are not behind the prompt"
        self.spans = [(len(row.ids) - 1 - row.tail if row.tail else 0, len(row.ids) - 1) for row in rows]  # of the positions that a whole metric reads
        self.base: np.ndarray | None = None  # the metric of the unchanged run [prompt]
        self.clean = clean  # [prompt, d_model] normed, for KL
        self.nll: Tensor | None = None  # of the base run's own tokens [prompt, seq - 1]
        if self.kind == "logit_diff":
            tokens = sorted({i for r in group for i in (*r.answers, *r.foils)})
            self.weights = t.zeros(len(group), len(tokens), dtype=t.float64)
            for row, r in zip(self.weights, group):
                row[[tokens.index(i) for i in r.answers]] += 1 / len(r.answers)
                row[[tokens.index(i) for i in r.foils]] -= 1 / len(r.foils)
            self.columns = self.model.bridge.W_U[:, tokens].contiguous()
            self.bias = self.model.bridge.b_U[tokens].float()

    def diff(self, normed: Tensor) -> Tensor:
        """Logit difference [variant, prompt] of normed rows [variant, prompt, d_model]; differentiable."""
        model = self.model
        logits = model.capped((normed @ self.columns.to(normed.device)).float() + self.bias.to(normed.device))
        return (logits.double() * self.weights.to(logits.device)).sum(-1)

    @t.no_grad()
    def of(self, x: Tensor, start: int) -> np.ndarray:
        """[variant, prompt] of the stream after the last block, [variant x prompt, seq from start, d_model]."""
        model, b = self.model, len(self.group)
        x = x.view(-1, b, *x.shape[1:])
        if self.own:
            return self.owns(x, start)
        if self.whole:
            return self.losses(x, start)
        out = self.of_normed(model.norm(x[:, t.arange(b, device=x.device), [max(0, p - start) for p in self.places]]))
        for j, place in enumerate(self.places):
            if place < start:  # nothing before `start` changes
                out[:, j] = self.base[j]
        return out

    def of_normed(self, normed: Tensor) -> np.ndarray:
        """[variant, prompt] of normed rows at the metric's positions."""
        model = self.model
        if self.kind == "logit_diff":
            return self.diff(normed).cpu().numpy()
        out = np.zeros(normed.shape[:2])
        for j, r in enumerate(self.group):
            clean = r.of("clean").unembed(self.clean[j : j + 1])[0] if self.kind == "kl" else None
            for i in range(0, len(normed), size := rows_at_once(model)):
                for k, row in enumerate(model.unembed(normed[i : i + size, j])):
                    out[i + k, j] = measure(self.kind, row, row if clean is None else clean, np.zeros(0), r.answers, r.foils)
        return out

    def owns(self, x: Tensor, start: int) -> np.ndarray:
        """A metric of one's own, on the logits of every whole run."""
        model, out = self.model, np.zeros(x.shape[:2])
        for j, ids in enumerate(self.ids):
            for i, row in enumerate(x[:, j]):
                row = t.cat([self.stream[j, :start].to(row), row]) if start else row
                out[i, j] = self.own(model.unembed(model.norm(row)), ids).item()
        return out

    def losses(self, x: Tensor, start: int) -> np.ndarray:
        """The mean cross-entropy of the prompt's tokens, or the answer's summed log probability."""
        model, out = self.model, np.zeros(x.shape[:2])
        for j, (ids, (first, last)) in enumerate(zip(self.ids, self.spans)):
            begin = max(start, first)
            target = t.tensor(ids[begin + 1 : last + 1], device=x.device)
            known = 0.0 if begin == first else self.nll[j, first:begin].sum().item()
            flat = x[:, j, begin - start : last - start].flatten(0, 1)
            found = [self.tokens(flat[i : i + rows_at_once(model)], target, i) for i in range(0, len(flat), rows_at_once(model))]
            nll = t.cat(found).view(len(x), -1) if found else t.zeros(len(x), 0)
            out[:, j] = (self.share(j) * (nll.sum(1) + known)).cpu().numpy()
        return out

    def share(self, j: int) -> float:
        """What one token's cross-entropy counts in a metric over several."""
        first, last = self.spans[j]
        return 1 / (last - first) if self.kind == "loss" else -1.0

    def tokens(self, x: Tensor, target: Tensor, first: int) -> Tensor:
        logits = self.model.unembed(self.model.norm(x)).double()
        right = target[(first + t.arange(len(x), device=x.device)) % len(target)]
        return logits.logsumexp(-1) - logits.gather(-1, right[:, None])[:, 0]


def metric(score: MetricReader, x: Tensor) -> Tensor:
    """The metric [prompt] of the stream after the last block, differentiable."""
    model, b = score.model, len(score.group)
    logits = lambda rows: model.capped(model.bridge.unembed(model.bridge.ln_final(rows.to(model.final_device))))  # noqa: E731
    if score.own:
        return t.stack([score.own.gradient(logits(x[j]), ids) for j, ids in enumerate(score.ids)])
    if score.whole:
        rows = [logits(x[j, first:last]).log_softmax(-1) for j, (first, last) in enumerate(score.spans)]
        right = [t.tensor(ids[first + 1 : last + 1], device=r.device)[:, None] for r, ids, (first, last) in zip(rows, score.ids, score.spans)]
        return t.stack([-score.share(j) * r.gather(-1, i).sum() for j, (r, i) in enumerate(zip(rows, right))])
    rows = x[t.arange(b, device=x.device), score.places]
    if score.kind == "logit_diff":
        return score.diff(model.bridge.ln_final(rows.to(model.final_device))[None])[0]
    logp = logits(rows).double().log_softmax(-1)
    out = []
    for j, r in enumerate(score.group):
        right, wrong = logp[j, r.answers], logp[j, r.foils]
        match score.kind:
            case "prob":
                out.append(right.exp().sum())
            case "prob_diff":
                out.append(right.exp().sum() - wrong.exp().sum())
            case "logprob":
                out.append(right.logsumexp(0))
            case "kl":
                clean = r.of("clean").unembed(score.clean[j : j + 1])[0].double().log_softmax(-1)
                out.append((clean.exp() * (clean - logp[j])).sum())
    return t.stack(out)
