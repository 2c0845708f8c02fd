"""Bytes that autograd saves for the backward pass, and all bytes that are alive in a step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["SavedBytes", "StorageTracker", "bytes_of", "count_saved", "uncounted"]

# autograd calls only the innermost hooks, so these count for every open block.
_counting: list[SavedBytes] = []


class SavedBytes:
    """Counts the activation bytes that autograd saves within the block, on any device:

        with SavedBytes(model) as saved:
            loss = model(**batch).loss
        saved.total

    Each storage counts once, with its whole size: a saved view keeps its base alive. Parameters and buffers of
    ``model`` do not count, nor does what activation checkpointing recomputes in the backward pass. Storages are kept
    alive until the block ends, so that no reused address hides one; a graph dropped within the block counts too.
    Blocks may be nested.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        self._model = model
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        owned = (*self._model.parameters(), *self._model.buffers())
        self._known = {tensor.untyped_storage()._cdata for tensor in owned}
        self._hooks.__enter__()
        _counting.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _counting.remove(self)
        self._hooks.__exit__(*error)
        self._storages.clear()

    @staticmethod
    def _pack(tensor: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            return tensor  # in a backward pass: reentrant checkpointing recomputes under these hooks
        count_saved(tensor)
        return tensor

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known and storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage
            self.total += storage.nbytes()


def count_saved(value: Any) -> None:
    """Count the tensors in ``value``, which are kept for the backward pass in another way than by autograd."""
    for leaf in tree_leaves(value):
        for counter in _counting if isinstance(leaf, Tensor) else ():
            for storage in _storages(leaf):
                counter._count(storage)


@contextmanager
def uncounted() -> Iterator[None]:
    """Counters around the block (storages, saved bytes, FLOPs) ignore what runs within it."""
    outer, _counting[:] = list(_counting), []
    try:
        with _disable_current_modes():
            yield
    finally:
        _counting[:] = outer


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that are alive within the block, and their peak, on any device:

        with StorageTracker() as tracker:
            tracker.hold(*model.parameters(), *model.buffers())
            model(**batch).loss.backward()
        tracker.peak

    A storage counts once, with its whole size, from the operator that made it until it is freed. Temporary memory of
    kernels is not seen. Works on fake tensors too.

    Args:
        rounding: round each storage up to a multiple of this many bytes (CUDA's allocator: 512).

    Attributes:
        now: bytes alive.
        peak: most bytes since the start, or since ``reset_peak``.
    """

    def __init__(self, rounding: int = 1) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._rounding = rounding
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, *tensors: Tensor) -> None:
        """Also count ``tensors``, which existed before the block."""
        for tensor in tensors:
            for storage in _storages(tensor):
                self._count(storage)

    def reset_peak(self) -> None:
        """Measure the peak from here."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and count its result."""
        result = func(*args, **(kwargs or {}))
        self.made(result)
        return result

    def made(self, result: Any) -> None:
        """Count the result of an operator."""
        if isinstance(result, Tensor):  # most do
            self.hold(result)
        elif result is not None:
            self.hold(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None and known() is storage:
            return
        nbytes = -(-storage.nbytes() // self._rounding) * self._rounding

        def freed(reference: weakref.ref[torch.UntypedStorage]) -> None:
            self.now -= nbytes
            if self._alive.get(key) is reference:  # another storage may have its address now
                del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each once."""
    return sum({one._cdata: one.nbytes() for tensor in tensors for one in _storages(tensor)}.values())


def _storages(tensor: Tensor) -> tuple[torch.UntypedStorage, ...]:
    try:
        return (tensor.untyped_storage(),)
    except (NotImplementedError, RuntimeError):
        if tensor.layout == torch.sparse_coo:  # two dense parts with storages
            return tensor._indices().untyped_storage(), tensor._values().untyped_storage()
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # a wrapper, such as torchao's
        return tuple(storage for name in names for storage in _storages(getattr(tensor, name)))
