"""FSDP2: a forward pass is a collective; sharded parameters freeze like others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import RunError
from ..model import Unit
from .base import Parallel

__all__ = ["FSDP2", "is_fsdp1"]


class FSDP2(Parallel):
    """``fully_shard`` gathers each block's weights in its forward pass, so all ranks run the same passes."""

    name = "FSDP2"
    collective = True
    no_cache = "under FSDP2 a forward pass is a collective, and ranks do not miss the same samples"
    no_budget = "under FSDP2 a step cannot be rehearsed on one rank alone"
    no_offload = "FSDP2 spreads the weights over the ranks already, and its CPUOffloadPolicy moves them to the host"
    hidden = dict.fromkeys(("weights", "gradients"), "FSDP2 keeps them in pieces, one on each rank")

    @classmethod
    def find(cls, model: nn.Module, optimizer: Any, units: Mapping[str, Unit]) -> FSDP2 | None:
        """If ``fully_shard`` was applied to any part of ``model``.

        Raises:
            RunError: FSDP1, whose flat parameters contain many adapters, and cannot freeze in part.
        """
        from torch.distributed.fsdp import FSDPModule

        if is_fsdp1(model):
            raise RunError(
                "FullyShardedDataParallel (FSDP1) wraps the model; its flat parameters cannot freeze in part.",
                fix="Use FSDP2: fully_shard(model), or --fsdp_config '{\"version\": 2}' in Trainer.",
            )
        return cls() if any(isinstance(module, FSDPModule) for module in model.modules()) else None


def is_fsdp1(model: nn.Module) -> bool:
    """Whether any part of ``model`` is a FullyShardedDataParallel."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
