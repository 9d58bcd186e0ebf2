"""The one table of actions, from which key bindings, hint line, help, palette and the README's key table are made."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from vocabulary.nodes import UserError


@dataclass(frozen=True)
class Action:
    """A key that does something: `id` names it in LOUPE_KEYMAP and the app's method do_<id>; `hint` lists the panes (by number) whose hint line shows it."""

    id: str
    keys: str
    title: str
    help: str
    group: str
    hint: str = ""


TABLE = (
    Action("pane_lens", "1", "lens", "Lens: hook points × positions", "Panes"),
    Action("pane_attention", "2", "attention", "Attention: heads map and pattern", "Panes"),
    Action("pane_attribution", "3", "attribution", "Attribution: direct logit attribution of every component", "Panes"),
    Action("pane_patching", "4", "patching", "Patching: sweeps over every node, estimate and truth", "Panes"),
    Action("pane_circuit", "5", "circuit", "Circuit: what was kept, paths, scores, discovery", "Panes"),
    Action("pane_features", "6", "features", "Features: an SAE's features at the cursor's position, examples, graph", "Panes"),
    Action("pane_weights", "7", "weights", "Weights: OV and QK of the head under the cursor, composition, singular directions", "Panes"),
    Action("pane_output", "0", "output", "Output: likeliest next tokens, clean, corrupted and now", "Panes"),
    Action("next_pane", "tab", "next pane", "Next pane", "Panes"),
    Action("previous_pane", "shift+tab", "previous pane", "Previous pane", "Panes"),
    Action("zoom", "+", "zoom", "This pane alone on the screen", "Panes"),
    Action("unzoom", "_", "zoom back", "All panes that fit", "Panes"),
    Action("back", "escape", "back", "Leave the pattern, then the zoom", "Panes"),
    Action("left", "h,left", "left", "Position left; head left in the heads map", "Move", "120"),
    Action("down", "j,down", "down", "Next row: hook point, layer or destination", "Move", "120"),
    Action("up", "k,up", "up", "Previous row", "Move", "120"),
    Action("right", "l,right", "right", "Position right; head right in the heads map", "Move", "120"),
    Action("layer_down", "[", "layer −", "Layer before", "Move"),
    Action("layer_up", "]", "layer +", "Layer after", "Move"),
    Action("pos_left", "comma", "position −", "Position left (in the weights: nearer)", "Move", "2"),
    Action("pos_right", ".", "position +", "Position right (in the weights: farther)", "Move", "2"),
    Action("first", "g", "first", "First row", "Move"),
    Action("last", "G", "last", "Last row", "Move"),
    Action(
        "enter",
        "enter",
        "drill in",
        "Attention: into the head's pattern (hjkl move destination and source); attribution: by source or neuron; patching: the cell as an intervention; paths: keep the edge; features: walk the graph",
        "Move",
        "23456",
    ),
    Action("edit", "e", "edit prompt", "Edit the prompt", "Prompt", "12037"),
    Action("edit_corrupt", "E", "edit corrupted", "Edit the corrupted prompt", "Prompt"),
    Action("edit_answer", "t", "answer", "Answer and foil tokens", "Prompt"),
    Action("open", "o", "open set", "Open a prompt set (.jsonl)", "Prompt"),
    Action("align", "%", "align", "Prompts of unequal length: which positions stand against each other, by labels, by a token diff, or by hand", "Prompt"),
    Action("previous_prompt", "(", "prompt −", "Previous prompt of the set", "Prompt"),
    Action("next_prompt", ")", "prompt +", "Next prompt of the set", "Prompt", "0"),
    Action("metric", "m", "metric", "Choose the metric and its position", "Prompt", "0"),
    Action("ids", "i", "ids", "Token ids in the prompt lines, on or off", "Prompt"),
    Action("ablate", "a", "ablate", "Ablate the node under the cursor; again to restore it", "Intervene", "1236"),
    Action("ablation", "A", "kind", "Choose the kind of ablation", "Intervene"),
    Action("patch", "p", "patch", "Patch the node under the cursor from the other prompt; again to restore it", "Intervene", "123"),
    Action("scale", "s", "scale", "Scale the node under the cursor by a factor; a feature: scale, set or steer", "Intervene", "6"),
    Action("scope", "@", "scope", "Act on all positions, or on the cursor's only", "Intervene", "123"),
    Action("keep", "c", "keep", "Keep the node under the cursor in the circuit; again to drop it", "Circuit", "12345"),
    Action("circuits", "Y", "circuits", "Circuits: new, open, groups, union, compare, save, export, what the rest is set to", "Circuit", "5"),
    Action(
        "receivers",
        "Q",
        "receivers",
        "Where paths end: q, k, v of heads, MLPs, logits; or where those to each receiver begin: a node, some together, a group",
        "Circuit",
        "5",
    ),
    Action("discover", "U", "discover", "Find a circuit: EAP, EAP-IG, ACDC or greedy, as a job", "Circuit", "5"),
    Action("saes", "z", "SAEs", "SAEs and transcoders: load, switch, put away", "Features", "6"),
    Action("type_node", "I", "type one", "Type an intervention: L2H3@S2=zero", "Intervene"),
    Action("base", "d", "base", "Noising or denoising: intervene on the clean or on the corrupted prompt", "Intervene", "4"),
    Action("enable", "x", "off/on", "Interventions off or on", "Intervene", "123"),
    Action("clear", "X", "clear", "Clear all interventions", "Intervene"),
    Action("undo", "u", "undo", "Undo the last action", "Intervene", "120374"),
    Action("redo", "ctrl+r", "redo", "Redo", "Intervene"),
    Action("view", "v", "view", "Next view or statistic of this pane", "View", "1234567"),
    Action("mode", "V", "colour", "Colours, numbers or shades", "View", "12347"),
    Action("which", "f", "run", "Which run: now, clean, corrupted, or a difference", "View", "123"),
    Action(
        "source",
        "R",
        "random / set",
        "Attention: statistics on the prompt or on random repeated tokens; patching and circuit: over the prompt or the set",
        "View",
        "245",
    ),
    Action(
        "points",
        "P",
        "rows",
        "Lens: which hook points or components are the rows; patching: effect, metric, estimate, disagreement, spread, p; paths: from every sender, by position, or to each receiver; features: by activation, attribution, direct",
        "View",
        "456",
    ),
    Action("worst", "W", "worst prompt", "Attribution over the set: go to the prompt with the lowest logit difference", "Find"),
    Action(
        "sweep",
        "S",
        "run sweep",
        "Run this pane's sweep: patch or ablate every cell; circuit: score it, or run the paths; features: examples in a text",
        "View",
        "456",
    ),
    Action("operation", "b", "operation", "What the sweep does: patch, zero, mean, resample, noise; circuit: what the rest is set to", "View", "45"),
    Action("chart", "L", "chart", "Line chart of the statistic over depth at the cursor's position, clean and corrupted", "View", "1"),
    Action("lens_kind", "K", "lens kind", "Logit, tuned or Jacobian lens", "View", "1"),
    Action("fit", "F", "fit lens", "Fit a tuned lens to this model", "View"),
    Action(
        "weighted",
        "Z",
        "weighted / direct",
        "Attention: weighted by the size of what each value writes; patching: total or direct effect; paths: direct edge or through MLPs; features: error term kept or dropped",
        "View",
        "2456",
    ),
    Action("multiples", "O", "all heads", "The patterns of all heads of the layer, small, or one head's", "View", "2"),
    Action("ranked", "H", "rank", "Heads or cells ranked by what is shown: filter and go", "Find", "24"),
    Action("reading", "T", "read", "Colour the prompt's tokens by the head's attention from the cursor, to it, or not", "View"),
    Action("labels", "B", "labels", "Mean attention between labelled positions over the prompt set, ranked: filter and go", "Find"),
    Action(
        "detect",
        "C",
        "detector",
        "Score heads against a pattern: a known one, or cells such as 14>2 10>4; features: check the edge by the real intervention",
        "Find",
    ),
    Action("search", "/", "search", "Find a token, or go to a node (L2H3, L1.resid_mid@S2)", "Find"),
    Action("find_next", "n", "next", "Next match", "Find"),
    Action("find_previous", "N", "previous", "Previous match", "Find"),
    Action("palette", ":", "palette", "Command palette", "Loupe"),
    Action("help", "?", "help", "Keys: filter and run", "Loupe"),
    Action("copy", "y", "copy", "Copy or export: text, TSV, SVG, Python script, address", "Loupe"),
    Action("convention", "=", "convention", "This pane's title and convention in full", "Loupe"),
    Action("honesty", "D", "honesty", "The identities, checked on this model and prompt", "Loupe"),
    Action("models", "M", "model", "Load another model", "Loupe"),
    Action("jobs", "J", "jobs", "Running jobs; x cancels one", "Loupe"),
    Action("write", "w", "session", "Where this session is written", "Loupe"),
    Action("restore", "r", "restore", "Restore another session", "Loupe"),
    Action("restart", "ctrl+e", "restart engine", "Restart the engine; prompts and interventions are kept", "Loupe"),
    Action("redraw", "ctrl+l", "redraw", "Draw the whole screen again", "Loupe"),
    Action("suspend", "ctrl+z", "suspend", "Suspend to the shell (fg comes back)", "Loupe"),
    Action("interrupt", "ctrl+c", "interrupt", "Cancel running jobs", "Loupe"),
    Action("quit", "q,ctrl+q", "quit", "Quit; the session stays on disk", "Loupe"),
)


def show_key(key: str) -> str:
    return {"comma": ",", "escape": "esc", "enter": "⏎", "left": "←", "right": "→", "up": "↑", "down": "↓"}.get(key, key)


def remapped(path: str) -> tuple[Action, ...]:
    """The table with the keys of a LOUPE_KEYMAP file: a JSON object {action id: "key[,key]"}. ctrl+q always quits."""
    if not path:
        return TABLE
    try:
        keymap = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        assert isinstance(keymap, dict) and all(isinstance(v, str) and v for v in keymap.values())
    except (OSError, json.JSONDecodeError, AssertionError) as error:
        raise UserError(f'LOUPE_KEYMAP {path}: give a JSON file such as {{"pane_lens": "f1"}} ({type(error).__name__})') from error
    if unknown := set(keymap) - {a.id for a in TABLE}:
        raise UserError(f"LOUPE_KEYMAP {path}: no action {min(unknown)!r}; `uv run tui.py --keys` lists the ids")
    taken = {k for keys in keymap.values() for k in keys.split(",")}
    table = []
    for a in TABLE:
        keys = keymap.get(a.id) or ",".join(k for k in a.keys.split(",") if k not in taken)
        table.append(replace(a, keys=f"{keys},ctrl+q" if a.id == "quit" and "ctrl+q" not in keys else keys))
    return tuple(table)


def key_table() -> str:
    """The README's key table in Markdown."""
    rows = ["| key | action | id |", "|---|---|---|"]
    for a in TABLE:
        rows.append("| " + " ".join(f"`{show_key(k)}`" for k in a.keys.split(",")) + f" | {a.help} | `{a.id}` |")
    return "\n".join(rows) + "\n"
