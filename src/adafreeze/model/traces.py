"""Forward passes that leave nothing behind in a model, and what user code takes part in one."""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .patches import HOOK_TABLES
from .restore import keep_random_state, restorer, temporarily

__all__ = [
    "captures_outputs",
    "changed_code",
    "read_by",
    "stateful_forward",
    "traceless",
    "users_code",
    "without_users_hooks",
]

# Hooks of these packages are part of how a model computes (sharding, offloading, capturing of outputs).
_LIBRARIES = {
    *("torch", "transformers", "peft", "accelerate", "adapters", "deepspeed", "lightning", "pytorch_lightning"),
    *("trl", "bitsandbytes", "torchao", "adafreeze"),
}
# Packages whose modules do not read padding that a mask excludes.
_OF_MODELS = _LIBRARIES | {"sentence_transformers", "setfit", "timm", "torchvision"}
_TABLES = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_TABLES = ("_global_forward_hooks", "_global_forward_pre_hooks")
# Attributes that a pass may change: torch's own, and adafreeze's patches.
_NOT_WATCHED = frozenset({*nn.Module().__dict__, "forward", "train", "__deepcopy__", "__reduce_ex__"})


def _is_users(hook: Any) -> bool:
    """Whether user code registered ``hook``, and not one of the libraries."""
    while (inner := getattr(hook, "func", None)) is not None:  # functools.partial
        hook = inner
    place = getattr(hook, "__module__", None) or type(hook).__module__
    return str(place).partition(".")[0] not in _LIBRARIES


def _users_tables(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, str]]:
    """(owner, name) of the hook tables with a user's hook, torch's global ones first."""
    for owner, names in ((torch_module, _GLOBAL_TABLES), *((module, _TABLES) for module in modules)):
        for name in names:
            table = owner.__dict__[name]
            if table and any(map(_is_users, table.values())):  # most are empty, and this runs in each training pass
                yield owner, name


def read_by(modules: Iterable[nn.Module]) -> str | None:
    """The class of the first of ``modules`` with a user's hook; None if there is none."""
    owner, _ = next(_users_tables(modules), (None, ""))
    return "every module" if owner is torch_module else None if owner is None else type(owner).__name__


def without_users_hooks(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Disable user hooks during a pass that is not part of the user's training; their order is kept."""
    return temporarily(
        (owner, name, OrderedDict((key, h) for key, h in getattr(owner, name).items() if not _is_users(h)))
        for owner, name in list(_users_tables(modules))
    )


@contextmanager
def traceless(modules: Iterable[nn.Module], written: Callable[[nn.Module, str], None] | None = None) -> Iterator[None]:
    """Undo what passes within the block leave behind: random states, buffers, hooks and attributes of modules.

    Hooks and attributes belong together: transformers installs the hooks that capture outputs in the first pass that
    needs them, and marks the model with an attribute; with only one of the two undone they would be installed twice.
    Buffers are what BatchNorm keeps, counters, biases of routers.

    Args:
        modules: to watch.
        written: called with each module and the name of the buffer or attribute that was changed there.
    """
    undo = [(module, _undo(module)) for module in modules]
    with keep_random_state():
        try:
            yield
        finally:
            for module, restore in undo:
                for name in restore():
                    if written is not None:
                        written(module, name)


def _undo(module: nn.Module) -> Callable[[], Iterator[str]]:
    """Remember what a module contains; the returned function puts it back and yields the names of changed values."""
    content = module.__dict__
    attributes = {name: value for name, value in content.items() if name not in _NOT_WATCHED}
    put_back = restorer(content, skip=lambda name, *_: name in _NOT_WATCHED)
    containers = {name: restorer(v) for name, v in attributes.items() if type(v) in (list, dict, set)}
    hooks = {name: set(content[name]) for name in HOOK_TABLES}
    forwards = [restorer(vars(forward)) for forward in stateful_forward(module)]
    # A model may put another module in the place of one (BigBird's attention for short inputs), and count in an object
    # of its own (PEFT's sampler of MonteCLoRA). Only numbers there: bitsandbytes moves a weight into such an object.
    beside = [restorer(content["_modules"])]
    beside += [restorer(vars(v), skip=_is_no_number) for v in attributes.values() if _is_plain_object(v)]
    buffers = {name: (b, b.detach().clone()) for name, b in module._buffers.items() if b is not None}

    def restore() -> Iterator[str]:
        for put_one_back in (*forwards, *beside):
            put_one_back()
        for name, keys in hooks.items():
            for key in content[name].keys() - keys:
                del content[name][key]
        for name, (buffer, values) in buffers.items():
            module._buffers[name] = buffer
            # By content: what BatchNorm writes to its statistics does not increase their version.
            if not buffer.is_meta and not torch.equal(buffer, values):
                with torch.no_grad():
                    buffer.copy_(values)
                yield name
        # What the pass added is a cache, which the next one makes again: it is removed, and not a changed value.
        changed = [name for name in put_back() if not isinstance(attributes.get(name, module), (nn.Module, Tensor))]
        yield from dict.fromkeys([*changed, *(name for name, one in containers.items() if one())])

    return restore


def _is_plain_object(value: Any) -> bool:
    """Whether ``value`` may hold state of a module: an object with attributes, and no module, tensor or function."""
    if isinstance(value, (nn.Module, Tensor, type, types.ModuleType, torch.dtype, torch.device)) or callable(value):
        return False
    return hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in ("builtins", "enum")


def _is_no_number(_name: Any, *values: Any) -> bool:
    return not all(isinstance(value, (int, float)) for value in values)


def users_code(modules: Iterable[nn.Module]) -> str | None:
    """The class of the first of ``modules`` whose class or forward is user code; None if there is none."""
    for module in modules:
        forward = module.__dict__.get("forward")
        of_class = type(module).__module__.partition(".")[0] not in _OF_MODELS
        if of_class or (isinstance(forward, types.FunctionType) and _is_users(forward)):
            return type(module).__name__
    return None


def changed_code(modules: Iterable[nn.Module]) -> str | None:
    """The class of the first of ``modules`` whose forward, or that of its class, is of none of the model libraries.

    Unlike ``users_code`` also where a library's class was given another forward, as kernels for training do.
    """
    for module in modules:
        forward = module.__dict__.get("forward")
        forwards = [type(module).forward, getattr(forward, "__func__", forward)]
        places = [type(module).__module__, *(getattr(f, "__module__", None) for f in forwards if f is not None)]
        if any(str(place).partition(".")[0] not in _OF_MODELS for place in places if place is not None):
            return type(module).__name__
    return None


def captures_outputs() -> bool:
    """Whether transformers records the outputs of blocks in the current pass (seen with 5.23)."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    return bool(collector is not None and collector.get())


def stateful_forward(module: nn.Module) -> list[Any]:
    """The object with its own attributes that replaces ``module.forward``, if there is one.

    Some losses do that (sentence-transformers' MatryoshkaLoss and AdaptiveLayerLoss) to count the calls of a step.
    """
    forward = module.__dict__.get("forward")
    plain = (types.FunctionType, types.MethodType, functools.partial, type(None))
    return [] if isinstance(forward, plain) or not hasattr(forward, "__dict__") else [forward]
