"""Directions against numbers read from Hugging Face's own model and weights, and steering against a plain hook that adds c times the vector; files that are wrong."""

import json

import numpy as np
import pytest
import torch as t
from conftest import ARCHS, CORRUPT, PROMPT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import engine as program
from model import directions
from vocabulary.script import python_script
from screen.session import Session, State, read_session
from techniques.generation.requests import Curve, Directions, MakeDirection
from techniques.output.requests import Run
from utils import ROOT
from vocabulary.files import folder
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Metric, Study, read_prompt_set
from vocabulary.requests import Load

DEFAULT = ("gemma2",)
families = pytest.mark.parametrize("arch", [pytest.param(a, marks=[] if a in DEFAULT else pytest.mark.table) for a in ARCHS])
IOI = str(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")


def study(*done: str, **kw) -> Study:
    return Study(PROMPT, tuple(map(parse_intervention, done)), **kw)


def held(name: str) -> np.ndarray:
    return load_file(folder("directions") / f"{name}.safetensors")["direction"].numpy()


@families
@pytest.mark.parametrize("site, node", [("resid_post", "L1.resid_post"), ("attn", "L2.attn"), ("resid_pre", "L1.resid_pre@3")])
def test_steering_adds_the_vector(engine, reference, site, node):
    """Made from two prompts, added at all positions or at one, with any coefficient."""
    made = engine.run(MakeDirection(study(), at=f"{node.partition('@')[0]}@END"))
    layer = int(node[1])
    ids = engine.run(Run(study())).clean.tokens.ids
    theirs = engine.model.row(CORRUPT, None).ids
    want = reference.read(ids, (site, layer))[0, -1] - reference.read(theirs, (site, layer))[0, -1]
    np.testing.assert_allclose(held(made.name), want.numpy(), atol=1e-4)
    assert made.at == node.partition("@")[0] and made.norm == pytest.approx(want.norm().item(), rel=1e-4)

    where = slice(None) if "@" not in node else 3
    found = engine.run(Run(study(f"{node}=steer:{made.name}:2.5"), k=5)).now
    logits = reference.run([ids], [((site, layer), lambda x: x[:, where].add_(2.5 * want))])[0][0]
    np.testing.assert_allclose(np.sort(logits, -1)[:, :-6:-1], found.top_logits, atol=1e-4, rtol=1e-4)
    for source in (made.path, str(folder("directions") / "v.npy")):
        np.save(folder("directions") / "v.npy", want.numpy())
        again = engine.run(Run(study(f"{node}=steer:{source}:2.5"), k=5)).now
        np.testing.assert_allclose(again.top_logits, found.top_logits, atol=1e-4, rtol=1e-4)


def test_means_over_positions_and_sets(engines, references):
    engine, reference = engines["zoo"], references["zoo"]
    prompts = read_prompt_set(IOI)[:5]
    read = lambda text: reference.read(engine.model.row(text, None).ids, ("resid_post", 2))[0]  # noqa: E731
    made = engine.run(MakeDirection(study(), at="L2.resid_post"))
    np.testing.assert_allclose(held(made.name), (read(PROMPT.clean)[1:].mean(0) - read(CORRUPT)[1:].mean(0)).numpy(), atol=1e-4)
    made = engine.run(MakeDirection(study(prompt_set=prompts), "set", "L2.resid_post@END"))
    want = sum(read(p.clean)[-1] - read(p.corrupt)[-1] for p in prompts) / 5
    np.testing.assert_allclose(held(made.name), want.numpy(), atol=1e-4)
    other = str(ROOT / "zoo" / "prompts" / "ioi_baba.jsonl")
    made = engine.run(MakeDirection(study(prompt_set=prompts), "set", "L2.resid_post", minus=other))
    theirs = [read(p.clean)[1:].mean(0) for p in read_prompt_set(other)]
    want = sum(read(p.clean)[1:].mean(0) for p in prompts) / 5 - sum(theirs) / len(theirs)
    np.testing.assert_allclose(held(made.name), want.numpy(), atol=1e-4)


def test_features_and_heads(engines, references):
    engine, reference = engines["zoo"], references["zoo"]
    made = engine.run(MakeDirection(study(saes=("zoo/L2.resid_post",)), "feature", "L2.sae.f12"))
    np.testing.assert_allclose(held(made.name), load_file(ROOT / "zoo/saes/L2.resid_post/sae_weights.safetensors")["W_dec"][12].numpy(), atol=1e-6)
    assert made.at == "L2.resid_post"

    block, d = reference.blocks[1], reference.d_head
    with t.no_grad():
        w_v = block.attn.c_attn.weight[:, reference.columns("v", 3)]
        b_v = block.attn.c_attn.bias[reference.columns("v", 3)]
        w_o = block.attn.c_proj.weight[3 * d : 4 * d]
        made = engine.run(MakeDirection(study(), "head", "L1H3", token=" Mary"))
        token = engine.model.encode(" Mary")[0][0]
        want = (block.ln_1(reference.embed.weight[token]) @ w_v + b_v) @ w_o
        np.testing.assert_allclose(held(made.name), want.numpy(), atol=1e-4)
        made = engine.run(MakeDirection(study(), "head", "L1H3"))
        gain = block.ln_1.weight[:, None] * w_v
        ov = ((gain - gain.mean(0)) @ w_o).double().numpy()
    u = np.linalg.svd(ov)[2][0]
    u = u if u[np.abs(u).argmax()] > 0 else -u
    np.testing.assert_allclose(held(made.name), u, atol=1e-4)
    assert made.at == "L1.attn"


def test_the_curve(engines):
    engine = engines["zoo"]
    made = engine.run(MakeDirection(study(), at="L2.resid_post@END"))
    done = f"L2.resid_post@END=steer:{made.name}:1"
    found = engine.run(Curve(study("L0H1=zero", done), coefficients=(-1.0, 0.0, 2.0)))
    for c, value in zip((-1.0, 0.0, 2.0), found.values):
        want = engine.run(Run(study("L0H1=zero", f"L2.resid_post@END=steer:{made.name}:{c}"))).now.metric
        assert value == pytest.approx(want, abs=1e-5)
    assert found.clean == engine.run(Run(study())).clean.metric


def test_files(engines, tmp_path):
    """Saved with its hook point, loaded again, put away and still found; what is wrong is said in a line."""
    engine = engines["zoo"]
    made = engine.run(MakeDirection(study(), at="L2.resid_post@END", name="truth", out=str(tmp_path / "v.safetensors")))
    with safe_open(tmp_path / "v.safetensors", "pt") as f:
        assert f.metadata()["hook_point"] == "L2.resid_post"
    again = engine.run(MakeDirection(study(), "file", file=str(tmp_path / "v.safetensors"), name="truth"))
    assert again == made and made.name.startswith("truth-")
    assert [d.name for d in engine.run(Directions()).some] == [made.name]
    before = engine.run(Run(study(f"L1.mlp=steer:{made.name}:2"))).now.metric
    assert engine.run(Directions(away=made.name)).some == ()
    assert engine.run(Run(study(f"L1.mlp=steer:{made.name}:2"))).now.metric == before, "what was put away is still found"

    save_file({"a": t.ones(128), "b": t.ones(128)}, tmp_path / "two.safetensors")
    np.save(tmp_path / "short.npy", np.ones(3))
    np.save(tmp_path / "flat.npy", np.ones((4, 32)))
    np.save(tmp_path / "nan.npy", np.full(128, np.nan))
    (tmp_path / "text.npy").write_text("no")
    changed = folder("directions") / "old-00000000.safetensors"
    save_file({"direction": t.ones(128)}, changed)
    for source, words in [
        ("nowhere", "there is no direction 'nowhere'"),
        (tmp_path / "two.safetensors", "holds 2 tensors"),
        (tmp_path / "short.npy", "has 3 numbers, and the model's residual stream 128"),
        (tmp_path / "flat.npy", "shape \\[4, 32\\]"),
        (tmp_path / "nan.npy", "zero or not finite"),
        (tmp_path / "text.npy", "is no direction"),
        ("old-00000000", "is not what it was when it was made"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.run(Run(study(f"L1.resid_post=steer:{source}:2")))
    assert engine.run(Directions()).wrong, "the list says what it could not read"


@pytest.mark.parametrize(
    "ask, words",
    [
        (MakeDirection(study(), at="L1H2"), "in the residual stream"),
        (MakeDirection(study(), "set", "L1.resid_post"), "needs a prompt set"),
        (MakeDirection(study(), "feature", "L1.resid_post"), "is no feature"),
        (MakeDirection(study(), "feature", "L2.sae.f1"), "no SAE is chosen"),
        (MakeDirection(study(), "head", "L1.mlp"), "is no head"),
        (MakeDirection(study(), "head", "L1H2", token=" Mary John"), "must be one"),
        (MakeDirection(study(), "file"), "name a .safetensors"),
        (MakeDirection(study(), "pairs"), "no kind of direction"),
        (MakeDirection(study(), at="L1.resid_post@1", name="a/b"), "is not a name"),
        (MakeDirection(study(), at="L1.resid_post@0"), "the two sides are alike there"),
        (Curve(study()), "no such steering intervention"),
        (Run(study("L1H2=steer:x:2")), "lies in the residual stream"),
    ],
)
def test_refusals(engines, ask, words):
    with pytest.raises(UserError, match=words):
        engines["zoo"].run(ask)


@pytest.mark.parametrize("text", ["L1.mlp=steer", "L1.mlp=steer:x", "L1.mlp=steer:2", "L1.mlp=steer:x:", "L1.mlp=steer:x:nan", "L1.mlp=steer:x:y"])
def test_what_is_no_steering(text):
    with pytest.raises(UserError):
        parse_intervention(text)


def test_session_and_script(engines, tmp_path):
    """Held by the session, through undo, redo and resume; the script adds the same vector."""
    engine = engines["zoo"]
    made = engine.run(MakeDirection(study(), at="L2.resid_post@END"))
    one = parse_intervention(f"L2.resid_post@2=steer:{made.name}:2")
    assert str(one) == f"L2.resid_post@2=steer:{made.name}:2.0" and parse_intervention(str(one)) == one
    session = Session(State(Load("zoo"), PROMPT, metric=Metric("logit_diff")), tmp_path / "s.jsonl")
    session.do("intervene", intervention=one)
    session.do("undo")
    assert session.state.interventions == ()
    session.do("redo")
    session.close()
    again = read_session(tmp_path / "s.jsonl")[0]
    assert again.state.interventions == (one,)
    run = engine.run(Run(again.state.study))
    space: dict = {}
    exec(compile(python_script(again.state, engine.model.info, run), "script", "exec"), space)
    t.set_grad_enabled(True)
    logits = space["logits"][-1]
    assert (logits[space["answers"]].mean() - logits[space["foils"]].mean()).item() == pytest.approx(run.now.metric, abs=1e-4)
    again.close()


def test_from_the_shell(engines, monkeypatch, capsys):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    words = ["--clean", PROMPT.clean, "--corrupt", CORRUPT, "--answer", " Mary", "--foil", " John"]
    assert program.main(["direction", *words, "--at", "L1.resid_post@END", "--name", "s2", "--json"]) == 0
    name = json.loads(capsys.readouterr().out)["name"]
    assert directions.digest(directions.read(name).x) == name[-8:]
    assert program.main(["steer-curve", *words, "--do", f"L1.resid_post=steer:{name}:1", "--coefficients", "0", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["values"]) == 2
    assert program.main(["directions"]) == 0 and name in capsys.readouterr().out
