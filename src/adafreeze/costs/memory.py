"""Saved bytes: what autograd keeps of a forward pass for the backward pass."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

__all__ = ["SavedBytes"]

# autograd calls only the innermost hooks, so they count for every block that is open.
_counting: list[SavedBytes] = []


class SavedBytes:
    """Counts the activation bytes that autograd saves within the block, on any device::

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
        # A sparse COO tensor has no storage of its own, but two dense parts that have.
        parts = (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else (tensor,)
        for counter in _counting:
            for part in parts:
                counter._count(part.untyped_storage())
        return tensor

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known and storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage
            self.total += storage.nbytes()
