"""
The one table of actions, put together from what the screen can do and from what each pane adds. From it come key bindings, hint line, help, palette and
the key table of the documentation.

1. An `Action` is a key that does something. The screen's act on the app; a pane's are called with that pane and the app.
2. Several panes may share a key: one of them declares the action, the others add a `Part`, which acts where they have the focus.
3. Where the pane in focus has no part, the action of the pane that declares it acts, or says what to do instead.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from textual.binding import Binding

from vocabulary.typed import parse_json, read_text, user_path
from vocabulary.nodes import UserError

PANES, MOVE, PROMPT, INTERVENE, CIRCUIT, FEATURES, VIEW, FIND, LOUPE = "Panes", "Move", "Prompt", "Intervene", "Circuit", "Features", "View", "Find", "Loupe"

KEY_PAGE = """# Keys

This page is the program's own table: `uv run tui.py --keys > docs/keys.md` writes it. On the screen `?` shows the same list, to filter and to run. What one key does in
several panes is separated by semicolons, each with its pane.

`LOUPE_KEYMAP` in `.env.local` names a JSON file that remaps keys by their ids: `{"ablate": "z", "saes": "f2"}`. Arrows always work too, and `ctrl+q` always quits.
"""


@dataclass(frozen=True)
class Action:
    """
    `id` names it in LOUPE_KEYMAP, `after` is the action behind which it stands in the table (else at the end of its group). In a pane's table: `who` begins its
    line of help, `reach` names the other panes in which it acts (None: all), and `elsewhere` is what it says in the rest.
    """

    id: str
    keys: str
    title: str
    help: str
    group: str
    do: Callable[..., None]
    after: str = ""
    who: str = ""
    reach: tuple[str, ...] | None = None
    elsewhere: str = ""
    of: tuple[tuple[str, str], ...] = ()  # filled by `collect`: the panes that have a part in it, and what it does there


@dataclass(frozen=True)
class Part:
    """What a key that is declared elsewhere does in this pane, and its words on the hint line there. False from `do`: nothing, as where there is no part."""

    id: str
    who: str
    help: str
    do: Callable[..., None]
    title: str = ""


class Keyed(Protocol):
    """What of a pane concerns its keys."""

    number: str
    key: str
    label: str
    about: str
    keys: tuple[Action | Part, ...]
    hints: tuple[str, ...]


def collect(screen: Iterable[Action], panes: Iterable[Keyed], more: Iterable[Action] = ()) -> tuple[Action, ...]:
    """
    The whole table: the keys of the panes themselves, then the screen's own, among which what the panes declare (and `more`, of rooms without a pane) finds
    its place. Every `do` takes the app alone.
    """
    panes = tuple(panes)
    by_number = sorted(panes, key=lambda p: (p.number == "0", p.number))
    table = [Action(f"pane_{p.key}", p.number, p.key, f"{p.label}: {p.about}", PANES, show_pane(p.key)) for p in by_number] + list(screen)
    owners, parts = {}, {}
    for pane in panes:
        for a in pane.keys:
            parts.setdefault(a.id, []).append((pane.key, a))
            if isinstance(a, Action):
                owners[a.id] = pane.key
    left = [a for pane in panes for a in pane.keys if isinstance(a, Action)] + list(more)
    while left:
        ids = {a.id: n for n, a in enumerate(table)}
        action = next((a for a in left if a.after in ids), left[0])
        left.remove(action)
        same = [n for n, a in enumerate(table) if a.group == action.group]
        table.insert(1 + ids.get(action.after, same[-1] if same else len(table) - 1), action)
    unknown = set(parts) - {a.id for a in table}
    assert not unknown, f"{parts[min(unknown)][0][0]}: no pane declares the action {min(unknown)!r}"
    check(table)
    return tuple(joined(a, owners.get(a.id), parts.get(a.id, [])) for a in table)


def check(table: list[Action]) -> None:
    """Two actions with one id or one key are a mistake in a pane's table."""
    seen: dict[str, str] = {}
    for a in table:
        for name in (f"id {a.id}", *(f"key {k}" for k in a.keys.split(",") if k)):
            assert name not in seen, f"{name} belongs to {seen[name]} and to {a.title}"
            seen[name] = a.title


def joined(action: Action, owner: str | None, parts: list[tuple[str, Action | Part]]) -> Action:
    """An action with what the panes add to its help and to what it does."""
    clauses: list[tuple[list[str], str]] = []
    for who, text in ([] if owner else [(action.who, action.help)]) + [(p.who, p.help) for _, p in parts]:
        if clauses and clauses[-1][1] == text:
            clauses[-1][0].append(who)
        elif text:
            clauses.append(([who], text))
    text = "; ".join(f"{' and '.join(who)}: {words}" if any(who) else words for who, words in clauses)
    of = [(key, upper(p.help or action.help)) for key, p in parts]
    of += [(key, upper(action.help)) for key in action.reach or () if key not in dict(of)]
    return replace(action, help=upper(text), do=dispatch(action, owner, {key: p.do for key, p in parts}), of=tuple(of))


def upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def dispatch(action: Action, owner: str | None, parts: dict[str, Callable]) -> Callable:
    """The part of the pane in focus, else the action of who declares it, as far as it reaches."""

    def do(app) -> None:
        if app.pane in parts and parts[app.pane](app.panes[app.pane], app) is not False:
            return
        if owner is None:
            action.do(app)
        elif action.reach is None or app.pane in action.reach:
            action.do(app.panes[owner], app)
        else:
            raise UserError(action.elsewhere)

    return do


def show_pane(key: str) -> Callable:
    return lambda app: app.show_pane(key)


def bindings(table: tuple[Action, ...]) -> list[Binding]:
    """Priority, so that keys that come in a burst are taken in order; check_action lets them through to an open overlay."""
    return [Binding(a.keys, f"do('{a.id}')", a.title, show=False, id=a.id, priority=True) for a in table if a.keys]


def keymap(table: tuple[Action, ...]) -> dict[str, str]:
    """What Textual calls the keys of every action."""
    return {b.id: ",".join(c.key for c in Binding.make_bindings([b])) for b in bindings(table)}


def hints(table: tuple[Action, ...], pane: Keyed, panes: Iterable[Keyed], idle: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """(key, title) of what the hint line shows in a pane, the most useful first; `idle` are ids of what would do nothing now."""
    first = ("enter", "sweep", "view", "ablate", "patch", "keep")
    rank = lambda a: (first.index(a.id) if a.id in first else len(first), sum(a.id in p.hints for p in panes))  # noqa: E731
    own = sorted((a for a in table if a.id in pane.hints and a.id not in idle), key=rank)
    titles = {a.id: a.title for a in pane.keys if a.title}
    return [*((show_key(a.keys.split(",")[0]), titles.get(a.id, a.title)) for a in own), ("hjkl", "move")]


def helped(table: tuple[Action, ...], pane: Keyed) -> list[tuple[str, Action, str]]:
    """(section, action, what it is for) of every key: first the pane's own, then those of every pane, then what other panes have."""
    own = [(pane.label, a, dict(a.of)[pane.key]) for a in table if pane.key in dict(a.of)]
    mine = {a.id for _, a, _ in own}
    rest = [(a.group if a.reach is None else "other panes", a, a.help) for a in table if a.id not in mine]
    return own + sorted(rest, key=lambda row: row[0] == "other panes")


def show_key(key: str) -> str:
    return {
        "comma": ",",
        "escape": "esc",
        "enter": "⏎",
        "backspace": "⌫",
        "left": "←",
        "right": "→",
        "up": "↑",
        "down": "↓",
        "pageup": "PgUp",
        "pagedown": "PgDn",
        "home": "Home",
        "end": "End",
    }.get(key, key)


def show_keys(action: Action) -> str:
    """The keys of an action; one without a key is run by its name."""
    return " ".join(show_key(k) for k in action.keys.split(",")) if action.keys else f":{action.id}"


def remapped(path: str, table: tuple[Action, ...]) -> tuple[Action, ...]:
    """The table with the keys of a LOUPE_KEYMAP file: a JSON object {action id: "key[,key]"}. ctrl+q always quits."""
    if not path:
        return table
    try:
        chosen = parse_json(read_text(user_path(path)))
        assert isinstance(chosen, dict) and all(isinstance(v, str) for v in chosen.values()), "not an object of strings"
        assert not (bad := [v for v in chosen.values() if not all(k.strip() for k in v.split(","))]), f"{bad[0]!r} is no key"
    except (UserError, AssertionError) as error:
        raise UserError(f'LOUPE_KEYMAP {path}: give a JSON file such as {{"pane_lens": "f1"}} ({error})') from error
    if unknown := set(chosen) - {a.id for a in table}:
        raise UserError(f"LOUPE_KEYMAP {path}: no action {min(unknown)!r}; `uv run tui.py --keys` lists the ids")
    taken = {k for keys in chosen.values() for k in keys.split(",")}
    out = []
    for a in table:
        keys = chosen.get(a.id) or ",".join(k for k in a.keys.split(",") if k not in taken)
        out.append(replace(a, keys=f"{keys},ctrl+q" if a.id == "quit" and "ctrl+q" not in keys else keys))
    return tuple(out)


def key_table(table: tuple[Action, ...]) -> str:
    """The key table in Markdown."""
    keys = [" ".join("`` ` ``" if k == "`" else f"`{k}`".replace("|", r"\|") for k in show_keys(a).split()) for a in table]
    return "\n".join(["| key | action | id |", "|---|---|---|", *(f"| {k} | {a.help} | `{a.id}` |" for k, a in zip(keys, table))]) + "\n"


def key_page(table: tuple[Action, ...]) -> str:
    """docs/keys.md: the key table, and how keys are changed."""
    return f"{KEY_PAGE}\n{key_table(table)}"
