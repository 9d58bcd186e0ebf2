"""Every decoder architecture × every analysis: equal to the reference, or refused in words; and docs/architectures.md says which."""

import re
from functools import cache
from pathlib import Path

import pytest

from families.analyses import ANALYSES, Case, outcomes
from families.configs import FAMILIES
from families.known import KNOWN
from families.table import numbers_of, row
from utils import ROOT

QUICK = ("gpt_neox", "olmo2", "granite")
KINDS = (  # one of each kind of difference, in every run of the tests; the others only with `-m table`, three minutes of one core
    "opt", "bloom", "falcon-alibi", "cohere", "mixtral", "deepseek_v2", "mamba",
)  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A family's engine and reference, the last one's only: parameters come family by family."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def found(case: Case, analysis: str) -> dict[str, str]:
        return outcomes(case, analysis)

    held: dict[str, Case] = {}

    def make(family: str) -> tuple[Case, object]:
        if family not in held:
            held.clear()
            found.cache_clear()
            held[family] = Case(family, root)
        return held[family], found

    return make


def pytest_generate_tests(metafunc) -> None:
    marks = lambda f: [] if f in QUICK else [pytest.mark.slow] if f in KINDS else [pytest.mark.slow, pytest.mark.table]  # noqa: E731
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", [pytest.param(f, marks=marks(f)) for f in FAMILIES], scope="module")


@pytest.mark.parametrize("analysis", ANALYSES)
def test_equal_to_the_reference_or_refused(case, family, analysis):
    mine, found = case(family)
    wrong = {part: words for part, words in found(mine, analysis).items() if words and not words.startswith("refused")}
    if (family, analysis) in KNOWN:
        assert wrong, f"{analysis} of {family} is right now: take it out of KNOWN"
        return
    assert not wrong


def test_the_reference_holds_against_itself(case, family):
    mine, _ = case(family)
    errors = mine.reference.proof(mine.ids[0])
    assert all(e < 1e-4 for e in errors.values()), errors


def test_effects_are_of_real_size(case, family):
    """A sweep's largest effect would be seen: else equal tables would say little."""
    mine, _ = case(family)
    assert abs(mine.bases[0] - mine.bases[1]) > 2e-3


def test_the_docs_say_so(case, family):
    mine, found = case(family)
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    stale = "docs/architectures.md is stale: uv run tests/families/table.py > docs/architectures.md"
    try:
        line = row(family, {a: found(mine, a) for a in ANALYSES}, numbers_of(page))
    except KeyError as new:
        pytest.fail(f"{stale} (a new reason: {new})")
    assert line in page, stale


def test_the_docs_have_a_row_a_family():
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([\w.-]+) \| [✓r✗]", page, re.M) == list(FAMILIES)
    for family, analysis in KNOWN:
        assert re.search(rf"^\| {re.escape(family)} \|.*✗", page, re.M), (family, analysis)


def test_every_architecture_is_here():
    """All text decoders of the Bridge's list that transformers can make from a config, but those named here."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    from families.configs import config

    left = {"BertLMHeadModel", "DeepseekV4ForCausalLM"}  # an encoder; hyper-connections: several streams
    known = {c for names in NAMES.values() for c in ([names] if isinstance(names, str) else names)}
    wanted = {a for a in SUPPORTED_ARCHITECTURES if a in known and "Conditional" not in a} - left
    mine = {AutoModelForCausalLM._model_mapping[type(config(f))].__name__ for f in FAMILIES}
    assert wanted <= mine, wanted - mine


def test_known_failures_are_of_families_and_analyses():
    assert all(f in FAMILIES and a in ANALYSES for f, a in KNOWN)
    assert Path(__file__).parent.joinpath("families").is_dir()
