"""
What came out before the house was rebuilt still comes out: the command line's JSON and tables, its list of commands, exported scripts, a session file.

`python tests/test_fixtures.py` records them again (only when a number is meant to change).
"""

import contextlib
import gzip
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine as program
import tui  # noqa: F401  (the panes bring their views)
from engine import Engine
from vocabulary.script import python_script
from techniques.output.requests import Run
from vocabulary.circuit import Circuit
from vocabulary.nodes import parse_intervention
from vocabulary.prompts import Metric, Prompt, read_prompt_set
from vocabulary.requests import Load
from vocabulary.wire import to_json
from screen.session import VIEWS, Session, State, read_session
from utils import ROOT

FIXTURES = Path(__file__).parent / "fixtures"
IOI = ["--clean", "When Mary and John went to the store, John gave a drink to", "--answer", " Mary", "--foil", " John"]
PAIR = [*IOI, "--corrupt", "When Mary and John went to the store, Alice gave a drink to"]
SET = ["--set", "zoo/prompts/ioi_abba.jsonl"]
FEW = ["--set", "tests/fixtures/few.jsonl"]  # the first four of that set
SAE = "zoo/L2.resid_post"
CALLS = (
    ["run", *IOI, "--do", "L3H3=zero"],
    ["run", *PAIR, "--do", "L3H3=patch", "L3H2=patch", "--k", "3"],
    ["run", *SET, "--do", "L2.mlp=mean", "L1H0@S2=resample", "--do-seed", "3", "--metric", "prob", "--k", "2"],
    ["run", *PAIR, "--do", "L2.sae.f263@-1=zero", "--sae", SAE, "--no-sae-error", "--k", "2"],
    ["run", "--clean", "When Mary and John went to the store, she gave it to", "--corrupt", PAIR[1], "--align", "diff", "--do", "L3H3=patch", "--base", "corrupt"],
    ["lens", "--clean", "The capital of France is"],
    ["lens", *PAIR, "--positions", "-1", "10", "--points", "L3.attn", "L3.mlp", "L3H2", "--k", "3", "--which", "clean"],
    ["lens", *IOI, "--kind", "tuned", "--positions", "-1"],
    ["attention", *IOI, "--layer", "1"],
    ["attention", *PAIR, "--layer", "2", "--weighted", "--which", "clean-corrupt"],
    ["attention", *FEW, "--mean"],
    ["heads", *IOI],
    ["heads", *IOI, "--source", "random"],
    ["detect", *IOI, "--pattern", "duplicate_token_head"],
    ["detect", *IOI, "--cells", "14,2", "10,4", "--error-measure", "abs", "--exclude-bos"],
    ["attribution", *PAIR],
    ["attribution", *PAIR, "--by", "L3H3"],
    ["attribution", *PAIR, "--by", "L3.mlp@-1", "--k", "4"],
    ["attribution", *FEW, "--mean"],
    ["weights", "--head", "L1H0", "--k", "4"],
    ["weights", "--head", "L2H0", "--view", "composition"],
    ["weights", "--head", "L3H2", "--view", "OV", "--r", "2", "--k", "4"],
    ["weights", "--head", "L2.mlp", "--view", "mlp_out", "--r", "2", "--k", "4"],
    ["sweep", *PAIR, "--kind", "z", "--direction", "noise"],
    ["sweep", *PAIR, "--kind", "resid_post"],
    ["sweep", *PAIR, "--kind", "z", "--effect", "direct"],
    ["sweep", *PAIR, "--kind", "attn", "--plain"],
    ["sweep", *FEW, "--kind", "nodes", "--op", "mean", "--mean"],
    ["sweep", *FEW, "--kind", "attn", "--mean", "--seed", "1", "--op", "resample"],
    ["sweep", *PAIR, "--kind", "pairs", "--nodes", "L3H2", "L3H3", "L0H1"],
    ["sweep", *PAIR, "--kind", "z_pos", "--estimate", "atp"],
    ["sweep", *PAIR, "--kind", "features", "--node", "L2.sae", "--sae", SAE, "--k", "3"],
    ["path", *PAIR, "--receiver", "L3H2.v", "L3H3.v"],
    ["path", *PAIR, "--each", "receiver", "--sender", "L0H1", "--convention", "mlps"],
    ["score", *FEW, "--nodes", "L0H1", "L0H3", "L3H2", "L3H3", "--rest", "patch", "--what", "faithfulness", "effects", "completeness", "minimality"],
    ["score", *FEW, "--circuit", "tests/fixtures/circuit.json", "--rest", "patch"],
    ["discover", *FEW, "--method", "eap", "--edges", "20"],
    ["discover", *FEW, "--method", "greedy", "--nodes", "4"],
    ["discover", *FEW, "--method", "features", "--nodes", "8", "--sae", SAE],
    ["compare", "--circuit", "tests/fixtures/circuit.json", "--other", "tests/fixtures/heads.json"],
    ["saes"],
    ["preflight", SAE, *IOI],
    ["features", SAE, *PAIR, "--order", "attribution", "--k", "6"],
    ["features", SAE, *PAIR, "--at", "10", "--which", "corrupt", "--order", "direct", "--k", "3"],
    ["feature", SAE, *IOI, "--index", "263", "--k", "4"],
    ["feature-graph", *IOI, "--up", "zoo/L1.resid_post", "--down", SAE, "--target", "263", "--k", "5"],
    ["feature-graph", *IOI, "--up", "zoo/L1.resid_post", "--target", "-1", "--k", "5"],
    ["feature-graph", *IOI, "--up", "zoo/L1.resid_post", "--down", SAE, "--target", "263", "--check", "156", "--check-at", "14"],
    ["check", *IOI],
)  # fmt: skip
TEXTS = (
    *(["circuit", *FEW, "--circuit", "tests/fixtures/circuit.json", "--form", form] for form in ("text", "dot", "mermaid", "table", "python")),
    ["circuit", *FEW, "--circuit", "tests/fixtures/heads.json", "--form", "python", "--rest", "mean", "--mlps"],
)
WRONG = (
    ["run", "--do", "L9H9"],
    ["score", "--nodes", "L9H9"],
    ["score"],
    ["compare"],
    ["circuit"],
    ["sweep", "--kind", "z"],
    ["sweep", *PAIR, "--estimate", "atp", "--op", "zero"],
    ["weights", "--head", "L1.mlp"],
    ["detect", "--cells", "14"],
    ["attribution", "--by", "embed"],
    ["features", "zoo/nothing"],
    ["preflight"],
    ["feature-graph", *IOI],
)
VOLATILE = {"seconds", "expected", "peak_mb", "cached", "floor"}
SESSION = FIXTURES / "session.jsonl"
SCRIPTS = (
    ("clean", "logit_diff", "L3H3=patch L2.mlp@-1=scale:0.5"),
    ("corrupt", "prob", "L1.resid_mid@S2=patch L3H2=mean_all L2.resid_pre@2=patch"),
)


def call(args: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
        code = program.main(args)
    return code, out.getvalue(), err.getvalue()


def help_list() -> list[str]:
    """The names of the commands that `--help` offers."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        program.main(["--help"])
    return sorted(re.search(r"\{([\w,-]+)\}", out.getvalue())[1].split(","))


def scripts(engine: Engine) -> list[str]:
    prompts = read_prompt_set(FIXTURES / "few.jsonl")
    out = []
    for base, metric, done in SCRIPTS:
        state = State(prompt=prompts[0], prompt_set=prompts, metric=Metric(metric), base=base, interventions=tuple(map(parse_intervention, done.split())))
        out.append(python_script(state, engine.model.info, engine.run(Run(state.study))).replace(str(ROOT), "ROOT"))
    return out


def tidy(obj: object) -> object:
    """JSON with numbers to 8 digits."""
    match obj:
        case float():
            return float(f"{obj:.8g}")
        case str():
            return obj.replace(str(ROOT), "ROOT")
        case list():
            return [tidy(x) for x in obj]
        case dict():
            return {k: tidy(v) for k, v in obj.items() if k not in VOLATILE}
    return obj


def words(text: str) -> list:
    """A table's words, with numbers as numbers; times and memory left out, and the mark of noise: on which side of 1e-6 a zero falls, the machine says."""
    text = re.sub(r"[\d.]+ (s|MB)\b", "", text).replace(str(ROOT), "ROOT").replace("~", "")
    out = []
    for word in text.split():
        try:
            out.append(float(word))
        except ValueError:
            out.append(word)
    return out


def differences(a: object, b: object, at: str = "", close: float = 1e-5) -> list[str]:
    """Where two JSON values differ: numbers by more than 1e-5 (of their size, when that is over 1)."""
    if isinstance(a, int | float) and isinstance(b, int | float) and not isinstance(a, bool):
        return [] if math.isclose(a, b, rel_tol=close, abs_tol=close) else [f"{at}: {a} and {b}"]
    if type(a) is not type(b) or isinstance(a, list) and len(a) != len(b):
        return [f"{at}: {str(a)[:80]} and {str(b)[:80]}"]
    if isinstance(a, list):
        return [x for i, (v, w) in enumerate(zip(a, b)) for x in differences(v, w, f"{at}[{i}]", close)]
    if isinstance(a, dict):
        if missing := set(a) - set(b):
            return [f"{at}: no {sorted(missing)}"]
        return [x for k in a for x in differences(a[k], b[k], f"{at}.{k}", close)]
    return [] if a == b else [f"{at}: {a!r} and {b!r}"]


def load(name: str) -> dict:
    return json.loads(gzip.decompress((FIXTURES / f"{name}.json.gz").read_bytes()))


def save(name: str, obj: object) -> None:
    (FIXTURES / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(obj, ensure_ascii=False).encode(), mtime=0))


def record() -> None:
    prompts = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")
    lines = (ROOT / "zoo" / "prompts" / "ioi_abba.jsonl").read_text().splitlines()[:4]
    (FIXTURES / "few.jsonl").write_text("\n".join(lines) + "\n")
    assert read_prompt_set(FIXTURES / "few.jsonl") == prompts[:4]
    engine = Engine("zoo")
    program.Engine = lambda: engine
    call(["discover", *FEW, "--method", "eap-ig", "--edges", "12", "--out", "tests/fixtures/circuit.json"])
    (FIXTURES / "heads.json").write_text(
        json.dumps({"name": "heads", "model": "zoo", "nodes": ["L0H1", "L0H3", "L3H2", "L3H3"], "groups": {"last": ["L3H2", "L3H3"]}})
    )
    save("results", {" ".join(c): tidy(json.loads(call([*c, "--json"])[1])) for c in CALLS})
    save("tables", {" ".join(c): call(c)[1].replace(str(ROOT), "ROOT") for c in CALLS})
    save("texts", {" ".join(c): call(c)[1].replace(str(ROOT), "ROOT") for c in TEXTS})
    save("wrong", {" ".join(c): call(c)[2] for c in WRONG})
    save("scripts", scripts(engine))
    save("commands", help_list())
    record_session(prompts[:4])
    save("session", to_json(read_session(SESSION)[0].state))


def record_session(prompts) -> None:
    """A hunt with every kind of action and every view."""
    SESSION.unlink(missing_ok=True)
    hunt = Session(State(), SESSION)
    hunt.do("model", load=to_json(Load("zoo")))
    hunt.do("open_set", path="few.jsonl", prompts=to_json(prompts), index=1)
    hunt.do("prompt", prompt=to_json(Prompt("a b", "a c d", (" x",), (" y",), (("S1", 0),), None, (), ((0, 0), (1, 2)))))
    for name, args in (
        ("go", {"index": 0}), ("metric", {"kind": "prob", "pos": "S2"}), ("base", {"value": "corrupt"}), ("ablation", {"kind": "mean"}),
        ("intervene", {"intervention": "L3H3=patch"}), ("intervene", {"intervention": "L2.mlp@-1=scale:0.5"}), ("drop", {"intervention": "L3H3=patch"}),
        ("enable", {"value": False}), ("lens", {"kind": "tuned", "artefact": "zoo/tuned_lens"}), ("align", {"how": "labels"}),
        ("saes", {"sources": ["zoo/L1.resid_post", SAE]}), ("show_sae", {"source": "zoo/L1.resid_post"}), ("sae_error", {"value": False}),
        ("intervene", {"intervention": "L2.sae.f12@S2=set:3.0"}), ("new_circuit", {"name": "one"}), ("keep", {"part": "L0H1"}),
        ("keep", {"part": "L0H1->L3H3.v"}), ("keep", {"part": "L2.sae.f12"}), ("group", {"name": "last", "nodes": ["L3H3"]}), ("new_circuit", {"name": "two"}),
        ("keep", {"part": "L2.mlp->logits"}), ("put_circuit", {"circuit": to_json(Circuit("three", "zoo", ("L1H1",), (), {"g": ("L1H1",)}, "by hand"))}),
        ("rename_circuit", {"name": "two", "to": "second"}), ("combine", {"how": "union", "one": "one", "other": "second", "name": "both"}),
        ("delete_circuit", {"name": "three"}), ("select_circuit", {"name": "one"}), ("receivers", {"addresses": ["L3H3.v", "logits"]}),
        ("senders", {"addresses": ["L0H1", "embed"]}), ("undo", {}), ("undo", {}), ("redo", {}),
    ):  # fmt: skip
        hunt.do(name, **args)
    for name, values in VIEWS.items():
        hunt.do("view", name=name, value=values[-1])


@pytest.fixture
def zoo(engines, monkeypatch):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    return engines["zoo"]


@pytest.mark.parametrize("args", CALLS, ids=lambda c: " ".join(c)[:60])
def test_results(zoo, args):
    code, out, err = call([*args, "--json"])
    assert code == 0 and err == "", err
    assert not differences(load("results")[" ".join(args)], tidy(json.loads(out)))


@pytest.mark.parametrize("args", CALLS, ids=lambda c: " ".join(c)[:60])
def test_tables(zoo, args):
    assert not differences(words(load("tables")[" ".join(args)]), words(call(args)[1]), close=2e-3)


def test_texts_and_errors(zoo):
    for args in TEXTS:
        assert call(args)[:2] == (0, load("texts")[" ".join(args)].replace("ROOT", str(ROOT)))
    for args in WRONG:
        code, out, err = call(args)
        assert code == 2 and out == "" and err == load("wrong")[" ".join(args)], args
    assert set(load("commands")) <= set(help_list()), "a command of before is gone"


def test_exported_scripts(zoo):
    assert scripts(zoo) == load("scripts")


def test_a_session_written_before_opens_unchanged():
    session, warning = read_session(SESSION)
    assert not warning and not differences(load("session"), to_json(session.state))


if __name__ == "__main__":
    record()
