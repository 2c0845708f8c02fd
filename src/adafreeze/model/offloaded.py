"""Parameters whose data are on the host or on disk, and come to their device only while something reads them."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import RunError

__all__ = [
    "FileSource", "HostSource", "Offloaded", "Source", "WeightsFile", "bring_back", "offload", "resident", "take_over",
]  # fmt: skip


class Source(Protocol):
    """Where the data of an offloaded parameter are."""

    def load(self) -> Tensor:
        """The data, on the host. Data of a file are mapped, so only what is read takes memory."""


class HostSource:
    """Data in host memory, pinned if they return to a CUDA device."""

    def __init__(self, data: Tensor) -> None:
        host = data.to("cpu", copy=True)
        self._data = host.pin_memory() if data.is_cuda else host

    def load(self) -> Tensor:
        """The data themselves."""
        return self._data


class WeightsFile:
    """A safetensors file that stays readable while it is open, even if it is deleted meanwhile.

    Args:
        path: of the file.

    Raises:
        RunError: there is none, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
            self._state = self._stat()
        except OSError as error:
            raise RunError(
                f"The weights in {self.path} cannot be read ({error.strerror}).",
                fix='Restore the file, or SafeConfig(offload="cpu").',
            ) from error
        # The file itself rather than its name, which may be deleted, or given to another file. Windows keeps both.
        self._name = f"/dev/fd/{self._file.fileno()}" if os.path.isdir("/dev/fd") else str(self.path)

    @classmethod
    def write(cls, path: Path, tensors: dict[str, Tensor]) -> WeightsFile:
        """Save ``tensors``. A process that is killed leaves no file where the system can delete an open one.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        made = cls(path)
        if made._name != str(path):
            path.unlink()
        return made

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def names(self) -> list[str]:
        """Of its tensors."""
        with self._opened() as file:
            return list(file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of them."""
        with self._opened() as file:
            return tuple(file.get_slice(name).get_shape())

    def load(self, name: str) -> Tensor:
        """One of its tensors, mapped.

        Raises:
            RunError: the file was written to since it was opened, or cannot be read any more.
        """
        with self._opened() as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            if self._stat() != self._state:
                raise OSError("it was written to")
            # Opened anew each time, so that what was read is unmapped with the last tensor.
            with safe_open(self._name, framework="pt") as file:
                yield file
        except Exception as error:
            raise RunError(
                f"The weights in {self.path} changed or cannot be read any more: {error}.",
                fix='Restore the file and resume from the last checkpoint; SafeConfig(offload="cpu") reads it once.',
            ) from error

    def close(self) -> None:
        """Close the file; what is mapped stays readable."""
        self._file.close()


class FileSource:
    """Data in a safetensors file."""

    def __init__(self, file: WeightsFile, name: str) -> None:
        self._file, self._name = file, name

    def load(self) -> Tensor:
        """The data, mapped."""
        return self._file.load(self._name)


class _Away:
    """What an offloaded parameter was, and how it becomes that again.

    Args:
        held: a parameter of the original class with its attributes, without data.
        source: of the data.
        device: to which the data return.
        seems_there: its ``device`` is this one, not ``meta``. So it is for embedding tables, often a model's first
            parameter, which tells people and libraries where the model is; and until a run begins for all weights that
            were loaded this way, since PEFT puts adapters beside them.
    """

    def __init__(self, held: nn.Parameter, source: Source, device: torch.device, seems_there: bool) -> None:
        self.held, self.source, self.device, self.seems_there = held, source, device, seems_there

    def load(self) -> Tensor:
        return self.source.load().to(self.device, non_blocking=True)


# Attributes of tensors that need their data; all others describe it.
_DATA_ATTRIBUTES = {"data", "T", "mT", "H", "mH", "real", "imag"}
# Methods that do not read data.
_DESCRIBE = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "__len__"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_inference", "is_signed", "get_device", "has_names"),
    *("untyped_storage", "data_ptr", "is_shared", "_is_view", "_use_count", "__hash__", "requires_grad_"),
    *("_has_compatible_shallow_copy_type", "register_hook", "register_post_accumulate_grad_hook"),
}
_IN_PLACE = {
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
    *("__ilshift__", "__irshift__"),
}


class Offloaded(nn.Parameter):
    """A parameter whose data left its device.

    It is a ``meta`` tensor, so it takes no memory, and counters see none. What reads it gets the data on the device
    where they were, for that operation; a look-up of embeddings moves its rows alone. What writes to it brings the data
    back first. So it is saved, copied, pickled and moved like the parameter that it was.
    """

    away: _Away

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("__get__", "__set__", "__delete__"):
                if func.__self__.__name__ == "device" and args[0].away.seems_there:
                    return args[0].away.device
                if func.__self__.__name__ not in _DATA_ATTRIBUTES or (name == "__set__" and args[0] is args[1]):
                    return func(*args, **kwargs)
            elif name in _DESCRIBE:
                return func(*args, **kwargs)
            if name in ("detach", "cpu") and not args[1:]:
                return args[0].away.source.load().detach()  # to save it, most often: the device need not take it
            if name == "to" and _is_there(args[0], *args[1:], **kwargs):
                return args[0]
            if func is nn.functional.embedding:
                return _look_up(*args, **kwargs)
            if _writes(name, kwargs):
                for parameter in {id(p): p for p in tree_leaves((args, kwargs)) if isinstance(p, Offloaded)}.values():
                    bring_back(parameter)
                return func(*args, **kwargs)
            loaded: dict[int, tuple[Offloaded, Tensor]] = {}

            def load(one: Offloaded) -> Tensor:
                return loaded.setdefault(id(one), (one, one.away.load()))[1]

            args, kwargs = tree_map_only(Offloaded, load, (args, kwargs))
            with _reloaded(loaded.values()):
                return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Such as the scales of a quantized weight, which did not leave.
        if name == "away":
            raise AttributeError(name)
        return getattr(self.away.held, name)

    def _copied(self) -> nn.Parameter:
        made = copy.copy(self.away.held)  # as its class does it
        made.data = self.away.load()
        made.requires_grad_(self.requires_grad)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = copy.deepcopy(self._copied())
        made: nn.Parameter = memo[id(self)]
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._copied().__reduce_ex__(protocol)


def _reloaded(loaded: Iterable[tuple[Offloaded, Tensor]]) -> AbstractContextManager[Any]:
    """Autograd keeps no data of these parameters: it loads them once more in the backward pass."""
    if not torch.is_grad_enabled():
        return nullcontext()
    known = {tensor.untyped_storage()._cdata: parameter for parameter, tensor in loaded}

    def pack(tensor: Tensor) -> Any:
        parameter = known.get(tensor.untyped_storage()._cdata)
        view = tensor.size(), tensor.stride(), tensor.storage_offset()
        return tensor if parameter is None or tensor.dtype != parameter.dtype else (parameter, view)

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        parameter, view = kept
        # It may have come back since then.
        data = parameter.away.load() if isinstance(parameter, Offloaded) else parameter.detach()
        return torch.as_strided(data, *view)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE or name in ("__get__", "__set__") or kwargs.get("out") is not None


def _is_there(parameter: Offloaded, *args: Any, **kwargs: Any) -> bool:
    """Whether ``parameter.to(...)`` would have returned the parameter itself."""
    if kwargs.pop("copy", False):
        return False
    if args and isinstance(args[0], Tensor):
        device, dtype = args[0].device, args[0].dtype
    else:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    home = parameter.away.device
    same = device is None or (device.type == home.type and device.index in (None, home.index))
    return same and dtype in (None, parameter.dtype)


def _look_up(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not isinstance(weight, Offloaded):
        return nn.functional.embedding(input.away.load(), weight, *args, **kwargs)  # type: ignore[attr-defined]
    rows = nn.functional.embedding(input.to("cpu"), weight.away.source.load(), *args, **kwargs)
    return rows.to(weight.away.device)


def offload(parameter: nn.Parameter, source: Source, *, seems_there: bool = False) -> bool:
    """Free the data of ``parameter``, which ``source`` has. The object stays the same for all who have it.

    Args:
        parameter: on its device.
        source: of its data.
        seems_there: its ``device`` stays what it is.

    Returns:
        False if that is not possible, since other code (compiled, or a graph) refers to its data.
    """
    device, data = parameter.device, parameter.data
    held = Offloaded(torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device="meta"), False)
    held.requires_grad_(parameter.requires_grad)
    del data
    if not _swap(parameter, held):
        return False
    held.data = torch.empty(0, dtype=held.dtype, device=device)  # ``held`` is what ``parameter`` was
    parameter.away = _Away(held, source, device, seems_there)  # type: ignore[attr-defined]
    return True


def take_over(model: nn.Module) -> list[Offloaded]:
    """Make all parameters that accelerate has dispatched to host or disk ``Offloaded``, and remove its hooks."""
    files: dict[str, WeightsFile] = {}
    made: dict[int, Offloaded] = {}
    for module in model.modules():
        for hook in _hooks(module):
            if isinstance(hook, AlignDevicesHook) and hook.offload:
                for name, parameter in module._parameters.items():
                    if parameter is None or not parameter.is_meta or isinstance(parameter, Offloaded):
                        continue
                    if id(parameter) not in made:
                        source = _dispatched(hook.weights_map, name, parameter, files)
                        held = nn.Parameter(torch.empty(0, dtype=parameter.dtype, device=hook.execution_device), False)
                        away: Any = Offloaded(torch.empty_like(parameter, device="meta"), False)
                        away.away = _Away(held, source, held.device, seems_there=True)
                        away.requires_grad_(parameter.requires_grad)
                        made[id(parameter)] = away
                    module._parameters[name] = made[id(parameter)]
                hook.original_devices = {}  # or it would load them as it is removed
        remove_hook_from_module(module)
    return list(made.values())


def _hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get("_hf_hook")
    return list(hook.hooks) if isinstance(hook, SequentialHook) else [hook] if hook is not None else []


def _dispatched(weights: Any, name: str, parameter: nn.Parameter, files: dict[str, WeightsFile]) -> Source:
    """Where accelerate has a parameter: in a safetensors file, in a file of its own, or in memory."""
    found = getattr(getattr(weights, "dataset", None), "index", {}).get(f"{getattr(weights, 'prefix', '')}{name}", {})
    if (path := found.get("safetensors_file")) is not None:
        file = files.setdefault(path, WeightsFile(path)) if path not in files else files[path]
        own = FileSource(file, found.get("weight_name", name))
        if own.load().dtype == parameter.dtype:
            return own
    return _Dispatched(weights, name)


class _Dispatched:
    """A parameter in one of accelerate's maps, which may convert it."""

    def __init__(self, weights: Any, name: str) -> None:
        self._weights, self._name = weights, name

    def load(self) -> Tensor:
        tensor: Tensor = self._weights[self._name]
        return tensor


def _swap(one: nn.Parameter, other: nn.Parameter) -> bool:
    if weakref.getweakrefs(one):
        gc.collect()  # those of fake tensors go with their mode
    try:
        torch.utils.swap_tensors(one, other)
    except RuntimeError:
        return False
    return True


def bring_back(parameter: Offloaded) -> None:
    """Make ``parameter`` what it was, for good.

    Raises:
        RunError: its data cannot be read any more.
    """
    _return(parameter, parameter.away.load())


def _return(parameter: Offloaded, data: Tensor) -> None:
    away, trains = parameter.away, parameter.requires_grad
    # A mapped file, and the host's own copy, are not to be written to.
    away.held.data = data if away.device.type != "cpu" else data.clone()
    _swap(parameter, away.held)
    parameter.requires_grad_(trains)


@contextmanager
def resident(parameters: list[Offloaded], data: list[Tensor] | None = None) -> Iterator[None]:
    """The parameters have their data within the block, which must keep no graph.

    Args:
        parameters: offloaded ones.
        data: theirs, on their device; None: loaded now.
    """
    loaded = [parameter.away.load() for parameter in parameters] if data is None else data
    there: list[tuple[nn.Parameter, _Away]] = []
    try:
        for parameter, own in zip(parameters, loaded, strict=True):
            away = parameter.away
            away.held.data = own
            if not _swap(parameter, away.held):
                raise RunError("A weight of the frozen prefix is in use elsewhere.", fix='SafeConfig(offload="off")')
            there.append((parameter, away))
        del loaded, data
        yield
    finally:
        for once, away in there:
            if _swap(once, away.held):  # else someone has kept a reference, and it is back
                away.held.data = torch.empty(0, dtype=once.dtype, device=away.device)
