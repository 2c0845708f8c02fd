"""Bytes: what autograd keeps of a forward pass for the backward pass, and all that a step holds at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["SavedBytes", "StorageTracker", "bytes_of", "uncounted"]

# autograd calls only the innermost hooks, so they count for every block that is open.
_counting: list[SavedBytes] = []


class SavedBytes:
    """Counts the activation bytes that autograd saves within the block, on any device:

        with SavedBytes(model) as saved:
            loss = model(**batch).loss
        saved.total

    Each storage counts once, by its whole size: a saved view keeps its base alive. Parameters and buffers of
    ``model`` do not count, they are there anyway. What activation checkpointing recomputes within the backward
    pass is not saved, and does not count. Storages are kept alive until the block ends, so that none is counted
    twice under a reused address; a graph that is dropped within the block is therefore counted too. Blocks may be
    nested.

    Args:
        model: whose parameters and buffers are left out.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _counting.remove(self)
        self._hooks.__exit__(kind, error, trace)  # type: ignore[arg-type]
        self._storages.clear()

    @staticmethod
    def _pack(tensor: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            return tensor  # within a backward pass: reentrant checkpointing recomputes under these hooks
        for counter in _counting:
            for storage in _storages(tensor):
                counter._count(storage)
        return tensor

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known and storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage
            self.total += storage.nbytes()


@contextmanager
def uncounted() -> Iterator[None]:
    """What runs within is not counted by whoever counts around it: storages, saved bytes, FLOPs."""
    outer, _counting[:] = list(_counting), []
    try:
        with _disable_current_modes():
            yield
    finally:
        _counting[:] = outer


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak, within the block, on any device:

        with StorageTracker() as tracker:
            tracker.hold(*model.parameters(), *model.buffers())
            model(**batch).loss.backward()
        tracker.peak

    A storage counts from the operator that made it until nobody refers to it any more, once, by its whole size.
    What a kernel allocates and frees within itself is not seen. Works on fake tensors as on real ones.

    Args:
        rounding: each storage counts as a multiple of so many bytes (the CUDA allocator's is 512).

    Attributes:
        now: bytes alive.
        peak: the most there were since the start, or since ``reset_peak``.
    """

    def __init__(self, rounding: int = 1) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._rounding = rounding
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, *tensors: Tensor) -> None:
        """Count these too: they were there before."""
        for tensor in tensors:
            for storage in _storages(tensor):
                self._count(storage)

    def reset_peak(self) -> None:
        """Look for the peak from here on."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator as it is, and count what it made."""
        result = func(*args, **(kwargs or {}))
        self.made(result)
        return result

    def made(self, result: Any) -> None:
        """Count what an operator returned."""
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
            if self._alive.get(key) is reference:  # or its address is another's already
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
        if tensor.layout == torch.sparse_coo:  # has no storage of its own, but two dense parts that have
            return tensor._indices().untyped_storage(), tensor._values().untyped_storage()
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # a wrapper, as torchao's quantised ones
        return tuple(storage for name in names for storage in _storages(getattr(tensor, name)))
