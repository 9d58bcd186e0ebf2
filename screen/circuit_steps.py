"""What the session's actions do to its circuits: each takes a state (session.State) and gives the next."""

from dataclasses import replace

from vocabulary.circuit import Circuit, COMBINE, LOGITS, check_receivers, combined, grouped, parse_edge, toggled
from vocabulary.nodes import UserError
from vocabulary.typed import one_of
from vocabulary.wire import from_json


def named(state, name: str) -> Circuit:
    found = next((c for c in state.circuits if c.name == name), None)
    if found is None:
        raise UserError(f"there is no circuit {name!r}: there {'are' if state.circuits else 'is none'} {', '.join(c.name for c in state.circuits)}".rstrip())
    return found


def with_circuit(state, circuit: Circuit) -> object:
    """The circuit in the place of the one of its name, or at the end; it becomes the current one."""
    if not circuit.name.strip():
        raise UserError("a circuit needs a name")
    old = [c.name for c in state.circuits]
    some = tuple(circuit if c.name == circuit.name else c for c in state.circuits) if circuit.name in old else (*state.circuits, circuit)
    return replace(state, circuits=some, circuit=circuit.name)


def new_circuit(state, name: str) -> object:
    if any(c.name == name for c in state.circuits):
        raise UserError(f"there is a circuit {name!r} already: choose another name")
    return with_circuit(state, Circuit(name, state.model.model))


def put_circuit(state, circuit: dict) -> object:
    return with_circuit(state, from_json(circuit, Circuit))


def select_circuit(state, name: str) -> object:
    return replace(state, circuit=named(state, name).name)


def rename_circuit(state, name: str, to: str) -> object:
    if any(c.name == to for c in state.circuits):
        raise UserError(f"there is a circuit {to!r} already: choose another name")
    renamed = replace(named(state, name), name=to)
    if not to.strip():
        raise UserError("a circuit needs a name")
    some = tuple(renamed if c.name == name else c for c in state.circuits)
    return replace(state, circuits=some, circuit=to if state.circuit == name else state.circuit)


def delete_circuit(state, name: str) -> object:
    left = tuple(c for c in state.circuits if c is not named(state, name))
    return replace(state, circuits=left, circuit=state.circuit if state.circuit != name else left[-1].name if left else "")


def keep(state, part: str) -> object:
    """Keep a node or an edge (an address with ->) in the current circuit, or drop it; the first one makes a circuit."""
    return with_circuit(state, toggled(state.current or Circuit("circuit", state.model.model), part))


def receivers(state, addresses: list) -> object:
    """Where paths end: heads' q, k, v, MLPs, logits."""
    check_receivers(addresses)
    return replace(state, receivers=tuple(dict.fromkeys(addresses)) or (LOGITS,))


def senders(state, addresses: list) -> object:
    """Where paths to each receiver begin, together: heads, MLPs, embed; none: at the node under the cursor."""
    for text in addresses:
        parse_edge(f"{text}->{LOGITS}")
    return replace(state, senders=tuple(dict.fromkeys(addresses)))


def group(state, name: str, nodes: list) -> object:
    """Give nodes of the current circuit a name; no nodes take the group away."""
    return with_circuit(state, grouped(named(state, state.circuit), name, tuple(nodes)))


def combine(state, how: str, one: str, other: str, name: str) -> object:
    return with_circuit(state, combined(named(state, one), named(state, other), one_of(how, COMBINE, "combination"), name))
