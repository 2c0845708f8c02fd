"""Parameters whose data are on the host or on disk, and come to their device only while something reads them."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import ModelError, RunError

__all__ = [
    "FileSource", "HostSource", "Offloaded", "Source", "WeightsFile",
    "any_away", "bring_back", "data_of", "offload", "resident", "take_over",
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
        # Copies, because tensors of a file may not share memory.
        save_file({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path)
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
    """Data in a safetensors file, in another data type if one is given."""

    def __init__(self, file: WeightsFile, name: str, dtype: torch.dtype | None = None) -> None:
        self._file, self._name, self._dtype = file, name, dtype

    def load(self) -> Tensor:
        """The data, mapped where they need no other type."""
        return self._file.load(self._name).to(self._dtype)


class _Away:
    """What an offloaded parameter was, and how it becomes that again.

    Args:
        held: a parameter of the original class with its attributes, without data.
        source: of the data.
        device: to which the data return.
        strides: of the data.
    """

    def __init__(self, held: nn.Parameter, source: Source, device: torch.device, strides: tuple[int, ...]) -> None:
        self.held, self.source, self.device, self.strides = held, source, device, strides

    def load(self) -> Tensor:
        """The data on their device, laid out as they were: kernels may round by that."""
        data = self.source.load()
        if data.stride() != self.strides:
            made = torch.empty_strided(data.shape, self.strides, dtype=data.dtype, device=self.device)
            return made.copy_(data)
        return data.to(self.device, non_blocking=True)

    def empty(self) -> None:
        """Let ``held`` have no data."""
        self.held.data = torch.empty(0, dtype=self.held.dtype, device=self.device)


# Attributes of tensors that need their data; all others describe it.
_DATA_ATTRIBUTES = {"data", "T", "mT", "H", "mH", "real", "imag"}
# Methods that do not read data.
_DESCRIBE = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "__len__"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_inference", "is_signed", "get_device", "has_names"),
    *("untyped_storage", "data_ptr", "is_shared", "_is_view", "_use_count", "__hash__"),
}
# What changes a parameter, lets others change it, or is to stay with it.
_CHANGE = {
    *("__dlpack__", "storage", "_typed_storage"),
    *("__setitem__", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"),
    "_has_compatible_shallow_copy_type",  # Module.to() asks, and then writes to the parameter or replaces it
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
    *("__ilshift__", "__irshift__"),
}


class Offloaded(nn.Parameter):
    """A parameter whose data left its device.

    It is a ``meta`` tensor, so it takes no memory, and counters see none. Its ``device`` is the one to which it
    returns, because people and libraries put other things beside it. What reads it gets the data on that device, for
    one operation; a look-up of embeddings moves its rows alone. What writes to it, could write to it (a view), trains
    it, or adds a hook, brings the data back first. So it is saved, copied, pickled and moved like the parameter that it
    was.
    """

    away: _Away

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        """An ordinary parameter, for code that makes one of the class of another."""
        return nn.Parameter(data, requires_grad)

    @classmethod
    def of(cls, described: Tensor, requires_grad: bool) -> Any:
        """One without data yet, with the shape of a ``meta`` tensor."""
        return nn.Parameter.__new__(cls, described, requires_grad)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("__get__", "__set__", "__delete__"):
                attribute = func.__self__.__name__
                if attribute == "device":
                    return args[0].away.device
                if attribute == "is_meta" and _caller() == "_load_from_state_dict":
                    return False  # it would warn that nothing is copied
                to_train = name == "__set__" and (
                    (attribute == "requires_grad" and bool(args[1])) or (attribute == "grad" and args[1] is not None)
                )
                if not to_train and (attribute not in _DATA_ATTRIBUTES or (name == "__set__" and args[0] is args[1])):
                    return func(*args, **kwargs)
            elif name in _DESCRIBE or (name == "requires_grad_" and not _is_true(*args[1:], **kwargs)):
                return func(*args, **kwargs)
            if name == "detach" and _caller() == "_save_to_state_dict":
                return args[0].away.source.load()  # the device need not take what is only saved
            if name == "detach" and _caller() == "__new__":  # nn.Parameter(weight) wants what has the class of weight
                bring_back(args[0])
                return nn.Parameter(args[0].data, requires_grad=False)
            if name == "to" and _is_there(args[0], *args[1:], **kwargs):
                return args[0]
            if name == "_has_compatible_shallow_copy_type" and args[0] is args[1]:
                return True
            own = {id(one): one for one in tree_leaves((args, kwargs)) if isinstance(one, Offloaded)}
            trains = torch.is_grad_enabled() and any(one.requires_grad for one in own.values())
            if trains or _changes(func, kwargs):
                return _with_data(own.values(), func, args, kwargs)
            if func is nn.functional.embedding:
                return _look_up(*args, **kwargs)
            loaded = {key: (one, one.away.load()) for key, one in own.items()}
            inputs = tree_map_only(Offloaded, lambda one: loaded[id(one)][1], (args, kwargs))
            with _reloaded(loaded.values()):
                result = func(*inputs[0], **inputs[1])
            storages = {data.untyped_storage()._cdata for _, data in loaded.values()}
            if any(_shares(leaf, storages) for leaf in tree_leaves(result)):  # through which it could be written to
                return _with_data(own.values(), func, args, kwargs)
            return result

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


def any_away(model: nn.Module) -> bool:
    """Whether any parameter of ``model`` is offloaded."""
    return any(isinstance(parameter, Offloaded) for parameter in model.parameters())


def data_of(tensor: Tensor) -> Tensor:
    """The data of a tensor, for reading; of an offloaded one on the host."""
    return tensor.away.source.load() if isinstance(tensor, Offloaded) else tensor.detach()


def _with_data(own: Iterable[Offloaded], func: Any, args: Any, kwargs: Any) -> Any:
    for parameter in own:
        bring_back(parameter)
    return func(*args, **kwargs)


def _is_true(requires_grad: bool = True) -> bool:
    return requires_grad


def _shares(value: Any, storages: set[int]) -> bool:
    if isinstance(value, np.ndarray):
        return True
    return isinstance(value, Tensor) and value.layout == torch.strided and value.untyped_storage()._cdata in storages


def _changes(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    overloads: list[str] = getattr(func, "overloads", list)()  # of an operator of torch.ops
    operators = [func] if hasattr(func, "_schema") else [getattr(func, one) for one in overloads]
    mutable = any(operator._schema.is_mutable for operator in operators)
    return in_place or mutable or name in _CHANGE or name in ("__get__", "__set__") or kwargs.get("out") is not None


def _caller() -> str:
    """The name of the function that called ``__torch_function__``."""
    return sys._getframe(2).f_code.co_name


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


def _look_up(input: Tensor, weight: Offloaded, *args: Any, **kwargs: Any) -> Tensor:
    rows = nn.functional.embedding(input.to("cpu"), weight.away.source.load(), *args, **kwargs)
    return rows.to(weight.away.device)


def offload(parameter: nn.Parameter, source: Source) -> bool:
    """Free the data of ``parameter``, which ``source`` has. The object stays the same for all who have it.

    Returns:
        False if that is not possible, since other code (compiled, or a graph) refers to its data.
    """
    device, data = parameter.device, parameter.data
    strides = data.stride()
    described = torch.empty_strided(data.shape, strides, dtype=data.dtype, device="meta")
    held = Offloaded.of(described, parameter.requires_grad)
    del data
    if not _swap(parameter, held):
        return False
    away = _Away(held, source, device, strides)  # ``held`` is what ``parameter`` was
    away.empty()
    parameter.away = away  # type: ignore[attr-defined]
    return True


def take_over(model: nn.Module) -> None:
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
                        away = Offloaded.of(parameter.data, parameter.requires_grad)
                        away.away = _Away(held, source, held.device, parameter.stride())
                        made[id(parameter)] = away
                    module._parameters[name] = made[id(parameter)]
                hook.original_devices = {}  # or it would load them as it is removed
        if "_hf_hook" in module.__dict__:  # not that of the module inside, which PEFT's wrapper passes on
            remove_hook_from_module(module)


def _hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get("_hf_hook")
    return list(hook.hooks) if isinstance(hook, SequentialHook) else [hook] if hook is not None else []


def _dispatched(weights: Any, name: str, parameter: nn.Parameter, files: dict[str, WeightsFile]) -> Source:
    """Where accelerate has a parameter: in a safetensors file, in a file of its own, or in memory."""
    found = getattr(getattr(weights, "dataset", None), "index", {}).get(f"{getattr(weights, 'prefix', '')}{name}", {})
    if (path := found.get("safetensors_file")) is not None:
        if path not in files:
            files[path] = WeightsFile(path)
        return FileSource(files[path], found.get("weight_name", name), parameter.dtype)
    try:
        weights[name]
    except KeyError as error:
        raise ModelError(
            f"The weight {error.args[0]} is not in the files of the model, so it has no values.",
            fix="Load it with from_pretrained of transformers, which makes new values, then save_pretrained(FOLDER).",
        ) from error
    return _Dispatched(weights, name)


class _Dispatched:
    """A parameter in one of accelerate's maps, which may convert it."""

    def __init__(self, weights: Any, name: str) -> None:
        self._weights, self._name = weights, name

    def load(self) -> Tensor:
        tensor: Tensor = self._weights[self._name]
        return tensor


def _swap(one: nn.Parameter, other: nn.Parameter) -> bool:
    """Exchange class, attributes and data of two objects; False if C++ code holds a reference to one's data.

    ``torch.utils.swap_tensors`` also refuses objects with Python's weak references (a WeakKeyDictionary of parameters).
    They refer to the object, which is to be found under them afterwards, too.
    """
    try:
        torch._C._swap_tensor_impl(one, other)  # type: ignore[attr-defined]
    except RuntimeError:
        return False
    one.__class__, other.__class__ = other.__class__, one.__class__
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    return True


def bring_back(parameter: Offloaded) -> None:
    """Make ``parameter`` what it was, for good.

    Raises:
        RunError: its data cannot be read any more, or other code refers to it.
    """
    away, trains = parameter.away, parameter.requires_grad
    with torch.inference_mode(False), torch.no_grad():
        data = away.load()
        # A mapped file, and the host's own copy, are not to be written to.
        away.held.data = data if away.device.type != "cpu" else data.clone(memory_format=torch.preserve_format)
    if not _return(parameter, away):
        away.empty()
        raise RunError(
            "A weight of the frozen prefix cannot come back to its device: other code holds a reference to it.",
            fix='SafeConfig(offload="off")',
        )
    parameter.requires_grad_(trains)


def _return(parameter: nn.Parameter, away: _Away) -> bool:
    """Put the class and the data of ``away.held`` into ``parameter``, with attributes that it got meanwhile."""
    meanwhile = {name: value for name, value in parameter.__dict__.items() if name != "away"}
    if not _swap(parameter, away.held):
        return False
    parameter.__dict__.update(meanwhile)
    return True


@contextmanager
def resident(parameters: list[Offloaded], data: list[Tensor] | None = None) -> Iterator[None]:
    """The parameters have their data within the block, which must keep no graph.

    Args:
        parameters: offloaded ones.
        data: theirs, on their device; None: loaded now.
    """
    there: list[tuple[nn.Parameter, _Away, tuple[Any, ...]]] = []
    try:
        for index, parameter in enumerate(parameters):
            away = parameter.away
            away.held.data = away.load() if data is None else data[index]
            if _return(parameter, away):
                there.append((parameter, away, _marks(parameter)))
            else:  # each operation on it loads it
                away.empty()
        del data
        yield
    finally:
        for once, away, marks in there:
            if _marks(once) != marks:  # it was written to, or is to train
                once.data = once.data.clone(memory_format=torch.preserve_format)
            elif _swap(once, away.held):  # else someone has kept a reference, and it is back
                away.empty()


def _marks(parameter: nn.Parameter) -> tuple[Any, ...]:
    """What is another one once somebody writes to a parameter, trains it, or adds a hook."""
    hooks = len(parameter._backward_hooks or ())
    return parameter._version, parameter.data_ptr(), parameter.requires_grad, parameter.grad is None, hooks
