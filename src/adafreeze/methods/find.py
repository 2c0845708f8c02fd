"""The table of methods, and finding a method by the text after ``--methods``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ..errors import ConfigError
from .method import Combined, Method

__all__ = ["METHODS", "find_method", "in_order"]

METHODS = {
    "plain": "adafreeze.methods.plain:Plain",
    "safe": "adafreeze.methods.safe:Safe",
    "safe-paper": "adafreeze.methods.safe:SafePaper",
    "safe-no-cache": "adafreeze.methods.safe:SafeNoCache",
    "safe-budget": "adafreeze.methods.safe:SafeBudget",
    "bottom-up": "adafreeze.methods.rivals:BottomUp",
    "random": "adafreeze.methods.rivals:RandomFreezing",
    "static-third": "adafreeze.methods.rivals:StaticThird",
    "static-half": "adafreeze.methods.rivals:StaticHalf",
    "static-two-thirds": "adafreeze.methods.rivals:StaticTwoThirds",
    "autofreeze": "adafreeze.methods.rivals:AutoFreeze",
    "grades": "adafreeze.methods.rivals:GradES",
    "top-blocks": "adafreeze.methods.plain:TopBlocks",
    "equal-flops": "adafreeze.methods.plain:EqualFlops",
    "checkpointing": "adafreeze.methods.plain:Checkpointing",
    "adapterdrop": "adafreeze.methods.adapter_drop:AdapterDrop",
    "sparse-adapter": "adafreeze.methods.sparse_adapter:SparseAdapter",
    "lora-fa": "adafreeze.methods.lora_variants:LoRAFA",
    "dora": "adafreeze.methods.lora_variants:DoRA",
}


def find_method(text: str) -> Method:
    """The method by name; ``"a+b"`` for both in one run; ``"file.py:Class"`` or ``"package.module:Class"``.

    Raises:
        ConfigError: there is no such method.

    >>> find_method("safe+lora-fa").name
    'safe+lora-fa'
    """
    place = METHODS.get(text, text)
    if ":" in place:
        return _load(place)
    if "+" in text:
        return Combined([find_method(part) for part in text.split("+")])
    close = difflib.get_close_matches(text, METHODS, n=1)
    raise ConfigError(
        f"There is no method {text!r}; the methods are {', '.join(METHODS)}.",
        fix=f"--methods {close[0] if close else 'plain safe'}, or a class of your own: my_method.py:MyMethod",
    )


def in_order(methods: list[Method]) -> list[Method]:
    """Sort the methods so that each comes after those whose results it needs.

    Raises:
        ConfigError: a method is missing or named twice, or methods need each other.
    """
    names = [method.name for method in methods]
    for method in methods:
        if names.count(method.name) > 1:
            raise ConfigError(f"The method {method.name!r} is named twice.", fix="Name it once.")
        for needed in method.after:
            if needed not in names:
                raise ConfigError(
                    f"The method {method.name!r} needs the result of {needed!r}.",
                    fix=f"--methods {' '.join([needed, *names])}",
                )
    placed: list[Method] = []
    while len(placed) < len(methods):
        done = {method.name for method in placed}
        ready = [method for method in methods if method not in placed and done.issuperset(method.after)]
        if not ready:
            raise ConfigError(
                f"The methods {', '.join(name for name in names if name not in done)} need each other's results.",
                fix="Remove one of them from the `after` of another.",
            )
        placed += ready
    return placed


def _load(text: str) -> Method:
    place, _, name = text.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        kind = getattr(module, name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ConfigError(
            f"There is no method {text!r} ({type(error).__name__}: {error}).",
            fix="Give a Python file or module and a class in it: --methods plain safe my_method.py:MyMethod",
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Method) and isinstance(getattr(kind, "name", None), str)):
        raise ConfigError(
            f"{text} is not a subclass of adafreeze.methods.Method with a name.",
            fix=f'class {name}(Method): name = "{name.lower()}"',
        )
    return kind()


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # Method.digest finds the source of its classes there
    spec.loader.exec_module(module)
    return module
