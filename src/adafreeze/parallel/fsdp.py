"""FSDP2: sharded parameters freeze as others do; what changes is that a forward pass is a collective."""

from __future__ import annotations

from torch import nn

from .base import Parallel

__all__ = ["FSDP2", "is_fsdp1", "is_fsdp2"]


class FSDP2(Parallel):
    """``fully_shard`` gathers each block's weights in its forward pass, so all ranks make the same passes."""

    name = "FSDP2"
    collective = True
    no_cache = "under FSDP2 a forward pass is a collective, and ranks do not miss the same samples"
    no_budget = "under FSDP2 a step cannot be rehearsed on one rank alone"
    hidden = dict.fromkeys(("weights", "gradients"), "FSDP2 keeps them in pieces, one on each rank")


def is_fsdp2(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to any part of it."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_fsdp1(model: nn.Module) -> bool:
    """Whether any part of it is a FullyShardedDataParallel."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
