"""Writes docs/messages.md: every error, warning and one-line note that the code can give, read off its source.

    python docs/messages.py

A message ends with the name of its entry, ``module.function``; a test holds the file and the source together.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "adafreeze"
PAGE = Path(__file__).with_name("messages.md")
ERRORS = ("ConfigError", "DataError", "ModelError", "ProbeError", "RunError")
SPEAKERS = {**{kind: kind for kind in ERRORS}, "warn": "warning", "warn_once": "warning", "note": "note"}
PASSED_ON = {"_guard.warn_once"}  # says what it is given: its callers are the ones listed
AREAS = {
    "Settings": ("config", "sizes", "decide"),
    "The model and its adapters": ("model", "tasks.adapters", "tasks.pretrained", "tasks.weightless"),
    "Data and tasks": ("tasks", "scoring"),
    "Freezing": ("safe", "deciding", "preflight", "_guard", "_stage", "_observe", "freeze"),
    "The prefix cache": ("caching", "freeze.cache"),
    "Plan and memory budget": ("plan", "budget", "costs", "freeze.recompute"),
    "Many processes": ("freeze.parallel",),
    "Stop and resume": ("resume", "state", "integrations.checkpoints"),
    "Trainer, Accelerate, Lightning": ("integrations", "doctor"),
    "Journals, reports and what is made of a run": ("journal", "_history", "export", "report", "analysis"),
    "Comparing methods": ("methods",),
    "The command line": ("cli",),
}
HEAD = """# All messages

<!-- Written by `python docs/messages.py` from the source. -->

Every error and warning ends with a line `More:` that names its entry here. ‹…› stands for what is filled in; where a
part depends on the case, ` / ` stands between the choices. Notes are single lines that cost you nothing. Symptoms
without a message: [troubleshooting](troubleshooting.md).
"""


@dataclass(frozen=True)
class Message:
    """A place in the source that speaks.

    Attributes:
        place: ``module.function``.
        kind: an error's class, "warning" or "note".
        fact, cause, fix: as templates; a note has a fact alone.
    """

    place: str
    kind: str
    fact: str
    cause: str = ""
    fix: str = ""


def messages() -> list[Message]:
    """All of them, in the order of the source."""
    return [message for path in sorted(SOURCE.rglob("*.py")) for message in _of_module(path)]


def _of_module(path: Path) -> Iterator[Message]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    if module == "errors":
        return
    for call, function in _calls(tree, None):
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        place = f"{module}.{function.name if function else '<module>'}"
        if name not in SPEAKERS or place in PASSED_ON:
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        parts = [call.args[name == "warn_once"], given.get("cause"), given.get("fix")]
        texts = [_text(part, function, tree) for part in parts if part is not None]
        yield Message(place, SPEAKERS[name], *texts)


def _calls(node: ast.AST, function: ast.FunctionDef | None) -> Iterator[tuple[ast.Call, ast.FunctionDef | None]]:
    """Calls, each with the function that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield child, function
        yield from _calls(child, child if isinstance(child, ast.FunctionDef) else function)


def _text(node: ast.expr, function: ast.FunctionDef | None, tree: ast.AST, deep: int = 0) -> str:
    """A template: literal text as it is, and ‹name› for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, function, tree, deep) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, function, tree, deep) + _text(node.right, function, tree, deep)
    if isinstance(node, ast.IfExp):
        choices = [_text(choice, function, tree, deep) for choice in (node.body, node.orelse)]
        return " / ".join(choices) if all(choices) else f"[{''.join(choices)}]"
    if isinstance(node, ast.FormattedValue):
        inner = node.value
        return _text(inner, function, tree, deep) if isinstance(inner, ast.IfExp) else f"‹{_name(inner)}›"
    if isinstance(node, ast.Name) and function and deep < 2:
        found = list(
            dict.fromkeys(_text(value, where, tree, deep + 1) for value, where in _values(node, function, tree))
        )
        if found:
            return " / ".join(found)
    return f"‹{_name(node)}›"


def _values(
    name: ast.Name, function: ast.FunctionDef, tree: ast.AST
) -> Iterator[tuple[ast.expr, ast.FunctionDef | None]]:
    """What a name can stand for: what is assigned to it, or, of a parameter, what this module passes."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and name.id in [getattr(target, "id", None) for target in node.targets]:
            yield node.value, function
    names = [argument.arg for argument in function.args.args if argument.arg != "self"]
    for call, caller in _calls(tree, None):
        if name.id not in names or getattr(call.func, "id", getattr(call.func, "attr", None)) != function.name:
            continue
        place = names.index(name.id)
        if place < len(call.args):
            yield call.args[place], caller
        yield from ((keyword.value, caller) for keyword in call.keywords if keyword.arg == name.id)


def _name(node: ast.expr) -> str:
    """A word for what is filled in, where the source has one."""
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Attribute):
        return "type" if node.attr == "__name__" else node.attr.strip("_")
    return "…"


def area(place: str) -> str:
    """The part of the page that an entry stands in: the longest prefix in AREAS.

    Raises:
        KeyError: the module has no area yet.
    """
    fitting = {
        prefix: title for title, prefixes in AREAS.items() for prefix in prefixes if place.startswith(f"{prefix}.")
    }
    if not fitting:
        raise KeyError(f"{place} has no area: give its module one in AREAS")
    return fitting[max(fitting, key=len)]


def page() -> str:
    """The text of docs/messages.md."""
    found, text = messages(), [HEAD]
    for title in AREAS:
        text.append(f"## {title}\n")
        here = sorted((m for m in found if area(m.place) == title), key=lambda m: m.place)
        for place, entries in itertools.groupby(here, key=lambda m: m.place):
            text.append(f'<a id="{place}"></a>\n')
            text += [_entry(message) for message in entries]
    return "\n".join(text)


def _entry(message: Message) -> str:
    lines = [f"**{_plain(message.fact)}** ({message.kind})\n"]
    lines += [f"- Cause: {_plain(message.cause)}"] * bool(message.cause)
    lines += [f"- Fix: {_plain(message.fix)}\n"] * bool(message.fix)
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Nothing in it is markup."""
    for sign, safe in {"\\": "\\\\", "*": "\\*", "`": "\\`", "[": "\\[", "<": "&lt;", "|": "\\|"}.items():
        text = text.replace(sign, safe)
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Written: {PAGE}")
