"""Drawing samples leaves no trace: what dataset and collator own is put back as it was."""

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

__all__ = ["untouched"]

# What the functions of these read is not looked at: it is much, and no state of the data is in it.
_LIBRARIES = sys.stdlib_module_names | {
    *("adafreeze", "torch", "numpy", "transformers", "tokenizers", "datasets", "accelerate", "peft", "trl"),
    *("lightning", "pandas", "pyarrow", "safetensors", "huggingface_hub", "pytest", "_pytest"),
}
# Data in memory can be millions of objects: a container with more than WIDE entries waits until all else was seen.
MOST_OBJECTS = 20_000
WIDE = 256
# Longer containers and larger arrays are data, and not state.
LONGEST_STATE = 10_000
LARGEST_STATE = 16

_PLAIN = (str, bytes, int, float, complex, type(None), np.generic, torch.dtype, torch.device)
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
_CONTAINERS = (list, dict, set, deque)
_STATE = (*_PLAIN, *_RANDOM, *_CONTAINERS, tuple, frozenset, np.ndarray, Tensor)
# What belongs to whoever has it.
_HOLDERS = (*_CONTAINERS, tuple, frozenset, types.CellType, types.MethodType, partial)
_CLOSED = (types.ModuleType, types.CodeType, types.FrameType, logging.Logger)
_ABSENT = object()


@contextmanager
def untouched(*owners: Any) -> Iterator[None]:
    """Put back what ``owners`` (dataset, collator) change of themselves meanwhile.

    That is the state of every random generator that is reached from them: through attributes, containers, closures,
    ``functools.partial``, bound methods, and the globals that their functions read. And, of the user's own classes and
    functions, numbers, texts and containers that are held there, such as counters. All in place, since the run goes on
    with the same objects. No data is copied, and no ``__copy__``, ``__getstate__`` or ``__del__`` of the user's runs.

    Raises:
        ProbeError: what can be gone through only once is among them.
    """
    restores: list[Callable[[], Any]] = []
    for one, own in _reached(owners):
        _refuse_one_way(one)
        with suppress(Exception):  # it does not let itself be read
            restores.extend(_restores(one, own))
    try:
        yield
    finally:
        for restore in restores:
            with suppress(Exception):
                restore()


def _reached(owners: tuple[Any, ...]) -> Iterator[tuple[Any, bool]]:
    """(object, whether it belongs to the user and not to a library)."""
    seen: dict[int, Any] = {}  # with the objects, so that no id is given a second time
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
        except Exception:  # it does not let itself be read
            continue
        (todo.extend if len(parts) > WIDE else todo.extendleft)((part, passes_on) for part in parts)


@lru_cache
def _is_users(module: str) -> bool:
    """Whether a module belongs to none of the installed packages."""
    place = getattr(sys.modules.get(module), "__file__", None) or ""
    return not (module.partition(".")[0] in _LIBRARIES or "site-packages" in place or "dist-packages" in place)


def _parts(one: Any) -> list[Any]:
    """What hangs on ``one``."""
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
        return []  # token ids: by far the most of what there is
    return parts


def _top(one: Any) -> str:
    return str(getattr(one, "__module__", "")).partition(".")[0]


def _globals_read(function: types.FunctionType) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """(namespace, name, value) of the globals that its code reads, also as attributes of modules."""
    if _top(function) in _LIBRARIES:
        return
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    spaces = [function.__globals__]
    known = {id(spaces[0])}
    while spaces:
        space = spaces.pop()
        for name in names & space.keys():
            value = space[name]
            yield space, name, value
            if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] not in _LIBRARIES:
                if id(vars(value)) not in known:
                    spaces.append(vars(value))
                known.add(id(vars(value)))


def _refuse_one_way(one: Any) -> None:
    """Iterators of Python's own; those of a user's class are put back by their attributes."""
    if type(one).__module__ in ("builtins", "itertools", "_csv") and isinstance(one, Iterator):
        if isinstance(one, io.IOBase) or (isinstance(one, types.GeneratorType) and one.gi_frame is None):
            return
        raise ProbeError(
            f"A probe cannot be drawn without using up samples of the run: they come through a {type(one).__name__}.",
            cause="It can be gone through once: what the probe takes, training would miss.",
            fix="Give samples of your own: SafeCallback(probe=[batch, ...]) or Safe(..., probe=[batch, ...])",
        )


def _restores(one: Any, own: bool) -> Iterator[Callable[[], Any]]:
    """What puts ``one`` back as it is now."""
    if isinstance(one, _CLOSED):
        return
    if isinstance(one, _RANDOM):
        yield _random_restore(one)
    elif own and isinstance(one, _CONTAINERS) and len(one) <= LONGEST_STATE:
        yield _entries_restore(one) if isinstance(one, dict) else _members_restore(one)
    elif own and isinstance(one, io.IOBase):
        yield partial(one.seek, one.tell())
    elif own and isinstance(one, types.CellType):
        yield _attribute_restore(one, "cell_contents", one.cell_contents)
    elif own and isinstance(one, types.FunctionType):
        for space, name, value in _globals_read(one):
            if isinstance(value, _STATE):
                yield partial(space.update, {name: value})
    elif own and isinstance(one, type):
        for name, value in vars(one).items():
            if isinstance(value, _STATE) and not name.startswith("__"):
                yield _attribute_restore(one, name, value)
    elif own and isinstance(one, Tensor) and one.numel() <= LARGEST_STATE:
        yield partial(one.detach().copy_, one.detach().clone())
    elif own and isinstance(one, np.ndarray) and one.size <= LARGEST_STATE:
        yield partial(one.__setitem__, ..., one.copy())
    if isinstance(getattr(one, "__dict__", None), dict):
        yield _entries_restore(vars(one), only_random=not own)
    for kind in type(one).__mro__ if own and type(one) not in _CONTAINERS else ():
        for slot in [slot for slot in vars(kind).values() if isinstance(slot, types.MemberDescriptorType)]:
            value = getattr(one, slot.__name__, _ABSENT)
            if isinstance(value, _STATE):
                yield _attribute_restore(one, slot.__name__, value)


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
    return lambda: setattr(one, name, before) if _is_to_go_back(before, getattr(one, name, _ABSENT)) else None


def _entries_restore(space: dict[Any, Any], *, only_random: bool = False) -> Callable[[], None]:
    before = dict(space)

    def restore() -> None:
        for name in before.keys() | space.keys():
            then, now = before.get(name, _ABSENT), space.get(name, _ABSENT)
            if not _is_to_go_back(then, now) or (only_random and not isinstance(now, _RANDOM)):
                continue
            if then is _ABSENT:
                del space[name]
            else:
                space[name] = then

    return restore


def _members_restore(one: Any) -> Callable[[], None]:
    before = list(one)

    def restore() -> None:
        now = list(one)
        if len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True)):
            return
        if all(isinstance(entry, _STATE) for entry in (*now, *before)):
            one.clear()
            (one.update if isinstance(one, set) else one.extend)(before)

    return restore


def _is_to_go_back(then: Any, now: Any) -> bool:
    """Whether a changed entry is state: an open file or a loaded image that stands there now is none."""
    return then is not now and all(entry is _ABSENT or isinstance(entry, _STATE) for entry in (then, now))
