"""Patches: what adafreeze puts on a user's modules, taken off without a trace and never carried into a copy."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "Hook",
    "before_call",
    "claim",
    "forward_hook",
    "forwarders",
    "forward_pre_hook",
    "held_attribute",
    "owners",
    "patched",
    "patched_forward",
    "release",
    "replaced_child",
    "trainable_in_copies",
]

_ABSENT = object()
# What torch keeps hooks in; the last two hold the ids of hooks that want keyword arguments, or to be called always.
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class _Patches:
    """All patches of one module.

    It stands in the module's ``__dict__`` as ``__deepcopy__``, and its method ``reduce`` as ``__reduce_ex__``: these
    two are what ``copy.deepcopy``, ``pickle`` and ``torch.save`` ask an instance for, so a copy can be made as if no
    patch were there. A subclass put in by ``__class__`` would do too, but people compare ``type(module)`` and its name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.owner: Any = None
        self.layers: dict[str, list[list[Any]]] = {}  # attribute: [value before, the same in a copy] of each patch
        self.hooks: set[int] = set()
        self.children: dict[str, nn.Module] = {}
        self.trainable: set[str] = set()

    @classmethod
    def of(cls, module: nn.Module) -> _Patches:
        found = module.__dict__.get("__deepcopy__")
        if not isinstance(found, _Patches):
            found = cls(module)
            module.__dict__["__deepcopy__"] = found
            module.__dict__["__reduce_ex__"] = found.reduce
        return found

    def drop_if_empty(self) -> None:
        if not (self.owner is not None or self.layers or self.hooks or self.children or self.trainable):
            self.module.__dict__.pop("__deepcopy__", None)
            self.module.__dict__.pop("__reduce_ex__", None)

    def __call__(self, memo: dict[int, Any]) -> Any:
        # Not copy.deepcopy: it asks the instance again, and PEFT's wrappers hand what they lack on to the model inside.
        kind = type(self.module)
        with self._ordinary():
            if hasattr(kind, "__deepcopy__"):
                return kind.__deepcopy__(self.module, memo)
            reduced = kind.__reduce_ex__(self.module, 4)
            return copy._reconstruct(self.module, memo, *reduced)  # type: ignore[attr-defined]

    def reduce(self, protocol: int) -> Any:
        with self._ordinary():
            reduced = type(self.module).__reduce_ex__(self.module, protocol)
            if isinstance(reduced, tuple) and len(reduced) > 2 and reduced[2] is self.module.__dict__:
                reduced = (*reduced[:2], dict(self.module.__dict__), *reduced[3:])
            return reduced

    @contextmanager
    def _ordinary(self) -> Iterator[None]:
        """The module as it would be without adafreeze; for the time that it takes to copy it."""
        content = self.module.__dict__
        before = dict(content)
        try:
            for name, layers in self.layers.items():
                _put(content, name, layers[0][1]() if callable(layers[0][1]) else layers[0][0])
            for table in _HOOK_TABLES:
                if table in content:
                    content[table] = OrderedDict((key, v) for key, v in content[table].items() if key not in self.hooks)
            if self.children:
                content["_modules"] = {**content["_modules"], **self.children}
            if self.trainable:
                content["_parameters"] = {
                    name: _trainable(p) if name in self.trainable and p is not None else p
                    for name, p in content["_parameters"].items()
                }
            del content["__deepcopy__"], content["__reduce_ex__"]
            yield
        finally:
            content.clear()
            content.update(before)


def _put(content: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        content.pop(name, None)
    else:
        content[name] = value


# One twin for one Parameter, so that a weight which two modules share is shared in a copy too.
_TWINS = WeakIdKeyDictionary()


def _trainable(parameter: nn.Parameter) -> nn.Parameter:
    """A Parameter that trains, of the same storage."""
    twin = _TWINS.get(parameter)
    if twin is None or not twin.is_set_to(parameter):
        twin = _TWINS[parameter] = nn.Parameter(parameter.detach(), requires_grad=True)
    return twin


class patched(AbstractContextManager[None]):
    """Give the instance ``module`` an attribute until the context is left, and put back exactly what was there.

    No generator: one that hangs in an ExitStack on a user's module would run its ``finally`` at the interpreter's end.

    Args:
        module: of the user.
        name: of the attribute in the module's ``__dict__``.
        value: what stands there meanwhile.
        in_copies: asked for the attribute of a copy that is made meanwhile; None: what was there before.
    """

    def __init__(self, module: nn.Module, name: str, value: Any, *, in_copies: Callable[[], Any] | None = None) -> None:
        self.module, self.name, self.value, self.in_copies = module, name, value, in_copies
        self._layer: list[Any] | None = None

    def __enter__(self) -> None:
        content = self.module.__dict__
        self._layer = [content.get(self.name, _ABSENT), self.in_copies]
        _Patches.of(self.module).layers.setdefault(self.name, []).append(self._layer)
        content[self.name] = self.value

    def __exit__(self, *_: object) -> None:
        patches = _Patches.of(self.module)
        layers = patches.layers[self.name]
        index = next(i for i, layer in enumerate(layers) if layer is self._layer)
        if index + 1 == len(layers):
            _put(self.module.__dict__, self.name, layers[index][0])
        else:  # something of ours lies on top: it is what will put this back
            layers[index + 1][:] = layers[index]
        del layers[index]
        if not layers:
            del patches.layers[self.name]
        patches.drop_if_empty()


def patched_forward(module: nn.Module, forward: Callable[..., Any]) -> patched:
    """Replace ``module.forward`` on the instance, and put back exactly what was there."""
    return patched(module, "forward", forward)


def held_attribute(module: nn.Module, name: str, value: Any) -> AbstractContextManager[None]:
    """Set ``module.name`` where the instance has it, until the context is left."""
    return patched(module, name, value) if name in module.__dict__ else nullcontext()


def before_call(module: nn.Module, method: str, notice: Callable[[], None]) -> patched:
    """Have ``notice`` called before each call of a method of ``module``, until the context is left."""
    original = getattr(module, method)

    def noticed(*args: Any, **kwargs: Any) -> Any:
        notice()
        return original(*args, **kwargs)

    return patched(module, method, noticed)


class Hook:
    """A hook of adafreeze's on a user's module.

    Attributes:
        module: that it is on.
    """

    def __init__(self, module: nn.Module, handle: Any) -> None:
        self.module = module
        self._handle = handle
        _Patches.of(module).hooks.add(handle.id)

    def go_last(self) -> None:
        """Behind all that were registered since: TRL switches checkpointing, and its hook, off and on in each step."""
        table: Any = self.module._forward_hooks
        if self._handle.id in table and next(reversed(table)) != self._handle.id:
            table.move_to_end(self._handle.id)

    def remove(self) -> None:
        """Take it off."""
        self._handle.remove()
        patches = _Patches.of(self.module)
        patches.hooks.discard(self._handle.id)
        patches.drop_if_empty()


def forward_pre_hook(module: nn.Module, call: Callable[..., Any], *, prepend: bool = False) -> Hook:
    """Have ``call(module, args, kwargs)`` made before each forward pass of ``module``."""
    return Hook(module, module.register_forward_pre_hook(call, with_kwargs=True, prepend=prepend))


def forward_hook(module: nn.Module, call: Callable[..., Any], *, always: bool = False) -> Hook:
    """Have ``call(module, args, output)`` made after each forward pass; ``always``: also after one that failed."""
    return Hook(module, module.register_forward_hook(call, always_call=always))


def replaced_child(parent: nn.Module, name: str, child: nn.Module) -> Callable[[], None]:
    """Put ``child`` in the place of ``parent.name``; copies have the old one. Returns what undoes it."""
    patches, old = _Patches.of(parent), parent.get_submodule(name)
    patches.children[name] = old
    parent._modules[name] = child

    def undo() -> None:
        parent._modules[name] = old
        patches.children.pop(name, None)
        patches.drop_if_empty()

    return undo


def trainable_in_copies(module: nn.Module, name: str, on: bool) -> None:
    """Whether a copy of ``module`` has its Parameter ``name`` require gradients, whatever the flag says here."""
    patches = _Patches.of(module)
    if on:
        patches.trainable.add(name)
    else:
        patches.trainable.discard(name)
    patches.drop_if_empty()


def claim(owner: Any, modules: Iterable[nn.Module]) -> None:
    """Write on ``modules`` that ``owner`` has them, for ``owners``."""
    for module in modules:
        _Patches.of(module).owner = owner


def release(owner: Any, modules: Iterable[nn.Module]) -> None:
    """Undo ``claim``."""
    for module in modules:
        patches = _Patches.of(module)
        if patches.owner is owner:
            patches.owner = None
        patches.drop_if_empty()


def forwarders(model: nn.Module) -> list[nn.Module]:
    """Modules that hand attributes which they lack on to another one, as PEFT's wrappers do.

    Where that other one has patches, these need some too, or a copy of them would be a copy of what is inside.
    """
    return [module for module in model.modules() if type(module).__getattr__ is not nn.Module.__getattr__]


def owners(model: nn.Module) -> list[Any]:
    """Who has claimed any part of ``model``, each once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        patches = module.__dict__.get("__deepcopy__")
        if isinstance(patches, _Patches) and patches.owner is not None:
            found[id(patches.owner)] = patches.owner
    return list(found.values())
