"""Patches on a user's modules: they come off without a trace, and copies of the model are made without them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .restore import ABSENT

__all__ = [
    "before_call", "held_attribute", "patched", "patched_forward", "replaced_child", "trainable_in_copies",
    "Hook", "forward_hook", "forward_pre_hook",
    "claim", "forwarders", "owners", "release",
]  # fmt: skip

# What torch keeps hooks in; the last three contain the ids of hooks that want keyword arguments, or always a call.
HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class _Patches:
    """All patches of one module.

    It is stored in the module's ``__dict__`` as ``__deepcopy__``, and its method ``reduce`` as ``__reduce_ex__``:
    ``copy.deepcopy``, ``pickle`` and ``torch.save`` look there, so a copy can be made as if there were no patch. A
    subclass put in by ``__class__`` would also work, but people compare ``type(module)`` and its name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.owner: Any = None
        self.layers: dict[tuple[str, str], list[patched]] = {}  # (table, name): patches, the oldest first
        self.hooks: set[int] = set()
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
        if not (self.owner is not None or self.layers or self.hooks or self.trainable):
            self.module.__dict__.pop("__deepcopy__", None)
            self.module.__dict__.pop("__reduce_ex__", None)

    def __call__(self, memo: dict[int, Any]) -> Any:
        # Not copy.deepcopy: it looks at the instance again, and PEFT's wrappers pass that on to the model inside.
        kind = type(self.module)
        with self._unpatched():
            if hasattr(kind, "__deepcopy__"):
                return kind.__deepcopy__(self.module, memo)
            reduced = kind.__reduce_ex__(self.module, 4)
            return copy._reconstruct(self.module, memo, *reduced)  # type: ignore[attr-defined]

    def reduce(self, protocol: int) -> Any:
        with self._unpatched():
            reduced = type(self.module).__reduce_ex__(self.module, protocol)
            if isinstance(reduced, tuple) and len(reduced) > 2 and reduced[2] is self.module.__dict__:
                reduced = (*reduced[:2], dict(self.module.__dict__), *reduced[3:])
            return reduced

    @contextmanager
    def _unpatched(self) -> Iterator[None]:
        """The module without any patch, while it is copied."""
        content = self.module.__dict__
        before = dict(content)
        try:
            content["_modules"] = dict(content["_modules"])
            for (table, name), layers in self.layers.items():
                first = layers[0]
                value = first.in_copies() if first.in_copies is not None else first.before
                _put(content if table == "__dict__" else content[table], name, value)
            for table in HOOK_TABLES:
                if table in content:
                    content[table] = OrderedDict((key, v) for key, v in content[table].items() if key not in self.hooks)
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
    if value is ABSENT:
        content.pop(name, None)
    else:
        content[name] = value


# One twin per Parameter, so that a weight which two modules share is shared in a copy too.
_TWINS = WeakIdKeyDictionary()


def _trainable(parameter: nn.Parameter) -> nn.Parameter:
    """A Parameter with the same storage that requires gradients."""
    twin = _TWINS.get(parameter)
    if twin is None or not twin.is_set_to(parameter):
        twin = _TWINS[parameter] = nn.Parameter(parameter.detach(), requires_grad=True)
    return twin


class patched(AbstractContextManager[None]):
    """Give the instance ``module`` an attribute within the block; patches may come off in any order.

    No generator: one that waits in an ExitStack on a user's module would run its ``finally`` as the interpreter exits.

    Args:
        module: of the user.
        name: of the attribute.
        value: its value within the block.
        in_copies: returns the value for a copy that is made meanwhile; None: the value before.
        table: the dict to patch: the module's ``"__dict__"`` or its ``"_modules"``.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        value: Any,
        *,
        in_copies: Callable[[], Any] | None = None,
        table: str = "__dict__",
    ) -> None:
        self.module, self.value, self.in_copies = module, value, in_copies
        self.before: Any = ABSENT
        self._place = table, name

    def __enter__(self) -> None:
        table, name = self._place
        content = getattr(self.module, table)
        self.before = content.get(name, ABSENT)
        _Patches.of(self.module).layers.setdefault(self._place, []).append(self)
        content[name] = self.value

    def __exit__(self, *_: object) -> None:
        patches = _Patches.of(self.module)
        layers = patches.layers[self._place]
        index = layers.index(self)
        if index + 1 == len(layers):
            table, name = self._place
            _put(getattr(self.module, table), name, self.before)
        else:  # another patch is on top: it now puts back what this one found
            above = layers[index + 1]
            above.before, above.in_copies = self.before, self.in_copies
        del layers[index]
        if not layers:
            del patches.layers[self._place]
        patches.drop_if_empty()


def patched_forward(module: nn.Module, forward: Callable[..., Any]) -> patched:
    """Replace ``module.forward`` on the instance."""
    return patched(module, "forward", forward)


def held_attribute(module: nn.Module, name: str, value: Any) -> AbstractContextManager[None]:
    """Set ``module.name`` if the instance has it."""
    return patched(module, name, value) if name in module.__dict__ else nullcontext()


def before_call(module: nn.Module, method: str, notice: Callable[[], None]) -> patched:
    """Call ``notice`` before each call of a method of ``module``."""
    original = getattr(module, method)

    def noticed(*args: Any, **kwargs: Any) -> Any:
        notice()
        return original(*args, **kwargs)

    return patched(module, method, noticed)


def replaced_child(parent: nn.Module, name: str, child: nn.Module) -> patched:
    """Put ``child`` in the place of ``parent.name``."""
    return patched(parent, name, child, table="_modules")


class Hook:
    """A forward hook of adafreeze on a user's ``module``."""

    def __init__(self, module: nn.Module, handle: Any) -> None:
        self.module = module
        self._handle = handle
        _Patches.of(module).hooks.add(handle.id)

    def go_last(self) -> None:
        """Move behind all later hooks: TRL switches checkpointing, and its hook, off and on in each step."""
        table: Any = self.module._forward_hooks
        if self._handle.id in table and next(reversed(table)) != self._handle.id:
            table.move_to_end(self._handle.id)

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()
        patches = _Patches.of(self.module)
        patches.hooks.discard(self._handle.id)
        patches.drop_if_empty()


def forward_pre_hook(module: nn.Module, call: Callable[..., Any], *, prepend: bool = False) -> Hook:
    """Call ``call(module, args, kwargs)`` before each forward pass of ``module``."""
    return Hook(module, module.register_forward_pre_hook(call, with_kwargs=True, prepend=prepend))


def forward_hook(module: nn.Module, call: Callable[..., Any], *, always: bool = False) -> Hook:
    """Call ``call(module, args, output)`` after each forward pass; with ``always`` also after one that failed."""
    return Hook(module, module.register_forward_hook(call, always_call=always))


def trainable_in_copies(module: nn.Module, name: str, on: bool) -> None:
    """Let the Parameter ``name`` require gradients in copies of ``module``, although it is frozen here."""
    patches = _Patches.of(module)
    (patches.trainable.add if on else patches.trainable.discard)(name)
    patches.drop_if_empty()


def claim(owner: Any, modules: Iterable[nn.Module]) -> None:
    """Mark ``modules`` as used by ``owner``."""
    for module in modules:
        _Patches.of(module).owner = owner


def release(owner: Any, modules: Iterable[nn.Module]) -> None:
    """Undo ``claim``."""
    for module in modules:
        patches = _Patches.of(module)
        if patches.owner is owner:
            patches.owner = None
        patches.drop_if_empty()


def owners(model: nn.Module) -> list[Any]:
    """Everyone who has claimed any part of ``model``, each once."""
    patches = (module.__dict__.get("__deepcopy__") for module in model.modules())
    found = [one.owner for one in patches if isinstance(one, _Patches) and one.owner is not None]
    return list({id(owner): owner for owner in found}.values())


def forwarders(model: nn.Module) -> list[nn.Module]:
    """Modules that look up unknown attributes in another module, as PEFT's wrappers do.

    Where the other module has patches they need their own, or a copy of them would be a copy of the module inside.
    """
    return [module for module in model.modules() if type(module).__getattr__ is not nn.Module.__getattr__]
