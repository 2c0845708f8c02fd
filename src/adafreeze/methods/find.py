"""Methods by what is typed: a name, several joined by +, or a class of the user's own."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ..errors import ConfigError
from .adapter_drop import AdapterDrop
from .lora_variants import DoRA, LoRAFA
from .method import Combined, Method
from .plain import Checkpointing, EqualFlops, Plain, TopBlocks
from .rivals import AutoFreeze, BottomUp, GradES, RandomFreezing, StaticPrefix
from .safe import Safe, SafeBudget, SafeNoCache, SafePaper
from .sparse_adapter import SparseAdapter

__all__ = ["METHODS", "find_method", "in_order"]

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        *(Plain, Safe, SafePaper, SafeNoCache, SafeBudget),
        *(BottomUp, RandomFreezing, StaticPrefix, AutoFreeze, GradES),
        *(TopBlocks, EqualFlops, Checkpointing),
        *(AdapterDrop, SparseAdapter, LoRAFA, DoRA),
    )
}


def find_method(text: str) -> Method:
    """The method that ``text`` names.

    Args:
        text: a name in ``METHODS``; ``"a+b"``, both in one run; ``"file.py:Class"`` or ``"package.module:Class"``.

    Raises:
        ConfigError: there is none.

    >>> find_method("safe+lora-fa").name
    'safe+lora-fa'
    """
    if "+" in text and ":" not in text:
        return Combined([find_method(part) for part in text.split("+")])
    if ":" in text:
        return _own(text)
    if text not in METHODS:
        close = difflib.get_close_matches(text, METHODS, n=1)
        raise ConfigError(
            f"There is no method {text!r}.",
            cause=f"There are {', '.join(METHODS)}; two together are joined by +.",
            fix=f"--methods {close[0] if close else 'plain safe'}, or one of your own: my_method.py:MyMethod",
        )
    return METHODS[text]()


def in_order(methods: list[Method]) -> list[Method]:
    """Each behind those whose results it needs.

    Raises:
        ConfigError: one of those is missing, or two have one name.
    """
    names = [method.name for method in methods]
    for method in methods:
        if names.count(method.name) > 1:
            raise ConfigError(
                f"The method {method.name!r} is named twice.",
                cause="Its results would be the same.",
                fix="Name it once.",
            )
        for needed in method.after:
            if needed not in names:
                raise ConfigError(
                    f"The method {method.name!r} needs the result of {needed!r}.",
                    cause="It is to train for as many steps, or as many blocks.",
                    fix=f"--methods {' '.join([needed, *names])}",
                )
    placed: list[Method] = []
    while len(placed) < len(methods):
        done = {method.name for method in placed}
        ready = [method for method in methods if method not in placed and done.issuperset(method.after)]
        if not ready:
            raise ConfigError(
                "The methods wait for one another.",
                cause="Each of them has another in its `after`.",
                fix="Take one out of the other's `after`.",
            )
        placed += ready
    return placed


def _own(text: str) -> Method:
    place, _, name = text.rpartition(":")
    try:
        module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        kind = getattr(module, name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ConfigError(
            f"There is no method {text!r} ({type(error).__name__}: {error}).",
            cause="Before the colon stands a Python file or module, behind it a class in there.",
            fix="--methods plain safe my_method.py:MyMethod",
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Method) and isinstance(getattr(kind, "name", None), str)):
        raise ConfigError(
            f"{text} is no method.",
            cause="It must be a subclass of adafreeze.methods.Method with a name.",
            fix=f'class {name}(Method): name = "{name.lower()}"',
        )
    return kind()


def _file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that its classes know where they are from
    spec.loader.exec_module(module)
    return module
