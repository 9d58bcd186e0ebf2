"""Where a graph's features fire most in a text, as files beside the graph's for the feature panel of circuit-tracer's viewer."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from techniques.features.requests import Examples, ExamplesResult
from techniques.graphs.files import pair
from techniques.graphs.requests import FEATURE, KINDS, GraphResult
from vocabulary.files import write_text
from vocabulary.nodes import UserError


def page(found: ExamplesResult, n: int, text: str) -> dict:
    """Of the n-th feature what circuit-tracer's viewer reads. Its histogram wants bins of one width, which Loupe does not keep: left out."""
    some = found.examples[n]
    shown = [
        {
            "tokens": [x.replace("\n", "⏎") for x in e.texts],
            "tokens_acts_list": list(e.activation),
            "train_token_ind": e.at,
            "is_repeated_datapoint": False,
        }
        for e in some
    ]
    top = max((x for e in some for x in e.activation), default=0.0)
    name = f"Where it fires most in {text}, {found.tokens:,} tokens" if some else f"It fires nowhere in {text}, {found.tokens:,} tokens"
    about = {"transcoder_id": found.info.source, "index": found.indices[n], "examples_quantiles": [{"quantile_name": name, "examples": shown}]}
    return about | {"top_logits": [], "bottom_logits": [], "act_min": 0.0, "act_max": top, "activation_frequency": float(found.density[n])}


def write_examples(path: Path, r: GraphResult, layers: dict[int, str], text: str, run: Callable[[Examples], ExamplesResult]) -> str:
    """
    Files of the features of a graph that goes to `path`, in a folder beside it; `layers`: each layer's transcoder. The folder, as the viewer is told it.
    UserError for features of a transcoder that is none of sae_lens's.
    """
    folder, said = path.with_name(f"{path.stem}-features"), Path(text).name or "corpus.txt"
    features = np.flatnonzero(r.kind == KINDS.index(FEATURE))
    if missing := sorted({int(x) for x in r.layer[features]} - set(layers)):
        raise UserError(f"--examples reads transcoders that sae_lens saved, one a layer; that of layer {missing[0]} is of another layout: leave it away")
    for layer, source in layers.items():
        indices = tuple(sorted({int(r.index[i]) for i in features if r.layer[i] == layer}))
        found = run(Examples(source, text, indices)) if indices else None
        for n, index in enumerate(indices):
            write_text(folder / f"{pair(layer, index)}.json", json.dumps(page(found, n, said)) + "\n")
    return f"./data/{folder.name}"
