"""What is put off: nothing is loaded before its first use, and then it is the real thing."""

import subprocess
import sys

import pytest

from model import later
from utils import ROOT

SOURCE = """
class Thing:
    kind = "real"
    def __init__(self, n=0): self.n = n
def double(n): return 2 * n
"""


@pytest.fixture
def heavy(monkeypatch, tmp_path):
    """A package that is put off."""
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("from heavy.inner import Thing")
    (tmp_path / "heavy" / "inner.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(later, "LATER", ("heavy",))
    yield
    for name in ("heavy", "heavy.inner"):
        sys.modules.pop(name, None)


def test_a_name_loads_its_module_when_it_is_used(heavy):
    with later.later():
        import heavy as whole
        from heavy.inner import Thing, double

        def annotated(x: Thing | None, y: None | Thing) -> Thing: ...

        assert not isinstance(3, Thing) and not issubclass(int, Thing)
    assert "heavy" not in sys.modules and not isinstance(3, Thing) and not isinstance(3, whole.Thing)
    thing = Thing(4)
    real = sys.modules["heavy.inner"]
    assert type(thing) is real.Thing and thing.n == 4 and isinstance(thing, Thing) and isinstance(thing, whole.Thing) and not isinstance(3, Thing)
    assert double(3) == 6 and Thing.kind == "real" and issubclass(real.Thing, Thing)
    Thing.kind = "changed"
    assert real.Thing.kind == "changed"
    import heavy as after

    assert after is sys.modules["heavy"] and after.Thing is real.Thing


def test_what_is_used_while_importing_is_real(heavy):
    with later.later():
        from heavy import Thing

        class Own(Thing): ...

        import heavy as again
    assert Own.__mro__[1] is sys.modules["heavy"].Thing and again is sys.modules["heavy"] and isinstance(Own(), Thing)
    with later.later():  # it is there already
        import heavy as third
    assert third is again


@pytest.mark.table
def test_every_name_that_is_put_off_is_a_class_or_function():
    """So that a call, an attribute or isinstance is all that is done with it; after all are loaded the model's numbers are the same."""
    code = """
import inspect, sys, engine
from model.later import Name
from techniques.lens.requests import Lens
from tui import first_state
state = first_state({})
here = engine.Engine(state.model)
before = here.run(Lens(state.study))
names = {(n._module, n._name): n for m in list(sys.modules.values()) for n in list(vars(m).values()) if type(n) is Name}
assert len(names) > 5, names
for key, name in names.items():
    assert inspect.isclass(name._real()) or inspect.isroutine(name._real()), key
after = engine.Engine(state.model).run(Lens(state.study))
assert (before.kl == after.kl).all() and (before.prob == after.prob).all()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
