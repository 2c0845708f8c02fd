"""Traces: what a pass leaves behind in a model, and how to run one that leaves nothing."""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .random_state import keep_random_state

__all__ = ["captures_outputs", "read_by", "stateful_forward", "traceless", "users_code", "without_users_hooks"]

# Hooks of these packages are part of how a model computes (sharding, offloading, capturing of outputs).
_LIBRARIES = {
    *("torch", "transformers", "peft", "accelerate", "adapters", "deepspeed", "lightning", "pytorch_lightning"),
    *("trl", "bitsandbytes", "torchao", "adafreeze"),
}
_TABLES = ("_forward_hooks", "_forward_pre_hooks")
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
# Packages whose modules read no padding that a mask excludes, but for what the gradient of a pass shows.
_OF_MODELS = _LIBRARIES | {"sentence_transformers", "setfit", "timm", "torchvision"}


def _is_users(hook: Any) -> bool:
    """Whether somebody's own code registered ``hook``, and not one of the libraries."""
    while (inner := getattr(hook, "func", None)) is not None:  # functools.partial
        hook = inner
    place = getattr(hook, "__module__", None) or type(hook).__module__
    return str(place).partition(".")[0] not in _LIBRARIES


def _users_hooks(module: nn.Module) -> bool:
    tables = (module._forward_hooks, module._forward_pre_hooks)
    return any(_is_users(hook) for table in tables for hook in table.values())


def read_by(modules: Iterable[nn.Module]) -> str | None:
    """The class of the first of ``modules`` that somebody's own hook reads; None if there is none."""
    for table in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        if any(_is_users(hook) for hook in table.values()):
            return "every module"
    for module in modules:
        if (module._forward_hooks or module._forward_pre_hooks) and _users_hooks(module):
            return type(module).__name__
    return None


@contextmanager
def without_users_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Take the hooks of somebody's own code off for a pass that is none of theirs, and put them back in their order."""
    kept: list[tuple[Any, Any, Any]] = []
    try:
        for module in modules:
            if (module._forward_hooks or module._forward_pre_hooks) and _users_hooks(module):
                for name in _TABLES:
                    table = module.__dict__[name]
                    kept.append((module, name, table))
                    module.__dict__[name] = OrderedDict((key, h) for key, h in table.items() if not _is_users(h))
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
            table = getattr(torch_module, name)
            if any(map(_is_users, table.values())):
                kept.append((torch_module, name, table))
                setattr(torch_module, name, OrderedDict((key, h) for key, h in table.items() if not _is_users(h)))
        yield
    finally:
        for holder, name, table in kept:
            holder.__dict__[name] = table


@contextmanager
def traceless(modules: Iterable[nn.Module], written: Callable[[nn.Module, str], None] | None = None) -> Iterator[None]:
    """Put back all that passes within leave behind: random states, buffers, hooks, and plain attributes of modules.

    Hooks go with the attributes: transformers installs those that capture outputs in the first pass that needs them,
    and marks the model with an attribute; with one of the two put back alone, they would be installed twice. Buffers
    are what BatchNorm keeps, counters, biases of routers. Attributes are put back as the objects they were; lists,
    dicts and sets also with the content that they had.

    Args:
        modules: that are looked at.
        written: called with each module and the name of what was written there.
    """
    before = [(module, _attributes(module), _tensors(module)) for module in modules]
    hooks = [(module, {name: set(module.__dict__[name]) for name in (*_TABLES, *_FLAGS)}) for module, *_ in before]
    foreign = [(forward, dict(vars(forward))) for module, *_ in before for forward in stateful_forward(module)]
    with keep_random_state():
        try:
            yield
        finally:
            for forward, content in foreign:
                vars(forward).clear()
                vars(forward).update(content)
            for module, tables in hooks:
                for name, keys in tables.items():
                    for key in module.__dict__[name].keys() - keys:
                        del module.__dict__[name][key]
            for module, attributes, tensors in before:
                for name in [*_put_back_tensors(module, tensors), *_put_back_attributes(module, attributes)]:
                    if written is not None:
                        written(module, name)


def users_code(modules: Iterable[nn.Module]) -> str | None:
    """The class of the first of ``modules`` that is somebody's own code, or runs it; None if there is none."""
    for module in modules:
        forward = module.__dict__.get("forward")
        of_class = type(module).__module__.partition(".")[0] not in _OF_MODELS
        if of_class or (isinstance(forward, types.FunctionType) and _is_users(forward)):
            return type(module).__name__
    return None


def captures_outputs() -> bool:
    """Whether transformers records what blocks return in the pass that is running (seen with 5.23)."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    return bool(collector is not None and collector.get())


def stateful_forward(module: nn.Module) -> list[Any]:
    """The object that somebody put in the place of ``module.forward`` with attributes of its own, if there is one.

    Some losses do (sentence-transformers' MatryoshkaLoss and AdaptiveLayerLoss): it counts the calls of a step.
    """
    forward = module.__dict__.get("forward")
    plain = (types.FunctionType, types.MethodType, functools.partial, type(None))
    return [] if isinstance(forward, plain) or not hasattr(forward, "__dict__") else [forward]


_OF_TORCH = frozenset(nn.Module().__dict__)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attributes, each with a copy of its content where it is a container."""
    found = {}
    for name, value in module.__dict__.items():
        if name not in _OF_TORCH and name not in ("forward", "train", "__deepcopy__", "__reduce_ex__"):
            found[name] = value, (value.copy() if type(value) in (list, dict, set) else None)
    return found


def _put_back_attributes(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> Iterator[str]:
    content = module.__dict__
    for name in [name for name in content if name not in _OF_TORCH and name not in before]:
        if name not in ("forward", "train", "__deepcopy__", "__reduce_ex__"):
            del content[name]  # a cache that the pass has made: the next one makes it again
    for name, (value, copied) in before.items():
        if content.get(name, before) is not value:
            content[name] = value
            if not isinstance(value, (nn.Module, Tensor)):
                yield name
        if copied is not None and not _same(value, copied):
            if isinstance(value, list):
                value[:] = copied
            else:
                value.clear()
                value.update(copied)
            yield name


def _same(value: Any, copied: Any) -> bool:
    """Whether a container holds the same objects; tensors have no truth value to compare by."""
    if len(value) != len(copied):
        return False
    if isinstance(value, dict):
        return all(key in copied and value[key] is copied[key] for key in value)
    if isinstance(value, set):
        return bool(value == copied)
    return all(a is b for a, b in zip(value, copied, strict=True))


def _tensors(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Buffers, each with its content."""
    return {name: (buffer, buffer.detach().clone()) for name, buffer in module._buffers.items() if buffer is not None}


def _put_back_tensors(module: nn.Module, before: dict[str, tuple[Tensor, Tensor]]) -> Iterator[str]:
    for name, (buffer, content) in before.items():
        module._buffers[name] = buffer
        # By content: what BatchNorm writes to its statistics does not count up their version.
        if not buffer.is_meta and not torch.equal(buffer, content):
            with torch.no_grad():
                buffer.copy_(content)
            yield name
