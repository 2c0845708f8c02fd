"""Drawing samples for a probe leaves the state of dataset and collator as it was."""

from __future__ import annotations

import gc
import io
import logging
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ProbeError
from .restore import ABSENT, restorer

__all__ = ["untouched"]

# Functions of these packages are not searched: they read much, and no state of the data.
_LIBRARIES = sys.stdlib_module_names | {
    *("adafreeze", "torch", "numpy", "transformers", "tokenizers", "datasets", "accelerate", "peft", "trl"),
    *("lightning", "pandas", "pyarrow", "safetensors", "huggingface_hub", "pytest", "_pytest"),
}
# Data in memory can be millions of objects: containers with more than WIDE entries are searched last.
MOST_OBJECTS = 20_000
WIDE = 256
# Longer containers and larger arrays are data, not state.
LONGEST_STATE = 10_000
LARGEST_STATE = 16

_PLAIN = (str, bytes, int, float, complex, type(None), np.generic, torch.dtype, torch.device)
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
_CONTAINERS = (list, dict, set, deque)
_STATE = (*_PLAIN, *_RANDOM, *_CONTAINERS, tuple, frozenset, np.ndarray, Tensor)
# These belong to the user if their owner does.
_HOLDERS = (*_CONTAINERS, tuple, frozenset, types.CellType, types.MethodType, partial)
_CLOSED = (types.ModuleType, types.CodeType, types.FrameType, logging.Logger)


@contextmanager
def untouched(*owners: Any) -> Iterator[None]:
    """Put back what ``owners`` (dataset, collator) change of their own state within the block.

    That is the state of every random generator reachable from them: through attributes, containers, closures,
    ``functools.partial``, bound methods and the globals that their functions read. For the user's own classes and
    functions it is also numbers, texts and containers, such as counters. Everything is put back in place, since the
    run continues with the same objects. No data is copied, and no ``__copy__``, ``__getstate__`` or ``__del__`` of the
    user runs.

    Raises:
        ProbeError: an iterator that can be consumed only once is among them.
    """
    restores: list[Callable[[], Any]] = []
    for one, own in _reached(owners):
        _refuse_one_way(one)
        with suppress(Exception):  # unreadable
            restores.extend(_restores(one, own))
    try:
        yield
    finally:
        for restore in restores:
            with suppress(Exception):
                restore()


def _reached(owners: tuple[Any, ...]) -> Iterator[tuple[Any, bool]]:
    """(object, whether it belongs to the user and not to a library)."""
    seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is reused
    todo = deque((owner, True) for owner in owners)
    while todo and len(seen) < MOST_OBJECTS:
        one, own = todo.popleft()
        if isinstance(one, _PLAIN) or id(one) in seen:
            continue
        seen[id(one)] = one
        kind = one if isinstance(one, (type, types.FunctionType)) else type(one)
        users = _is_users(str(getattr(kind, "__module__", "")))
        own = own or users
        yield one, own
        passes_on = own and (users or isinstance(one, _HOLDERS))
        try:
            parts = _parts(one)
        except Exception:  # unreadable
            continue
        (todo.extend if len(parts) > WIDE else todo.extendleft)((part, passes_on) for part in parts)


@lru_cache
def _is_users(module: str) -> bool:
    """Whether a module belongs to none of the installed packages."""
    place = getattr(sys.modules.get(module), "__file__", None) or ""
    return not (module.partition(".")[0] in _LIBRARIES or "site-packages" in place or "dist-packages" in place)


def _parts(one: Any) -> list[Any]:
    """The objects that ``one`` refers to."""
    if isinstance(one, (*_CLOSED, io.IOBase, np.ndarray, Tensor)):
        return []
    if isinstance(one, types.FunctionType):
        held = [*(one.__closure__ or ()), one.__defaults__, one.__kwdefaults__, vars(one)]
        return held + [value for _, _, value in _globals_read(one)]
    if isinstance(one, type):
        return [*vars(one).values(), *one.__bases__] if _top(one) not in _LIBRARIES else []
    parts = gc.get_referents(one)
    is_data = isinstance(one, (list, tuple)) and len(parts) > LARGEST_STATE
    if is_data and all(isinstance(part, (*_PLAIN, Tensor, np.ndarray)) for part in (*parts[:8], *parts[-8:])):
        return []  # token ids: most of the objects
    return parts


def _top(one: Any) -> str:
    return str(getattr(one, "__module__", "")).partition(".")[0]


def _globals_read(function: types.FunctionType) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """(namespace, name, value) of the globals that its code reads, also as attributes of modules."""
    if _top(function) in _LIBRARIES:
        return
    names, spaces, known = _names(function.__code__), [function.__globals__], set()
    while spaces:
        space = spaces.pop()
        if id(space) in known:
            continue
        known.add(id(space))
        for name in names & space.keys():
            value = space[name]
            yield space, name, value
            if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] not in _LIBRARIES:
                spaces.append(vars(value))


def _names(code: types.CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _refuse_one_way(one: Any) -> None:
    """Refuse Python's own iterators; those of a user's class are put back by their attributes."""
    if type(one).__module__ in ("builtins", "itertools", "_csv") and isinstance(one, Iterator):
        if isinstance(one, io.IOBase) or (isinstance(one, types.GeneratorType) and one.gi_frame is None):
            return
        raise ProbeError(
            f"The samples come through a {type(one).__name__}, so training would miss the samples that a probe takes.",
            fix="Pass your own samples: SafeCallback(probe=[batch, ...]) or Safe(..., probe=[batch, ...])",
        )


def _restores(one: Any, own: bool) -> Iterator[Callable[[], Any]]:
    """Functions that put ``one`` back as it is now."""
    if isinstance(one, _CLOSED):
        return
    if isinstance(one, _RANDOM):
        yield _random_restore(one)
    if isinstance(getattr(one, "__dict__", None), dict):
        yield restorer(vars(one), skip=_is_no_state if own else _is_not_random)
    if not own:
        return
    if isinstance(one, _CONTAINERS) and len(one) <= LONGEST_STATE:
        yield restorer(one, skip=_is_no_state)
    elif isinstance(one, io.IOBase):
        yield partial(one.seek, one.tell())
    elif isinstance(one, types.FunctionType):
        yield from (partial(space.update, {k: v}) for space, k, v in _globals_read(one) if isinstance(v, _STATE))
    elif isinstance(one, Tensor) and one.numel() <= LARGEST_STATE:
        yield partial(one.detach().copy_, one.detach().clone())
    elif isinstance(one, np.ndarray) and one.size <= LARGEST_STATE:
        yield partial(one.__setitem__, ..., one.copy())
    for name in _attributes(one):
        if isinstance(value := getattr(one, name, ABSENT), _STATE):
            yield _attribute_restore(one, name, value)


def _attributes(one: Any) -> list[str]:
    """Names of the attributes that are not in a dict: those of classes, cells and ``__slots__``."""
    if isinstance(one, type):
        return [name for name in vars(one) if not name.startswith("__")]
    if isinstance(one, types.CellType):
        return ["cell_contents"]
    members = [value for kind in type(one).__mro__ for value in vars(kind).values()]
    return [member.__name__ for member in members if isinstance(member, types.MemberDescriptorType)]


def _random_restore(one: Any) -> Callable[[], Any]:
    if isinstance(one, random.Random):
        return partial(one.setstate, one.getstate())
    if isinstance(one, torch.Generator):
        return partial(one.set_state, one.get_state())
    if isinstance(one, np.random.RandomState):
        return partial(one.set_state, one.get_state(legacy=False))
    bits = one.bit_generator if isinstance(one, np.random.Generator) else one
    return partial(setattr, bits, "state", bits.state)


def _attribute_restore(one: Any, name: str, before: Any) -> Callable[[], Any]:
    def restore() -> None:
        now = getattr(one, name, ABSENT)
        if now is not before and not _is_no_state(name, before, now):
            setattr(one, name, before)

    return restore


def _is_no_state(_key: Any, then: Any, now: Any) -> bool:
    """Whether an entry stays as it is now: an open file or a loaded image is not state."""
    return not all(entry is ABSENT or isinstance(entry, _STATE) for entry in (then, now))


def _is_not_random(key: Any, then: Any, now: Any) -> bool:
    return not isinstance(now, _RANDOM) or _is_no_state(key, then, now)
